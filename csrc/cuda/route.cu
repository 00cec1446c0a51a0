// The binding of route.

#include "cuda/route.cuh"

#include "cuda/binding.h"

namespace moe_unlearn {
namespace {

Integer integer_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value() || tensor->scalar_type() == ScalarType::Long) return Integer::int64;
  return tensor->scalar_type() == ScalarType::Char ? Integer::int8 : Integer::int32;
}

template <class Index>
void run(Routing& r, const Tensor& like, cudaStream_t stream) {
  RoutePlan plan(r);
  check(plan_route<Index>(plan, r));
  auto workspace = torch::stable::new_empty(like, {plan.workspace}, ScalarType::Int);
  r.workspace = workspace.mutable_data_ptr<int32_t>();
  check(route<Index>(r, plan, stream));
}

std::tuple<Tensor, Tensor, Tensor> route_rows(
    const Tensor& top_k_index, int64_t num_experts, const std::optional<Tensor>& group, int64_t num_groups,
    const std::optional<Tensor>& log_tilt, const std::optional<Tensor>& log_weight) {
  STD_TORCH_CHECK(top_k_index.is_contiguous(), "top_k_index must be contiguous");
  STD_TORCH_CHECK(top_k_index.numel() <= INT32_MAX, "sorted_rows are int32; got ", top_k_index.numel(), " rows");
  const OnDevice device(top_k_index);
  auto tokens_per_expert = torch::stable::new_empty(top_k_index, {num_groups, num_experts}, ScalarType::Int);
  auto expert_offsets = torch::stable::new_empty(top_k_index, {num_experts + 1}, ScalarType::Int);
  auto sorted_rows = torch::stable::new_empty(top_k_index, {top_k_index.numel()}, ScalarType::Int);
  Routing r{
      .index = top_k_index.const_data_ptr(),
      .num_tokens = top_k_index.size(0),
      .top_k = top_k_index.size(1),
      .num_experts = num_experts,
      .num_groups = num_groups,
      .group = group.has_value() ? group->const_data_ptr() : nullptr,
      .group_type = integer_of(group),
      .log_tilt = log_tilt.has_value() ? log_tilt->const_data_ptr<float>() : nullptr,
      .log_weight = log_weight.has_value() ? log_weight->mutable_data_ptr<float>() : nullptr,
      .log_weight_stride = log_weight.has_value() ? log_weight->stride(0) : 0,
      .tokens_per_expert = tokens_per_expert.mutable_data_ptr<int32_t>(),
      .expert_offsets = expert_offsets.mutable_data_ptr<int32_t>(),
      .sorted_rows = sorted_rows.mutable_data_ptr<int32_t>(),
      .workspace = nullptr,
  };
  if (top_k_index.scalar_type() == ScalarType::Int)
    run<int32_t>(r, top_k_index, device.stream());
  else
    run<int64_t>(r, top_k_index, device.stream());
  return {tokens_per_expert, expert_offsets, sorted_rows};
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CUDA, m) { m.impl("route", TORCH_BOX(&moe_unlearn::route_rows)); }
