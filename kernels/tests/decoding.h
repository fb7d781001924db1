// The decoder against a plain one in float64: odd sizes, one group and several, windows, caches of one place, and full ones.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "expect.h"

namespace {

using Row = std::vector<double>;

Row product_of(const Packed &p, const Row &x) {
  Row out;
  for (int64_t r = 0; r < p.matrix.rows; ++r) {
    double sum = static_cast<double>(p.bias.data[static_cast<size_t>(r)]);
    for (size_t c = 0; c < x.size(); ++c) sum += p.weights[static_cast<size_t>(r * p.matrix.columns) + c] * x[c];
    out.push_back(sum);
  }
  return out;
}

Row normed(const Row &x, const Exact<float> &weight, double epsilon) {
  double squares = 0;
  for (const double one : x) squares += one * one;
  const double factor = 1 / std::sqrt(squares / static_cast<double>(x.size()) + epsilon);
  Row out;
  for (size_t i = 0; i < x.size(); ++i) out.push_back(x[i] * factor * static_cast<double>(weight.data[i]));
  return out;
}

Exact<float> numbers(int64_t count) {
  Exact<float> made(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) made.data[static_cast<size_t>(i)] = static_cast<float>(uniform() - 0.5);
  return made;
}

Row row_of(const Exact<float> &from, int64_t count) { return Row(from.data.get(), from.data.get() + count); }

struct PlainBlock {
  std::vector<Packed> matrices;
  std::array<Exact<float>, 2> norms;
  int64_t head, rotated, window;
  double scale;
  std::vector<Row> keys = {}, values = {};  // of all tokens so far

  Row turned(Row x, const Row &cosines, const Row &sines) const {
    const size_t half = static_cast<size_t>(rotated) / 2, size = static_cast<size_t>(head);
    for (size_t at = 0; at < x.size(); at += size)
      for (size_t i = 0; i < half; ++i) {
        const double first = x[at + i], second = x[at + half + i];
        x[at + i] = first * cosines[i] - second * sines[i];
        x[at + half + i] = second * cosines[half + i] + first * sines[half + i];
      }
    return x;
  }

