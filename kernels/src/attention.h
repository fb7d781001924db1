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
    for (int64_t lane = 0; lane < SIDE; ++lane) to[lane] = from_f16(from[lane]);
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

template <class As>
float dot_of(const float *query, const typename As::Number *key, int64_t head) {
  Lanes sums = {};
  int64_t i = 0;
  for (; i + SIDE <= head; i += SIDE) {
    Lanes mine, theirs;
    AsF32::load(mine, query + i);
    As::load(theirs, key + i);
    sums += mine * theirs;
  }
  float sum = sum_of_lanes(sums);
  for (; i < head; ++i) sum += query[i] * As::one(key[i]);
  return sum;
}

// out += the values of four places, each by its weight.
template <class As>
void add_four(float *out, const typename As::Number *values, const float *weights, int64_t head) {
  int64_t i = 0;
  for (; i + SIDE <= head; i += SIDE) {
    Lanes sum, value;
    AsF32::load(sum, out + i);
    for (int64_t place = 0; place < 4; ++place) {
      As::load(value, values + place * head + i);
      sum += value * weights[place];
    }
    memcpy(out + i, &sum, sizeof sum);
  }
  for (; i < head; ++i)
    for (int64_t place = 0; place < 4; ++place) out[i] += As::one(values[place * head + i]) * weights[place];
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
    for (int64_t p = 0; p < count; ++p) {
      weights[p] = dot_of<As>(query, key + (first + p) * head, head);
      here = weights[p] > here ? weights[p] : here;
    }
    if (here > most) {
      const float less = first == 0 ? 0.0f : exponential(most - here);
      for (int64_t i = 0; i < head; ++i) out[i] *= less;
      total *= less;
      most = here;
    }
    for (int64_t p = 0; p < AT_ONCE; ++p) weights[p] = exponential(weights[p] - most);
    for (int64_t p = count; p < AT_ONCE; ++p) weights[p] = 0.0f;
    Lanes sums = {};
    for (int64_t p = 0; p < AT_ONCE; p += SIDE) {
      Lanes some;
      AsF32::load(some, weights + p);
      sums += some;
    }
    total += sum_of_lanes(sums);
    int64_t p = 0;
    for (; p + 4 <= count; p += 4) add_four<As>(out, value + (first + p) * head, weights + p, head);
    for (; p < count; ++p)
      for (int64_t i = 0; i < head; ++i) out[i] += As::one(value[(first + p) * head + i]) * weights[p];
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
