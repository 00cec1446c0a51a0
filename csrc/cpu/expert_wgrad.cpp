// expert_wgrad: dW of the listed experts, a block of rows at a time, and what is made of it while it is in cache.
//
// A thread gathers an expert's rows once; a block of dW is one product of them, by torch's mm or ours. Only the plain
// store writes a whole dW. Products are in the factors' dtype where dW would be rounded to it next anyway, and in
// float32 otherwise. Blocks, and what is summed over them, are the same for any number of threads.

#include "cpu/masked_update.h"
#include "cpu/widened_product.h"

namespace moe_unlearn {
namespace {

constexpr int64_t block_bytes = 1 << 19;  // of dW: half of a small second-level cache
constexpr int64_t cached_bytes = 1 << 22;  // of a gradient that whoever reads it may find in a cache
constexpr int64_t epilogue_cost = 32;     // of an element of dW, counted in rows of its product

const int64_t* indices(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "indices must be contiguous");
  return tensor.const_data_ptr<int64_t>();
}

const int64_t* indices(const std::optional<Tensor>& tensor) { return tensor ? indices(*tensor) : nullptr; }

/// What one gradient is made of: `Factors` of expert_wgrad.py, for the listed experts.
struct Factors {
  Rows grad, input;
  const int64_t* bounds;  // [listed, 2]: start and stop of each expert's positions
  int64_t listed;
  const int64_t *grad_rows, *input_rows;  // null: the position itself

  Factors(
      const Tensor& grad, const Tensor& input, const Tensor& bounds, const std::optional<Tensor>& grad_rows,
      const std::optional<Tensor>& input_rows)
      : grad(grad), input(input), bounds(indices(bounds)), listed(bounds.size(0)), grad_rows(indices(grad_rows)),
        input_rows(indices(input_rows)) {}

  int64_t start(int64_t expert) const { return bounds[2 * expert]; }
  int64_t count(int64_t expert) const { return std::max<int64_t>(bounds[2 * expert + 1] - start(expert), 0); }
  /// The dtype of the rows that make a dW of dtype `dw`: their own where the product widens them.
  ScalarType gathered(ScalarType dw) const { return widens(grad.dtype) && grad.dtype == input.dtype ? grad.dtype : dw; }
  int64_t most(ScalarType dtype) const {
    int64_t most = 0;
    for (int64_t expert = 0; expert < listed; ++expert) most = std::max(most, padded(count(expert), dtype));
    return most;
  }
};

/// One thread's products: the rows of the expert at hand, gathered.
class Products {
 public:
  Products(const Factors& factors, ScalarType dtype)
      : factors_(factors), widens_(widens(dtype)),
        memory_(factors.most(dtype) * (factors.grad.width + factors.input.width) * item_size(dtype)),
        grad_(memory_.data(), dtype, factors.most(dtype), factors.grad.width),
        input_(grad_.row(grad_.rows), dtype, grad_.rows, factors.input.width) {}

  /// out = the rows of dW[expert] from `first_row` on, or zeros if they are not wanted; `streams`: of a whole dW
  void compute(const Matrix& out, int64_t expert, int64_t first_row, bool wanted, bool streams) {
    const int64_t count = factors_.count(expert), start = factors_.start(expert);
    if (count == 0 || !wanted) {
      std::memset(out.data, 0, out.rows * out.row_bytes());
      return;
    }
    const int64_t rows = padded(count, grad_.dtype);
    if (expert != gathered_) {
      gather(grad_, factors_.grad, factors_.grad_rows, start, count);
      gather(input_, factors_.input, factors_.input_rows, start, count);
      if (widens_) panels_.pack(input_.first_rows(rows));
      gathered_ = expert;
    }
    const Matrix left = grad_.first_rows(rows).transposed().slice(first_row, out.rows);
    if (widens_)
      own_.multiply(out, left, panels_, streams);
    else
      multiply(out, left, input_.first_rows(rows));
  }

