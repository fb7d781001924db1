#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

constexpr int MOST = 256;
// Looks for work for some 80 microseconds before sleeping: calls of one token, and tokens of one text, follow each other
// within that time.
constexpr int LOOKS = 4000;
constexpr int64_t WHOLE = 4;  // tiles of rows are not cut

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// A token is some 150 calls of a few microseconds, so what counts is how often a line of the cache goes from one core to
// another: the call is published in one line, and every thread tells in a line of its own where it is.
struct alignas(64) Slot {
  std::atomic<uint64_t> in{0}, done{0};  // rounds
};

struct Pool {
  alignas(64) std::atomic<bool> busy{false};  // held by the caller whose work is done
  int made = 0;                               // threads besides the callers; changed by who holds it

  // The work at hand. `round` is odd while threads may come in, and one more is added when they no longer may. What stands
  // beside it is written while nobody is inside and nobody may come in.
  alignas(64) std::atomic<uint64_t> round{0};
  Work work = nullptr;
  void *context = nullptr;
  int64_t units = 0, least = 0;
  int threads = 0;
  alignas(64) std::atomic<int64_t> next{0};

  alignas(64) std::atomic<int> asleep{0};
  std::mutex sleep;
  std::condition_variable wake;
  Slot slots[MOST];

  // Large pieces first, for long reading in one go, and small ones in the end, so that threads end together. One that is
  // held up leaves the rest to the others.
  void pieces() {
    int64_t first = next.load(std::memory_order_relaxed);
    while (first < units) {
      int64_t piece = (units - first) * 3 / (threads * 4) / WHOLE * WHOLE;
      if (piece < least) piece = least;
      const int64_t last = first + piece < units ? first + piece : units;
      if (!next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
      work(context, first, last);
      first = next.load(std::memory_order_relaxed);
    }
  }

  bool open(uint64_t seen) const {
    const uint64_t now = round.load(std::memory_order_seq_cst);
    return now % 2 != 0 && now != seen;
  }

  void wait(uint64_t seen) {
    for (int look = 0; look < LOOKS; ++look) {
      if (open(seen)) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(sleep);
    asleep.fetch_add(1, std::memory_order_seq_cst);
    wake.wait(lock, [&] { return open(seen); });
    asleep.fetch_sub(1, std::memory_order_relaxed);
  }

  void loop(int number) {
    Slot &slot = slots[number];
    uint64_t seen = 0;
    for (;;) {
      wait(seen);
      const uint64_t now = round.load(std::memory_order_acquire);
      if (now % 2 == 0 || now == seen) continue;
      seen = now;
      // Told before it is looked again: either the caller sees that somebody is in, or the round is seen to be over.
      slot.in.store(now, std::memory_order_seq_cst);
      if (round.load(std::memory_order_seq_cst) == now && number + 1 < threads) pieces();
      slot.done.store(now, std::memory_order_release);
    }
  }

  void grow(int wanted) {
    while (made < wanted) {
      try {
        std::thread(&Pool::loop, this, made).detach();
      } catch (const std::system_error &) {
        return;  // the machine has no more; those that are there do the work
      }
      ++made;
    }
  }

  void run(int64_t count, int64_t least_piece, int wanted, Work job, void *with) {
    if (busy.exchange(true, std::memory_order_acquire)) {
      job(with, 0, count);
      return;
    }
    grow(wanted - 1);
    const int helpers = made < wanted - 1 ? made : wanted - 1;
    work = job;
    context = with;
    units = count;
    least = least_piece;
    threads = helpers + 1;
    next.store(0, std::memory_order_relaxed);
    const uint64_t now = round.load(std::memory_order_relaxed) + 1;
    round.store(now, std::memory_order_seq_cst);
    // A thread counts itself among the sleepers before it looks for the last time.
    if (asleep.load(std::memory_order_seq_cst) > 0) {
      { std::lock_guard<std::mutex> lock(sleep); }
      wake.notify_all();
    }
    pieces();
    // Nobody comes in any more; a thread that has not woken up is not waited for.
    round.store(now + 1, std::memory_order_seq_cst);
    for (int i = 0; i < made; ++i) leave(slots[i], now);
    busy.store(false, std::memory_order_release);
  }

  static void leave(const Slot &slot, uint64_t now) {
    if (slot.in.load(std::memory_order_seq_cst) != now) return;
    for (int look = 0; slot.done.load(std::memory_order_acquire) != now; ++look) {
      if (look < LOOKS)
        relax();
      else
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }
};

// Never freed: threads may wait in it while the program ends. A child process has none of the threads and gets a new one.
std::atomic<Pool *> pool{nullptr};

void forget() { pool.store(nullptr); }

Pool &the_pool() {
  Pool *found = pool.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  Pool *made = new Pool;
  if (pool.compare_exchange_strong(found, made)) {
#if !defined(_WIN32)
    static const int once = pthread_atfork(nullptr, nullptr, forget);
    (void)once;
#endif
    return *made;
  }
  delete made;
  return *found;
}

}  // namespace

void parallel(int64_t units, int64_t grain, int threads, Work work, void *context) {
  if (threads > MOST) threads = MOST;
  const int64_t most = units / grain;
  if (most < threads) threads = static_cast<int>(most);
  if (threads <= 1) {
    work(context, 0, units);
    return;
  }
  const int64_t least = grain / 4 / WHOLE * WHOLE;
  the_pool().run(units, least < WHOLE ? WHOLE : least, threads, work, context);
}
