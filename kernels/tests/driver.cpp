// Every kernel against a plain reference, on buffers of exactly the size of the format. Under AddressSanitizer and UBSan
// those are guarded by it; in a build without them each ends at a page that cannot be read, so that the very code of the
// library is held to its bounds, too.
//
//   driver [QUICK]    without an argument all columns from 1 to 130
#include "decoding.h"
#include "expect.h"

namespace {

void products(const Packed &p, int tokens, int type, int activations, int threads, double density) {
  const sk_matrix &m = p.matrix;
  const size_t inputs = static_cast<size_t>(tokens * m.columns), outputs = static_cast<size_t>(tokens * m.rows);
  const size_t width = type == SK_F32 ? 4 : 2;
  Exact<uint8_t> x(inputs * width), out(outputs * width);
  std::vector<double> numbers(inputs);
  for (size_t i = 0; i < inputs; ++i) {
    store_number(x.data.get(), type, static_cast<int64_t>(i), static_cast<float>(uniform() - 0.5));
    numbers[i] = load_number(x.data.get(), type, static_cast<int64_t>(i));
  }
  expect(sk_linear(&m, 1, x.data.get(), type, tokens, activations, out.data.get(), threads) == SK_OK, "status", m, density);
  for (int t = 0; t < tokens; ++t) {
    double most = 0;
    for (int64_t c = 0; c < m.columns; ++c) most = fmax(most, fabs(numbers[static_cast<size_t>(t * m.columns + c)]));
    for (int64_t r = 0; r < m.rows; ++r) {
      double sum = static_cast<double>(p.bias.data[static_cast<size_t>(r)]), size = fabs(sum), weights = 0;
      for (int64_t c = 0; c < m.columns; ++c) {
        const double w = p.weights[static_cast<size_t>(r * m.columns + c)];
        sum += w * numbers[static_cast<size_t>(t * m.columns + c)];
        size += fabs(w * numbers[static_cast<size_t>(t * m.columns + c)]);
        weights += fabs(w);
      }
      double bound = size * 1e-5 + (type == SK_F32 ? 0 : fabs(sum) * (type == SK_BF16 ? 1.0 / 256 : 1.0 / 2048));
      if (activations != SK_FLOAT && m.bits < 16) bound += weights * most / 127 * 0.51;
      const double found = load_number(out.data.get(), type, t * m.rows + r);
      expect(fabs(found - sum) <= bound + 1e-7, "product", m, density);
    }
  }
}

void unpacked(const Packed &p, int type, double density) {
  const sk_matrix &m = p.matrix;
  const int64_t first = m.rows / 3, count = m.rows - first;
  Exact<uint8_t> out(static_cast<size_t>(count * m.columns) * (type == SK_F32 ? 4 : 2));
  expect(sk_unpack(&m, first, m.rows, out.data.get(), type, 2) == SK_OK, "status", m, density);
  for (int64_t i = 0; i < count * m.columns; ++i) {
    const float wanted = static_cast<float>(p.weights[static_cast<size_t>(first * m.columns + i)]);
    uint32_t slot[1];
    store_number(slot, type, 0, wanted);
    expect(load_number(slot, type, 0) == load_number(out.data.get(), type, i), "unpack", m, density);
  }
}

// Damaged matrices that pass the check of sizes must not be read out of bounds where the format promises so.
void damaged() {
  for (int bits : {16, 8, 4}) {
    Packed p = pack(SK_TWO_OF_FOUR, bits, SK_BF16, 3, 100, 0, 0.5);
    for (int i = 0; i < 3 * 13; ++i) p.pattern.data[static_cast<size_t>(i)] = static_cast<uint8_t>(engine());
    expect(sk_check(&p.matrix) == SK_BAD_PATTERN, "broken indices", p.matrix, 0);
    Exact<float> x(100), out(3);
    expect(sk_linear(&p.matrix, 1, x.data.get(), SK_F32, 1, 0, out.data.get(), 1) == SK_OK, "no crash", p.matrix, 0);
  }
  Packed p = pack(SK_MASK, 8, 0, 5, 70, 0, 0.5);
  expect(sk_check(&p.matrix) == SK_OK, "check", p.matrix, 0);
  p.pattern.data[15] |= 128;
  expect(sk_check(&p.matrix) == SK_BAD_PATTERN, "bit behind the last column", p.matrix, 0);
  p.pattern.data[15] &= 127;
  p.pattern.data[0] ^= 1;
  expect(sk_check(&p.matrix) != SK_OK, "one bit more or less", p.matrix, 0);
  sk_matrix m = p.matrix;
  m.value_count += 1;
  expect(sk_check(&m) == SK_BAD_STARTS, "one value more", m, 0);
  m = p.matrix;
  m.columns = int64_t{1} << 40;
  expect(sk_check(&m) == SK_BAD_SIZE, "too wide", m, 0);
  m = p.matrix;
  m.rows = -1;
  expect(sk_check(&m) == SK_BAD_SIZE, "negative", m, 0);
  m = p.matrix;
  m.scales = nullptr;
  expect(sk_check(&m) == SK_NO_MATRIX, "no scales", m, 0);
}

// Blocks of odd sizes on memory of exactly their size; what they compute is compared in tests/kernels/test_blocks.py.
void blocks(int64_t hidden, int turn) {
  const int64_t head = 2 + turn % 5, heads = 1 + turn % 3, groups = 1 + turn % 2, inner = 1 + turn * 37 % 130;
  const int64_t rotated = 2 + turn % 3 * 2 <= head ? 2 + turn % 3 * 2 : 2;
  const int bits = std::vector<int>{16, 8, 4}[static_cast<size_t>(turn % 3)];
  const int64_t shapes[7][2] = {{heads * head, hidden}, {groups * head, hidden}, {groups * head, hidden},
                                {hidden, heads * head}, {inner, hidden}, {inner, hidden}, {hidden, inner}};
  std::vector<Packed> packed;
  std::vector<sk_matrix> matrices;
  for (int i = 0; i < 7; ++i) {
    packed.push_back(pack((turn + i) % 2 ? SK_MASK : SK_DENSE, bits, SK_BF16, shapes[i][0], shapes[i][1], 0, 0.5));
    matrices.push_back(packed.back().matrix);
  }
  const int64_t rows = (heads + 2 * groups) * head;
  for (int type : {SK_F32, SK_BF16, SK_F16}) {
    const auto filled = [type](int64_t count) {
      Exact<uint8_t> made(static_cast<size_t>(count) * (type == SK_F32 ? 4 : 2));
      for (int64_t i = 0; i < count; ++i) store_number(made.data.get(), type, i, static_cast<float>(uniform() - 0.5));
      return made;
    };
    const Exact<uint8_t> x = filled(hidden), cosines = filled(rotated), sines = filled(rotated), weight = filled(hidden);
    const Exact<uint8_t> attended = filled(heads * head), first = filled(rows), second = filled(hidden);
    const sk_norm norm = {weight.data.get(), type, 1e-5f};
    expect(sk_block_before(matrices.data(), &norm, x.data.get(), type, cosines.data.get(), sines.data.get(), head, rotated,
                           turn % 3, first.data.get(), 2) == SK_OK, "block before", matrices[0], 0.5);
    expect(sk_block_behind(matrices.data() + 3, &norm, attended.data.get(), x.data.get(), type, turn % 3,
                           second.data.get(), 2) == SK_OK, "block behind", matrices[3], 0.5);
    // Weights this large leave the range of float16.
    for (int64_t i = 0; i < rows && type != SK_F16; ++i)
      expect(std::isfinite(load_number(first.data.get(), type, i)), "block before", matrices[0], 0.5);
    for (int64_t i = 0; i < hidden && type != SK_F16; ++i)
      expect(std::isfinite(load_number(second.data.get(), type, i)), "block behind", matrices[3], 0.5);
    expect(sk_block_before(matrices.data(), &norm, x.data.get(), type, cosines.data.get(), sines.data.get(), head,
                           head + 2 - head % 2, 0, first.data.get(), 1) == SK_BAD_SIZE, "turned too far", matrices[0], 0.5);
    expect(sk_block_behind(matrices.data() + 3, &norm, attended.data.get(), nullptr, type, 0, second.data.get(), 1) ==
               SK_NO_MATRIX, "no input", matrices[3], 0.5);
    std::swap(matrices[5], matrices[6]);
    if (hidden != inner)
      expect(sk_block_behind(matrices.data() + 3, &norm, attended.data.get(), x.data.get(), type, 0, second.data.get(),
                             1) == SK_BAD_SIZE, "matrices that do not fit", matrices[3], 0.5);
    std::swap(matrices[5], matrices[6]);
  }
}

}  // namespace

