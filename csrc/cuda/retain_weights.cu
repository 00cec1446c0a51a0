// The binding of retain_weights.

#include "cuda/retain_weights.cuh"

#include "cuda/binding.h"

namespace moe_unlearn {
namespace {

Tokens tokens_of(const Tensor& words, const Tensor& tilt, double bias, double cap) {
  STD_TORCH_CHECK(words.is_contiguous() && tilt.is_contiguous(), "words and tilt must be contiguous");
  return {reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()), tilt.const_data_ptr<double>(),
          words.size(0), words.size(1), tilt.size(0), bias, cap};
}

Tensor weights(const Tensor& words, const Tensor& tilt, double bias, double cap) {
  const OnDevice device(words);
  const Tokens tokens = tokens_of(words, tilt, bias, cap);
  auto out = torch::stable::new_empty(words, {tokens.count}, ScalarType::Float);
  check(retain_weights(tokens, out.mutable_data_ptr<float>(), device.stream()));
  return out;
}

std::tuple<Tensor, Tensor> moments(const Tensor& words, const Tensor& tilt, double bias, double cap) {
  const OnDevice device(words);
  const Tokens tokens = tokens_of(words, tilt, bias, cap);
  const MomentsPlan plan(tokens.count, tokens.size);
  const int64_t size = tokens.size + 1;
  auto workspace = torch::stable::new_empty(tilt, {plan.workspace}, ScalarType::Double);
  auto first = torch::stable::new_empty(tilt, {size}, ScalarType::Double);
  auto second = torch::stable::new_empty(tilt, {size, size}, ScalarType::Double);
  check(retain_weights_moments(
      tokens, plan, workspace.mutable_data_ptr<double>(), first.mutable_data_ptr<double>(),
      second.mutable_data_ptr<double>(), device.stream()));
  return {first, second};
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CUDA, m) {
  m.impl("retain_weights", TORCH_BOX(&moe_unlearn::weights));
  m.impl("retain_weights_moments", TORCH_BOX(&moe_unlearn::moments));
}
