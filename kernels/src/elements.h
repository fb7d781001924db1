// Rows of numbers between products, in the vectors of the variant that includes it: plain loops for the compiler.
#pragma once

#include "scalar.h"
#include "variant.h"

namespace {

constexpr int SUMS = 64;  // side by side, so that vectors of any width have some in hand

void widen_row(float *to, const void *from, int type, int64_t count) {
  const uint16_t *halves = static_cast<const uint16_t *>(from);
  if (type == SK_F32)
    memcpy(to, from, static_cast<size_t>(count) * 4);
  else if (type == SK_BF16)
    for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(halves[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from_f16(halves[i]);
}

void narrow_row(void *to, int type, const float *from, int64_t count) {
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
  for (int width = SUMS / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  const float factor = 1.0f / __builtin_sqrtf(sums[0] / static_cast<float>(count) + norm.epsilon);
  widen_row(out, norm.weight, norm.type, count);
  for (i = 0; i < count; ++i) out[i] *= x[i] * factor;
}

// gate = silu(gate) * up
void gate_row(float *gate, const float *up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// Turns the pairs (i, i + half) of the first `rotated` numbers of each head.
void rotate_heads(float *x, int64_t heads, int64_t head, int64_t rotated, const float *cosines, const float *sines) {
  const int64_t half = rotated / 2;
  for (int64_t h = 0; h < heads; ++h, x += head)
    for (int64_t i = 0; i < half; ++i) {
      const float first = x[i], second = x[half + i];
      x[i] = first * cosines[i] - second * sines[i];
      x[half + i] = second * cosines[half + i] + first * sines[half + i];
    }
}

constexpr Elements elements = {widen_row, narrow_row, normalise, gate_row, rotate_heads};

}  // namespace
