// The binding of weight_score.

#include "cuda/weight_score.cuh"

#include "cuda/binding.h"

namespace moe_unlearn {
namespace {

ScoreTerms terms_of(const Tensor& weight, const Tensor& grad_forget, const Tensor& grad_retain, double gamma) {
  return {rows_of(weight), rows_of(grad_forget), rows_of(grad_retain), gamma};
}

Tensor histogram(
    const Tensor& weight, const Tensor& grad_forget, const Tensor& grad_retain, double gamma, int64_t digit,
    int64_t prefix) {
  const OnDevice device(weight);
  auto counts = torch::stable::new_zeros(weight, {1 << 16}, ScalarType::Long);
  check(weight_score_histogram(
      terms_of(weight, grad_forget, grad_retain, gamma), digit, prefix, counts.mutable_data_ptr<int64_t>(),
      device.stream()));
  return counts;
}

std::tuple<Tensor, Tensor> mask(
    const Tensor& weight, const Tensor& grad_forget, const Tensor& grad_retain, double gamma,
    int64_t threshold_bits, int64_t ties) {
  const OnDevice device(weight);
  const ScoreTerms terms = terms_of(weight, grad_forget, grad_retain, gamma);
  Device properties{};
  check(get_device(properties));
  const MaskPlan plan(terms.chunks, properties.multiprocessors);
  std::vector<int64_t> shape(weight.sizes().begin(), weight.sizes().end());
  shape.back() = terms.words;
  auto words = torch::stable::new_empty(weight, shape, ScalarType::Int);
  auto ties_in_span = torch::stable::new_empty(weight, {plan.spans}, ScalarType::Long);
  auto taken = torch::stable::new_empty(weight, {}, ScalarType::Long);
  check(weight_score_mask(
      terms, plan, threshold_bits, ties, words.mutable_data_ptr<int32_t>(), ties_in_span.mutable_data_ptr<int64_t>(),
      taken.mutable_data_ptr<int64_t>(), device.stream()));
  return {words, taken};
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CUDA, m) {
  m.impl("weight_score_histogram", TORCH_BOX(&moe_unlearn::histogram));
  m.impl("weight_score_mask", TORCH_BOX(&moe_unlearn::mask));
}
