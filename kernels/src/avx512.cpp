// AVX-512 with VBMI2 (expand) and VNNI; compiled twice, the second time with BF16.
#include <immintrin.h>

#include "scalar.h"
#include "variant.h"

namespace {

constexpr int BIAS = 128;  // vpdpbusd multiplies unsigned by signed: weights are the unsigned ones
constexpr int SPLIT = 32;
constexpr int ROWS_1 = 4, ROWS_2 = 4, ROWS_4 = 2;
#ifdef __AVX512BF16__
#define SK_BF16_DOT 1
#else
#define SK_BF16_DOT 0
#endif

struct W16 {
  __m512i low, high;
};
struct W8 {
  __m512i v;
};
using Sum = __m512;
using Count = __m512i;

// Expand with merging, from a register. The zeroing form, and that with an operand in memory, which compilers make of
// the intrinsics, take about four times as long on Zen 4.
inline __m512i expand_bytes(__m512i into, uint64_t mask, __m512i from) {
  __asm__("vpexpandb %2, %0 %{%1%}" : "+v"(into) : "Yk"(static_cast<__mmask64>(mask)), "v"(from));
  return into;
}
inline __m512i expand_words(uint32_t mask, __m512i from) {
  __m512i into = _mm512_setzero_si512();
  __asm__("vpexpandw %2, %0 %{%1%}" : "+v"(into) : "Yk"(static_cast<__mmask32>(mask)), "v"(from));
  return into;
}

inline __m512i flip() { return _mm512_set1_epi8(static_cast<char>(0x80)); }

inline uint64_t fours_mask(uint64_t indices) {
  // p + 4 q -> bits p and q; unordered places are given too, so that no index is undefined
  const __m128i table = _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8);
  const __m128i halves = _mm_set1_epi8(15);
  const __m128i both = _mm_cvtsi64_si128(static_cast<long long>(indices));
  const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(both, halves));
  const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), halves));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(low, _mm_slli_epi16(high, 4))));
}

inline W16 expand16(uint64_t mask, const uint16_t *&values) {
  const uint32_t first = static_cast<uint32_t>(mask), second = static_cast<uint32_t>(mask >> 32);
  const uint16_t *middle = values + _mm_popcnt_u32(first);
  const W16 word = {expand_words(first, _mm512_loadu_si512(values)), expand_words(second, _mm512_loadu_si512(middle))};
  values += _mm_popcnt_u64(mask);
  return word;
}

inline W8 expand8(uint64_t mask, const int8_t *&values) {
  const __m512i stored = _mm512_xor_si512(_mm512_loadu_si512(values), flip());
  values += _mm_popcnt_u64(mask);
  return {expand_bytes(flip(), mask, stored)};
}

// 32 bytes of two numbers each as 64 bytes, plus 128.
inline __m512i nibbles(const uint8_t *values) {
  const __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(-128, -127, -126, -125, -124, -123, -122, -121, 120, 121, 122, 123, 124, 125, 126, 127));
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(values)));
  const __m512i apart =
      _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
  return _mm512_shuffle_epi8(table, apart);
}

inline W8 expand4(uint64_t mask, const uint8_t *&values) {
  const __m512i stored = nibbles(values);
  values += (_mm_popcnt_u64(mask) + 1) / 2;
  return {expand_bytes(flip(), mask, stored)};
}

inline W16 load16(const uint16_t *values, int count) {
  if (count == WORD) return {_mm512_loadu_si512(values), _mm512_loadu_si512(values + 32)};
  const uint64_t mask = (uint64_t{1} << count) - 1;
  return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), values),
          _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask >> 32), values + 32)};
}

inline W8 load8(const int8_t *values) { return {_mm512_xor_si512(_mm512_loadu_si512(values), flip())}; }
inline W8 load4(const uint8_t *values) { return {nibbles(values)}; }

inline void store16(uint16_t *to, const W16 &word) {
  _mm512_storeu_si512(to, word.low);
  _mm512_storeu_si512(to + 32, word.high);
}
inline void store8(int8_t *to, const W8 &word) { _mm512_storeu_si512(to, _mm512_xor_si512(word.v, flip())); }

inline Sum no_sum() { return _mm512_setzero_ps(); }
inline Count no_count() { return _mm512_setzero_si512(); }
inline Count offset_count(const int32_t *offsets) { return _mm512_loadu_si512(offsets); }
inline float sum_of(const Sum &sum) { return _mm512_reduce_add_ps(sum); }
inline int32_t count_of(const Count &count) {
  // In steps: the built-in reduction adds signed numbers, and these may pass 2^31.
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(count), _mm512_extracti64x4_epi64(count, 1));
  __m128i rest = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  rest = _mm_add_epi32(rest, _mm_shuffle_epi32(rest, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(rest, _mm_shuffle_epi32(rest, 0xb1)));
}

inline Sum add_bf16(Sum sum, const W16 &word, const float *x) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(word.low, 16)), _mm512_loadu_ps(x), sum);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(word.low, upper)), _mm512_loadu_ps(x + 16), sum);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(word.high, 16)), _mm512_loadu_ps(x + 32), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(word.high, upper)), _mm512_loadu_ps(x + 48), sum);
}

inline Sum add_f16(Sum sum, const W16 &word, const float *x) {
  sum = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(word.low)), _mm512_loadu_ps(x), sum);
  sum = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(word.low, 1)), _mm512_loadu_ps(x + 16), sum);
  sum = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(word.high)), _mm512_loadu_ps(x + 32), sum);
  return _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(word.high, 1)), _mm512_loadu_ps(x + 48), sum);
}

#if SK_BF16_DOT
inline Sum dot_bf16(Sum sum, const W16 &word, const uint16_t *x) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)word.low, (__m512bh)_mm512_loadu_si512(x));
  return _mm512_dpbf16_ps(sum, (__m512bh)word.high, (__m512bh)_mm512_loadu_si512(x + 32));
}
#endif

inline __m512 sixteen(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

inline Sum add_int(Sum sum, const W8 &word, const float *x) {
  const __m512i v = _mm512_xor_si512(word.v, flip());
  sum = _mm512_fmadd_ps(sixteen(_mm512_castsi512_si128(v)), _mm512_loadu_ps(x), sum);
  sum = _mm512_fmadd_ps(sixteen(_mm512_extracti32x4_epi32(v, 1)), _mm512_loadu_ps(x + 16), sum);
  sum = _mm512_fmadd_ps(sixteen(_mm512_extracti32x4_epi32(v, 2)), _mm512_loadu_ps(x + 32), sum);
  return _mm512_fmadd_ps(sixteen(_mm512_extracti32x4_epi32(v, 3)), _mm512_loadu_ps(x + 48), sum);
}

inline Count dot_int8(Count count, const W8 &word, const int8_t *x) {
  return _mm512_dpbusd_epi32(count, word.v, _mm512_loadu_si512(x));
}

inline Sum add_count(Sum sum, Count count, float scale) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(count), _mm512_set1_ps(scale), sum);
}
inline Sum add_scaled(Sum sum, Sum more, float scale) { return _mm512_fmadd_ps(more, _mm512_set1_ps(scale), sum); }

bool runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt")
#if SK_BF16_DOT
         && __builtin_cpu_supports("avx512bf16")
#endif
      ;
}

}  // namespace

#include "attention.h"
#include "elements.h"
#include "tiles.h"

#if SK_BF16_DOT
const Variant variant_avx512_bf16 = {"avx512_bf16", runs, select, unpacker, prepare, attend, elements};
#else
const Variant variant_avx512 = {"avx512", runs, select, unpacker, prepare, attend, elements};
#endif
