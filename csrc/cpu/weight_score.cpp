// weight_score: histograms of the bits of WAGLE's score |S|, S = (weight - grad_retain / gamma) * grad_forget, and
// the packed mask of the largest, streamed one word (32 elements of a row) at a time; no score is stored.

#include "cpu/common.h"

#include <tuple>
#include <vector>

namespace moe_unlearn {
namespace {

constexpr int64_t bins = 1 << 16;
constexpr int64_t grain = 512;             // words per thread at least
constexpr int64_t largest_part = 1 << 26;  // words counted in 32 bits: 2^31 elements
constexpr int64_t mask_block = 4096;       // words between two counts of ties

struct Terms {
  Rows weight, grad_forget, grad_retain;
  float gamma;
};

/// f(word, n, S of its 32 elements) for the words [begin, end); beyond the row's n elements S is 0.
template <class F>
MOE_UNLEARN_INLINE void for_each_word(const Terms& t, int64_t begin, int64_t end, const F& f) {
  const int64_t words = t.weight.words();
  for (int64_t row = begin / words; row * words < end; ++row) {
    const char* const weight = t.weight.row(row);
    const char* const grad_forget = t.grad_forget.row(row);
    const char* const grad_retain = t.grad_retain.row(row);
    const int64_t last = std::min(end - row * words, words);
    for (int64_t word = std::max<int64_t>(begin - row * words, 0); word < last; ++word) {
      const int64_t first = word * word_bits, n = std::min<int64_t>(t.weight.width - first, word_bits);
      Word w, g_f, g_r;
      load(w, t.weight.dtype, weight + first * t.weight.stride, t.weight.stride, n);
      load(g_f, t.grad_forget.dtype, grad_forget + first * t.grad_forget.stride, t.grad_forget.stride, n);
      load(g_r, t.grad_retain.dtype, grad_retain + first * t.grad_retain.stride, t.grad_retain.stride, n);
      for (int j = 0; j < word_bits; ++j) w[j] = score_of(w[j], g_f[j], g_r[j], t.gamma);
      f(row * words + word, n, w);
    }
  }
}

/// Adds to counts [65536] the high halves (digit 0), or the low halves under the high half `prefix` (digit 1).
MOE_UNLEARN_INLINE void count_words(
    const Terms& t, int64_t begin, int64_t end, int64_t digit, uint32_t prefix, uint32_t* counts) {
  for_each_word(t, begin, end, [&](int64_t, int64_t n, const Word& score) MOE_UNLEARN_INLINE_LAMBDA {
    uint32_t bits[word_bits], found = 0;
    for (int j = 0; j < word_bits; ++j) {
      bits[j] = magnitude_bits(score[j]);
      found |= choose(bits[j] >> 16 == prefix, 1, 0);
    }
    if (digit == 0) {
      for (int j = 0; j < n; ++j) ++counts[bits[j] >> 16];
    } else if (found) {  // few words hold an element of one bin
      for (int j = 0; j < n; ++j)
        if (bits[j] >> 16 == prefix) ++counts[bits[j] & 0xFFFF];
    }
  });
}

/// Writes the words [begin, end) of the mask: bits above the threshold, and the first `ties` equal to it. Sets
/// *taken to how many were equal and taken.
MOE_UNLEARN_INLINE void mask_words(
    const Terms& t, int64_t begin, int64_t end, uint32_t threshold, int64_t ties, int32_t* out, int64_t* taken) {
  int64_t left = ties;
  for_each_word(t, begin, end, [&](int64_t word, int64_t n, const Word& score) MOE_UNLEARN_INLINE_LAMBDA {
    uint32_t above = 0, equal = 0;
    for (int j = 0; j < word_bits; ++j) {
      const uint32_t bits = magnitude_bits(score[j]);
      above |= choose(bits > threshold, 1, 0) << j;
      equal |= choose(bits == threshold, 1, 0) << j;
    }
    equal &= 0xFFFFFFFF >> (word_bits - n);  // the padding beyond a row has score 0
    for (; equal != 0 && left > 0; --left) {
      above |= equal & -equal;
      equal &= equal - 1;
    }
    out[word] = static_cast<int32_t>(above);
  });
  *taken = ties - left;
}

Terms terms(const Tensor& weight, const Tensor& grad_forget, const Tensor& grad_retain, double gamma) {
  return {Rows(weight), Rows(grad_forget), Rows(grad_retain), static_cast<float>(gamma)};
}

int64_t total_words(const Terms& t) { return t.weight.count * t.weight.words(); }

Tensor weight_score_histogram(
    const Tensor& weight, const Tensor& grad_forget, const Tensor& grad_retain, double gamma, int64_t digit,
    int64_t prefix) {
  const Terms t = terms(weight, grad_forget, grad_retain, gamma);
  const int64_t words = total_words(t), threads = torch::stable::get_num_threads();
  const int64_t size = std::clamp<int64_t>(ceil_div(words, threads), grain, largest_part);
  const int64_t parts = ceil_div(words, size);
  std::vector<uint32_t> counts(parts * bins, 0);
  parallel_blocks(words, size, [&](int64_t part, int64_t begin, int64_t end) {
    for_this_cpu<count_words, const Terms&, int64_t, int64_t, int64_t, uint32_t, uint32_t*>(
        t, begin, end, digit, static_cast<uint32_t>(prefix), counts.data() + part * bins);
  });
  auto out = torch::stable::new_zeros(weight, {bins}, ScalarType::Long);
  int64_t* const sums = out.mutable_data_ptr<int64_t>();
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t bin = 0; bin < bins; ++bin) sums[bin] += counts[part * bins + bin];
  return out;
}

std::tuple<Tensor, Tensor> weight_score_mask(
    const Tensor& weight, const Tensor& grad_forget, const Tensor& grad_retain, double gamma,
    int64_t threshold_bits, int64_t ties) {
  const Terms t = terms(weight, grad_forget, grad_retain, gamma);
  const int64_t words = total_words(t), blocks = ceil_div(words, mask_block);
  std::vector<int64_t> shape(weight.sizes().begin(), weight.sizes().end());
  shape.back() = t.weight.words();
  auto mask = torch::stable::new_empty(weight, shape, ScalarType::Int);
  auto taken = torch::stable::new_empty(weight, {}, ScalarType::Long);
  int32_t* const out = mask.mutable_data_ptr<int32_t>();

  std::vector<int64_t> allowed(blocks, ties), equal(blocks, 0);
  const auto write = [&](int64_t block, int64_t begin, int64_t end) {
    for_this_cpu<mask_words, const Terms&, int64_t, int64_t, uint32_t, int64_t, int32_t*, int64_t*>(
        t, begin, end, static_cast<uint32_t>(threshold_bits), allowed[block], out, &equal[block]);
  };
  // as if every block came first; then those that took too many ties, rarely any, once more
  parallel_blocks(words, mask_block, write);
  int64_t left = ties;
  for (int64_t block = 0; block < blocks; ++block) {
    allowed[block] = std::min(equal[block], left);
    left -= allowed[block];
  }
  parallel_blocks(words, mask_block, [&](int64_t block, int64_t begin, int64_t end) {
    if (equal[block] > allowed[block]) write(block, begin, end);
  });
  *taken.mutable_data_ptr<int64_t>() = ties - left;
  return {mask, taken};
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("weight_score_histogram", TORCH_BOX(&moe_unlearn::weight_score_histogram));
  m.impl("weight_score_mask", TORCH_BOX(&moe_unlearn::weight_score_mask));
}
