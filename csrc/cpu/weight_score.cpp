// weight_score: histograms of the bits of WAGLE's score |S|, S = (weight - grad_retain / gamma) * grad_forget, the
// packed mask of the largest, the scores of an interval, and exact sums of both terms' magnitudes, streamed one word
// (32 elements of a row) at a time; no score is stored.

#include "cpu/common.h"

#include <numeric>
#include <tuple>
#include <vector>

namespace moe_unlearn {
namespace {

constexpr int64_t bins = 1 << 16;
constexpr int64_t grain = 512;             // words per thread at least
constexpr int64_t largest_part = 1 << 26;  // words counted in 32 bits: 2^31 elements
constexpr int64_t mask_block = 4096;       // words between two counts of ties, and of what an interval has
constexpr int64_t exponents = 256;         // of float32
constexpr int mantissa = 23;               // bits
constexpr int tables = 4;                  // of sums: an element waits for the one before it in the same table

struct Terms {
  Rows weight, grad_forget, grad_retain;
  float gamma;
};

/// f(word, n, its 32 weights, forget and retain gradients) for the words [begin, end); beyond the row's n elements
/// all are 0.
template <class F>
MOE_UNLEARN_INLINE void for_each_terms(const Terms& t, int64_t begin, int64_t end, const F& f) {
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
      f(row * words + word, n, w, g_f, g_r);
    }
  }
}

