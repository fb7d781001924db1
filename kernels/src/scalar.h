// Number formats, one number at a time. Everything is static: each variant compiles its own with its own flags.
#pragma once

#include <cstdint>
#include <cstring>

#include "secateur_kernels.h"

static inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float from_bf16(uint16_t value) { return bits_float(static_cast<uint32_t>(value) << 16); }

// To the nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline float from_f16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t exponent = (value >> 10) & 31u, fraction = value & 1023u;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return bits_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -small : small;
}

static inline uint16_t to_f16(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (size < 0x38800000u) {
    // Below 2^-14 the steps are 2^-24: an addition rounds to them, to even.
    const float shifted = bits_float(size) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13));
}

static inline float load_number(const void *data, int type, int64_t place) {
  if (type == SK_F32) return static_cast<const float *>(data)[place];
  const uint16_t half = static_cast<const uint16_t *>(data)[place];
  return type == SK_BF16 ? from_bf16(half) : from_f16(half);
}

static inline void store_number(void *data, int type, int64_t place, float value) {
  if (type == SK_F32)
    static_cast<float *>(data)[place] = value;
  else
    static_cast<uint16_t *>(data)[place] = type == SK_BF16 ? to_bf16(value) : to_f16(value);
}

// e^x to a few units of the last place: 2^n times a polynomial of the rest, which a compiler makes vectors of.
static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // the nearest whole number, in the low bits
  const float whole = shifted - 12582912.0f;
  const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return bits_float(float_bits(sum) + (float_bits(shifted) << 23));
}
