// Sizes that follow from the layout of a matrix.
#pragma once

#include <cstdint>

#include "secateur_kernels.h"

// What can be seen without looking at the pattern: O(1).
int check_sizes(const sk_matrix &matrix);
