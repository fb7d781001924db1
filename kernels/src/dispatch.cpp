// The functions of secateur_kernels.h: look at the sizes, choose the variant, divide the rows among threads.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "layout.h"
#include "pool.h"
#include "scalar.h"
#include "variant.h"

namespace {

const Variant *const variants[] = {
#if defined(SK_X86)
    &variant_avx512_bf16, &variant_avx512, &variant_avx2,
#endif
    &variant_portable,
};
constexpr int COUNT = static_cast<int>(sizeof variants / sizeof variants[0]);
constexpr int64_t LEAST = 32768;  // weights for which another thread is worth waking

const Variant *named(const char *name) {
  for (const Variant *variant : variants)
    if (strcmp(variant->name, name) == 0) return variant;
  return nullptr;
}

const Variant *best() {
  for (const Variant *variant : variants)
    if (variant->runs()) return variant;
  return &variant_portable;
}

// SECATEUR_KERNELS is looked at once; what it names and this CPU cannot run is refused by the Python side, which asks.
const Variant *first_choice() {
  const char *wanted = getenv("SECATEUR_KERNELS");
  const Variant *variant = wanted ? named(wanted) : nullptr;
  return variant && variant->runs() ? variant : best();
}

std::atomic<const Variant *> chosen{nullptr};

}  // namespace

const Variant &variant_in_use() {
  const Variant *variant = chosen.load(std::memory_order_acquire);
  if (variant == nullptr) {
    variant = first_choice();
    chosen.store(variant, std::memory_order_release);
  }
  return *variant;
}

namespace {

// Memory of a calling thread for its activations; it grows to the widest call and stays.
struct Scratch {
  void *data = nullptr;
  size_t size = 0;
  ~Scratch() { free(data); }

  void *get(size_t wanted) {
    if (wanted > size) {
      free(data);
      size = 0;
      data = aligned_alloc(64, (wanted + 63) / 64 * 64);
      if (data != nullptr) size = wanted;
    }
    return data;
  }
};
thread_local Scratch scratch;

// Cuts the forms of the activations out of one piece of memory.
bool lay_out(Activations &a, int forms, int padded, int64_t columns) {
  a.words = (columns + WORD - 1) / WORD;
  const size_t places = static_cast<size_t>(a.words) * WORD * static_cast<size_t>(padded);
  const bool wide = (forms & (FORM_F32 | FORM_SPLIT | FORM_INT8)) != 0;
  const size_t sizes[] = {
      wide ? places * 4 : 0,
      forms & FORM_SPLIT ? places * 4 : 0,
      forms & FORM_BF16 ? places * 2 : 0,
      forms & FORM_INT8 ? places : 0,
      forms & FORM_INT8 ? places / WORD * 4 : 0,
      forms & FORM_INT8 ? places / WORD * LANES * 4 : 0,
  };
  size_t total = 0;
  for (const size_t size : sizes) total += (size + 63) / 64 * 64;
  char *at = static_cast<char *>(scratch.get(total));
  if (at == nullptr) return false;
  void *found[6];
  for (int i = 0; i < 6; ++i) {
    found[i] = at;
    at += (sizes[i] + 63) / 64 * 64;
  }
  a.f32 = static_cast<float *>(found[0]);
  a.split = static_cast<float *>(found[1]);
  a.bf16 = static_cast<uint16_t *>(found[2]);
  a.int8 = static_cast<int8_t *>(found[3]);
  a.scales = static_cast<float *>(found[4]);
  a.offsets = static_cast<int32_t *>(found[5]);
  return true;
}

constexpr int MOST_MATRICES = 16;

struct Product {
  const sk_matrix *matrices;
  const Kernel *kernels;
  const int64_t *ends;  // of the rows of each matrix in all rows
  int count, tokens, size;
  Activations activations;
  Output output;
};

// Rows side by side of all matrices, as one range.
void product_rows(void *context, int64_t first, int64_t last) {
  const Product &p = *static_cast<const Product *>(context);
  int64_t begin = 0;
  for (int i = 0; i < p.count; ++i) {
    const int64_t from = first > begin ? first : begin, to = last < p.ends[i] ? last : p.ends[i];
    if (from < to) {
      Output output = p.output;
      output.offset = begin;
      p.kernels[i].rows[p.size](p.matrices[i], p.activations, from - begin, to - begin, output);
    }
    begin = p.ends[i];
  }
}

struct Unpacking {
  const sk_matrix *matrix;
  UnpackFunction unpack;
  int64_t first;
  char *out;
  int type;
};

void unpack_some(void *context, int64_t first, int64_t last) {
  const Unpacking &u = *static_cast<const Unpacking *>(context);
  const int64_t width = u.type == SK_F32 ? 4 : 2;
  u.unpack(*u.matrix, u.first + first, u.first + last, u.out + first * u.matrix->columns * width, u.type);
}

struct Reading {
  const Variant *variant;
  const char *data;
  std::atomic<uint64_t> sum;
};

void read_some(void *context, int64_t first, int64_t last) {
  Reading &reading = *static_cast<Reading *>(context);
  const uint64_t sum = reading.variant->elements.read(reading.data + first * 64, last - first);
  reading.sum.fetch_add(sum, std::memory_order_relaxed);
}

bool is_type(int type) { return type == SK_F32 || type == SK_BF16 || type == SK_F16; }

}  // namespace

