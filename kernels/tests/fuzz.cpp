// Damaged matrices: what sk_check lets pass, every kernel of every variant must bear, on buffers that are exactly as long
// as the matrix declares. To be run under AddressSanitizer and UBSan, or on memory guarded by pages that cannot be read.
//
//   fuzz [CASES [FIRST]]    20000 from 0; a case is its number: fuzz 1 NUMBER repeats it
//
// A buffer that is declared longer than can be had is a page that cannot be read: sk_check must see it without looking.
// Of what passes, unpacked numbers must be the same bits in all variants.
#include <csignal>
#include <utility>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "packed.h"

namespace {

constexpr int64_t MOST_BYTES = int64_t{1} << 22;
long number = 0, failures = 0, passed = 0, calls = 0;

void failed(const char *what) {
  ++failures;
  printf("FAILED case %ld: %s, %s\n", number, what, sk_variant());
}

#if defined(__unix__)
// A case that ends the program, or takes a minute, says which it was.
void ended(int signal_number) {
  char text[64];
  const int size = snprintf(text, sizeof text, "case %ld: signal %d\n", number, signal_number);
  if (write(2, text, static_cast<size_t>(size)) < 0) _exit(1);
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}
#endif

template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[engine() % values.size()];
}

int64_t bytes_of_pattern(const sk_matrix &m) {
  return m.kind == SK_MASK ? m.rows * ((m.columns + 63) / 64) * 8 : m.rows * ((m.columns + 7) / 8);
}

int64_t groups_of(const sk_matrix &m) {
  return m.group_size > 0 ? (m.columns - 1) / m.group_size + 1 : 1;
}

// Buffers of the lengths that a matrix declares: what there was, and behind it anything.
struct Declared {
  std::vector<Exact<uint8_t>> held;

  const void *take(const void *old, size_t had, int64_t wanted) {
    if (old == nullptr) return nullptr;
    if (wanted < 0 || wanted > MOST_BYTES) return nowhere();
    held.emplace_back(static_cast<size_t>(wanted));
    uint8_t *made = held.back().data.get();
    const size_t kept = had < static_cast<size_t>(wanted) ? had : static_cast<size_t>(wanted);
    if (kept) memcpy(made, old, kept);
    const bool random = engine() % 2;
    for (size_t i = kept; i < static_cast<size_t>(wanted); ++i) made[i] = random ? static_cast<uint8_t>(engine()) : 0;
    return made;
  }

  static const void *nowhere() {
#if defined(__unix__)
    static const void *page = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return page;
#else
    return reinterpret_cast<const void *>(64);
#endif
  }
};

// Whether the fields are in the ranges that sk_check allows by themselves, so that it may look at buffers.
bool plausible(const sk_matrix &m) {
  return m.rows >= 1 && m.rows <= SK_MOST_ROWS && m.columns >= 1 && m.columns <= SK_MOST_COLUMNS &&
         (m.kind == SK_MASK || m.kind == SK_TWO_OF_FOUR || m.kind == SK_DENSE);
}

void damage_fields(sk_matrix &m) {
  const int64_t odd = one_of<int64_t>({-1, 0, 1, 2, 3, 63, 64, 65, 128, 131072, 131073, 2147483647, 2147483648,
                                       int64_t{1} << 40, INT64_MAX, INT64_MIN});
  const int64_t step = one_of<int64_t>({-64, -8, -4, -1, 1, 4, 8, 64});
  const bool near = engine() % 2;
  const auto changed = [&](int64_t old) { return near && old < INT32_MAX && old > 0 ? old + step : odd; };
  switch (engine() % 8) {
    case 0: m.rows = changed(m.rows); break;
    case 1: m.columns = changed(m.columns); break;
    case 2: m.value_count = changed(m.value_count); break;
    case 3: m.group_size = changed(m.group_size); break;
    case 4: m.kind = engine() % 2 ? static_cast<int32_t>(engine() % 4) : static_cast<int32_t>(odd); break;
    case 5: m.bits = one_of({16, 8, 4, 0, -8, 5, 32}); break;
    case 6: m.value_type = static_cast<int32_t>(engine() % 5) - 1; break;
    default: m.bias_type = static_cast<int32_t>(engine() % 5) - 1; break;
  }
}

// What the fields ask for, so that more of them pass.
void agree(sk_matrix &m) {
  if (!plausible(m) || m.kind == SK_MASK || m.rows > 4096) return;
  const int64_t numbers = m.kind == SK_TWO_OF_FOUR ? m.columns / 2 : m.columns;
  m.value_count = m.rows * (m.bits == 4 ? (numbers + 1) / 2 : numbers);
}

void damage_bytes(const void *buffer, int64_t size) {
  if (buffer == nullptr || buffer == Declared::nowhere() || size < 1) return;
  uint8_t *bytes = static_cast<uint8_t *>(const_cast<void *>(buffer));
  const int times = one_of({1, 1, 2, 16});
  for (int i = 0; i < times; ++i) {
    uint8_t &byte = bytes[engine() % static_cast<uint64_t>(size)];
    byte = engine() % 2 ? static_cast<uint8_t>(byte ^ 1u << engine() % 8) : one_of<uint8_t>({0, 255, 0x80, 0x7f});
  }
}

