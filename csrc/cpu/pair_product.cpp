// Eight rows by 32 columns of a product stay in registers while all terms are added.

#include "cpu/pair_product.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe_unlearn {

#if defined(__x86_64__)

bool has_pair_products() {
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported && prefers_pairs() && instruction_set() == InstructionSet::avx512;
}

namespace {

#define MOE_UNLEARN_PAIRS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

MOE_UNLEARN_PAIRS inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

/// One panel for the rows that start at a[0], ..., a[7].
MOE_UNLEARN_PAIRS void multiply_tile(
    float* c, int64_t c_stride, const char* const* a, int64_t pair_stride, int64_t rows, const uint32_t* b,
    int64_t pairs, bool accumulate, const float* scale) {
  __m512 sums[pair_rows][2];
  for (int i = 0; i < pair_rows; ++i)
    for (int half = 0; half < 2; ++half) {
      sums[i][half] = _mm512_setzero_ps();
      if (!accumulate || i >= rows) continue;
      sums[i][half] = _mm512_loadu_ps(c + i * c_stride + 16 * half);
      if (scale != nullptr) sums[i][half] = _mm512_mul_ps(sums[i][half], _mm512_set1_ps(scale[i]));
    }
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512i left = _mm512_loadu_si512(b + k * 32), right = _mm512_loadu_si512(b + k * 32 + 16);
#pragma GCC unroll 8
    for (int i = 0; i < pair_rows; ++i) {
      int32_t pair;
      std::memcpy(&pair, a[i] + k * pair_stride, sizeof(pair));
      const __m512i both = _mm512_set1_epi32(pair);
      sums[i][0] = multiply_add(sums[i][0], both, left);
      sums[i][1] = multiply_add(sums[i][1], both, right);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(c + i * c_stride + 16 * half, sums[i][half]);
}

}  // namespace

void multiply_pairs(
    float* c, int64_t c_stride, const Pairs& a, int64_t rows, const uint32_t* b, int64_t panels, int64_t pairs,
    bool accumulate, const float* scale) {
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t first = 0; first < rows; first += pair_rows) {
      const int64_t count = std::min(pair_rows, rows - first);
      const char* starts[pair_rows];
      for (int64_t i = 0; i < pair_rows; ++i) starts[i] = a.data + (first + std::min(i, count - 1)) * a.row_stride;
      multiply_tile(
          c + first * c_stride + panel * word_bits, c_stride, starts, a.pair_stride, count,
          b + panel * pairs * word_bits, pairs, accumulate, scale != nullptr ? scale + first : nullptr);
    }
}

#else

bool has_pair_products() { return false; }

void multiply_pairs(float*, int64_t, const Pairs&, int64_t, const uint32_t*, int64_t, int64_t, bool, const float*) {
  STD_TORCH_CHECK(false, "no pair products on this CPU");
}

#endif

}  // namespace moe_unlearn
