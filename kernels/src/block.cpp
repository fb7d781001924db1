// One token through a block as Llama has it, but for its attention: what stands before it (norm, query, key and value,
// rotation of their places) and behind it (output, sum, norm, gated network, sum). Between the products, numbers are
// float32; what goes into a product or out of it has the type of the model, as in a model that is run step by step.
#include "numbers.h"
#include "secateur_kernels.h"

namespace {

// Turns the pairs (i, i + half) of the first `rotated` numbers of each head.
void rotate(float *x, int64_t heads, int64_t head, int64_t rotated, const float *cosines, const float *sines) {
  const int64_t half = rotated / 2;
  for (int64_t h = 0; h < heads; ++h, x += head)
    for (int64_t i = 0; i < half; ++i) {
      const float first = x[i], second = x[half + i];
      x[i] = first * cosines[i] - second * sines[i];
      x[half + i] = second * cosines[half + i] + first * sines[half + i];
    }
}

}  // namespace

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
  float *wide = space.take<float>(widest), *normed = space.take<float>(widest);
  void *small = space.take<char>(widest, 4);
  float *cosine = space.take<float>(head), *sine = space.take<float>(head);
  widen(wide, x, type, columns);
  normalise(normed, wide, *norm, columns);
  narrow(small, type, normed, columns);
  const int done = sk_linear(matrices, 3, small, type, 1, activations, out, threads);
  if (done != SK_OK) return done;
  if (rotated == 0) return SK_OK;
  widen(cosine, cosines, type, rotated);
  widen(sine, sines, type, rotated);
  widen(wide, out, type, turned);
  rotate(wide, turned / head, head, rotated, cosine, sine);
  narrow(out, type, wide, turned);
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
  float *sum = space.take<float>(hidden), *normed = space.take<float>(hidden), *wide = space.take<float>(2 * inner);
  char *small = space.take<char>(hidden, 4), *pair = space.take<char>(2 * inner, 4);
  int done = sk_linear(&output, 1, attended, type, 1, activations, small, threads);
  if (done != SK_OK) return done;
  widen(sum, x, type, hidden);
  widen(normed, small, type, hidden);
  for (int64_t i = 0; i < hidden; ++i) sum[i] += normed[i];
  normalise(normed, sum, *norm, hidden);
  narrow(small, type, normed, hidden);
  done = sk_linear(&gate, 2, small, type, 1, activations, pair, threads);
  if (done != SK_OK) return done;
  widen(wide, pair, type, 2 * inner);
  for (int64_t i = 0; i < inner; ++i) wide[i] = wide[i] / (1.0f + exponential(-wide[i])) * wide[inner + i];
  narrow(pair, type, wide, inner);
  done = sk_linear(&down, 1, pair, type, 1, activations, small, threads);
  if (done != SK_OK) return done;
  widen(normed, small, type, hidden);
  for (int64_t i = 0; i < hidden; ++i) sum[i] += normed[i];
  narrow(out, type, sum, hidden);
  return SK_OK;
}
}
