// One token through a block as Llama has it, but for its attention: what stands before it (norm, query, key and value,
// rotation of their places) and behind it (output, sum, norm, gated network, sum). Between the products, numbers are
// float32; what goes into a product or out of it has the type of the model, as in a model that is run step by step.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "layout.h"
#include "scalar.h"
#include "secateur_kernels.h"

namespace {

constexpr int SUMS = 16;  // side by side, so that a vector of any width holds some

// Memory of a calling thread; it grows to the widest block and stays.
struct Space {
  char *data = nullptr;
  size_t size = 0, used = 0;
  ~Space() { free(data); }

  bool open(size_t wanted) {
    used = 0;
    if (wanted <= size) return true;
    free(data);
    size = 0;
    data = static_cast<char *>(aligned_alloc(64, (wanted + 63) / 64 * 64));
    if (data != nullptr) size = wanted;
    return data != nullptr;
  }

  template <class T>
  T *take(int64_t count, size_t width = sizeof(T)) {
    char *at = data + used;
    used += (static_cast<size_t>(count) * width + 63) / 64 * 64;
    return reinterpret_cast<T *>(at);
  }
};
thread_local Space space;

bool is_type(int type) { return type == SK_F32 || type == SK_BF16 || type == SK_F16; }
size_t width_of(int type) { return type == SK_F32 ? 4 : 2; }

void widen(float *to, const void *from, int type, int64_t count) {
  const uint16_t *halves = static_cast<const uint16_t *>(from);
  if (type == SK_F32)
    memcpy(to, from, static_cast<size_t>(count) * 4);
  else if (type == SK_BF16)
    for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(halves[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from_f16(halves[i]);
}

void narrow(void *to, int type, const float *from, int64_t count) {
  uint16_t *halves = static_cast<uint16_t *>(to);
  if (type == SK_F32)
    memcpy(to, from, static_cast<size_t>(count) * 4);
  else if (type == SK_BF16)
    for (int64_t i = 0; i < count; ++i) halves[i] = to_bf16(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) halves[i] = to_f16(from[i]);
}

// x / sqrt(mean of squares + epsilon) * weight
void normalise(float *out, const float *x, const sk_norm &norm, int64_t count) {
  float sums[SUMS] = {};
  int64_t i = 0;
  for (; i + SUMS <= count; i += SUMS)
    for (int lane = 0; lane < SUMS; ++lane) sums[lane] += x[i + lane] * x[i + lane];
  for (; i < count; ++i) sums[0] += x[i] * x[i];
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(count) + norm.epsilon);
  widen(out, norm.weight, norm.type, count);
  for (i = 0; i < count; ++i) out[i] *= x[i] * factor;
}

// e^x to a few units of the last place: 2^n times a polynomial of the rest, which a compiler makes vectors of.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // the nearest whole number, in the low bits
  const float whole = shifted - 12582912.0f;
  const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return bits_float(float_bits(sum) + (float_bits(shifted) << 23));
}

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

int sizes_of(const sk_matrix *matrices, int count) {
  if (matrices == nullptr) return SK_NO_MATRIX;
  for (int i = 0; i < count; ++i) {
    const int status = check_sizes(matrices[i]);
    if (status != SK_OK) return status;
  }
  return SK_OK;
}

}  // namespace

extern "C" {

int sk_block_before(const sk_matrix *matrices, const sk_norm *norm, const void *x, int type, const void *cosines,
                    const void *sines, int64_t head, int64_t rotated, int activations, void *out, int threads) {
  const int status = sizes_of(matrices, 3);
  if (status != SK_OK) return status;
  if (!norm || !norm->weight || !x || !cosines || !sines || !out) return SK_NO_MATRIX;
  if (!is_type(type) || !is_type(norm->type)) return SK_BAD_LAYOUT;
  const int64_t columns = matrices[0].columns, turned = matrices[0].rows + matrices[1].rows;
  if (head < 1 || rotated < 2 || rotated % 2 || rotated > head || matrices[0].rows % head || matrices[1].rows % head)
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
