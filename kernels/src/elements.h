// Rows of numbers between products, in the vectors of the variant that includes it: plain loops for the compiler.
#pragma once

#include "scalar.h"
#include "variant.h"

namespace {

constexpr int SUMS = 64;  // side by side, so that vectors of any width have some in hand
constexpr int64_t BLOCK = 2048;

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

// The place of the first of the highest numbers; of the first NaN where there is one.
int64_t highest_of(const void *x, int type, int64_t count) {
  float most = bits_float(0xff800000u), numbers[BLOCK], sides[SUMS];
  int64_t block = 0;
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t width = count - first < BLOCK ? count - first : BLOCK;
    widen_row(numbers, static_cast<const char *>(x) + first * (type == SK_F32 ? 4 : 2), type, width);
    for (int64_t i = width; i < (width + SUMS - 1) / SUMS * SUMS; ++i) numbers[i] = numbers[0];
    int32_t bad = 0;
    for (int64_t i = 0; i < width; ++i) bad |= (float_bits(numbers[i]) & 0x7fffffffu) > 0x7f800000u;
    if (bad) {
      for (int64_t i = 0; i < width; ++i)
        if (numbers[i] != numbers[i]) return first + i;
    }
    for (int lane = 0; lane < SUMS; ++lane) sides[lane] = numbers[lane];
    for (int64_t i = SUMS; i < width; i += SUMS)
      for (int lane = 0; lane < SUMS; ++lane)
        sides[lane] = numbers[i + lane] > sides[lane] ? numbers[i + lane] : sides[lane];
    float here = sides[0];
    for (int lane = 1; lane < SUMS; ++lane) here = sides[lane] > here ? sides[lane] : here;
    if (here > most) {
      most = here;
      block = first;
    }
  }
  for (int64_t i = block; i < count; ++i)
    if (load_number(x, type, i) == most) return i;
  return 0;
}

// The sum of the words of lines of 64 bytes, read as products read their rows: side by side, from four places.
uint64_t read_lines(const char *data, int64_t lines) {
  typedef uint64_t Line __attribute__((vector_size(64)));
  constexpr int64_t STREAMS = 4;
  Line sums[STREAMS] = {}, line;
  const int64_t step = lines / STREAMS * 64;
  for (int64_t at = 0; at < step; at += 64)
    for (int64_t s = 0; s < STREAMS; ++s) {
      __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(data + s * step + at) + 1024));
      memcpy(&line, data + s * step + at, sizeof line);
      sums[s] += line;
    }
  for (int64_t at = step * STREAMS; at < lines * 64; at += 64) {
    memcpy(&line, data + at, sizeof line);
    sums[0] += line;
  }
  uint64_t sum = 0;
  for (const Line &one : sums)
    for (int lane = 0; lane < 8; ++lane) sum += one[lane];
  return sum;
}

constexpr Elements elements = {widen_row, narrow_row, normalise, gate_row, rotate_heads, highest_of, read_lines};

}  // namespace
