// One token through all blocks of a model as Llama is built, the last norm and the head: what sk_block_before and
// sk_block_behind compute, and between them the attention to the keys and values that the caller holds.
#include "numbers.h"
#include "pool.h"
#include "secateur_kernels.h"
#include "variant.h"

namespace {

constexpr int64_t LEAST = 32768;  // multiplications for which another thread is worth waking
constexpr int64_t MOST_NUMBERS = int64_t{1} << 48;  // of the keys of a cache
constexpr int64_t STEP = 4;       // units of a head: threads get pieces of whole fours

struct Heads {
  const Variant *variant;
  const float *queries;  // times the scale
  float *out;
  const char *keys, *values;  // of the first place that is attended to, of the first group
  int64_t head, queries_of_group, places, stride;  // stride: bytes between groups
  int type;
};

void some_heads(void *context, int64_t first, int64_t last) {
  const Heads &h = *static_cast<const Heads *>(context);
  for (int64_t one = first / STEP; one < last / STEP; ++one) {
    const int64_t group = one / h.queries_of_group * h.stride, at = one * h.head;
    h.variant->attend(h.out + at, h.queries + at, h.keys + group, h.values + group, h.type, h.head, h.places);
  }
}

int check_block(const sk_block &block, int64_t hidden) {
  const int status = sizes_of(block.matrices, 7);
  if (status != SK_OK) return status;
  const sk_matrix &query = block.matrices[0], &key = block.matrices[1], &value = block.matrices[2];
  const sk_matrix &output = block.matrices[3], &gate = block.matrices[4], &up = block.matrices[5];
  const sk_matrix &down = block.matrices[6];
  const int64_t head = block.head, rotated = block.rotated;
  if (query.columns != hidden || key.columns != hidden || value.columns != hidden || output.rows != hidden ||
      gate.columns != hidden || up.columns != hidden || down.rows != hidden || output.columns != query.rows ||
      value.rows != key.rows || up.rows != gate.rows || down.columns != gate.rows)
    return SK_BAD_SIZE;
  if (head < 1 || rotated < 0 || rotated % 2 || rotated > head || query.rows % head || key.rows % head ||
      query.rows % key.rows)
    return SK_BAD_SIZE;
  for (const sk_norm &norm : block.norms) {
    if (norm.weight == nullptr) return SK_NO_MATRIX;
    if (!is_type(norm.type)) return SK_BAD_LAYOUT;
  }
  return SK_OK;
}

int check_cache(const sk_cache &cache, int64_t rows) {
  if (cache.keys == nullptr || cache.values == nullptr) return SK_NO_MATRIX;
  if (cache.places < 1 || cache.places > MOST_NUMBERS / rows || cache.used < 0 || cache.window < 0) return SK_BAD_SIZE;
  return cache.used < cache.places ? SK_OK : SK_FULL;
}

// Puts key and value of the token into the cache, and attends to all that the window leaves of it.
void attention(const sk_block &block, const sk_cache &cache, const char *mixed, int type, float *queries, float *sums,
               int threads) {
  const int64_t head = block.head, rows = block.matrices[0].rows, groups = block.matrices[1].rows / head;
  const int64_t width = static_cast<int64_t>(width_of(type)), place = head * width, stride = cache.places * place;
  char *keys = static_cast<char *>(cache.keys), *values = static_cast<char *>(cache.values);
  const char *key = mixed + rows * width, *value = key + groups * place;
  for (int64_t g = 0; g < groups; ++g) {
    memcpy(keys + g * stride + cache.used * place, key + g * place, static_cast<size_t>(place));
    memcpy(values + g * stride + cache.used * place, value + g * place, static_cast<size_t>(place));
  }
  variant_in_use().elements.widen(queries, mixed, type, rows);
  for (int64_t i = 0; i < rows; ++i) queries[i] *= block.scale;
  const int64_t last = cache.used + 1, first = cache.window && last > cache.window ? last - cache.window : 0;
  Heads heads = {&variant_in_use(), queries, sums, keys + first * place, values + first * place, head,
                 rows / head / groups, last - first, stride, type};
  const int64_t work = (last - first) * head * 2 / STEP;  // of a unit
  parallel(rows / head * STEP, 1 + LEAST / (work > 0 ? work : 1), threads, some_heads, &heads);
}

}  // namespace

extern "C" int sk_decode(const sk_block *blocks, sk_cache *caches, int count, const sk_norm *norm, const sk_matrix *head,
                         const void *x, int type, const void *cosines, const void *sines, int activations, void *out,
                         int threads) {
  if (!blocks || !caches || count < 1 || !norm || !norm->weight || !x || !cosines || !sines || !out)
    return SK_NO_MATRIX;
  if (!is_type(type) || !is_type(norm->type)) return SK_BAD_LAYOUT;
  const int64_t hidden = blocks[0].matrices[0].columns;
  int64_t widest = hidden, queries_most = 1;
  for (int i = 0; i < count; ++i) {
    int status = check_block(blocks[i], hidden);
    if (status == SK_OK) status = check_cache(caches[i], blocks[i].matrices[1].rows);
    if (status != SK_OK) return status;
    const int64_t rows = blocks[i].matrices[0].rows, all = rows + 2 * blocks[i].matrices[1].rows;
    widest = all > widest ? all : widest;
    queries_most = rows > queries_most ? rows : queries_most;
  }
  if (head != nullptr) {
    const int status = sizes_of(head, 1);
    if (status != SK_OK) return status;
    if (head->columns != hidden) return SK_BAD_SIZE;
  }
  if (!space.open(static_cast<size_t>(4 * hidden + 2 * queries_most + 2 * widest) * 4 + 1024)) return SK_NO_MEMORY;
  char *now = space.take<char>(hidden, 4), *next = space.take<char>(hidden, 4);
  char *mixed = space.take<char>(widest, 4), *attended = space.take<char>(widest, 4);
  float *wide = space.take<float>(hidden), *normed = space.take<float>(hidden);
  float *queries = space.take<float>(queries_most), *sums = space.take<float>(queries_most);
  const Elements &e = variant_in_use().elements;
  const void *from = x;
  for (int i = 0; i < count; ++i) {
    const sk_block &block = blocks[i];
    int done = sk_block_before(block.matrices, &block.norms[0], from, type, cosines, sines, block.head, block.rotated,
                               activations, mixed, threads);
    if (done != SK_OK) return done;
    attention(block, caches[i], mixed, type, queries, sums, threads);
    e.narrow(attended, type, sums, block.matrices[0].rows);
    done = sk_block_behind(block.matrices + 3, &block.norms[1], attended, from, type, activations, next, threads);
    if (done != SK_OK) return done;
    char *const free_now = now;
    now = next;
    next = free_now;
    from = now;
  }
  e.widen(wide, from, type, hidden);
  e.normalise(normed, wide, *norm, hidden);
  if (head == nullptr) {
    e.narrow(out, type, normed, hidden);
  } else {
    e.narrow(attended, type, normed, hidden);
    const int done = sk_linear(head, 1, attended, type, 1, activations, out, threads);
    if (done != SK_OK) return done;
  }
  for (int i = 0; i < count; ++i) ++caches[i].used;
  return SK_OK;
}