// Starts as a reader counts them, for a mask that was changed.
void count_starts(sk_matrix &m) {
  int64_t *starts = const_cast<int64_t *>(m.starts);
  const int64_t words = (m.columns + 63) / 64;
  int64_t found = 0;
  for (int64_t row = 0; row < m.rows; ++row) {
    starts[row] = found;
    for (int64_t w = 0; w < words; ++w) {
      uint64_t word;
      memcpy(&word, static_cast<const char *>(m.pattern) + (row * words + w) * 8, 8);
      const int set = __builtin_popcountll(word);
      found += m.bits == 4 ? (set + 1) / 2 : set;
    }
  }
  starts[m.rows] = found;
  m.value_count = found;
}

void products(const sk_matrix &m, int type, int activations) {
  const int64_t width = type == SK_F32 ? 4 : 2;
  const int tokens = one_of({1, 1, 2, 3, 5, 8, 9});
  const int count = one_of({1, 1, 3});
  const sk_matrix several[3] = {m, m, m};
  Exact<uint8_t> x(static_cast<size_t>(tokens * m.columns * width));
  Exact<uint8_t> out(static_cast<size_t>(tokens * count * m.rows * width));
  for (int64_t i = 0; i < tokens * m.columns; ++i)
    store_number(x.data.get(), type, i, static_cast<float>(uniform() - 0.5) * (engine() % 64 ? 1.0f : 1e38f));
  ++calls;
  if (sk_linear(several, count, x.data.get(), type, tokens, activations, out.data.get(), 1 + engine() % 2) != SK_OK)
    failed("sk_linear refuses what sk_check lets pass");
  const int64_t first = static_cast<int64_t>(engine() % static_cast<uint64_t>(m.rows)), last = m.rows;
  Exact<uint8_t> some(static_cast<size_t>((last - first) * m.columns * width));
  ++calls;
  if (sk_unpack(&m, first, last, some.data.get(), type, 2) != SK_OK) failed("sk_unpack refuses what sk_check lets pass");
  // The same matrix as all of a block, where it fits.
  Exact<float> norm_weight(static_cast<size_t>(m.columns));
  const sk_norm norm = {norm_weight.data.get(), SK_F32, 1e-5f};
  if (m.rows % 2 == 0) {
    const int64_t head = m.rows, rotated = 2 * (1 + static_cast<int64_t>(engine() % static_cast<uint64_t>(head / 2)));
    Exact<uint8_t> angles(static_cast<size_t>(rotated * width)), all(static_cast<size_t>(3 * m.rows * width));
    ++calls;
    if (sk_block_before(several, &norm, x.data.get(), type, angles.data.get(), angles.data.get(), head, rotated,
                        activations, all.data.get(), 1) != SK_OK)
      failed("sk_block_before refuses what sk_check lets pass");
  }
  if (m.rows == m.columns) {
    const sk_matrix four[4] = {m, m, m, m};
    Exact<uint8_t> all(static_cast<size_t>(m.rows * width));
    ++calls;
    if (sk_block_behind(four, &norm, x.data.get(), x.data.get(), type, activations, all.data.get(), 1) != SK_OK)
      failed("sk_block_behind refuses what sk_check lets pass");
  }
}

// Bit for bit, but for what a NaN carries: processors quieten some.
bool same(const std::vector<float> &some, const std::vector<float> &others) {
  for (size_t i = 0; i < some.size(); ++i)
    if (float_bits(some[i]) != float_bits(others[i]) && !(std::isnan(some[i]) && std::isnan(others[i]))) return false;
  return true;
}

void every_kernel(const sk_matrix &m) {
  const size_t size = static_cast<size_t>(m.rows * m.columns);
  std::vector<float> wanted;
  for (int v = 0; v < sk_variant_count(); ++v) {
    if (!sk_variant_runs(v) || sk_use(sk_variant_name(v)) != SK_OK) continue;
    for (int activations = 0; activations < (m.bits == 16 ? 1 : 3); ++activations)
      products(m, static_cast<int>(engine() % 3), activations);
    Exact<float> numbers(size);
    if (sk_unpack(&m, 0, m.rows, numbers.data.get(), SK_F32, 1) != SK_OK) failed("sk_unpack");
    std::vector<float> found(numbers.data.get(), numbers.data.get() + size);
    if (wanted.empty())
      wanted = std::move(found);
    else if (!same(wanted, found)) failed("variants unpack other numbers");
  }
}

