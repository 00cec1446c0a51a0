// Products of bfloat16 matrices with float32 sums and float32 results, which torch's mm has not: it rounds its results
// to bfloat16. For CPUs with AVX512-BF16, whose instruction multiplies pairs of neighbouring terms.

#pragma once

#include "cpu/common.h"

namespace moe_unlearn {

constexpr int64_t pair_rows = 8;  // rows of a product made at a time: space for rows is rounded up to it

/// Whether this CPU has the instruction, it is the faster way here, and the CPU is not held to a lower instruction set.
bool has_pair_products();

/// The left side: the pair of terms k and k + 1 of row i is the 4 bytes at data + i * row_stride + k / 2 * pair_stride.
struct Pairs {
  const char* data;
  int64_t row_stride, pair_stride;
};

/// c [rows, 32 panels] = a b, or scale c + a b: `panels` of 32 columns each, b [panels, pairs, 32] holding the pairs
/// of terms of its columns as words (the first term in the low half); scale one factor a row, or null.
void multiply_pairs(
    float* c, int64_t c_stride, const Pairs& a, int64_t rows, const uint32_t* b, int64_t panels, int64_t pairs,
    bool accumulate, const float* scale);

}  // namespace moe_unlearn
