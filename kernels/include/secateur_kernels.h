/* Products with the packed matrices of the sparse format of secateur (docs/sparse-format.md), on the CPU.
 *
 * A plain C interface: pointers and integers, no ownership, no global state but the thread pool and the variant in use.
 * Every function that can fail returns an sk_status; sk_message says it in words. Pointers are to memory of the caller,
 * in the layout of the format: row-major, low byte first, 64 bytes of padding behind the values. */
#ifndef SECATEUR_KERNELS_H
#define SECATEUR_KERNELS_H

#include <stdint.h>

#if defined(__GNUC__)
#define SK_API __attribute__((visibility("default")))
#else
#define SK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SK_ABI 1
/* Sums of products of 8 by 8 bits stay within 32 bits up to here. */
#define SK_MOST_COLUMNS 131072
#define SK_MOST_ROWS 2147483647

enum sk_kind { SK_MASK = 0, SK_TWO_OF_FOUR = 1, SK_DENSE = 2 };
enum sk_type { SK_F32 = 0, SK_BF16 = 1, SK_F16 = 2 };

/* How activations meet weights of 8 and 4 bits. Weights of 16 bits always meet them as they are. */
enum sk_activations {
  SK_FLOAT = 0,      /* as they are; sums in float32 */
  SK_INT8_TOKEN = 1, /* rounded to 8 bits, one scale for each token: fastest */
  SK_INT8_GROUP = 2  /* rounded to 8 bits, one scale for every 64 columns of a token: nearer */
};

enum sk_status {
  SK_OK = 0,
  SK_NO_MATRIX = 1,   /* a null pointer, or a count below one */
  SK_BAD_LAYOUT = 2,  /* kind, bits, types or group size that do not go together */
  SK_BAD_SIZE = 3,    /* rows, columns or tokens out of range, or columns that differ between matrices */
  SK_BAD_LENGTH = 4,  /* value_count is not what the rows ask for */
  SK_BAD_STARTS = 5,  /* starts do not begin at zero, end at value_count and agree with the mask */
  SK_BAD_PATTERN = 6, /* bits behind the last column, or places of 2:4 that do not ascend */
  SK_NO_MEMORY = 7,
  SK_NO_VARIANT = 8, /* unknown, or this CPU cannot run it */
  SK_BAD_SCALE = 9,  /* not finite */
  SK_FULL = 10       /* no place left in a cache */
};

typedef struct sk_matrix {
  int64_t rows, columns;
  int64_t value_count; /* elements of values, padding not counted */
  int64_t group_size;  /* columns that share a scale, a multiple of 64; 0 is the row */
  int32_t kind, bits;
  int32_t value_type; /* at 16 bits SK_BF16 or SK_F16; else ignored */
  int32_t bias_type;
  const void *pattern; /* uint64 words of the mask, or uint8 indices of 2:4; null for dense */
  const void *values;
  const void *scales;    /* bfloat16; null at 16 bits */
  const int64_t *starts; /* rows + 1, for masks only: where the values of each row begin */
  const void *bias;      /* rows, or null */
} sk_matrix;

SK_API int sk_abi(void);
SK_API const char *sk_message(int status);

/* Variants, best first: how many are built in, the name of one (null past the end), whether this CPU runs it. */
SK_API int sk_variant_count(void);
SK_API const char *sk_variant_name(int number);
SK_API int sk_variant_runs(int number);
/* The one in use; at the start that of the environment variable SECATEUR_KERNELS, else the best that runs. */
SK_API const char *sk_variant(void);
SK_API int sk_use(const char *name);

/* All that a reader must check before computing, O(size of the pattern). */
SK_API int sk_check(const sk_matrix *matrix);

/* out = x W^T + bias, for one or more matrices with the same columns: activations are rounded once for all of them.
 *
 * x: tokens x columns; out: tokens x the sum of their rows, side by side; both contiguous, of the same type.
 * starts must be those of a matrix that passed sk_check: only sizes are looked at here. */
SK_API int sk_linear(const sk_matrix *matrices, int count, const void *x, int type, int64_t tokens, int activations,
                     void *out, int threads);

typedef struct sk_norm {
  const void *weight; /* as many as the columns it is for */
  int32_t type;
  float epsilon;
} sk_norm;

/* One token through a block as Llama has it, without its attention; all of x, out, cosines, sines of one type.
 *
 * Before: out = query, key and value of x after its norm (x / sqrt(mean of squares + epsilon) * weight), side by side;
 * of each head of query and key the pairs (i, i + rotated / 2) are turned by the cosines and sines (`rotated` of each;
 * none for 0).
 * matrices: query, key, value. */
SK_API int sk_block_before(const sk_matrix *matrices, const sk_norm *norm, const void *x, int type, const void *cosines,
                           const void *sines, int64_t head, int64_t rotated, int activations, void *out, int threads);

/* Behind: h = x + output(attended); out = h + down(silu(gate(n)) * up(n)) with n = h after its norm.
 * matrices: output, gate, up, down. */
SK_API int sk_block_behind(const sk_matrix *matrices, const sk_norm *norm, const void *attended, const void *x, int type,
                           int activations, void *out, int threads);

/* A block of a model: matrices are query, key, value, output, gate, up, down. */
typedef struct sk_block {
  sk_matrix matrices[7];
  sk_norm norms[2];      /* before the attention, before the network */
  int64_t head, rotated; /* rotated: 0, or as many cosines and sines as a token has */
  float scale;           /* of the products of queries and keys */
  int32_t reserved;
} sk_block;

/* Keys and values of the tokens so far, both groups x places x head, of the type of x. */
typedef struct sk_cache {
  void *keys, *values;
  int64_t places, used;
  int64_t window; /* the token attends to so many places, itself among them; 0: to all */
} sk_cache;

/* One token through all blocks: its key and value are put at place `used` of each cache, which then is one more.
 *
 * x: the row of the embedding; cosines, sines: those of the token's place. out = head(norm of what comes out of the last
 * block), head->rows numbers; without a head (null) it is that norm. All of one type. On an error caches hold what they
 * held, but for the place `used`. */
SK_API int sk_decode(const sk_block *blocks, sk_cache *caches, int count, const sk_norm *norm, const sk_matrix *head,
                     const void *x, int type, const void *cosines, const void *sines, int activations, void *out,
                     int threads);

/* Rows first to last (exclusive) as numbers: out is (last - first) x columns, contiguous. */
SK_API int sk_unpack(const sk_matrix *matrix, int64_t first, int64_t last, void *out, int type, int threads);

/* The place of the first of the highest of `count` numbers, of the first NaN if there is one; -1 if there are no numbers.
 * The caller's thread computes it alone: it takes no longer than waking others. */
SK_API int64_t sk_highest(const void *x, int type, int64_t count);

/* Bytes read by `threads` threads, for measuring: sums 64-bit words. */
SK_API uint64_t sk_read(const void *data, int64_t bytes, int threads);

#ifdef __cplusplus
}
#endif
#endif
