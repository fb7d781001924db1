// What blocks and the decoder share: memory for rows of numbers, their formats. Everything is static: each compiles its
// own.
#pragma once

#include <cstdlib>
#include <cstring>

#include "layout.h"
#include "scalar.h"
#include "secateur_kernels.h"

namespace {

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
thread_local Space space;  // one for each source file

bool is_type(int type) { return type == SK_F32 || type == SK_BF16 || type == SK_F16; }
size_t width_of(int type) { return type == SK_F32 ? 4 : 2; }

int sizes_of(const sk_matrix *matrices, int count) {
  if (matrices == nullptr) return SK_NO_MATRIX;
  for (int i = 0; i < count; ++i) {
    const int status = check_sizes(matrices[i]);
    if (status != SK_OK) return status;
  }
  return SK_OK;
}

}  // namespace
