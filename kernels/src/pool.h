// Threads that stay. The caller is one of them; others are made when first asked for and wait for the next call.
#pragma once

#include <cstdint>

// Work on units [first, last) of `units`.
using Work = void (*)(void *context, int64_t first, int64_t last);

// Divide `units` among at most `threads` threads, as many as have `grain` of them each. While another thread of the program is
// in here, or in a program that cannot make threads, the caller does all of it alone: there are never more than asked for.
void parallel(int64_t units, int64_t grain, int threads, Work work, void *context);
