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
// Looks at the gate for about 50 microseconds before sleeping: calls of one token follow each other within that time.
constexpr int LOOKS = 2000;
// A piece is this part of a thread's share of what is left: large ones first, for long reading in one go, and small ones
// in the end, so that threads end together. One that is held up leaves the rest to the others.
constexpr int64_t PART = 2;
constexpr int64_t WHOLE = 4;  // tiles of rows are not cut

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// The gate of the pool is one number, so that it is read and changed in one go: threads inside (bits 0 to 15), threads
// that may still come in (16 to 31), and the number of the round.
constexpr uint64_t INSIDE = 0xffffu, TICKETS = 0xffff0000u, TICKET = 0x10000u;
constexpr uint64_t round_of(uint64_t gate) { return gate >> 32; }

struct Pool {
  std::mutex busy;  // held by the caller whose work is done
  int made = 0;     // threads besides the callers; changed under busy

  // The work at hand. Written while nobody is inside and nobody may come in; read by threads that are inside.
  Work work = nullptr;
  void *context = nullptr;
  int64_t units = 0, least = 0, shares = 1;
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<uint64_t> gate{0};

  std::mutex sleep;
  std::condition_variable wake;
  int asleep = 0;  // under sleep

  void pieces() {
    int64_t first = next.load(std::memory_order_relaxed);
    while (first < units) {
      int64_t piece = (units - first) / shares / WHOLE * WHOLE;
      if (piece < least) piece = least;
      const int64_t last = first + piece < units ? first + piece : units;
      if (!next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
      work(context, first, last);
      first = next.load(std::memory_order_relaxed);
    }
  }

  bool open(uint64_t seen) const {
    const uint64_t now = gate.load(std::memory_order_acquire);
    return (now & TICKETS) != 0 && round_of(now) != seen;
  }

  void wait(uint64_t seen) {
    for (int look = 0; look < LOOKS; ++look) {
      if (open(seen)) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(sleep);
    ++asleep;
    wake.wait(lock, [&] { return open(seen); });
    --asleep;
  }

  void loop() {
    uint64_t seen = 0;
    for (;;) {
      wait(seen);
      uint64_t now = gate.load(std::memory_order_acquire);
      bool in = false;
      while (!in && (now & TICKETS) != 0)
        in = gate.compare_exchange_weak(now, now - TICKET + 1, std::memory_order_acq_rel, std::memory_order_acquire);
      seen = round_of(now);
      if (!in) continue;
      pieces();
      gate.fetch_sub(1, std::memory_order_release);
    }
  }

  void grow(int wanted) {
    while (made < wanted) {
      try {
        std::thread(&Pool::loop, this).detach();
      } catch (const std::system_error &) {
        return;  // the machine has no more; those that are there do the work
      }
      ++made;
    }
  }

  void run(int64_t count, int64_t least_piece, int threads, Work job, void *with) {
    if (!busy.try_lock()) {
      job(with, 0, count);
      return;
    }
    std::lock_guard<std::mutex> held(busy, std::adopt_lock);
    const int wanted = threads - 1;
    grow(wanted);
    const int helpers = made < wanted ? made : wanted;
    work = job;
    context = with;
    units = count;
    least = least_piece;
    shares = threads * PART;
    next.store(0, std::memory_order_relaxed);
    const uint64_t round = (round_of(gate.load(std::memory_order_relaxed)) + 1) & 0xffffffffu;
    bool sleepers;
    {
      // Under the lock, or a thread could go to sleep between its look and the new round.
      std::lock_guard<std::mutex> lock(sleep);
      gate.store(round << 32 | static_cast<uint64_t>(helpers) * TICKET, std::memory_order_release);
      sleepers = asleep > 0;
    }
    if (sleepers) wake.notify_all();
    pieces();
    // Nobody comes in any more; a thread that has not woken up is not waited for.
    gate.fetch_and(~TICKETS, std::memory_order_acq_rel);
    for (int look = 0; (gate.load(std::memory_order_acquire) & INSIDE) != 0; ++look) {
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
