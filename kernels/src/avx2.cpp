// AVX2 with FMA and F16C. There is no expand: eight weights at a time are put in place by a shuffle, whose pattern comes
// from a table of the 256 masks of eight.
#include <immintrin.h>

#include "scalar.h"
#include "variant.h"

namespace {

constexpr int BIAS = 0;
constexpr int SPLIT = 16;
constexpr int ROWS_1 = 2, ROWS_2 = 1, ROWS_4 = 1;
#define SK_BF16_DOT 0

struct W16 {
  __m256i v[4];
};
struct W8 {
  __m256i low, high;
};
using Sum = __m256;
using Count = __m256i;

// Shuffles for bytes and for pairs of bytes; 0x80 makes a zero.
struct Shuffles {
  alignas(64) uint8_t bytes[256][8];
  alignas(64) uint8_t pairs[256][16];
};

constexpr Shuffles make_shuffles() {
  Shuffles made = {};
  for (int mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (int bit = 0; bit < 8; ++bit) {
      const bool set = (mask >> bit) & 1;
      made.bytes[mask][bit] = static_cast<uint8_t>(set ? next : 0x80);
      made.pairs[mask][2 * bit] = static_cast<uint8_t>(set ? 2 * next : 0x80);
      made.pairs[mask][2 * bit + 1] = static_cast<uint8_t>(set ? 2 * next + 1 : 0x80);
      next += set;
    }
  }
  return made;
}
constexpr Shuffles shuffles = make_shuffles();

// In byte j: the set bits of the bytes 0 to j of a mask.
inline uint64_t counts_up_to(uint64_t mask) {
  uint64_t counts = mask - ((mask >> 1) & 0x5555555555555555u);
  counts = (counts & 0x3333333333333333u) + ((counts >> 2) & 0x3333333333333333u);
  return ((counts + (counts >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u;
}

inline uint64_t fours_mask(uint64_t indices) {
  const __m128i table = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8);
  const __m128i halves = _mm_set1_epi8(15);
  const __m128i both = _mm_cvtsi64_si128(static_cast<long long>(indices));
  const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(both, halves));
  const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), halves));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(low, _mm_slli_epi16(high, 4))));
}

inline __m128i load_128(const void *from) { return _mm_loadu_si128(static_cast<const __m128i *>(from)); }
inline __m128i load_64(const void *from) { return _mm_loadl_epi64(static_cast<const __m128i *>(from)); }

inline W16 expand16(uint64_t mask, const uint16_t *&values) {
  const uint64_t counts = counts_up_to(mask), before = counts << 8;
  __m128i parts[8];
  for (int j = 0; j < 8; ++j)
    parts[j] = _mm_shuffle_epi8(load_128(values + ((before >> (8 * j)) & 255u)),
                                load_128(shuffles.pairs[(mask >> (8 * j)) & 255u]));
  values += counts >> 56;
  W16 word;
  for (int j = 0; j < 4; ++j) word.v[j] = _mm256_set_m128i(parts[2 * j + 1], parts[2 * j]);
  return word;
}

inline W8 expand_bytes(uint64_t mask, uint64_t counts, const void *values) {
  const uint64_t before = counts << 8;
  const uint8_t *from = static_cast<const uint8_t *>(values);
  __m128i parts[8];
  for (int j = 0; j < 8; ++j)
    parts[j] = _mm_shuffle_epi8(load_64(from + ((before >> (8 * j)) & 255u)),
                                load_64(shuffles.bytes[(mask >> (8 * j)) & 255u]));
  return {_mm256_set_m128i(_mm_unpacklo_epi64(parts[2], parts[3]), _mm_unpacklo_epi64(parts[0], parts[1])),
          _mm256_set_m128i(_mm_unpacklo_epi64(parts[6], parts[7]), _mm_unpacklo_epi64(parts[4], parts[5]))};
}

inline W8 expand8(uint64_t mask, const int8_t *&values) {
  const uint64_t counts = counts_up_to(mask);
  const W8 word = expand_bytes(mask, counts, values);
  values += counts >> 56;
  return word;
}

// 16 bytes of two numbers each as 32.
inline __m256i nibbles(const uint8_t *values) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  const __m256i wide = _mm256_cvtepu8_epi16(load_128(values));
  const __m256i apart = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(table, apart);
}

inline W8 load4(const uint8_t *values) { return {nibbles(values), nibbles(values + 16)}; }

inline W8 expand4(uint64_t mask, const uint8_t *&values) {
  alignas(32) uint8_t numbers[WORD + 8];  // eight more: the last load may begin at any of them
  const W8 all = load4(values);
  _mm256_store_si256(reinterpret_cast<__m256i *>(numbers), all.low);
  _mm256_store_si256(reinterpret_cast<__m256i *>(numbers + 32), all.high);
  memset(numbers + WORD, 0, 8);
  const uint64_t counts = counts_up_to(mask);
  values += ((counts >> 56) + 1) / 2;
  return expand_bytes(mask, counts, numbers);
}

