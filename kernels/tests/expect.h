// Counts comparisons, and says what failed.
#pragma once
#include <utility>

#include "packed.h"

namespace {

long failures = 0, compared = 0;

void expect(bool good, const char *what, const sk_matrix &m, double density) {
  ++compared;
  if (good) return;
  ++failures;
  printf("FAILED %s: %s, kind %d, bits %d, %lld x %lld, group %lld, density %g\n", what, sk_variant(), m.kind, m.bits,
         static_cast<long long>(m.rows), static_cast<long long>(m.columns), static_cast<long long>(m.group_size),
         density);
}

}  // namespace