  Row step(const Row &x, const Row &cosines, const Row &sines) {
    const Row n = normed(x, norms[0], 1e-5);
    const Row query = turned(product_of(matrices[0], n), cosines, sines);
    keys.push_back(turned(product_of(matrices[1], n), cosines, sines));
    values.push_back(product_of(matrices[2], n));
    const size_t size = static_cast<size_t>(head), heads = query.size() / size, groups = keys[0].size() / size;
    const size_t first = window && keys.size() > static_cast<size_t>(window) ? keys.size() - static_cast<size_t>(window) : 0;
    Row attended(query.size(), 0.0);
    for (size_t h = 0; h < heads; ++h) {
      const size_t group = h / (heads / groups);
      Row weights;
      for (size_t p = first; p < keys.size(); ++p) {
        double score = 0;
        for (size_t i = 0; i < size; ++i) score += query[h * size + i] * keys[p][group * size + i];
        weights.push_back(score * scale);
      }
      const double most = *std::max_element(weights.begin(), weights.end());
      double total = 0;
      for (double &weight : weights) total += weight = std::exp(weight - most);
      for (size_t p = first; p < keys.size(); ++p)
        for (size_t i = 0; i < size; ++i)
          attended[h * size + i] += weights[p - first] / total * values[p][group * size + i];
    }
    Row sum = product_of(matrices[3], attended);
    for (size_t i = 0; i < x.size(); ++i) sum[i] += x[i];
    const Row after = normed(sum, norms[1], 1e-5);
    Row inner = product_of(matrices[4], after);
    const Row up = product_of(matrices[5], after);
    for (size_t i = 0; i < inner.size(); ++i) inner[i] = inner[i] / (1 + std::exp(-inner[i])) * up[i];
    const Row down = product_of(matrices[6], inner);
    for (size_t i = 0; i < x.size(); ++i) sum[i] += down[i];
    return sum;
  }
};

void decoding(int64_t hidden, int turn) {
  // Every kernel is compared by `products`; here weights are small, so that no score stands alone.
  const int64_t head = turn % 4 ? 2 + turn % 37 : 16 * (1 + turn % 3), groups = 1 + turn % 3, heads = groups * (1 + turn % 4);
  const int64_t inner = 1 + turn * 37 % 60, vocabulary = 5 + turn % 7, tokens = turn % 9 == 0 ? 1 : turn % 11 == 0 ? 70 : 6;
  const int64_t rotated = turn % 5 == 0 ? head / 4 * 2 : head / 2 * 2;
  const auto made = [](int number, int64_t rows, int64_t columns) {
    return pack(number % 2 ? SK_MASK : SK_DENSE, 16, SK_BF16, rows, columns, 0, 0.5);
  };
  std::vector<PlainBlock> plain;
  std::vector<sk_block> blocks;
  std::vector<sk_cache> caches;
  std::vector<Exact<float>> held;
  for (int b = 0; b < 2; ++b) {
    const int64_t shapes[7][2] = {{heads * head, hidden}, {groups * head, hidden}, {groups * head, hidden},
                                  {hidden, heads * head}, {inner, hidden}, {inner, hidden}, {hidden, inner}};
    PlainBlock one = {{}, {numbers(hidden), numbers(hidden)}, head, b == 1 && turn % 3 == 0 ? 0 : rotated,
                      b == 1 && turn % 2 ? 3 : 0, 0.1};
    sk_block block = {};
    for (int i = 0; i < 7; ++i) {
      one.matrices.push_back(made(turn + i, shapes[i][0], shapes[i][1]));
      block.matrices[i] = one.matrices.back().matrix;
    }
    for (size_t i = 0; i < 2; ++i) block.norms[i] = {one.norms[i].data.get(), SK_F32, 1e-5f};
    block.head = head;
    block.rotated = one.rotated;
    block.scale = 0.1f;
    held.push_back(numbers(groups * tokens * head));
    held.push_back(numbers(groups * tokens * head));
    caches.push_back({held[held.size() - 2].data.get(), held.back().data.get(), tokens, 0, one.window});
    plain.push_back(std::move(one));
    blocks.push_back(block);
  }
  const Exact<float> weight = numbers(hidden);
  const sk_norm norm = {weight.data.get(), SK_F32, 1e-5f};
  const Packed last = made(0, vocabulary, hidden);
  const bool headless = turn % 4 == 3;
  const sk_matrix &shown = blocks[0].matrices[0];
  for (int64_t token = 0; token < tokens; ++token) {
    const Exact<float> x = numbers(hidden), cosines = numbers(rotated), sines = numbers(rotated);
    Row row = row_of(x, hidden);
    for (PlainBlock &one : plain) row = one.step(row, row_of(cosines, rotated), row_of(sines, rotated));
    Row wanted = normed(row, weight, 1e-5);
    if (!headless) wanted = product_of(last, wanted);
    const Exact<float> out = numbers(static_cast<int64_t>(wanted.size()));
    // A cosine more than is used would be read behind its end.
    const int status = sk_decode(blocks.data(), caches.data(), 2, &norm, headless ? nullptr : &last.matrix, x.data.get(),
                                 SK_F32, rotated ? cosines.data.get() : weight.data.get(),
                                 rotated ? sines.data.get() : weight.data.get(), SK_FLOAT, out.data.get(), 1 + turn % 2);
    expect(status == SK_OK && caches[0].used == token + 1 && caches[1].used == token + 1, "decode", shown, 0.5);
    double most = 1e-6;
    for (const double one : wanted) most = std::max(most, std::fabs(one));
    for (size_t i = 0; i < wanted.size(); ++i)
      expect(std::fabs(static_cast<double>(out.data[i]) - wanted[i]) <= 1e-3 * most, "decode", shown, 0.5);
  }
  // Other types see the same bounds; what comes out is looked at in tests/kernels.
  for (int type : {SK_BF16, SK_F16}) {
    const auto halves = [](int64_t count) { return Exact<uint16_t>(static_cast<size_t>(count)); };
    const Exact<uint16_t> keys = halves(groups * 2 * head), values = halves(groups * 2 * head), x = halves(hidden);
    const Exact<uint16_t> more_keys = halves(groups * head), more_values = halves(groups * head);
    const Exact<uint16_t> cosines = halves(head), out = halves(vocabulary);
    sk_cache small[2] = {{keys.data.get(), values.data.get(), 2, 1, 0}, {more_keys.data.get(), more_values.data.get(), 1, 0, 1}};
    for (int wanted : {SK_OK, SK_FULL})
      expect(sk_decode(blocks.data(), small, 2, &norm, &last.matrix, x.data.get(), type, cosines.data.get(),
                       cosines.data.get(), turn % 3, out.data.get(), 2) == wanted, "full", shown, 0.5);
  }
  const Exact<float> x = numbers(hidden), turns = numbers(head), out = numbers(vocabulary);
  const auto status = [&](const sk_norm *by) {
    return sk_decode(blocks.data(), caches.data(), 2, by, &last.matrix, x.data.get(), SK_F32, turns.data.get(),
                     turns.data.get(), 0, out.data.get(), 1);
  };
  expect(status(nullptr) == SK_NO_MATRIX, "no norm", shown, 0.5);
  expect(status(&norm) == SK_FULL, "full", shown, 0.5);
  caches[1].used = -1;
  caches[0].used = 0;
  expect(status(&norm) == SK_BAD_SIZE, "negative", shown, 0.5);
  caches[1].used = 0;
  caches[1].places = int64_t{1} << 48;
  expect(status(&norm) == (groups * head > 1 ? SK_BAD_SIZE : SK_OK), "too many places", shown, 0.5);
  caches[1].places = tokens;
  std::swap(blocks[1].matrices[5], blocks[1].matrices[6]);
  if (hidden != inner) expect(status(&norm) == SK_BAD_SIZE, "matrices that do not fit", shown, 0.5);
  std::swap(blocks[1].matrices[5], blocks[1].matrices[6]);
  blocks[1].rotated = head + 2 - head % 2;
  expect(status(&norm) == SK_BAD_SIZE, "turned too far", shown, 0.5);
}

}  // namespace
