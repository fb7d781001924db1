// The loops that all variants share. A variant defines, in the namespace without a name, before it includes this:
//
//   W16, W8                 64 weights: of 16 bits as stored, zeros in place; of 8 bits as numbers plus BIAS (0 or 128)
//   expand16, expand8, expand4 (mask, &values)   64 weights behind a mask; values is moved on
//   load16 (values, count), load8, load4         64 weights that lie side by side
//   fours_mask (indices)    eight bytes of 2:4 indices as a mask of 64 bits
//   Sum, Count              partial sums in float32 and in int32
//   ...                     and the functions called on them below
//
// Each variant is compiled by itself with its own flags. Nothing here may have external linkage, and no header of C++ is
// included: an inline function that two variants share would be taken from either of them.
#pragma once

#include "prepare.h"
#include "scalar.h"
#include "variant.h"

namespace {

constexpr uintptr_t AHEAD = 1024;  // bytes, in each of the rows that are read side by side

inline int64_t words_of(const sk_matrix &m) { return (m.columns + WORD - 1) / WORD; }
inline int64_t groups_of(const sk_matrix &m) {
  return m.group_size ? (m.columns + m.group_size - 1) / m.group_size : 1;
}
inline uint64_t tail_mask(int64_t columns) {
  const int used = static_cast<int>(columns % WORD);
  return used ? (uint64_t{1} << used) - 1 : ~uint64_t{0};
}
inline void ahead(const void *p) {
  // As a number: the address may lie behind the end, where a prefetch does nothing.
  __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(p) + AHEAD));
}

// Where the weights of a word are: a mask as it is stored, or made of the indices of 2:4.
struct MaskWords {
  const uint64_t *words;
  void open(const sk_matrix &m, int64_t row) { words = static_cast<const uint64_t *>(m.pattern) + row * words_of(m); }
  template <bool Tail>
  uint64_t at(const sk_matrix &, int64_t word) const {
    return words[word];
  }
  static int64_t start(const sk_matrix &m, int64_t row) { return m.starts[row]; }
};

struct Fours {
  const uint8_t *indices;
  int64_t stride;
  void open(const sk_matrix &m, int64_t row) {
    stride = (m.columns + 7) / 8;
    indices = static_cast<const uint8_t *>(m.pattern) + row * stride;
  }
  template <bool Tail>
  uint64_t at(const sk_matrix &m, int64_t word) const {
    uint64_t eight = 0;
    if (!Tail) {
      memcpy(&eight, indices + word * 8, 8);
      return fours_mask(eight);
    }
    const int64_t left = stride - word * 8;
    memcpy(&eight, indices + word * 8, static_cast<size_t>(left < 8 ? left : 8));
    return fours_mask(eight) & tail_mask(m.columns);
  }
  static int64_t start(const sk_matrix &m, int64_t row) {
    const int64_t numbers = m.columns / 2;
    return row * (m.bits == 4 ? numbers / 2 + numbers % 2 : numbers);
  }
};

// Readers: one row, 64 weights at a time.
template <class Pattern>
struct Sparse16 {
  using Word = W16;
  Pattern pattern;
  const uint16_t *values;
  void open(const sk_matrix &m, int64_t row) {
    pattern.open(m, row);
    values = static_cast<const uint16_t *>(m.values) + Pattern::start(m, row);
  }
  template <bool Tail>
  W16 next(const sk_matrix &m, int64_t word) {
    ahead(values);
    return expand16(pattern.template at<Tail>(m, word), values);
  }
};

template <class Pattern>
struct Sparse8 {
  using Word = W8;
  Pattern pattern;
  const int8_t *values;
  void open(const sk_matrix &m, int64_t row) {
    pattern.open(m, row);
    values = static_cast<const int8_t *>(m.values) + Pattern::start(m, row);
  }
  template <bool Tail>
  W8 next(const sk_matrix &m, int64_t word) {
    ahead(values);
    return expand8(pattern.template at<Tail>(m, word), values);
  }
};

template <class Pattern>
struct Sparse4 {
  using Word = W8;
  Pattern pattern;
  const uint8_t *values;
  void open(const sk_matrix &m, int64_t row) {
    pattern.open(m, row);
    values = static_cast<const uint8_t *>(m.values) + Pattern::start(m, row);
  }
  template <bool Tail>
  W8 next(const sk_matrix &m, int64_t word) {
    ahead(values);
    return expand4(pattern.template at<Tail>(m, word), values);
  }
};

