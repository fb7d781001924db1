// What a variant of the kernels is, and what they are given.
#pragma once

#include <cstdint>

#include "secateur_kernels.h"

constexpr int WORD = 64;   // columns of one word of a mask, the step of every kernel
constexpr int TOKENS = 8;  // at most, in one pass over the weights
constexpr int LANES = 16;  // 32-bit sums of one word in the widest variant

// Forms of the activations. A kernel says which it reads.
enum Form { FORM_F32 = 1, FORM_SPLIT = 2, FORM_BF16 = 4, FORM_INT8 = 8 };

// Up to TOKENS tokens in the forms that the kernels of a call read; zero behind the last column and the last token.
struct Activations {
  int64_t words;       // ceil(columns / 64): each form has words * 64 places a token
  float *f32;          // in the order of the columns
  float *split;        // even columns before odd ones in each block, as weights of bfloat16 come apart
  uint16_t *bf16;      // in the order of the columns
  int8_t *int8;        // rounded, in the order of the columns
  float *scales;       // of int8: words a token
  int32_t *offsets;    // LANES a word: what a kernel with unsigned weights has too much, negative
  float token_scale[TOKENS];
  int32_t token_offset[TOKENS];  // the sum of the offsets of a token, modulo 2^32
};

struct Output {
  void *data;
  int type;
  int64_t stride;  // between tokens
  int64_t offset;  // of row 0 of the matrix
  int tokens;
};

using RowsFunction = void (*)(const sk_matrix &, const Activations &, int64_t first, int64_t last, const Output &);
using UnpackFunction = void (*)(const sk_matrix &, int64_t first, int64_t last, void *out, int type);

struct Kernel {
  int form;
  RowsFunction rows[4];  // for 1, 2, 4 and 8 tokens
};

// What happens to rows of numbers between products.
struct Elements {
  void (*widen)(float *to, const void *from, int type, int64_t count);
  void (*narrow)(void *to, int type, const float *from, int64_t count);
  void (*normalise)(float *out, const float *x, const sk_norm &norm, int64_t count);
  void (*gate)(float *gate, const float *up, int64_t count);  // gate = silu(gate) * up
  void (*rotate)(float *x, int64_t heads, int64_t head, int64_t rotated, const float *cosines, const float *sines);
  int64_t (*highest)(const void *x, int type, int64_t count);
  uint64_t (*read)(const char *data, int64_t lines);
};

struct Variant {
  const char *name;
  bool (*runs)();
  Kernel (*select)(const sk_matrix &, int type, int activations);
  UnpackFunction (*unpack)(const sk_matrix &);
  // Fills the forms asked for. x is tokens x columns.
  void (*prepare)(Activations &, int forms, const void *x, int type, int tokens, int padded, int64_t columns,
                  bool groups);
  // out = the values of `places` places, weighed by the softmax of their keys times the query; all of one head.
  void (*attend)(float *out, const float *query, const void *keys, const void *values, int type, int64_t head,
                 int64_t places);
  const Elements &elements;
};

// The one in use.
const Variant &variant_in_use();

extern const Variant variant_portable;
#if defined(SK_X86)
extern const Variant variant_avx2, variant_avx512, variant_avx512_bf16;
#endif
