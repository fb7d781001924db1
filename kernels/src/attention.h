// The attention of one query to the keys and values of its head, in the vectors of the variant that includes it.
#pragma once

#include "scalar.h"
#include "variant.h"

namespace {

typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t SIDE = 16;     // numbers of Lanes
constexpr int64_t AT_ONCE = 64;  // places whose weights are in hand

// How keys and values are stored, sixteen at a time and one by one.
struct AsF32 {
  using Number = float;
  static void load(Lanes &to, const float *from) { memcpy(&to, from, sizeof to); }
  static float one(float value) { return value; }
};
struct AsBf16 {
  using Number = uint16_t;
  static void load(Lanes &to, const uint16_t *from) {
    typedef uint16_t Halves __attribute__((vector_size(32)));
    typedef uint32_t Words __attribute__((vector_size(64)));
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    memcpy(&to, &words, sizeof to);
  }
  static float one(uint16_t value) { return from_bf16(value); }
};
struct AsF16 {
  using Number = uint16_t;
  static void load(Lanes &to, const uint16_t *from) {
#ifdef __AVX512F__
    to = (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#else
    for (int64_t lane = 0; lane < SIDE; ++lane) to[lane] = from_f16(from[lane]);
#endif
  }
  static float one(uint16_t value) { return from_f16(value); }
};

inline float sum_of_lanes(const Lanes &lanes) {
  float side[SIDE];
  memcpy(side, &lanes, sizeof side);
  for (int64_t width = SIDE / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) side[lane] += side[lane + width];
  return side[0];
}

#ifdef __AVX512F__
typedef int32_t From __attribute__((vector_size(64)));  // lanes of two vectors, side by side

// Halves of two vectors on each other, then quarters of those, and so on: lanes are added in the order of sum_of_lanes.
inline void sums_of(float *out, Lanes (&v)[SIDE]) {
  constexpr From first[] = {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                            {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27},
                            {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29},
                            {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}};
  for (int64_t level = 0, count = SIDE / 2; count > 0; ++level, count /= 2)
    for (int64_t i = 0; i < count; ++i)
      v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], first[level]) +
             __builtin_shuffle(v[2 * i], v[2 * i + 1], first[level] + static_cast<int32_t>(count));
  memcpy(out, v, sizeof *v);
}
inline void add_product(Lanes &sum, const Lanes &x, const Lanes &y) {
  sum = (Lanes)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
}
#else
inline void sums_of(float *out, Lanes (&v)[SIDE]) {
  for (int64_t i = 0; i < SIDE; ++i) out[i] = sum_of_lanes(v[i]);
}
inline void add_product(Lanes &sum, const Lanes &x, const Lanes &y) { sum += x * y; }
#endif

// The products of a query with the keys of up to sixteen places.
template <class As>
void scores(float *out, const float *query, const typename As::Number *keys, int64_t head, int64_t count) {
  Lanes sums[SIDE];
  for (int64_t p = 0; p < count; ++p) {
    Lanes sum = {}, mine, theirs;
    for (int64_t i = 0; i + SIDE <= head; i += SIDE) {
      AsF32::load(mine, query + i);
      As::load(theirs, keys + p * head + i);
      add_product(sum, mine, theirs);
    }
    sums[p] = sum;
  }
  for (int64_t p = count; p < SIDE; ++p) sums[p] = Lanes{};
  sums_of(out, sums);
  if (head % SIDE == 0) return;
  for (int64_t p = 0; p < count; ++p)
    for (int64_t i = head / SIDE * SIDE; i < head; ++i) out[p] += query[i] * As::one(keys[p * head + i]);
}

// out += the values of places, each by its weight; N vectors of each in hand.
template <class As, int N>
inline void add_some(float *out, const typename As::Number *values, const float *weights, int64_t head, int64_t count) {
  Lanes sums[N], value;
  for (int n = 0; n < N; ++n) AsF32::load(sums[n], out + n * SIDE);
  for (int64_t p = 0; p < count; ++p) {
    const Lanes weight = weights[p] - Lanes{};  // in every lane
    for (int n = 0; n < N; ++n) {
      As::load(value, values + p * head + n * SIDE);
      add_product(sums[n], value, weight);
    }
  }
  memcpy(out, sums, sizeof sums);
}

template <class As>
void add_values(float *out, const typename As::Number *values, const float *weights, int64_t head, int64_t count) {
  int64_t i = 0;
  for (; i + 4 * SIDE <= head; i += 4 * SIDE) add_some<As, 4>(out + i, values + i, weights, head, count);
  for (; i + SIDE <= head; i += SIDE) add_some<As, 1>(out + i, values + i, weights, head, count);
  for (; i < head; ++i)
    for (int64_t p = 0; p < count; ++p) out[i] += As::one(values[p * head + i]) * weights[p];
}

// The largest score so far is kept apart, and what was summed up is made smaller when a larger one comes.
template <class As>
void attend_as(float *out, const float *query, const void *keys, const void *values, int64_t head, int64_t places) {
  const typename As::Number *key = static_cast<const typename As::Number *>(keys);
  const typename As::Number *value = static_cast<const typename As::Number *>(values);
  float weights[AT_ONCE] = {};
  float most = bits_float(0xff800000u), total = 0.0f;
  for (int64_t i = 0; i < head; ++i) out[i] = 0.0f;
  for (int64_t first = 0; first < places; first += AT_ONCE) {
    const int64_t count = places - first < AT_ONCE ? places - first : AT_ONCE;
    float here = most;
    for (int64_t p = 0; p < count; p += SIDE)
      scores<As>(weights + p, query, key + (first + p) * head, head, count - p < SIDE ? count - p : SIDE);
    for (int64_t p = 0; p < count; ++p) here = weights[p] > here ? weights[p] : here;
    if (here > most) {
      const float less = first == 0 ? 0.0f : exponential(most - here);
      for (int64_t i = 0; i < head; ++i) out[i] *= less;
      total *= less;
      most = here;
    }
    const int64_t whole = (count + SIDE - 1) / SIDE * SIDE;
    for (int64_t p = 0; p < whole; ++p) weights[p] = exponential(weights[p] - most);
    for (int64_t p = count; p < whole; ++p) weights[p] = 0.0f;
    Lanes sums = {};
    for (int64_t p = 0; p < whole; p += SIDE) {
      Lanes some;
      AsF32::load(some, weights + p);
      sums += some;
    }
    total += sum_of_lanes(sums);
    add_values<As>(out, value + first * head, weights, head, count);
  }
  const float share = 1.0f / total;
  for (int64_t i = 0; i < head; ++i) out[i] *= share;
}

void attend(float *out, const float *query, const void *keys, const void *values, int type, int64_t head,
            int64_t places) {
  if (type == SK_F32)
    attend_as<AsF32>(out, query, keys, values, head, places);
  else if (type == SK_BF16)
    attend_as<AsBf16>(out, query, keys, values, head, places);
  else
    attend_as<AsF16>(out, query, keys, values, head, places);
}

}  // namespace