struct Dense16 {
  using Word = W16;
  const uint16_t *values;
  void open(const sk_matrix &m, int64_t row) { values = static_cast<const uint16_t *>(m.values) + row * m.columns; }
  template <bool Tail>
  W16 next(const sk_matrix &m, int64_t word) {
    const uint16_t *at = values + word * WORD;
    ahead(at);
    ahead(at + WORD / 2);  // a word is two lines of a cache
    // What stands behind the row may be no number: it is not loaded.
    return load16(at, Tail ? static_cast<int>(m.columns - word * WORD) : WORD);
  }
};

struct Dense8 {
  using Word = W8;
  const int8_t *values;
  void open(const sk_matrix &m, int64_t row) { values = static_cast<const int8_t *>(m.values) + row * m.columns; }
  template <bool Tail>
  W8 next(const sk_matrix &, int64_t word) {
    ahead(values + word * WORD);
    return load8(values + word * WORD);
  }
};

struct Dense4 {
  using Word = W8;
  const uint8_t *values;
  void open(const sk_matrix &m, int64_t row) {
    values = static_cast<const uint8_t *>(m.values) + row * ((m.columns + 1) / 2);
  }
  template <bool Tail>
  W8 next(const sk_matrix &, int64_t word) {
    ahead(values + word * (WORD / 2));
    return load4(values + word * (WORD / 2));
  }
};

// Dots: what a word adds to a sum, and what a sum comes to. `scale` is that of the weights of the word where they have
// several in a row, else it is applied in the end.
struct FloatBf16 {
  static constexpr int form = FORM_SPLIT;
  static constexpr bool scaled = false, grouped = false;
  using Acc = Sum;
  static void add(Acc &acc, const W16 &w, const Activations &a, int64_t at, int64_t, float) {
    acc = add_bf16(acc, w, a.split + at * WORD);
  }
  static float end(const Acc &acc, const Activations &, int) { return sum_of(acc); }
};

struct FloatF16 {
  static constexpr int form = FORM_F32;
  static constexpr bool scaled = false, grouped = false;
  using Acc = Sum;
  static void add(Acc &acc, const W16 &w, const Activations &a, int64_t at, int64_t, float) {
    acc = add_f16(acc, w, a.f32 + at * WORD);
  }
  static float end(const Acc &acc, const Activations &, int) { return sum_of(acc); }
};

#if SK_BF16_DOT
struct Bf16 {
  static constexpr int form = FORM_BF16;
  static constexpr bool scaled = false, grouped = false;
  using Acc = Sum;
  static void add(Acc &acc, const W16 &w, const Activations &a, int64_t at, int64_t, float) {
    acc = dot_bf16(acc, w, a.bf16 + at * WORD);
  }
  static float end(const Acc &acc, const Activations &, int) { return sum_of(acc); }
};
#endif

template <bool Grouped>
struct FloatInt {
  static constexpr int form = FORM_F32;
  static constexpr bool scaled = true, grouped = Grouped;
  using Acc = Sum;
  static void add(Acc &acc, const W8 &w, const Activations &a, int64_t at, int64_t, float scale) {
    if (Grouped)
      acc = add_scaled(acc, add_int(no_sum(), w, a.f32 + at * WORD), scale);
    else
      acc = add_int(acc, w, a.f32 + at * WORD);
  }
  static float end(const Acc &acc, const Activations &, int) { return sum_of(acc); }
};

// One scale a row and one a token: integers to the end of the row.
struct IntOnce {
  static constexpr int form = FORM_INT8;
  static constexpr bool scaled = true, grouped = false;
  using Acc = Count;
  static void add(Acc &acc, const W8 &w, const Activations &a, int64_t at, int64_t, float) {
    acc = dot_int8(acc, w, a.int8 + at * WORD);
  }
  static float end(const Acc &acc, const Activations &a, int token) {
    const uint32_t sum = static_cast<uint32_t>(count_of(acc)) + static_cast<uint32_t>(BIAS ? a.token_offset[token] : 0);
    return static_cast<float>(static_cast<int32_t>(sum)) * a.token_scale[token];
  }
};

// A scale for every word of the activations, of the weights, or both.
template <bool Grouped>
struct IntWord {
  static constexpr int form = FORM_INT8;
  static constexpr bool scaled = true, grouped = Grouped;
  using Acc = Sum;
  static void add(Acc &acc, const W8 &w, const Activations &a, int64_t at, int64_t, float scale) {
    const Count count = dot_int8(offset_count(a.offsets + at * LANES), w, a.int8 + at * WORD);
    acc = add_count(acc, count, Grouped ? scale * a.scales[at] : a.scales[at]);
  }
  static float end(const Acc &acc, const Activations &, int) { return sum_of(acc); }
};

