// Rows of numbers between products: memory for them, their formats, the norm. Everything is static: blocks and the decoder
// each compile their own.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "layout.h"
#include "scalar.h"
#include "secateur_kernels.h"

namespace {

constexpr int SUMS = 16;  // side by side, so that a vector of any width holds some

// Memory of a calling thread; it grows to the widest block and stays.
struct Space {
  char *data = nullptr;
  size_t size = 0, used = 0;
  ~Space() { free(data); }

  bool open(size_t wanted) {
    used = 0;
    if (wanted <= size) return true;
    free(data);
    size = 0;
    data = static_cast<char *>(aligned_alloc(64, (wanted + 63) / 64 * 64));
    if (data != nullptr) size = wanted;
    return data != nullptr;
  }

  template <class T>
  T *take(int64_t count, size_t width = sizeof(T)) {
    char *at = data + used;
    used += (static_cast<size_t>(count) * width + 63) / 64 * 64;
    return reinterpret_cast<T *>(at);
  }
};
thread_local Space space;  // one for each source file

bool is_type(int type) { return type == SK_F32 || type == SK_BF16 || type == SK_F16; }
size_t width_of(int type) { return type == SK_F32 ? 4 : 2; }

void widen(float *to, const void *from, int type, int64_t count) {
  const uint16_t *halves = static_cast<const uint16_t *>(from);
  if (type == SK_F32)
    memcpy(to, from, static_cast<size_t>(count) * 4);
  else if (type == SK_BF16)
    for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(halves[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from_f16(halves[i]);
}

void narrow(void *to, int type, const float *from, int64_t count) {
  uint16_t *halves = static_cast<uint16_t *>(to);
  if (type == SK_F32)
    memcpy(to, from, static_cast<size_t>(count) * 4);
  else if (type == SK_BF16)
    for (int64_t i = 0; i < count; ++i) halves[i] = to_bf16(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) halves[i] = to_f16(from[i]);
}

// x / sqrt(mean of squares + epsilon) * weight
void normalise(float *out, const float *x, const sk_norm &norm, int64_t count) {
  float sums[SUMS] = {};
  int64_t i = 0;
  for (; i + SUMS <= count; i += SUMS)
    for (int lane = 0; lane < SUMS; ++lane) sums[lane] += x[i + lane] * x[i + lane];
  for (; i < count; ++i) sums[0] += x[i] * x[i];
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(count) + norm.epsilon);
  widen(out, norm.weight, norm.type, count);
  for (i = 0; i < count; ++i) out[i] *= x[i] * factor;
}

int sizes_of(const sk_matrix *matrices, int count) {
  if (matrices == nullptr) return SK_NO_MATRIX;
  for (int i = 0; i < count; ++i) {
    const int status = check_sizes(matrices[i]);
    if (status != SK_OK) return status;
  }
  return SK_OK;
}

}  // namespace