 private:
  const Factors& factors_;
  bool widens_;
  Buffer memory_;
  Matrix grad_, input_;
  Panels panels_;
  WidenedProducts own_;
  int64_t gathered_ = -1;
};

MOE_UNLEARN_INLINE uint32_t mask_word(const Rows& mask, int64_t row, int64_t word) {
  uint32_t bits = 0xFFFFFFFF;
  if (mask) std::memcpy(&bits, mask.row(row) + word * mask.stride, sizeof(bits));
  return bits;
}

/// A block: rows of the compact [listed, M, P].
struct Block {
  int64_t index, expert, first_row, rows;  // first_row of the expert's M
};

struct Blocks {
  int64_t listed, height, width, rows, per_expert;

  Blocks(const std::vector<Factors>& gradients, ScalarType dtype)
      : listed(gradients[0].listed), height(gradients[0].grad.width), width(gradients[0].input.width) {
    const int64_t bytes = std::max<int64_t>(width * item_size(dtype) * gradients.size(), 1);
    rows = std::max(block_bytes / bytes / row_step * row_step, row_step);
    per_expert = ceil_div(height, rows);
  }

  int64_t count() const { return width > 0 ? listed * per_expert : 0; }
  Block operator[](int64_t index) const {
    const int64_t first = index % per_expert * rows;
    return {index, index / per_expert, first, std::min(rows, height - first)};
  }

