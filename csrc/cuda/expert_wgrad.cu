// The binding of expert_wgrad.

#include "cuda/expert_wgrad.cuh"

#include "cuda/hopper_binding.h"
#include "cuda/operands.h"
#include "cuda/wgrad_inner.cuh"

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

/// A list has no optional tensors.
std::optional<Tensor> given(const Tensor& rows) {
  return rows.numel() > 0 ? std::optional<Tensor>(rows) : std::nullopt;
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

/// out [listed, m, m] float64, from one gradient after the other in lists of m; rows of none: the positions themselves.
void expert_wgrad_inner_(
    const Tensor& out, std::vector<Tensor> grads, std::vector<Tensor> inputs, std::vector<Tensor> bounds,
    std::vector<Tensor> grad_rows, std::vector<Tensor> input_rows, const std::optional<Tensor>& mask) {
  if (out.numel() == 0) return;
  const OnDevice device(out);
  std::vector<Factors> gradients;
  for (size_t i = 0; i < grads.size(); ++i)
    gradients.push_back(factors(grads[i], inputs[i], bounds[i], given(grad_rows[i]), given(input_rows[i])));
  const int64_t count = out.size(1), listed = out.size(0), pairs = std::max<int64_t>(count * (count - 1) / 2, 1);
  const int64_t parts = WgradInner::parts_of_expert(gradients[0].grad.columns, gradients[0].input.columns);
  auto workspace = torch::stable::new_empty(out, {pairs, listed, parts, 3});
  double* to = workspace.mutable_data_ptr<double>();
  for (int64_t i = 0; i < std::max<int64_t>(count - 1, 1); ++i)
    for (int64_t j = std::min(i + 1, count - 1); j < count; ++j, to += listed * parts * 3)
      check_support(
          "expert_wgrad", expert_wgrad_parts(gradients[i], gradients[j], rows_of(mask), to, device.stream()));
  check(expert_wgrad_gram(
      {workspace.const_data_ptr<double>(), out.mutable_data_ptr<double>(), listed, parts, count}, device.stream()));
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CUDA, m) {
  m.impl("expert_wgrad_", TORCH_BOX(&moe_unlearn::expert_wgrad_));
  m.impl("expert_wgrad_sgd_", TORCH_BOX(&moe_unlearn::expert_wgrad_sgd_));
  m.impl("expert_wgrad_adamw_", TORCH_BOX(&moe_unlearn::expert_wgrad_adamw_));
  m.impl("expert_wgrad_inner_", TORCH_BOX(&moe_unlearn::expert_wgrad_inner_));
}