int one_case() {
  const int kind = one_of({SK_MASK, SK_MASK, SK_TWO_OF_FOUR, SK_DENSE}), bits = one_of({16, 8, 4});
  int64_t columns = 1 + static_cast<int64_t>(engine() % 130), rows = 1 + static_cast<int64_t>(engine() % 9);
  if (kind == SK_TWO_OF_FOUR) columns = (columns + 3) / 4 * 4;
  if (engine() % 8 == 0) rows = columns;
  const int64_t group = bits == 16 ? 0 : one_of<int64_t>({0, 64, 128});
  const double density = one_of({0.0, 0.05, 0.5, 0.95, 1.0});
  const Packed p = pack(kind, bits, one_of({SK_BF16, SK_F16}), rows, columns, group, density);
  sk_matrix m = p.matrix;
  const size_t had_values = static_cast<size_t>(m.value_count) * (bits == 16 ? 2 : 1) + 64;
  const size_t had_pattern = kind == SK_DENSE ? 0 : static_cast<size_t>(bytes_of_pattern(m));
  const size_t had_scales = bits < 16 ? static_cast<size_t>(rows * groups_of(m)) * 2 : 0;
  const size_t had_starts = kind == SK_MASK ? static_cast<size_t>(rows + 1) * 8 : 0;

  const int what = static_cast<int>(engine() % 8);
  if (what < 4) damage_fields(m);
  if (what == 3) damage_fields(m);
  const bool agreed = engine() % 2;
  if (agreed) agree(m);
  // A kind or a number of bits that wants other buffers gets them, half of the time.
  if (what < 4 && engine() % 2) {
    if (m.kind != SK_DENSE && m.pattern == nullptr) m.pattern = p.values.data.get();
    if (m.kind == SK_DENSE) m.pattern = nullptr;
    if (m.bits < 16 && m.scales == nullptr) m.scales = reinterpret_cast<const uint16_t *>(p.values.data.get());
    if (m.bits == 16) m.scales = nullptr;
    if (m.kind == SK_MASK && m.starts == nullptr) m.starts = reinterpret_cast<const int64_t *>(p.values.data.get());
    if (m.kind != SK_MASK) m.starts = nullptr;
  }
  const auto least = [&](size_t had) { return had ? had : size_t{32}; };  // of values there are 64 bytes at least
  const bool looks = plausible(m);
  Declared memory;
  const int64_t pattern_bytes = looks ? bytes_of_pattern(m) : -1;
  const int64_t scales_bytes = looks && m.group_size >= 0 && m.rows <= MOST_BYTES ? m.rows * groups_of(m) * 2 : -1;
  const int64_t starts_bytes = looks ? (m.rows + 1) * 8 : -1;
  const int64_t bias_bytes = looks && m.rows <= MOST_BYTES ? m.rows * 4 : -1;
  const int64_t width = m.bits == 16 ? 2 : 1;
  const int64_t values_bytes = m.value_count >= 0 && m.value_count <= MOST_BYTES ? m.value_count * width + 64 : -1;
  // Rows that are too many for the memory of this test, and no count of values that would tell, are not its matter.
  if (looks && m.kind == SK_MASK && starts_bytes > MOST_BYTES) return -1;
  m.pattern = memory.take(m.pattern, least(had_pattern), pattern_bytes);
  m.values = memory.take(m.values, had_values, values_bytes);
  m.scales = memory.take(m.scales, least(had_scales), scales_bytes);
  m.starts = static_cast<const int64_t *>(memory.take(m.starts, least(had_starts), starts_bytes));
  m.bias = engine() % 3 ? memory.take(m.bias, static_cast<size_t>(rows) * 4, bias_bytes) : nullptr;
  switch (what) {
    case 4: damage_bytes(m.pattern, pattern_bytes); break;
    case 5: damage_bytes(m.scales, scales_bytes); break;
    case 6: damage_bytes(m.starts, starts_bytes); break;
    case 7: damage_bytes(m.values, values_bytes); break;
    default: break;
  }
  const bool counted = looks && m.kind == SK_MASK && m.starts != nullptr && m.starts != Declared::nowhere() &&
                       m.pattern != nullptr && m.pattern != Declared::nowhere();
  if (counted && engine() % 2) {
    count_starts(m);
    if (m.value_count <= MOST_BYTES) m.values = memory.take(m.values, 0, m.value_count * width + 64);
  }
  if (engine() % 32 == 0) {
    const void **places[] = {&m.pattern, &m.values, &m.scales, &m.bias};
    *places[engine() % 4] = nullptr;
  }
  const int status = sk_check(&m);
  if (status == SK_OK) {
    ++passed;
    every_kernel(m);
  }
  return status;
}

}  // namespace

int main(int argc, char **argv) {
  const long cases = argc > 1 ? atol(argv[1]) : 20000, first = argc > 2 ? atol(argv[2]) : 0;
#if defined(__unix__)
  for (const int one : {SIGALRM, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) signal(one, ended);
#endif
  long by_status[16] = {}, skipped = 0;
  for (number = first; number < first + cases; ++number) {
#if defined(__unix__)
    alarm(60);
#endif
    engine.seed(static_cast<unsigned>(number));
    const int status = one_case();
    if (status < 0) ++skipped;
    else ++by_status[status & 15];
  }
  for (int status = 0; status < 16; ++status)
    if (by_status[status]) printf("%7ld %s\n", by_status[status], sk_message(status));
  printf("%ld cases, %ld not built, %ld passed the check and went through %ld calls, %ld failures\n", cases, skipped,
         passed, calls, failures);
  return failures != 0;
}
