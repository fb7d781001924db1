// One token through a block as Llama has it, but for its attention: what stands before it (norm, query, key and value,
// rotation of their places) and behind it (output, sum, norm, gated network, sum). Between the products, numbers are
// float32; what goes into a product or out of it has the type of the model, as in a model that is run step by step.
#include "numbers.h"
#include "secateur_kernels.h"
#include "variant.h"

extern "C" {

int sk_block_before(const sk_matrix *matrices, const sk_norm *norm, const void *x, int type, const void *cosines,
                    const void *sines, int64_t head, int64_t rotated, int activations, void *out, int threads) {
  const int status = sizes_of(matrices, 3);
  if (status != SK_OK) return status;
  if (!norm || !norm->weight || !x || (rotated && (!cosines || !sines)) || !out) return SK_NO_MATRIX;
  if (!is_type(type) || !is_type(norm->type)) return SK_BAD_LAYOUT;
  const int64_t columns = matrices[0].columns, turned = matrices[0].rows + matrices[1].rows;
  if (head < 1 || rotated < 0 || rotated % 2 || rotated > head || matrices[0].rows % head || matrices[1].rows % head)
    return SK_BAD_SIZE;
  const int64_t widest = columns > turned ? columns : turned;
  if (!space.open(static_cast<size_t>(3 * widest + 2 * head) * 4 + 1024)) return SK_NO_MEMORY;
  const Elements &e = variant_in_use().elements;
  float *wide = space.take<float>(widest), *normed = space.take<float>(widest);
  void *small = space.take<char>(widest, 4);
  float *cosine = space.take<float>(head), *sine = space.take<float>(head);
  e.widen(wide, x, type, columns);
  e.normalise(normed, wide, *norm, columns);
  e.narrow(small, type, normed, columns);
  const int done = sk_linear(matrices, 3, small, type, 1, activations, out, threads);
  if (done != SK_OK) return done;
  if (rotated == 0) return SK_OK;
  e.widen(cosine, cosines, type, rotated);
  e.widen(sine, sines, type, rotated);
  e.widen(wide, out, type, turned);
  e.rotate(wide, turned / head, head, rotated, cosine, sine);
  e.narrow(out, type, wide, turned);
  return SK_OK;
}

int sk_block_behind(const sk_matrix *matrices, const sk_norm *norm, const void *attended, const void *x, int type,
                    int activations, void *out, int threads) {
  const int status = sizes_of(matrices, 4);
  if (status != SK_OK) return status;
  if (!norm || !norm->weight || !attended || !x || !out) return SK_NO_MATRIX;
  if (!is_type(type) || !is_type(norm->type)) return SK_BAD_LAYOUT;
  const sk_matrix &output = matrices[0], &gate = matrices[1], &up = matrices[2], &down = matrices[3];
  const int64_t hidden = output.rows, inner = gate.rows;
  if (gate.columns != hidden || up.columns != hidden || up.rows != inner || down.columns != inner ||
      down.rows != hidden)
    return SK_BAD_SIZE;
  if (!space.open(static_cast<size_t>(3 * hidden + 4 * inner) * 4 + 1024)) return SK_NO_MEMORY;
  const Elements &e = variant_in_use().elements;
  float *sum = space.take<float>(hidden), *normed = space.take<float>(hidden), *wide = space.take<float>(2 * inner);
  char *small = space.take<char>(hidden, 4), *pair = space.take<char>(2 * inner, 4);
  int done = sk_linear(&output, 1, attended, type, 1, activations, small, threads);
  if (done != SK_OK) return done;
  e.widen(sum, x, type, hidden);
  e.widen(normed, small, type, hidden);
  for (int64_t i = 0; i < hidden; ++i) sum[i] += normed[i];
  e.normalise(normed, sum, *norm, hidden);
  e.narrow(small, type, normed, hidden);
  done = sk_linear(&gate, 2, small, type, 1, activations, pair, threads);
  if (done != SK_OK) return done;
  e.widen(wide, pair, type, 2 * inner);
  e.gate(wide, wide + inner, inner);
  e.narrow(pair, type, wide, inner);
  done = sk_linear(&down, 1, pair, type, 1, activations, small, threads);
  if (done != SK_OK) return done;
  e.widen(normed, small, type, hidden);
  for (int64_t i = 0; i < hidden; ++i) sum[i] += normed[i];
  e.narrow(out, type, sum, hidden);
  return SK_OK;
}
}
