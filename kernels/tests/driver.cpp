// Every kernel against a plain reference, on buffers of exactly the size of the format. Under AddressSanitizer and UBSan
// those are guarded by it; in a build without them each ends at a page that cannot be read, so that the very code of the
// library is held to its bounds, too.
//
//   driver [QUICK]    without an argument all columns from 1 to 130
//
// The packing here is written from docs/sparse-format.md and shares nothing with the kernels.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(__unix__)
#include <sys/mman.h>
#endif

#include "scalar.h"
#include "secateur_kernels.h"

namespace {

std::mt19937 engine(1);
double uniform() { return std::uniform_real_distribution<double>(0, 1)(engine); }

// Memory of exactly n elements: what reads behind it is reported, or ends the program.
#if defined(__SANITIZE_ADDRESS__) || !defined(__unix__)
template <class T>
using Memory = std::unique_ptr<T[]>;
template <class T>
Memory<T> memory(size_t n) {
  return Memory<T>(n ? new T[n]() : nullptr);
}
#else
struct Unmap {
  size_t pages = 0;
  void operator()(void *first) const {
    // The first element lies in the first page.
    munmap(reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(first) / 4096 * 4096), pages);
  }
};
template <class T>
using Memory = std::unique_ptr<T[], Unmap>;
template <class T>
Memory<T> memory(size_t n) {
  if (n == 0) return Memory<T>();
  const size_t used = (n * sizeof(T) + 4095) / 4096 * 4096;
  char *start = static_cast<char *>(
      mmap(nullptr, used + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED || mprotect(start + used, 4096, PROT_NONE) != 0) abort();
  return Memory<T>(reinterpret_cast<T *>(start + used - n * sizeof(T)), Unmap{used + 4096});
}
#endif

template <class T>
struct Exact {
  Memory<T> data;
  explicit Exact(size_t n = 0) : data(memory<T>(n)) {}
  explicit Exact(const std::vector<T> &from) : Exact(from.size()) {
    if (!from.empty()) memcpy(data.get(), from.data(), from.size() * sizeof(T));
  }
};

struct Packed {
  sk_matrix matrix = {};
  Exact<uint8_t> pattern, values;
  Exact<uint16_t> scales;
  Exact<int64_t> starts;
  Exact<float> bias;
  std::vector<double> weights;
};

void push16(std::vector<uint8_t> &to, uint16_t value) {
  to.push_back(static_cast<uint8_t>(value & 255));
  to.push_back(static_cast<uint8_t>(value >> 8));
}

Packed pack(int kind, int bits, int type, int64_t rows, int64_t columns, int64_t group_size, double density) {
  Packed p;
  const int64_t groups = group_size ? (columns + group_size - 1) / group_size : 1;
  std::vector<uint8_t> pattern, values;
  std::vector<uint16_t> scales;
  std::vector<int64_t> starts = {0};
  p.weights.assign(static_cast<size_t>(rows * columns), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> scale;
    for (int64_t g = 0; g < groups; ++g) {
      const uint16_t stored = to_bf16(static_cast<float>(uniform() - 0.5));
      if (bits < 16) scales.push_back(stored);
      scale.push_back(bits < 16 ? from_bf16(stored) : 1.0f);
    }
    std::vector<bool> kept(static_cast<size_t>((columns + 63) / 64 * 64), false);
    if (kind == SK_TWO_OF_FOUR) {
      std::vector<uint8_t> indices(static_cast<size_t>((columns + 7) / 8), 0);
      for (int64_t four = 0; four < columns / 4; ++four) {
        const int a = static_cast<int>(engine() % 4), b = static_cast<int>((a + 1 + engine() % 3) % 4);
        const int low = a < b ? a : b, high = a < b ? b : a;
        kept[static_cast<size_t>(four * 4 + low)] = kept[static_cast<size_t>(four * 4 + high)] = true;
        indices[static_cast<size_t>(four / 2)] |= static_cast<uint8_t>((low | high << 2) << (four % 2 ? 4 : 0));
      }
      pattern.insert(pattern.end(), indices.begin(), indices.end());
    } else {
      for (int64_t c = 0; c < columns; ++c) kept[static_cast<size_t>(c)] = kind == SK_DENSE || uniform() < density;
      if (kind == SK_MASK)
        for (size_t octet = 0; octet < kept.size() / 8; ++octet) {
          int byte = 0;
          for (size_t bit = 0; bit < 8; ++bit) byte |= kept[octet * 8 + bit] << bit;
          pattern.push_back(static_cast<uint8_t>(byte));
        }
    }
    bool half = false;
    for (int64_t c = 0; c < columns; ++c) {
      if (kind == SK_MASK && c % 64 == 0) half = false;  // every word begins a byte
      if (!kept[static_cast<size_t>(c)]) continue;
      double weight;
      if (bits == 16) {
        const float number = static_cast<float>(uniform() - 0.5);
        const uint16_t stored = type == SK_BF16 ? to_bf16(number) : to_f16(number);
        push16(values, stored);
        weight = type == SK_BF16 ? from_bf16(stored) : from_f16(stored);
      } else {
        const int code = bits == 8 ? static_cast<int>(engine() % 255) - 127 : static_cast<int>(engine() % 16) - 8;
        if (bits == 8)
          values.push_back(static_cast<uint8_t>(code & 255));
        else if (half)
          values.back() = static_cast<uint8_t>(values.back() | (code & 15) << 4);
        else
          values.push_back(static_cast<uint8_t>(code & 15));
        half = bits == 4 && !half;
        const size_t group = static_cast<size_t>(group_size ? c / group_size : 0);
        weight = static_cast<double>(code) * static_cast<double>(scale[group]);
      }
      p.weights[static_cast<size_t>(r * columns + c)] = weight;
    }
    starts.push_back(static_cast<int64_t>(values.size()) / (bits == 16 ? 2 : 1));
  }
  values.insert(values.end(), 64, 0);
  p.pattern = Exact<uint8_t>(pattern);
  p.values = Exact<uint8_t>(values);
  p.scales = Exact<uint16_t>(scales);
  p.starts = Exact<int64_t>(starts);
  p.bias = Exact<float>(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) p.bias.data[static_cast<size_t>(r)] = static_cast<float>(uniform());
  p.matrix = {rows, columns, starts.back(), bits == 16 ? 0 : group_size, kind, bits, type, SK_F32,
              p.pattern.data.get(), p.values.data.get(), bits < 16 ? p.scales.data.get() : nullptr,
              kind == SK_MASK ? p.starts.data.get() : nullptr, p.bias.data.get()};
  return p;
}

long failures = 0, compared = 0;

void expect(bool good, const char *what, const sk_matrix &m, double density) {
  ++compared;
  if (good) return;
  ++failures;
  printf("FAILED %s: %s, kind %d, bits %d, %lld x %lld, group %lld, density %g\n", what, sk_variant(), m.kind, m.bits,
         static_cast<long long>(m.rows), static_cast<long long>(m.columns), static_cast<long long>(m.group_size),
         density);
}

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
      for (int64_t hidden = 1; hidden <= 130; hidden += quick ? 11 : 1) blocks(hidden, static_cast<int>(hidden));
  printf("%ld of %ld comparisons failed\n", failures, compared);
  return failures != 0;
}