extern "C" {

int sk_abi(void) { return SK_ABI; }

const char *sk_message(int status) {
  switch (status) {
    case SK_OK: return "all is well";
    case SK_NO_MATRIX: return "a pointer is null, or there are no matrices, or more than 16";
    case SK_BAD_LAYOUT: return "kind, bits, types or group size do not go together";
    case SK_BAD_SIZE: return "rows, columns or tokens are out of range, or matrices of one call differ in columns";
    case SK_BAD_LENGTH: return "the number of values is not what the rows ask for";
    case SK_BAD_STARTS: return "the starts of the rows do not fit to the values";
    case SK_BAD_PATTERN: return "the mask or the indices are broken";
    case SK_NO_MEMORY: return "no memory for the activations";
    case SK_NO_VARIANT: return "no such variant, or this CPU lacks its instructions";
    case SK_BAD_SCALE: return "a scale is not finite";
    case SK_FULL: return "there is no place left in a cache";
    default: return "unknown status";
  }
}

int sk_variant_count(void) { return COUNT; }
const char *sk_variant_name(int number) { return number >= 0 && number < COUNT ? variants[number]->name : nullptr; }
int sk_variant_runs(int number) { return number >= 0 && number < COUNT && variants[number]->runs(); }
const char *sk_variant(void) { return variant_in_use().name; }

int sk_use(const char *name) {
  const Variant *variant = name ? named(name) : best();
  if (variant == nullptr || !variant->runs()) return SK_NO_VARIANT;
  chosen.store(variant, std::memory_order_release);
  return SK_OK;
}

int sk_linear(const sk_matrix *matrices, int count, const void *x, int type, int64_t tokens, int activations, void *out,
              int threads) {
  if (matrices == nullptr || count < 1 || count > MOST_MATRICES) return SK_NO_MATRIX;
  if (!is_type(type) || activations < SK_FLOAT || activations > SK_INT8_GROUP) return SK_BAD_LAYOUT;
  const Variant &variant = variant_in_use();
  Kernel kernels[MOST_MATRICES];
  int64_t ends[MOST_MATRICES];
  int64_t all = 0;
  int forms = 0;
  for (int i = 0; i < count; ++i) {
    const int status = check_sizes(matrices[i]);
    if (status != SK_OK) return status;
    if (matrices[i].columns != matrices[0].columns) return SK_BAD_SIZE;
    kernels[i] = variant.select(matrices[i], type, activations);
    forms |= kernels[i].form;
    ends[i] = all += matrices[i].rows;
  }
  const int64_t columns = matrices[0].columns;
  if (tokens < 0 || tokens > INT64_MAX / 4 / all || tokens > INT64_MAX / 4 / columns) return SK_BAD_SIZE;
  if (tokens == 0) return SK_OK;
  if (x == nullptr || out == nullptr) return SK_NO_MATRIX;
  const int64_t width = type == SK_F32 ? 4 : 2;
  const int64_t grain = 1 + LEAST / columns;
  for (int64_t done = 0; done < tokens; done += TOKENS) {
    Product product;
    product.tokens = static_cast<int>(tokens - done < TOKENS ? tokens - done : TOKENS);
    product.size = product.tokens == 1 ? 0 : product.tokens == 2 ? 1 : product.tokens <= 4 ? 2 : 3;
    const int padded = 1 << product.size;
    if (!lay_out(product.activations, forms, padded, columns)) return SK_NO_MEMORY;
    variant.prepare(product.activations, forms, static_cast<const char *>(x) + done * columns * width, type,
                    product.tokens, padded, columns, activations == SK_INT8_GROUP);
    product.matrices = matrices;
    product.kernels = kernels;
    product.ends = ends;
    product.count = count;
    product.output = {static_cast<char *>(out) + done * all * width, type, all, 0, product.tokens};
    parallel(all, grain, threads, product_rows, &product);
  }
  return SK_OK;
}

int sk_unpack(const sk_matrix *matrix, int64_t first, int64_t last, void *out, int type, int threads) {
  if (matrix == nullptr) return SK_NO_MATRIX;
  const int status = check_sizes(*matrix);
  if (status != SK_OK) return status;
  if (!is_type(type)) return SK_BAD_LAYOUT;
  if (first < 0 || last > matrix->rows || first > last) return SK_BAD_SIZE;
  if (first == last) return SK_OK;
  if (out == nullptr) return SK_NO_MATRIX;
  Unpacking unpacking = {matrix, variant_in_use().unpack(*matrix), first, static_cast<char *>(out), type};
  parallel(last - first, 1 + LEAST / matrix->columns, threads, unpack_some, &unpacking);
  return SK_OK;
}

int64_t sk_highest(const void *x, int type, int64_t count) {
  return x != nullptr && is_type(type) && count > 0 ? variant_in_use().elements.highest(x, type, count) : -1;
}

uint64_t sk_read(const void *data, int64_t bytes, int threads) {
  if (data == nullptr || bytes < 64) return 0;
  Reading reading{&variant_in_use(), static_cast<const char *>(data), {0}};
  parallel(bytes / 64, 16384, threads, read_some, &reading);
  return reading.sum.load();
}
}