  /// Whether the block has a bit in the mask: where not, its dW counts as zero and is not computed.
  bool trains(const Rows& mask, int64_t index) const {
    const Block block = (*this)[index];
    const int64_t first = block.expert * height + block.first_row;
    for (int64_t row = first; mask && row < first + block.rows; ++row)
      for (int64_t word = 0; word < mask.width; ++word)
        if (mask_word(mask, row, word) != 0) return true;
    return !mask;
  }
};

/// epilogue(block, dW of each gradient) for each block, in parallel. With `out`, dense and of this dtype, dW of the
/// only gradient is computed there.
template <class Epilogue>
void for_each_block(
    const std::vector<Factors>& gradients, ScalarType dtype, const Rows& mask, const Epilogue& epilogue,
    char* out = nullptr) {
  const Blocks blocks(gradients, dtype);
  const int64_t row_bytes = blocks.width * item_size(dtype), bytes = blocks.rows * row_bytes;
  const bool streams = out && blocks.listed * blocks.height * row_bytes > cached_bytes;
  std::vector<int64_t> cost;
  std::vector<char> trains;
  for (int64_t i = 0; i < blocks.count(); ++i) {
    cost.push_back(epilogue_cost), trains.push_back(blocks.trains(mask, i));
    for (const Factors& factors : gradients)
      if (trains[i]) cost.back() += padded(factors.count(blocks[i].expert), factors.gathered(dtype));
  }
  parallel_by_cost(cost, [&](int64_t first, int64_t last) {
    std::vector<Products> products;
    products.reserve(gradients.size());
    for (const Factors& factors : gradients) products.emplace_back(factors, factors.gathered(dtype));
    const Buffer memory(out ? 0 : bytes * gradients.size());
    std::vector<Matrix> dw(gradients.size(), Matrix(nullptr, dtype, 0, 0));
    for (int64_t i = first; i < last; ++i) {
      const Block block = blocks[i];
      for (size_t g = 0; g < gradients.size(); ++g) {
        char* const place =
            out ? out + (block.expert * blocks.height + block.first_row) * row_bytes : memory.data() + g * bytes;
        dw[g] = Matrix(place, dtype, block.rows, blocks.width);
        products[g].compute(dw[g], block.expert, block.first_row, trains[i], streams);
      }
      epilogue(block, dw);
    }
  });
}

/// f(row of dW, first element, elements, mask bits) for each word of a block's rows, first_row being that in mask.
template <class F>
MOE_UNLEARN_INLINE void for_each_word(const Matrix& dw, const Rows& mask, int64_t first_row, const F& f) {
  for (int64_t row = 0; row < dw.rows; ++row)
    for (int64_t first = 0; first < dw.columns; first += word_bits)
      f(row, first, std::min<int64_t>(dw.columns - first, word_bits),
        mask_word(mask, first_row + row, first / word_bits));
}

MOE_UNLEARN_INLINE void load_word(Word& to, const Matrix& dw, int64_t row, int64_t first, int64_t n) {
  const int64_t item = item_size(dw.dtype);
  load(to, dw.dtype, dw.row(row) + first * item, item, n);
}

// ---- store, accumulate ---------------------------------------------------------------------------------------

MOE_UNLEARN_INLINE void store_block(
    const Matrix& dw, const Rows& out, const Rows& mask, int64_t first_row, bool accumulate) {
  const auto write = [&](int64_t row, int64_t first, int64_t n, uint32_t bits) MOE_UNLEARN_INLINE_LAMBDA {
    if (accumulate && bits == 0) return;
    Word value, old;
    load_word(value, dw, row, first, n);
    char* const to = out.row(first_row + row) + first * out.stride;
    if (accumulate) {
      load(old, out.dtype, to, out.stride, n);
      for (int j = 0; j < word_bits; ++j) value[j] += old[j];
      store(value, out.dtype, to, out.stride, bits, n);
    } else {
      for (int j = 0; j < word_bits; ++j) value[j] = bits >> j & 1 ? value[j] : 0.0f;
      store(value, out.dtype, to, out.stride, 0xFFFFFFFF, n);
    }
  };
  for_each_word(dw, mask, first_row, write);
}

void expert_wgrad_(
    const Tensor& out, const Tensor& grad, const Tensor& input, const Tensor& bounds,
    const std::optional<Tensor>& grad_rows, const std::optional<Tensor>& input_rows,
    const std::optional<Tensor>& mask, bool accumulate) {
  const std::vector<Factors> factors{{grad, input, bounds, grad_rows, input_rows}};
  char* const data = static_cast<char*>(out.mutable_data_ptr());
  const Rows to(out), words(mask);
  const bool narrow = !accumulate && grad.scalar_type() == out.scalar_type();
  const bool direct = narrow && !mask && out.is_contiguous();
  const auto write = [&](const Block& block, const std::vector<Matrix>& dw) {
    if (!direct)
      for_this_cpu<store_block, const Matrix&, const Rows&, const Rows&>(
          dw[0], to, words, block.expert * factors[0].grad.width + block.first_row, accumulate);
  };
  for_each_block(factors, narrow ? grad.scalar_type() : ScalarType::Float, words, write, direct ? data : nullptr);
}

// ---- sgd, adamw ----------------------------------------------------------------------------------------------

template <class Rule>
void update(const UpdateOperands& whole, const Rule& rule, const Factors& factors) {
  const int64_t height = factors.grad.width;
  const bool narrow = whole.arithmetic() == factors.grad.dtype;
  for_each_block(
      {factors}, narrow ? factors.grad.dtype : ScalarType::Float, whole.mask,
      [&](const Block& block, const std::vector<Matrix>& dw) {
        UpdateOperands part = whole;
        part.grad_start = block.expert * height + block.first_row;
        part.grad = Rows(dw[0].data, dw[0].dtype, dw[0].rows, dw[0].columns);
        update_rows(part, rule, part.grad_start, part.grad_start + block.rows);
      });
}

void expert_wgrad_sgd_(
    const Tensor& weight, const std::optional<Tensor>& momentum_buffer, const std::optional<Tensor>& master,
    const Tensor& grad, const Tensor& input, const Tensor& bounds, const std::optional<Tensor>& grad_rows,
    const std::optional<Tensor>& input_rows, const Tensor& experts, const std::optional<Tensor>& mask, double lr,
    double momentum, double grad_scale, double weight_decay, bool nesterov, int64_t step, bool stochastic,
    int64_t seed, int64_t parameter_id, int64_t first_row) {
  const int64_t rows = experts.numel() * weight.size(1);
  UpdateOperands o(
      weight, Rows(), rows, mask, master, experts, {step, stochastic, seed, parameter_id, first_row});
  o.state[0] = Rows(momentum_buffer);
  const Sgd rule(lr, momentum, grad_scale, weight_decay, nesterov, step);
  update(o, rule, {grad, input, bounds, grad_rows, input_rows});
}

void expert_wgrad_adamw_(
    const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& master,
    const Tensor& grad, const Tensor& input, const Tensor& bounds, const std::optional<Tensor>& grad_rows,
    const std::optional<Tensor>& input_rows, const Tensor& experts, const std::optional<Tensor>& mask,
    double decay, double beta1, double beta2, double root_correction, double eps, double step_size, int64_t step,
    bool stochastic, int64_t seed, int64_t parameter_id, int64_t first_row) {
  const int64_t rows = experts.numel() * weight.size(1);
  UpdateOperands o(
      weight, Rows(), rows, mask, master, experts, {step, stochastic, seed, parameter_id, first_row});
  o.state[0] = Rows(exp_avg), o.state[1] = Rows(exp_avg_sq);
  const AdamW rule(decay, beta1, beta2, root_correction, eps, step_size);
  update(o, rule, {grad, input, bounds, grad_rows, input_rows});
}

// ---- inner products ------------------------------------------------------------------------------------------

MOE_UNLEARN_INLINE void inner_block(
    const Matrix& a, const Matrix& b, const Rows& mask, int64_t first_row, double* out) {
  double sums[word_bits] = {};
  const auto add = [&](int64_t row, int64_t first, int64_t n, uint32_t bits) MOE_UNLEARN_INLINE_LAMBDA {
    if (bits == 0) return;
    Word x, y;
    load_word(x, a, row, first, n);
    load_word(y, b, row, first, n);
    for (int j = 0; j < word_bits; ++j) {
      const double product = static_cast<double>(x[j]) * static_cast<double>(y[j]);
      sums[j] += bits >> j & 1 ? product : 0.0;
    }
  };
  for_each_word(a, mask, first_row, add);
  *out = 0;
  for (const double sum : sums) *out += sum;
}

/// A list has no optional tensors.
std::optional<Tensor> given(const Tensor& rows) {
  return rows.numel() > 0 ? std::optional<Tensor>(rows) : std::nullopt;
}

/// out [listed, m, m] float64, from one gradient after the other in lists of m; rows of none: the positions themselves.
void expert_wgrad_inner_(
    const Tensor& out, std::vector<Tensor> grads, std::vector<Tensor> inputs, std::vector<Tensor> bounds,
    std::vector<Tensor> grad_rows, std::vector<Tensor> input_rows, const std::optional<Tensor>& mask) {
  std::vector<Factors> gradients;
  for (size_t i = 0; i < grads.size(); ++i)
    gradients.emplace_back(grads[i], inputs[i], bounds[i], given(grad_rows[i]), given(input_rows[i]));
  const Rows words(mask);
  const int64_t m = static_cast<int64_t>(gradients.size()), height = gradients[0].grad.width;
  const Blocks blocks(gradients, ScalarType::Float);
  std::vector<double> parts(blocks.count() * m * m);
  for_each_block(gradients, ScalarType::Float, words, [&](const Block& block, const std::vector<Matrix>& dw) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j <= i; ++j)
        for_this_cpu<inner_block, const Matrix&, const Matrix&, const Rows&, int64_t, double*>(
            dw[i], dw[j], words, block.expert * height + block.first_row, &parts[(block.index * m + i) * m + j]);
  });
  double* const sums = out.mutable_data_ptr<double>();
  std::fill_n(sums, blocks.listed * m * m, 0.0);
  for (int64_t block = 0; block < blocks.count(); ++block) {
    double* const gram = sums + blocks[block].expert * m * m;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j <= i; ++j) gram[j * m + i] = gram[i * m + j] += parts[(block * m + i) * m + j];
  }
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("expert_wgrad_", TORCH_BOX(&moe_unlearn::expert_wgrad_));
  m.impl("expert_wgrad_sgd_", TORCH_BOX(&moe_unlearn::expert_wgrad_sgd_));
  m.impl("expert_wgrad_adamw_", TORCH_BOX(&moe_unlearn::expert_wgrad_adamw_));
  m.impl("expert_wgrad_inner_", TORCH_BOX(&moe_unlearn::expert_wgrad_inner_));
}
