// retain_weights: the capped exponential weights of tokens from their packed memberships, and the sums that give
// gradient and Hessian of the dual. float64; sums over fixed blocks of tokens, added in order.

#include "cpu/common.h"

#include <cmath>
#include <vector>

namespace moe_unlearn {
namespace {

constexpr int64_t grain = 512;            // tokens per thread at least
constexpr int64_t smallest_block = 4096;  // tokens
constexpr int64_t most_blocks = 32;       // whose partial sums, (S + 1)^2 doubles each, are held at a time

struct Tokens {
  const uint32_t* words;  // [T, width]
  const double* tilt;     // [size]
  int64_t count, width, size;
  double bias, cap;
};

/// f(s) for the members s of token t, in order.
template <class F>
MOE_UNLEARN_INLINE void for_each_member(const Tokens& tokens, int64_t t, const F& f) {
  for (int64_t word = 0; word < tokens.width; ++word)
    for (uint32_t bits = tokens.words[t * tokens.width + word]; bits != 0; bits &= bits - 1)
      f(word * word_bits + std::countr_zero(bits));
}

MOE_UNLEARN_INLINE double uncapped_weight(const Tokens& tokens, int64_t t) {
  double tilted = 0;
  for_each_member(tokens, t, [&](int64_t s) MOE_UNLEARN_INLINE_LAMBDA { tilted += tokens.tilt[s]; });
  return std::exp(tokens.bias + tilted);
}

// a NaN stays one, as in torch.clamp_max
MOE_UNLEARN_INLINE double capped(double weight, double cap) { return weight > cap ? cap : weight; }

/// Adds the tokens [begin, end) to first [S + 1] and to the upper triangle of second [S + 1, S + 1]; `member`
/// has room for S + 1 doubles, rounded up to whole words.
MOE_UNLEARN_INLINE void add_moments(
    const Tokens& tokens, int64_t begin, int64_t end, double* first, double* second, double* member) {
  const int64_t size = tokens.size + 1;
  for (int64_t t = begin; t < end; ++t) {
    const double raw = uncapped_weight(tokens, t), weight = capped(raw, tokens.cap);
    const double free = raw < tokens.cap ? raw : 0.0;
    member[0] = 1;
    for (int64_t word = 0; word < tokens.width; ++word) {
      const uint32_t bits = tokens.words[t * tokens.width + word];
      double* const to = member + 1 + word * word_bits;
      for (int j = 0; j < word_bits; ++j) to[j] = static_cast<double>(static_cast<int32_t>(bits >> j & 1));
    }
    // products, not choices: an infinite weight makes NaN of the sums it is not in, and the solver refuses the step
    for (int64_t s = 0; s < size; ++s) first[s] += weight * member[s];
    if (free == 0) continue;
    for (int64_t s = 0; s < size; ++s) second[s] += free * member[s];
    for_each_member(tokens, t, [&](int64_t i) MOE_UNLEARN_INLINE_LAMBDA {
      double* const row = second + (i + 1) * size;
      for (int64_t s = i + 1; s < size; ++s) row[s] += free * member[s];
    });
  }
}

Tokens tokens_of(const Tensor& words, const Tensor& tilt, double bias, double cap) {
  STD_TORCH_CHECK(words.is_contiguous() && tilt.is_contiguous(), "words and tilt must be contiguous");
  return {reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()), tilt.const_data_ptr<double>(),
          words.size(0), words.size(1), tilt.size(0), bias, cap};
}

Tensor retain_weights(const Tensor& words, const Tensor& tilt, double bias, double cap) {
  const Tokens tokens = tokens_of(words, tilt, bias, cap);
  auto out = torch::stable::new_empty(words, {tokens.count}, ScalarType::Float);
  float* const to = out.mutable_data_ptr<float>();
  parallel(tokens.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) to[t] = static_cast<float>(capped(uncapped_weight(tokens, t), cap));
  });
  return out;
}

std::tuple<Tensor, Tensor> retain_weights_moments(
    const Tensor& words, const Tensor& tilt, double bias, double cap) {
  const Tokens tokens = tokens_of(words, tilt, bias, cap);
  const int64_t size = tokens.size + 1, length = size + size * size;  // first, then second
  auto first = torch::stable::new_empty(tilt, {size}, ScalarType::Double);
  auto second = torch::stable::new_empty(tilt, {size, size}, ScalarType::Double);

  const int64_t block_size = std::max(smallest_block, ceil_div(tokens.count, most_blocks));
  const int64_t blocks = std::max<int64_t>(ceil_div(tokens.count, block_size), 1);
  std::vector<double> sums(blocks * length, 0.0);
  parallel_blocks(tokens.count, block_size, [&](int64_t block, int64_t begin, int64_t end) {
    double* const own = sums.data() + block * length;
    std::vector<double> member(tokens.width * word_bits + 1);
    for_this_cpu<add_moments, const Tokens&, int64_t, int64_t, double*, double*, double*>(
        tokens, begin, end, own, own + size, member.data());
  });
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t i = 0; i < length; ++i) sums[i] += sums[block * length + i];

  std::copy_n(sums.data(), size, first.mutable_data_ptr<double>());
  double* const to = second.mutable_data_ptr<double>();
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) to[i * size + j] = sums[size + std::min(i, j) * size + std::max(i, j)];
  return {first, second};
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("retain_weights", TORCH_BOX(&moe_unlearn::retain_weights));
  m.impl("retain_weights_moments", TORCH_BOX(&moe_unlearn::retain_weights_moments));
}
