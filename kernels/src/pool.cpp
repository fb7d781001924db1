#include "pool.h"

#include <atomic>
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
// Looks at the flag for about 50 microseconds before sleeping: calls of one token follow each other within that time.
constexpr int LOOKS = 2000;
constexpr int PIECES = 4;  // a thread: one that is held up leaves its pieces to the others

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

struct Pool {
  std::mutex busy;  // held by the caller whose work is done
  int made = 0;     // threads besides the callers; changed under busy

  // The work at hand. Written before `round` is raised, read after it was seen raised.
  Work work = nullptr;
  void *context = nullptr;
  int64_t units = 0, step = 0;
  int helpers = 0;
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int> running{0};
  alignas(64) std::atomic<uint64_t> round{0};

  std::mutex sleep;
  std::condition_variable wake;
  int asleep = 0;  // under sleep

  void pieces() {
    for (;;) {
      const int64_t first = next.fetch_add(step, std::memory_order_relaxed);
      if (first >= units) return;
      work(context, first, first + step < units ? first + step : units);
    }
  }

  // Waits until a round after `seen`, which it returns.
  uint64_t wait(uint64_t seen) {
    for (int look = 0; look < LOOKS; ++look) {
      const uint64_t now = round.load(std::memory_order_acquire);
      if (now != seen) return now;
      relax();
    }
    std::unique_lock<std::mutex> lock(sleep);
    ++asleep;
    wake.wait(lock, [&] { return round.load(std::memory_order_acquire) != seen; });
    --asleep;
    return round.load(std::memory_order_acquire);
  }

  void loop(int number, uint64_t seen) {
    for (;;) {
      seen = wait(seen);
      // A round ends only when all its helpers have ended, so that `helpers` is that of the round seen. A thread that
      // is none of them may come late and see a later one: it must not touch anything else.
      if (number >= (round_helpers(seen))) continue;
      pieces();
      running.fetch_sub(1, std::memory_order_release);
    }
  }

  // The helpers of a round are in its number, so that they are read with it in one go.
  static int round_helpers(uint64_t round) { return static_cast<int>(round & 0xffff); }

  bool grow(int wanted) {
    while (made < wanted) {
      try {
        std::thread(&Pool::loop, this, made, round.load()).detach();
      } catch (const std::system_error &) {
        break;
      }
      ++made;
    }
    return made > 0;
  }

  void run(int64_t count, int64_t piece, int threads, Work job, void *with) {
    const int wanted = threads - 1;
    if (!busy.try_lock()) {
      job(with, 0, count);
      return;
    }
    std::lock_guard<std::mutex> held(busy, std::adopt_lock);
    if (made < wanted) grow(wanted);
    const int found = made < wanted ? made : wanted;
    if (found == 0) {
      job(with, 0, count);
      return;
    }
    work = job;
    context = with;
    units = count;
    step = piece;
    next.store(0, std::memory_order_relaxed);
    running.store(found, std::memory_order_relaxed);
    bool sleepers;
    {
      // Under the lock, or a thread could go to sleep between our look and the new round.
      std::lock_guard<std::mutex> lock(sleep);
      round.store(((round.load(std::memory_order_relaxed) >> 16) + 1) << 16 | static_cast<uint64_t>(found),
                  std::memory_order_release);
      sleepers = asleep > 0;
    }
    if (sleepers) wake.notify_all();
    pieces();
    for (int look = 0; running.load(std::memory_order_acquire) != 0; ++look) {
      if (look < LOOKS)
        relax();
      else
        std::this_thread::yield();
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
  int64_t piece = units / (static_cast<int64_t>(threads) * PIECES);
  piece = piece / 4 * 4;  // whole tiles of rows
  if (piece < 4) piece = 4;
  the_pool().run(units, piece, threads, work, context);
}
