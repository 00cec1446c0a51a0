// The binding of expert_wgrad: everything but the inner products.

#include "cuda/expert_wgrad.cuh"

#include "cuda/hopper_binding.h"
#include "cuda/operands.h"

namespace moe_unlearn {
namespace {

Factor factor(const Tensor& tensor, const std::optional<Tensor>& rows) {
  const bool dense = tensor.scalar_type() == ScalarType::BFloat16 && tensor.stride(1) == 1;
  STD_TORCH_CHECK(dense, "factors must be bfloat16 with columns of stride 1");
  const auto* const data = static_cast<const uint16_t*>(tensor.const_data_ptr());
  return {data, tensor.size(0), tensor.size(1), tensor.stride(0), indices(rows)};
}

Factors factors(
    const Tensor& grad, const Tensor& input, const Tensor& bounds, const std::optional<Tensor>& grad_rows,
    const std::optional<Tensor>& input_rows) {
  return {factor(grad, grad_rows), factor(input, input_rows), indices(bounds), bounds.size(0)};
}

void expert_wgrad_(
    const Tensor& out, const Tensor& grad, const Tensor& input, const Tensor& bounds,
    const std::optional<Tensor>& grad_rows, const std::optional<Tensor>& input_rows,
    const std::optional<Tensor>& mask, bool accumulate) {
  const OnDevice device(out);
  out.mutable_data_ptr();
  const WgradStore store{rows_of(out), rows_of(mask), accumulate};
  const Factors f = factors(grad, input, bounds, grad_rows, input_rows);
  check_support("expert_wgrad", expert_wgrad(f, store, device.stream()));
}

void expert_wgrad_sgd_(
    const Tensor& weight, const std::optional<Tensor>& momentum_buffer, const std::optional<Tensor>& master,
    const Tensor& grad, const Tensor& input, const Tensor& bounds, const std::optional<Tensor>& grad_rows,
    const std::optional<Tensor>& input_rows, const Tensor& experts, const std::optional<Tensor>& mask, double lr,
    double momentum, double grad_scale, double weight_decay, bool nesterov, int64_t step, bool stochastic,
    int64_t seed, int64_t parameter_id, int64_t first_row) {
  const OnDevice device(weight);
  const int64_t rows = experts.numel() * weight.size(1);
  const Update update{step, stochastic, seed, parameter_id, first_row};
  Operands o = operands_of(weight, rows, mask, master, experts, update);
  o.state[0] = state_of(momentum_buffer);
  const Sgd rule(lr, momentum, grad_scale, weight_decay, nesterov, step);
  const Factors f = factors(grad, input, bounds, grad_rows, input_rows);
  check_support("expert_wgrad", expert_wgrad_update(f, o, rule, device.stream()));
}

void expert_wgrad_adamw_(
    const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& master,
    const Tensor& grad, const Tensor& input, const Tensor& bounds, const std::optional<Tensor>& grad_rows,
    const std::optional<Tensor>& input_rows, const Tensor& experts, const std::optional<Tensor>& mask,
    double decay, double beta1, double beta2, double root_correction, double eps, double step_size, int64_t step,
    bool stochastic, int64_t seed, int64_t parameter_id, int64_t first_row) {
  const OnDevice device(weight);
  const int64_t rows = experts.numel() * weight.size(1);
  const Update update{step, stochastic, seed, parameter_id, first_row};
  Operands o = operands_of(weight, rows, mask, master, experts, update);
  o.state[0] = state_of(exp_avg), o.state[1] = state_of(exp_avg_sq);
  const AdamW rule(decay, beta1, beta2, root_correction, eps, step_size);
  const Factors f = factors(grad, input, bounds, grad_rows, input_rows);
  check_support("expert_wgrad", expert_wgrad_update(f, o, rule, device.stream()));
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CUDA, m) {
  m.impl("expert_wgrad_", TORCH_BOX(&moe_unlearn::expert_wgrad_));
  m.impl("expert_wgrad_sgd_", TORCH_BOX(&moe_unlearn::expert_wgrad_sgd_));
  m.impl("expert_wgrad_adamw_", TORCH_BOX(&moe_unlearn::expert_wgrad_adamw_));
}