template <class T>
inline void clear(T &acc);
template <>
inline void clear<Sum>(Sum &acc) {
  acc = no_sum();
}
template <>
inline void clear<Count>(Count &acc) {
  acc = no_count();
}

// R rows, `step` apart, times T tokens. Rows side by side give the processor work while a row waits for its next place
// in the values.
template <class Reader, class Dot, int T, int R>
inline void tile(const sk_matrix &m, const Activations &a, int64_t row, int64_t step, const Output &out) {
  Reader readers[R];
  typename Dot::Acc acc[R][T];
  const uint16_t *scales[R] = {};
  const int64_t groups = groups_of(m);
  for (int r = 0; r < R; ++r) {
    readers[r].open(m, row + r * step);
    if (Dot::scaled) scales[r] = static_cast<const uint16_t *>(m.scales) + (row + r * step) * groups;
    for (int t = 0; t < T; ++t) clear(acc[r][t]);
  }
  const int64_t whole = m.columns / WORD, words = a.words;
  const int64_t words_a_group = Dot::grouped ? m.group_size / WORD : 1;
  int64_t group = 0, left = words_a_group;
  for (int64_t w = 0; w < whole; ++w) {
    for (int r = 0; r < R; ++r) {
      const typename Reader::Word word = readers[r].template next<false>(m, w);
      const float scale = Dot::grouped ? from_bf16(scales[r][group]) : 1.0f;
      for (int t = 0; t < T; ++t) Dot::add(acc[r][t], word, a, t * words + w, w, scale);
    }
    if (Dot::grouped && --left == 0) {
      left = words_a_group;
      ++group;
    }
  }
  for (int r = 0; r < R; ++r) {
    if (whole < words) {
      const typename Reader::Word word = readers[r].template next<true>(m, whole);
      const float scale = Dot::grouped ? from_bf16(scales[r][group]) : 1.0f;
      for (int t = 0; t < T; ++t) Dot::add(acc[r][t], word, a, t * words + whole, whole, scale);
    }
    const float scale = Dot::scaled && !Dot::grouped ? from_bf16(scales[r][0]) : 1.0f;
    const float bias = m.bias ? load_number(m.bias, m.bias_type, row + r * step) : 0.0f;
    for (int t = 0; t < T && t < out.tokens; ++t)
      store_number(out.data, out.type, t * out.stride + out.offset + row + r * step,
                   Dot::end(acc[r][t], a, t) * scale + bias);
  }
}

// The rows of a tile are a part of the range apart, not neighbours: each is then a stream of its own, in another page,
// and a core that reads several streams at once gets up to twice the bytes a second of one that reads a single one.
template <class Reader, class Dot, int T, int R>
void rows(const sk_matrix &m, const Activations &a, int64_t first, int64_t last, const Output &out) {
  const int64_t step = (last - first) / R;
  for (int64_t row = first; row < first + step; ++row) tile<Reader, Dot, T, R>(m, a, row, step, out);
  if (R > 1)
    for (int64_t row = first + step * R; row < last; ++row) tile<Reader, Dot, T, 1>(m, a, row, 0, out);
}

template <class Reader, class Dot>
Kernel kernel() {
  return {Dot::form, {rows<Reader, Dot, 1, ROWS_1>, rows<Reader, Dot, 2, ROWS_2>, rows<Reader, Dot, 4, ROWS_4>,
                      rows<Reader, Dot, 8, 1>}};
}

template <class Reader>
Kernel select16(const sk_matrix &m, int type) {
  if (m.value_type == SK_F16) return kernel<Reader, FloatF16>();
#if SK_BF16_DOT
  if (type == SK_BF16) return kernel<Reader, Bf16>();
#endif
  (void)type;
  return kernel<Reader, FloatBf16>();
}

template <class Reader>
Kernel select_small(const sk_matrix &m, int activations) {
  // A group as wide as the row is no group.
  const bool grouped = groups_of(m) > 1;
  if (activations == SK_FLOAT) return grouped ? kernel<Reader, FloatInt<true>>() : kernel<Reader, FloatInt<false>>();
  if (grouped) return kernel<Reader, IntWord<true>>();
  return activations == SK_INT8_GROUP ? kernel<Reader, IntWord<false>>() : kernel<Reader, IntOnce>();
}

