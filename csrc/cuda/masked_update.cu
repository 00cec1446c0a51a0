// The binding of masked_update.

#include "cuda/masked_update.cuh"

#include "cuda/operands.h"

namespace moe_unlearn {
namespace {

void masked_sgd_(
    const Tensor& param, const Tensor& grad, const std::optional<Tensor>& momentum_buffer,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& master, const std::optional<Tensor>& slices,
    double lr, double momentum, double grad_scale, double weight_decay, bool nesterov, int64_t step,
    bool stochastic, int64_t seed, int64_t parameter_id, int64_t first_row) {
  const OnDevice device(param);
  const Rows gradient = rows_of(grad);
  const Update update{step, stochastic, seed, parameter_id, first_row};
  Operands o = operands_of(param, gradient.count, mask, master, slices, update);
  o.grad = gradient, o.state[0] = state_of(momentum_buffer);
  check(masked_update(o, Sgd(lr, momentum, grad_scale, weight_decay, nesterov, step), device.stream()));
}

void masked_adamw_(
    const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& master, const std::optional<Tensor>& slices,
    double decay, double beta1, double beta2, double root_correction, double eps, double step_size, int64_t step,
    bool stochastic, int64_t seed, int64_t parameter_id, int64_t first_row) {
  const OnDevice device(param);
  const Rows gradient = rows_of(grad);
  const Update update{step, stochastic, seed, parameter_id, first_row};
  Operands o = operands_of(param, gradient.count, mask, master, slices, update);
  o.grad = gradient, o.state[0] = state_of(exp_avg), o.state[1] = state_of(exp_avg_sq);
  check(masked_update(o, AdamW(decay, beta1, beta2, root_correction, eps, step_size), device.stream()));
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CUDA, m) {
  m.impl("masked_sgd_", TORCH_BOX(&moe_unlearn::masked_sgd_));
  m.impl("masked_adamw_", TORCH_BOX(&moe_unlearn::masked_adamw_));
}
