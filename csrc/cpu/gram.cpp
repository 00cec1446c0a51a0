// gram: inner products of m gradients of one shape, in one pass over them, and of grouped weight gradients from their
// factors. Products of float32 and narrower are exact in float64; sums over fixed blocks, added in order.

#include "cpu/common.h"
#include "cpu/product.h"

#include <array>
#include <vector>

namespace moe_unlearn {
namespace {

constexpr int64_t piece = 16;             // words widened at a time: 4 KiB of doubles a gradient
constexpr int64_t block_size = 1 << 11;  // words of a partial sum
constexpr int64_t factor_rows = 128;      // rows of an expert multiplied at a time

// One sum a lane, and the lanes added in order at the end of a block: the bits are those of every vector width.
using Lanes = std::array<double, word_bits>;

struct Terms {
  std::vector<Rows> gradients;
  const uint32_t* mask;  // words of the rows, null for none
};

/// Adds sum_k a[k] b[k] to the lanes.
MOE_UNLEARN_INLINE void add_products(const double* a, const double* b, int64_t words, Lanes& sums) {
  double own[word_bits];
  for (int j = 0; j < word_bits; ++j) own[j] = sums[j];
  for (int64_t word = 0; word < words; ++word)
    for (int j = 0; j < word_bits; ++j) own[j] += a[word * word_bits + j] * b[word * word_bits + j];
  for (int j = 0; j < word_bits; ++j) sums[j] = own[j];
}

/// The word `index` of a gradient's row as doubles, 0 beyond the row and where the mask is.
MOE_UNLEARN_INLINE void widen(const Rows& g, const char* row, int64_t word, uint32_t kept, double* to) {
  const int64_t first = word * word_bits;
  Word value;
  load(value, g.dtype, row + first * g.stride, g.stride, std::min<int64_t>(g.width - first, word_bits));
  if (kept == 0xFFFFFFFF)
    for (int j = 0; j < word_bits; ++j) to[j] = static_cast<double>(value[j]);
  else  // a choice, not a product: what a mask hides may be NaN
    for (int j = 0; j < word_bits; ++j)
      to[j] = static_cast<double>(float_of(choose(kept >> j & 1, bits_of(value[j]), 0)));
}

/// Adds the words [begin, end) to the lanes of every pair i <= j; `wide` has room for a piece of each gradient.
MOE_UNLEARN_INLINE void add_words(const Terms& t, int64_t begin, int64_t end, double* wide, Lanes* sums) {
  const int64_t m = static_cast<int64_t>(t.gradients.size()), words = t.gradients[0].words();
  constexpr int64_t stride = piece * word_bits;
  for (int64_t first = begin; first < end; first += piece) {
    const int64_t count = std::min(piece, end - first);
    for (int64_t i = 0; i < m; ++i) {
      const Rows& g = t.gradients[i];
      int64_t row = first / words, word = first % words;
      const char* from = g.row(row);
      for (int64_t k = 0; k < count; ++k) {
        widen(g, from, word, t.mask != nullptr ? t.mask[first + k] : 0xFFFFFFFF, wide + i * stride + k * word_bits);
        if (++word == words && k + 1 < count) {
          word = 0;
          from = g.row(++row);
        }
      }
    }
    Lanes* pair = sums;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = i; j < m; ++j) add_products(wide + i * stride, wide + j * stride, count, *pair++);
  }
}

/// G from the lanes of its upper triangle in every block.
Tensor symmetric(const Tensor& like, int64_t m, const std::vector<Lanes>& parts) {
  auto out = torch::stable::new_zeros(like, {m, m}, ScalarType::Double);
  double* const to = out.mutable_data_ptr<double>();
  for (auto part = parts.begin(); part != parts.end();)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = i; j < m; ++j, ++part)
        for (const double lane : *part) to[i * m + j] += lane;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < i; ++j) to[i * m + j] = to[j * m + i];
  return out;
}

Tensor gram(const std::vector<Tensor>& gradients, const std::optional<Tensor>& mask) {
  Terms t{{}, nullptr};
  for (const Tensor& gradient : gradients) t.gradients.emplace_back(gradient);
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->is_contiguous(), "mask must be contiguous");
    t.mask = static_cast<const uint32_t*>(mask->const_data_ptr());
  }
  const int64_t m = static_cast<int64_t>(gradients.size()), pairs = m * (m + 1) / 2;
  const int64_t words = t.gradients[0].count * t.gradients[0].words(), blocks = ceil_div(words, block_size);
  std::vector<Lanes> parts(blocks * pairs, Lanes{});
  parallel(blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<double> wide(m * piece * word_bits);
    for (int64_t block = first; block < last; ++block)
      for_this_cpu<add_words, const Terms&, int64_t, int64_t, double*, Lanes*>(
          t, block * block_size, std::min(words, (block + 1) * block_size), wide.data(),
          parts.data() + block * pairs);
  });
  return symmetric(gradients[0], m, parts);
}

struct Factors {
  std::vector<Rows> row_gradients;
  Rows inputs;
};

/// The rows [first, first + count) as doubles, padded with 0 to whole words, `stride` apart.
MOE_UNLEARN_INLINE void widen_rows(const Rows& rows, int64_t first, int64_t count, double* to, int64_t stride) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t word = 0; word < rows.words(); ++word)
      widen(rows, rows.row(first + r), word, 0xFFFFFFFF, to + r * stride + word * word_bits);
}

