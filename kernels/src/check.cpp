// What must be true of a matrix before a kernel runs on it. Compiled without special flags.
#include <cstring>

#include "layout.h"

namespace {

int64_t row_values(const sk_matrix &m) {
  const int64_t numbers = m.kind == SK_TWO_OF_FOUR ? m.columns / 2 : m.columns;
  return m.bits == 4 ? (numbers + 1) / 2 : numbers;
}

int check_mask(const sk_matrix &m) {
  const int64_t words = (m.columns + 63) / 64;
  const int used = static_cast<int>(m.columns % 64);
  int64_t found = 0;
  for (int64_t row = 0; row < m.rows; ++row) {
    if (m.starts[row] != found) return SK_BAD_STARTS;
    for (int64_t w = 0; w < words; ++w) {
      uint64_t word;
      memcpy(&word, static_cast<const char *>(m.pattern) + (row * words + w) * 8, 8);
      if (w == words - 1 && used && (word >> used)) return SK_BAD_PATTERN;
      const int set = __builtin_popcountll(word);
      found += m.bits == 4 ? (set + 1) / 2 : set;
    }
  }
  return found == m.value_count && m.starts[m.rows] == found ? SK_OK : SK_BAD_LENGTH;
}

int check_fours(const sk_matrix &m) {
  const int64_t fours = m.columns / 4, stride = (m.columns + 7) / 8;
  for (int64_t row = 0; row < m.rows; ++row) {
    const uint8_t *indices = static_cast<const uint8_t *>(m.pattern) + row * stride;
    for (int64_t four = 0; four < stride * 2; ++four) {
      const int places = (indices[four / 2] >> (four % 2 ? 4 : 0)) & 15;
      if (four >= fours ? places != 0 : (places & 3) >= (places >> 2)) return SK_BAD_PATTERN;
    }
  }
  return SK_OK;
}

}  // namespace

int check_sizes(const sk_matrix &m) {
  if (m.kind != SK_MASK && m.kind != SK_TWO_OF_FOUR && m.kind != SK_DENSE) return SK_BAD_LAYOUT;
  if (m.bits != 16 && m.bits != 8 && m.bits != 4) return SK_BAD_LAYOUT;
  if (m.bits == 16 && m.value_type != SK_BF16 && m.value_type != SK_F16) return SK_BAD_LAYOUT;
  if (m.rows < 1 || m.rows > SK_MOST_ROWS || m.columns < 1 || m.columns > SK_MOST_COLUMNS) return SK_BAD_SIZE;
  if (m.group_size < 0 || m.group_size % 64 != 0 || (m.bits == 16 && m.group_size != 0)) return SK_BAD_LAYOUT;
  if (m.values == nullptr || (m.bits < 16) != (m.scales != nullptr)) return SK_NO_MATRIX;
  if ((m.kind == SK_DENSE) != (m.pattern == nullptr) || (m.kind == SK_MASK) != (m.starts != nullptr))
    return SK_NO_MATRIX;
  if (m.bias != nullptr && m.bias_type != SK_F32 && m.bias_type != SK_BF16 && m.bias_type != SK_F16)
    return SK_BAD_LAYOUT;
  if (m.kind == SK_TWO_OF_FOUR && m.columns % 4 != 0) return SK_BAD_SIZE;
  // rows times columns stays below 2^48
  if (m.value_count < 0 || m.value_count > m.rows * m.columns) return SK_BAD_LENGTH;
  if (m.kind == SK_MASK) return m.starts[0] == 0 && m.starts[m.rows] == m.value_count ? SK_OK : SK_BAD_STARTS;
  return m.value_count == m.rows * row_values(m) ? SK_OK : SK_BAD_LENGTH;
}

extern "C" int sk_check(const sk_matrix *matrix) {
  if (matrix == nullptr) return SK_NO_MATRIX;
  const int status = check_sizes(*matrix);
  if (status != SK_OK) return status;
  if (matrix->bits < 16) {
    const int64_t groups =
        matrix->group_size ? (matrix->columns + matrix->group_size - 1) / matrix->group_size : 1;
    const uint16_t *scales = static_cast<const uint16_t *>(matrix->scales);
    for (int64_t i = 0; i < matrix->rows * groups; ++i)
      if ((scales[i] & 0x7f80u) == 0x7f80u) return SK_BAD_SCALE;
  }
  if (matrix->kind == SK_MASK) return check_mask(*matrix);
  return matrix->kind == SK_TWO_OF_FOUR ? check_fours(*matrix) : SK_OK;
}
