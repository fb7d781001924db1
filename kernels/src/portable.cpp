// The variant in plain C++, for any CPU; the others are tested against the same reference.
#include "scalar.h"
#include "variant.h"

namespace {

constexpr int BIAS = 0;
constexpr int SPLIT = 2;  // a block of two columns is in order already
constexpr int ROWS_1 = 1, ROWS_2 = 1, ROWS_4 = 1;
#define SK_BF16_DOT 0

struct W16 {
  uint16_t v[WORD];
};
struct W8 {
  int8_t v[WORD];
};
using Sum = float;
using Count = int32_t;

inline uint64_t fours_mask(uint64_t indices) {
  // In each four bits p + 4 q; the bits p and q are to be set.
  const uint64_t ones = 0x1111111111111111u;
  const uint64_t p0 = indices & ones, p1 = (indices >> 1) & ones, q0 = (indices >> 2) & ones, q1 = (indices >> 3) & ones;
  const uint64_t zero = ((p0 | p1) ^ ones) | ((q0 | q1) ^ ones), one = (p0 & ~p1) | (q0 & ~q1);
  const uint64_t two = (p1 & ~p0) | (q1 & ~q0), three = (p0 & p1) | (q0 & q1);
  return zero | (one << 1) | (two << 2) | (three << 3);
}

inline W16 expand16(uint64_t mask, const uint16_t *&values) {
  W16 word = {};
  for (; mask; mask &= mask - 1) word.v[__builtin_ctzll(mask)] = *values++;
  return word;
}

inline W8 expand8(uint64_t mask, const int8_t *&values) {
  W8 word = {};
  for (; mask; mask &= mask - 1) word.v[__builtin_ctzll(mask)] = *values++;
  return word;
}

inline int8_t nibble(const uint8_t *values, int place) {
  const int half = (values[place / 2] >> (place % 2 ? 4 : 0)) & 15;
  return static_cast<int8_t>((half ^ 8) - 8);
}

inline W8 expand4(uint64_t mask, const uint8_t *&values) {
  W8 word = {};
  int place = 0;
  for (; mask; mask &= mask - 1) word.v[__builtin_ctzll(mask)] = nibble(values, place++);
  values += (place + 1) / 2;
  return word;
}

inline W16 load16(const uint16_t *values, int count) {
  W16 word = {};
  memcpy(word.v, values, static_cast<size_t>(count) * 2);
  return word;
}

inline W8 load8(const int8_t *values) {
  W8 word;
  memcpy(word.v, values, WORD);
  return word;
}

inline W8 load4(const uint8_t *values) {
  W8 word;
  for (int c = 0; c < WORD; ++c) word.v[c] = nibble(values, c);
  return word;
}

inline void store16(uint16_t *to, const W16 &word) { memcpy(to, word.v, sizeof word.v); }
inline void store8(int8_t *to, const W8 &word) { memcpy(to, word.v, sizeof word.v); }

inline Sum no_sum() { return 0.0f; }
inline Count no_count() { return 0; }
inline Count offset_count(const int32_t *) { return 0; }
inline float sum_of(Sum sum) { return sum; }
inline int32_t count_of(Count count) { return count; }

inline Sum add_bf16(Sum sum, const W16 &word, const float *x) {
  for (int c = 0; c < WORD; ++c) sum += from_bf16(word.v[c]) * x[c];
  return sum;
}

inline Sum add_f16(Sum sum, const W16 &word, const float *x) {
  for (int c = 0; c < WORD; ++c) sum += from_f16(word.v[c]) * x[c];
  return sum;
}

inline Sum add_int(Sum sum, const W8 &word, const float *x) {
  for (int c = 0; c < WORD; ++c) sum += static_cast<float>(word.v[c]) * x[c];
  return sum;
}

inline Count dot_int8(Count count, const W8 &word, const int8_t *x) {
  for (int c = 0; c < WORD; ++c) count += word.v[c] * x[c];
  return count;
}

inline Sum add_count(Sum sum, Count count, float scale) { return sum + static_cast<float>(count) * scale; }
inline Sum add_scaled(Sum sum, Sum more, float scale) { return sum + more * scale; }

bool runs() { return true; }

}  // namespace

#include "attention.h"
#include "elements.h"
#include "tiles.h"

const Variant variant_portable = {"portable", runs, select, unpacker, prepare, attend, elements};
