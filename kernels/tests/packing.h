// Random matrices packed as docs/sparse-format.md says, on memory of exactly their size, and what counts comparisons.
#pragma once

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

}  // namespace