/// f(word, n, S of its 32 elements) for the words [begin, end); beyond the row's n elements S is 0.
template <class F>
MOE_UNLEARN_INLINE void for_each_word(const Terms& t, int64_t begin, int64_t end, const F& f) {
  const auto scored = [&](int64_t word, int64_t n, Word& w, Word& g_f, Word& g_r) MOE_UNLEARN_INLINE_LAMBDA {
    for (int j = 0; j < word_bits; ++j) w[j] = score_of(w[j], g_f[j], g_r[j], t.gamma);
    f(word, n, w);
  };
  for_each_terms(t, begin, end, scored);
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

/// Scores with a bit pattern in [low, high), and where they go once they are counted.
struct Interval {
  uint32_t low, high;
  int32_t* mask;  // of scores from `high` on
  void* places;   // flat indices, of 64 bits if `wide`
  int32_t* bits;
  bool wide;
};

/// Writes the words [begin, end) of the mask, and sets *inside to how many scores are in the interval and *above to how
/// many are from its end on; where there are places, writes those inside, from `first` on, instead.
MOE_UNLEARN_INLINE void interval_words(
    const Terms& t, int64_t begin, int64_t end, const Interval& interval, int64_t first, int64_t* inside,
    int64_t* above) {
  const int64_t words = t.weight.words(), width = t.weight.width;
  int64_t found = 0, beyond = 0;
  for_each_word(t, begin, end, [&](int64_t word, int64_t n, const Word& score) MOE_UNLEARN_INLINE_LAMBDA {
    const uint32_t real = 0xFFFFFFFF >> (word_bits - n);
    uint32_t bits[word_bits], in = 0, over = 0;
    for (int j = 0; j < word_bits; ++j) {
      bits[j] = magnitude_bits(score[j]);
      over |= choose(bits[j] >= interval.high, 1, 0) << j;
      in |= choose(bits[j] >= interval.low, 1, 0) << j;
    }
    over &= real;
    in &= real & ~over;
    beyond += std::popcount(over);
    if (interval.bits == nullptr) {
      interval.mask[word] = static_cast<int32_t>(over);
      found += std::popcount(in);
      return;
    }
    for (; in != 0; in &= in - 1, ++found) {  // few words hold one
      const int j = std::countr_zero(in);
      const int64_t place = word / words * width + word % words * word_bits + j, at = first + found;
      if (interval.wide)
        static_cast<int64_t*>(interval.places)[at] = place;
      else
        static_cast<int32_t*>(interval.places)[at] = static_cast<int32_t>(place);
      interval.bits[at] = static_cast<int32_t>(bits[j]);
    }
  });
  *inside = found;
  *above = beyond;
}

/// Adds the integers of |weight grad_forget| and of |grad_retain grad_forget| to sums [2, 256], by exponent.
MOE_UNLEARN_INLINE void sum_words(const Terms& t, int64_t begin, int64_t end, int64_t* sums) {
  int64_t parts[2][tables][exponents] = {};
  const auto add = [&](const Word& a, const Word& b, int64_t (&into)[tables][exponents]) MOE_UNLEARN_INLINE_LAMBDA {
    uint32_t exponent[word_bits], integer[word_bits];
    for (int j = 0; j < word_bits; ++j) {
      const uint32_t bits = magnitude_bits(a[j] * b[j]);
      exponent[j] = bits >> mantissa;
      integer[j] = (bits & ((1u << mantissa) - 1)) | choose(exponent[j] != 0, 1, 0) << mantissa;
    }
    for (int j = 0; j < word_bits; ++j) into[j % tables][exponent[j]] += integer[j];
  };
  for_each_terms(t, begin, end, [&](int64_t, int64_t, Word& w, Word& g_f, Word& g_r) MOE_UNLEARN_INLINE_LAMBDA {
    add(w, g_f, parts[0]);
    add(g_r, g_f, parts[1]);
  });
  for (int term = 0; term < 2; ++term)
    for (int table = 0; table < tables; ++table)
      for (int64_t e = 0; e < exponents; ++e) sums[term * exponents + e] += parts[term][table][e];
}

Terms terms(const Tensor& weight, const Tensor& grad_forget, const Tensor& grad_retain, double gamma) {
  return {Rows(weight), Rows(grad_forget), Rows(grad_retain), static_cast<float>(gamma)};
}

int64_t total_words(const Terms& t) { return t.weight.count * t.weight.words(); }

/// An empty mask of the shape of the terms.
Tensor new_mask(const Tensor& weight, const Terms& t) {
  std::vector<int64_t> shape(weight.sizes().begin(), weight.sizes().end());
  shape.back() = t.weight.words();
  return torch::stable::new_empty(weight, shape, ScalarType::Int);
}

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
  auto mask = new_mask(weight, t);
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

std::tuple<Tensor, Tensor, Tensor, int64_t> weight_score_between(
    const Tensor& weight, const Tensor& grad_forget, const Tensor& grad_retain, double gamma, int64_t low, int64_t high,
    int64_t most) {
  const Terms t = terms(weight, grad_forget, grad_retain, gamma);
  const int64_t words = total_words(t), blocks = ceil_div(words, mask_block);
  auto mask = new_mask(weight, t);
  Interval interval{
      .low = static_cast<uint32_t>(low),
      .high = static_cast<uint32_t>(high),
      .mask = mask.mutable_data_ptr<int32_t>(),
      .places = nullptr,
      .bits = nullptr,
      .wide = t.weight.count * t.weight.width >= int64_t{1} << 31};
  std::vector<int64_t> inside(blocks, 0), above(blocks, 0), first(blocks, 0);
  const auto pass = [&](int64_t block, int64_t begin, int64_t end) {
    for_this_cpu<
        interval_words, const Terms&, int64_t, int64_t, const Interval&, int64_t, int64_t*, int64_t*>(
        t, begin, end, interval, first[block], &inside[block], &above[block]);
  };
  parallel_blocks(words, mask_block, pass);
  // up to the block with which there are more than `most`
  int64_t found = 0, used = 0;
  for (; used < blocks && found <= most; ++used) {
    first[used] = found;
    found += inside[used];
  }
  auto places = torch::stable::new_empty(weight, {found}, interval.wide ? ScalarType::Long : ScalarType::Int);
  auto bits = torch::stable::new_empty(weight, {found}, ScalarType::Int);
  interval.places = places.mutable_data_ptr();
  interval.bits = bits.mutable_data_ptr<int32_t>();
  if (found > 0)
    parallel_blocks(std::min(words, used * mask_block), mask_block, [&](int64_t block, int64_t begin, int64_t end) {
      if (inside[block] > 0) pass(block, begin, end);
    });
  return {mask, places, bits, std::accumulate(above.begin(), above.begin() + used, int64_t{0})};
}

Tensor weight_score_magnitudes(const Tensor& weight, const Tensor& grad_forget, const Tensor& grad_retain) {
  const Terms t = terms(weight, grad_forget, grad_retain, 1.0);
  const int64_t words = total_words(t), threads = torch::stable::get_num_threads();
  const int64_t size = std::max(ceil_div(words, threads), grain), parts = ceil_div(words, size);
  std::vector<int64_t> sums(parts * 2 * exponents, 0);
  parallel_blocks(words, size, [&](int64_t part, int64_t begin, int64_t end) {
    for_this_cpu<sum_words, const Terms&, int64_t, int64_t, int64_t*>(
        t, begin, end, sums.data() + part * 2 * exponents);
  });
  auto out = torch::stable::new_zeros(weight, {2, exponents}, ScalarType::Long);
  int64_t* const total = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < parts * 2 * exponents; ++i) total[i % (2 * exponents)] += sums[i];
  return out;
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("weight_score_histogram", TORCH_BOX(&moe_unlearn::weight_score_histogram));
  m.impl("weight_score_mask", TORCH_BOX(&moe_unlearn::weight_score_mask));
  m.impl("weight_score_between", TORCH_BOX(&moe_unlearn::weight_score_between));
  m.impl("weight_score_magnitudes", TORCH_BOX(&moe_unlearn::weight_score_magnitudes));
}