Kernel select(const sk_matrix &m, int type, int activations) {
  const int kind = m.kind;
  if (m.bits == 16)
    return kind == SK_MASK             ? select16<Sparse16<MaskWords>>(m, type)
           : kind == SK_TWO_OF_FOUR    ? select16<Sparse16<Fours>>(m, type)
                                       : select16<Dense16>(m, type);
  if (m.bits == 8)
    return kind == SK_MASK             ? select_small<Sparse8<MaskWords>>(m, activations)
           : kind == SK_TWO_OF_FOUR    ? select_small<Sparse8<Fours>>(m, activations)
                                       : select_small<Dense8>(m, activations);
  return kind == SK_MASK               ? select_small<Sparse4<MaskWords>>(m, activations)
         : kind == SK_TWO_OF_FOUR      ? select_small<Sparse4<Fours>>(m, activations)
                                       : select_small<Dense4>(m, activations);
}

// Unpacking: exactly the numbers of the format, rounded once to the type asked for.
inline void put(void *out, int type, int64_t at, const float *numbers, float scale, int count) {
  if (type == SK_F32) {
    float *to = static_cast<float *>(out) + at;
    for (int c = 0; c < count; ++c) to[c] = numbers[c] * scale;
  } else {
    uint16_t *to = static_cast<uint16_t *>(out) + at;
    if (type == SK_BF16)
      for (int c = 0; c < count; ++c) to[c] = to_bf16(numbers[c] * scale);
    else
      for (int c = 0; c < count; ++c) to[c] = to_f16(numbers[c] * scale);
  }
}

inline void unpack_word(const W16 &word, const sk_matrix &m, int64_t, int64_t, void *out, int type, int64_t at,
                        int count) {
  alignas(64) uint16_t stored[WORD];
  alignas(64) float numbers[WORD];
  store16(stored, word);
  if (type == m.value_type) {
    memcpy(static_cast<uint16_t *>(out) + at, stored, static_cast<size_t>(count) * 2);
    return;
  }
  if (m.value_type == SK_BF16)
    for (int c = 0; c < WORD; ++c) numbers[c] = from_bf16(stored[c]);
  else
    for (int c = 0; c < WORD; ++c) numbers[c] = from_f16(stored[c]);
  put(out, type, at, numbers, 1.0f, count);
}

inline void unpack_word(const W8 &word, const sk_matrix &m, int64_t row, int64_t w, void *out, int type, int64_t at,
                        int count) {
  alignas(64) int8_t stored[WORD];
  alignas(64) float numbers[WORD];
  store8(stored, word);
  for (int c = 0; c < WORD; ++c) numbers[c] = static_cast<float>(stored[c]);
  const int64_t group = m.group_size ? w * WORD / m.group_size : 0;
  const float scale = from_bf16(static_cast<const uint16_t *>(m.scales)[row * groups_of(m) + group]);
  put(out, type, at, numbers, scale, count);
}

template <class Reader>
void unpack_rows(const sk_matrix &m, int64_t first, int64_t last, void *out, int type) {
  const int64_t whole = m.columns / WORD, words = words_of(m);
  for (int64_t row = first; row < last; ++row) {
    Reader reader;
    reader.open(m, row);
    const int64_t at = (row - first) * m.columns;
    for (int64_t w = 0; w < whole; ++w)
      unpack_word(reader.template next<false>(m, w), m, row, w, out, type, at + w * WORD, WORD);
    if (whole < words)
      unpack_word(reader.template next<true>(m, whole), m, row, whole, out, type, at + whole * WORD,
                  static_cast<int>(m.columns - whole * WORD));
  }
}

UnpackFunction unpacker(const sk_matrix &m) {
  const int kind = m.kind;
  if (m.bits == 16)
    return kind == SK_MASK          ? unpack_rows<Sparse16<MaskWords>>
           : kind == SK_TWO_OF_FOUR ? unpack_rows<Sparse16<Fours>>
                                    : unpack_rows<Dense16>;
  if (m.bits == 8)
    return kind == SK_MASK          ? unpack_rows<Sparse8<MaskWords>>
           : kind == SK_TWO_OF_FOUR ? unpack_rows<Sparse8<Fours>>
                                    : unpack_rows<Dense8>;
  return kind == SK_MASK          ? unpack_rows<Sparse4<MaskWords>>
         : kind == SK_TWO_OF_FOUR ? unpack_rows<Sparse4<Fours>>
                                  : unpack_rows<Dense4>;
}

}  // namespace
