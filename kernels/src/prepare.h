// Activations in the forms that kernels read. Plain loops, which the compiler turns into vectors of the variant.
// Included by each variant behind its definitions; needs SPLIT (columns in a block of FORM_SPLIT) and BIAS.
#pragma once

#include "scalar.h"
#include "variant.h"

namespace {

// One token as float32, zero behind its last column.
void widen(float *to, const void *x, int type, int64_t start, int64_t columns, int64_t padded) {
  if (type == SK_F32) {
    memcpy(to, static_cast<const float *>(x) + start, static_cast<size_t>(columns) * 4);
  } else {
    const uint16_t *from = static_cast<const uint16_t *>(x) + start;
    if (type == SK_BF16)
      for (int64_t c = 0; c < columns; ++c) to[c] = from_bf16(from[c]);
    else
      for (int64_t c = 0; c < columns; ++c) to[c] = from_f16(from[c]);
  }
  for (int64_t c = columns; c < padded; ++c) to[c] = 0.0f;
}

// The largest absolute value as bits: integers have an order for NaN too, the highest.
uint32_t largest(const float *x, int64_t count) {
  uint32_t most = 0;
  for (int64_t c = 0; c < count; ++c) {
    const uint32_t size = float_bits(x[c]) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  return most;
}

// Round to -127 .. 127. Returns the scale: NaN where a number is not finite, which makes every output of the token NaN.
float round_to_int8(int8_t *to, const float *x, int64_t count) {
  const uint32_t most = largest(x, count);
  // Below 2^-100 the factor could overflow; such numbers are zero beside any other.
  if (most >= 0x7f800000u || most < 0x0d800000u) {
    for (int64_t c = 0; c < count; ++c) to[c] = 0;
    return most >= 0x7f800000u ? bits_float(0x7fc00000u) : 0.0f;
  }
  const float factor = 127.0f / bits_float(most);
  for (int64_t c = 0; c < count; ++c) {
    // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
    const float shifted = x[c] * factor + 12582912.0f;
    to[c] = static_cast<int8_t>(float_bits(shifted) & 255u);
  }
  return bits_float(most) / 127.0f;
}

void prepare(Activations &a, int forms, const void *x, int type, int tokens, int padded, int64_t columns, bool groups) {
  const int64_t width = a.words * WORD;
  for (int t = 0; t < padded; ++t) {
    const int64_t at = t * width;
    if (t >= tokens) {
      if (forms & FORM_F32) memset(a.f32 + at, 0, static_cast<size_t>(width) * 4);
      if (forms & FORM_SPLIT) memset(a.split + at, 0, static_cast<size_t>(width) * 4);
      if (forms & FORM_BF16) memset(a.bf16 + at, 0, static_cast<size_t>(width) * 2);
      if (forms & FORM_INT8) {
        memset(a.int8 + at, 0, static_cast<size_t>(width));
        memset(a.offsets + t * a.words * LANES, 0, static_cast<size_t>(a.words) * LANES * 4);
        for (int64_t w = 0; w < a.words; ++w) a.scales[t * a.words + w] = 0.0f;
        a.token_scale[t] = 0.0f;
        a.token_offset[t] = 0;
      }
      continue;
    }
    if (forms & FORM_BF16) {  // only asked for when x is bfloat16
      memcpy(a.bf16 + at, static_cast<const uint16_t *>(x) + t * columns, static_cast<size_t>(columns) * 2);
      memset(a.bf16 + at + columns, 0, static_cast<size_t>(width - columns) * 2);
    }
    if (!(forms & (FORM_F32 | FORM_SPLIT | FORM_INT8))) continue;
    float *wide = a.f32 + at;
    widen(wide, x, type, t * columns, columns, width);
    if (forms & FORM_SPLIT)
      for (int64_t block = 0; block < width; block += SPLIT)
        for (int64_t c = 0; c < SPLIT / 2; ++c) {
          a.split[at + block + c] = wide[block + 2 * c];
          a.split[at + block + SPLIT / 2 + c] = wide[block + 2 * c + 1];
        }
    if (!(forms & FORM_INT8)) continue;
    int8_t *small = a.int8 + at;
    if (groups) {
      for (int64_t w = 0; w < a.words; ++w)
        a.scales[t * a.words + w] = round_to_int8(small + w * WORD, wide + w * WORD, WORD);
      a.token_scale[t] = 1.0f;
    } else {
      a.token_scale[t] = round_to_int8(small, wide, width);
      for (int64_t w = 0; w < a.words; ++w) a.scales[t * a.words + w] = a.token_scale[t];
    }
    if (BIAS == 0) continue;
    int32_t *offsets = a.offsets + t * a.words * LANES;
    uint32_t total = 0;
    for (int64_t lane = 0; lane < a.words * LANES; ++lane) {
      const int8_t *four = small + 4 * lane;
      offsets[lane] = -BIAS * (four[0] + four[1] + four[2] + four[3]);
      total += static_cast<uint32_t>(offsets[lane]);
    }
    a.token_offset[t] = static_cast<int32_t>(total);
  }
}

}  // namespace