int main(int argc, char **) {
  const bool quick = argc > 1;
  damaged();
  int turn = 0;
  for (int64_t columns = 1; columns <= 130; columns += quick ? 7 : 1)
    for (int kind : {SK_MASK, SK_TWO_OF_FOUR, SK_DENSE})
      for (int bits : {16, 8, 4})
        for (int64_t group : {int64_t{0}, int64_t{64}, int64_t{128}}) {
          if ((bits == 16 && group) || (kind == SK_TWO_OF_FOUR && columns % 4)) continue;
          // What does not cross every other goes round.
          ++turn;
          const double density = std::vector<double>{0, 0.05, 0.5, 0.95, 1}[static_cast<size_t>(turn % 5)];
          const int64_t rows = std::vector<int64_t>{1, 2, 3, 5, 7}[static_cast<size_t>(turn / 5 % 5)];
          const Packed p = pack(kind, bits, turn % 2 ? SK_BF16 : SK_F16, rows, columns, group, density);
          expect(sk_check(&p.matrix) == SK_OK, "check", p.matrix, density);
          for (int v = 0; v < sk_variant_count(); ++v) {
            if (!sk_variant_runs(v) || sk_use(sk_variant_name(v)) != SK_OK) continue;
            const int type = turn % 3;
            for (int activations = 0; activations < (bits == 16 ? 1 : 3); ++activations)
              for (int tokens : {1, 2 + turn % 7, turn % 4 == 0 ? 11 : 1})
                products(p, tokens, type, activations, 1 + turn % 2, density);
            unpacked(p, type, density);
          }
        }
  // Large enough for two threads.
  for (int bits : {16, 8, 4}) {
    const Packed p = pack(SK_MASK, bits, SK_BF16, 333, 517, bits == 4 ? 64 : 0, 0.5);
    for (int v = 0; v < sk_variant_count(); ++v)
      if (sk_variant_runs(v) && sk_use(sk_variant_name(v)) == SK_OK) products(p, 3, SK_BF16, 1, 2, 0.5);
  }
  for (int v = 0; v < sk_variant_count(); ++v)
    if (sk_variant_runs(v) && sk_use(sk_variant_name(v)) == SK_OK)
      for (int64_t hidden = 1; hidden <= 130; hidden += quick ? 11 : 1) {
        blocks(hidden, static_cast<int>(hidden));
        decoding(hidden, static_cast<int>(hidden));
      }
  printf("%ld of %ld comparisons failed\n", failures, compared);
  return failures != 0;
}