inline W16 load16(const uint16_t *values, int count) {
  W16 word;
  if (count == WORD) {
    for (int j = 0; j < 4; ++j) word.v[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(values + 16 * j));
    return word;
  }
  alignas(32) uint16_t numbers[WORD] = {};
  memcpy(numbers, values, static_cast<size_t>(count) * 2);
  for (int j = 0; j < 4; ++j) word.v[j] = _mm256_load_si256(reinterpret_cast<const __m256i *>(numbers + 16 * j));
  return word;
}

inline W8 load8(const int8_t *values) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(values)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i *>(values + 32))};
}

inline void store16(uint16_t *to, const W16 &word) {
  for (int j = 0; j < 4; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 16 * j), word.v[j]);
}
inline void store8(int8_t *to, const W8 &word) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), word.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 32), word.high);
}

inline Sum no_sum() { return _mm256_setzero_ps(); }
inline Count no_count() { return _mm256_setzero_si256(); }
inline Count offset_count(const int32_t *) { return _mm256_setzero_si256(); }
inline float sum_of(const Sum &sum) {
  __m128 rest = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  rest = _mm_add_ps(rest, _mm_movehl_ps(rest, rest));
  return _mm_cvtss_f32(_mm_add_ss(rest, _mm_movehdup_ps(rest)));
}
inline int32_t count_of(const Count &count) {
  __m128i rest = _mm_add_epi32(_mm256_castsi256_si128(count), _mm256_extracti128_si256(count, 1));
  rest = _mm_add_epi32(rest, _mm_shuffle_epi32(rest, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(rest, _mm_shuffle_epi32(rest, 0xb1)));
}

inline Sum add_bf16(Sum sum, const W16 &word, const float *x) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int j = 0; j < 4; ++j) {
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(word.v[j], 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(word.v[j], upper));
    sum = _mm256_fmadd_ps(even, _mm256_loadu_ps(x + 16 * j), sum);
    sum = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + 16 * j + 8), sum);
  }
  return sum;
}

inline Sum add_f16(Sum sum, const W16 &word, const float *x) {
  for (int j = 0; j < 4; ++j) {
    const __m256 first = _mm256_cvtph_ps(_mm256_castsi256_si128(word.v[j]));
    const __m256 second = _mm256_cvtph_ps(_mm256_extracti128_si256(word.v[j], 1));
    sum = _mm256_fmadd_ps(first, _mm256_loadu_ps(x + 16 * j), sum);
    sum = _mm256_fmadd_ps(second, _mm256_loadu_ps(x + 16 * j + 8), sum);
  }
  return sum;
}

inline Sum add_sixteen(Sum sum, __m128i bytes, const float *x) {
  const __m256 first = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  const __m256 second = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
  return _mm256_fmadd_ps(second, _mm256_loadu_ps(x + 8), _mm256_fmadd_ps(first, _mm256_loadu_ps(x), sum));
}

inline Sum add_int(Sum sum, const W8 &word, const float *x) {
  sum = add_sixteen(sum, _mm256_castsi256_si128(word.low), x);
  sum = add_sixteen(sum, _mm256_extracti128_si256(word.low, 1), x + 16);
  sum = add_sixteen(sum, _mm256_castsi256_si128(word.high), x + 32);
  return add_sixteen(sum, _mm256_extracti128_si256(word.high, 1), x + 48);
}

// |w| times x with the sign of w: 128 * 127 twice stays below 2^15, so that no sum of two saturates.
inline __m256i pairs(__m256i word, const int8_t *x) {
  const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
  return _mm256_maddubs_epi16(_mm256_abs_epi8(word), _mm256_sign_epi8(other, word));
}

inline Count dot_int8(Count count, const W8 &word, const int8_t *x) {
  const __m256i ones = _mm256_set1_epi16(1);
  count = _mm256_add_epi32(count, _mm256_madd_epi16(pairs(word.low, x), ones));
  return _mm256_add_epi32(count, _mm256_madd_epi16(pairs(word.high, x + 32), ones));
}

inline Sum add_count(Sum sum, Count count, float scale) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(count), _mm256_set1_ps(scale), sum);
}
inline Sum add_scaled(Sum sum, Sum more, float scale) { return _mm256_fmadd_ps(more, _mm256_set1_ps(scale), sum); }

bool runs() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("popcnt");
}

}  // namespace

#include "attention.h"
#include "elements.h"
#include "tiles.h"

const Variant variant_avx2 = {"avx2", runs, select, unpacker, prepare, attend, elements};