/// Adds sum_r weighted_i[r] . dy_j[r] for i <= j, the m vectors of a row lying `width` apart.
MOE_UNLEARN_INLINE void add_row_products(
    const double* weighted, const double* dy, int64_t rows, int64_t m, int64_t width, Lanes* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    Lanes* pair = sums;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = i; j < m; ++j)
        add_products(weighted + (r * m + i) * width, dy + (r * m + j) * width, width / word_bits, *pair++);
  }
}

MOE_UNLEARN_INLINE void add_to(double* to, const double* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

/// The rows [a, a + factor_rows) of an expert against all of its rows [begin, end).
struct Task {
  int64_t begin, end, a;
};

class FactorWorkspace {
 public:
  FactorWorkspace(const Factors& factors, const Tensor& like)
      : factors_(factors), m_(static_cast<int64_t>(factors.row_gradients.size())),
        x_width_(factors.inputs.words() * word_bits), dy_width_(factors.row_gradients[0].words() * word_bits),
        x_a_(make(like, x_width_)), x_b_(make(like, x_width_)), dy_(make(like, m_ * dy_width_)),
        weighted_(make(like, m_ * dy_width_)), part_(make(like, m_ * dy_width_)), products_(make(like, factor_rows)) {}

  void run(const Task& task, Lanes* sums) {
    const int64_t rows = std::min(factor_rows, task.end - task.a);
    Tensor x_a = first_rows(x_a_, rows), weighted = first_rows(weighted_, rows);
    widen_x(task.a, x_a);
    // the rows of a last: dy_ then holds theirs
    Tensor part = weighted;
    for (int64_t b = task.begin; b < task.end; b += factor_rows) {
      if (b == task.a) continue;
      multiply_rows(task, b, x_a, part);
      add(weighted, part);
      part = first_rows(part_, rows);
    }
    multiply_rows(task, task.a, x_a, part);
    add(weighted, part);
    for_this_cpu<add_row_products, const double*, const double*, int64_t, int64_t, int64_t, Lanes*>(
        weighted_.const_data_ptr<double>(), dy_.const_data_ptr<double>(), rows, m_, dy_width_, sums);
  }

 private:
  static Tensor make(const Tensor& like, int64_t width) {
    return torch::stable::new_empty(like, {factor_rows, width}, ScalarType::Double);
  }

  void widen_x(int64_t first, Tensor& to) {
    for_this_cpu<widen_rows, const Rows&, int64_t, int64_t, double*, int64_t>(
        factors_.inputs, first, to.size(0), to.mutable_data_ptr<double>(), x_width_);
  }

  /// out = (x_a x_b^T) dy_b
  void multiply_rows(const Task& task, int64_t b, const Tensor& x_a, const Tensor& out) {
    const int64_t rows = std::min(factor_rows, task.end - b);
    Tensor x_b = x_a, dy = first_rows(dy_, rows);
    if (b != task.a) {
      x_b = first_rows(x_b_, rows);
      widen_x(b, x_b);
    }
    for (int64_t i = 0; i < m_; ++i)
      for_this_cpu<widen_rows, const Rows&, int64_t, int64_t, double*, int64_t>(
          factors_.row_gradients[i], b, rows, dy.mutable_data_ptr<double>() + i * dy_width_, m_ * dy_width_);
    const Tensor products = corner(products_, x_a.size(0), rows);
    multiply(products, x_a, transposed(x_b));
    multiply(out, products, dy);
  }

  /// weighted += part, unless they are one
  void add(Tensor& weighted, const Tensor& part) const {
    const double* const from = part.const_data_ptr<double>();
    double* const to = weighted.mutable_data_ptr<double>();
    if (from != to) for_this_cpu<add_to, double*, const double*, int64_t>(to, from, part.size(0) * m_ * dy_width_);
  }

  const Factors& factors_;
  int64_t m_, x_width_, dy_width_;
  Tensor x_a_, x_b_, dy_, weighted_, part_, products_;
};

Tensor gram_factors(
    const std::vector<Tensor>& row_gradients, const Tensor& inputs, const std::vector<int64_t>& expert_offsets) {
  Factors factors{{}, Rows(inputs)};
  for (const Tensor& dy : row_gradients) factors.row_gradients.emplace_back(dy);
  std::vector<Task> tasks;
  for (size_t e = 0; e + 1 < expert_offsets.size(); ++e)
    for (int64_t a = expert_offsets[e]; a < expert_offsets[e + 1]; a += factor_rows)
      tasks.push_back({expert_offsets[e], expert_offsets[e + 1], a});
  const int64_t m = static_cast<int64_t>(row_gradients.size()), pairs = m * (m + 1) / 2;
  const int64_t count = static_cast<int64_t>(tasks.size());
  std::vector<Lanes> parts(count * pairs, Lanes{});
  parallel_products(count, [&](int64_t first, int64_t last) {
    FactorWorkspace workspace(factors, inputs);
    for (int64_t task = first; task < last; ++task) workspace.run(tasks[task], parts.data() + task * pairs);
  });
  return symmetric(inputs, m, parts);
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("gram", TORCH_BOX(&moe_unlearn::gram));
  m.impl("gram_factors", TORCH_BOX(&moe_unlearn::gram_factors));
}
