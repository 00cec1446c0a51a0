// The binding of expert_mlp: SwiGLU of bfloat16 operands, any of the layouts of its weights.

#include "cuda/expert_mlp.cuh"

#include "cuda/hopper_binding.h"

namespace moe_unlearn {
namespace {

const uint16_t* halves_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, "operands must be bfloat16");
  return static_cast<const uint16_t*>(tensor.const_data_ptr());
}

const uint16_t* halves_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous(), "biases must be contiguous");
  return halves_of(*tensor);
}

uint16_t* written(Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }

/// `out` or null, where it has no rows since nobody wants it.
uint16_t* wanted(Tensor& tensor, bool wanted) { return wanted ? written(tensor) : nullptr; }

const int32_t* indices_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "indices must be contiguous");
  return tensor.const_data_ptr<int32_t>();
}

SlotWeights weights_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "top_k_weights must be contiguous");
  return {tensor.const_data_ptr(), dtype_of(tensor)};
}

/// [experts, columns, depth] if by_row, else [experts, depth, columns]
ExpertWeight weight_of(const Tensor& tensor, bool by_row) {
  const int64_t experts = tensor.size(0), rows = tensor.size(1), stride = tensor.stride(1);
  const int64_t apart = experts > 1 ? tensor.stride(0) : rows * stride;
  const bool fits = tensor.stride(2) == 1 && stride >= tensor.size(2) && (stride | apart) % 8 == 0;
  STD_TORCH_CHECK(fits, "weights must have rows of stride 1 at 16-byte addresses");
  return {{halves_of(tensor), rows, tensor.size(2), stride, experts, apart}, by_row};
}

/// What forward and backward have in common.
struct Layer {
  Segments segments;
  const int32_t* slots;
  SlotWeights weights;
  SwiGlu gate;
  int64_t tokens, hidden, inner;
  int32_t top_k;
  bool transposed, interleaved;

  Layer(
      const Tensor& x, const Tensor& top_k_weights, const Tensor& sorted_rows, const Tensor& expert_offsets,
      const Tensor& down_proj, const std::string& activation, SwiGlu gate, bool transposed, bool interleaved,
      bool gated)
      : segments{indices_of(expert_offsets), static_cast<int32_t>(down_proj.size(0)),
                 static_cast<int32_t>(sorted_rows.numel())},
        slots(indices_of(sorted_rows)), weights(weights_of(top_k_weights)), gate(gate), tokens(x.size(0)),
        hidden(x.size(1)), inner(down_proj.size(transposed ? 1 : 2)),
        top_k(static_cast<int32_t>(top_k_weights.size(1))), transposed(transposed), interleaved(interleaved) {
    STD_TORCH_CHECK(activation == "silu" && gated, "expert_mlp in CUDA has SwiGLU alone");
  }

  /// Rows by token, which are gathered.
  Left by_token(const Tensor& rows) const {
    STD_TORCH_CHECK(rows.stride(1) == 1, "rows must have columns of stride 1");
    return {halves_of(rows), tokens, hidden, rows.stride(0), slots, top_k};
  }

  /// Rows by position, which stand in order.
  Left by_position(const uint16_t* rows, int64_t columns) const {
    return {rows, segments.rows, columns, columns, nullptr, top_k};
  }

  /// out = for each token the sum of its rows' products, which stand in workspace meanwhile.
  Tensor to_tokens(
      const Tensor& like, const uint16_t* rows, int64_t columns, const ExpertWeight& weight, const uint16_t* bias,
      SlotWeights counted, cudaStream_t stream) const {
    auto workspace = torch::stable::new_empty(like, {segments.rows, hidden});
    auto out = torch::stable::new_empty(like, {tokens, hidden});
    const auto wide = static_cast<int32_t>(hidden);
    const Scatter scatter{written(workspace), bias, slots, counted, wide};
    const Left left = by_position(rows, columns);
    check_support("expert_mlp", grouped_product(left, weight, segments, hidden, false, scatter, stream));
    check(sum_slots({written(workspace), written(out), tokens, wide, top_k}, stream));
    return out;
  }
};

std::tuple<Tensor, Tensor> expert_mlp(
    const Tensor& x, const Tensor& top_k_weights, const Tensor& sorted_rows, const Tensor& expert_offsets,
    const Tensor& gate_up_proj, const Tensor& down_proj, const std::optional<Tensor>& gate_up_bias,
    const std::optional<Tensor>& down_bias, std::string activation, double alpha, double limit, double shift,
    bool transposed, bool interleaved, bool gated) {
  const SwiGlu gate{static_cast<float>(alpha), static_cast<float>(limit), static_cast<float>(shift)};
  const Layer layer(
      x, top_k_weights, sorted_rows, expert_offsets, down_proj, activation, gate, transposed, interleaved, gated);
  auto z = torch::stable::new_empty(x, {layer.segments.rows, 2 * layer.inner});
  if (layer.segments.rows == 0) return {torch::stable::new_empty(x, {layer.tokens, layer.hidden}), z};
  const OnDevice device(x);
  auto a = torch::stable::new_empty(x, {layer.segments.rows, layer.inner});
  const auto up = [&](const auto& epilogue, int64_t width) {
    const auto weight = weight_of(gate_up_proj, !transposed);
    const Left left = layer.by_token(x);
    check_support(
        "expert_mlp",
        grouped_product(left, weight, layer.segments, width, !interleaved, epilogue, device.stream()));
  };
  const auto inner = static_cast<int32_t>(layer.inner);
  if (interleaved)
    up(GateUp<true>{written(z), written(a), halves_of(gate_up_bias), inner, gate}, 2 * layer.inner);
  else
    up(GateUp<false>{written(z), written(a), halves_of(gate_up_bias), inner, gate}, layer.inner);
  const auto down = weight_of(down_proj, !transposed);
  return {
      layer.to_tokens(x, written(a), layer.inner, down, halves_of(down_bias), layer.weights, device.stream()), z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& top_k_weights, const Tensor& sorted_rows,
    const Tensor& expert_offsets, const Tensor& gate_up_proj, const Tensor& down_proj,
    const std::optional<Tensor>& down_bias, const Tensor& z, std::string activation, double alpha, double limit,
    double shift, bool transposed, bool interleaved, bool gated, bool need_x, bool need_weights, bool need_z,
    bool need_scaled) {
  const SwiGlu gate{static_cast<float>(alpha), static_cast<float>(limit), static_cast<float>(shift)};
  const Layer layer(
      x, top_k_weights, sorted_rows, expert_offsets, down_proj, activation, gate, transposed, interleaved, gated);
  const int64_t rows = layer.segments.rows, wide = 2 * layer.inner;
  const bool has_dz = need_x || need_z;
  auto d_x = torch::stable::new_empty(x, {0, layer.hidden});
  auto d_weights = torch::stable::new_empty(top_k_weights, {need_weights ? layer.tokens : 0, layer.top_k});
  auto dz = torch::stable::new_empty(x, {has_dz ? rows : 0, wide});
  auto scaled = torch::stable::new_empty(x, {need_scaled ? rows : 0, layer.inner});
  const auto parts = static_cast<int32_t>(ceil_div<int64_t>(layer.inner, ProductPlan::columns));
  if (rows == 0) {
    if (need_x) d_x = torch::stable::new_empty(x, {layer.tokens, layer.hidden});
  } else if (has_dz || need_weights || need_scaled) {
    const OnDevice device(x);
    STD_TORCH_CHECK(z.is_contiguous(), "z must be contiguous");
    auto partial = torch::stable::new_empty(x, {need_weights ? parts : 0, rows}, ScalarType::Float);
    float* const sums = need_weights ? partial.mutable_data_ptr<float>() : nullptr;
    Left grad = layer.by_token(grad_out);
    const auto gradient = [&]<bool pairs>() {
      const GateUpGradient<pairs> epilogue{
          halves_of(z), wanted(dz, has_dz), wanted(scaled, need_scaled), sums, layer.slots, layer.weights,
          static_cast<int32_t>(layer.inner), layer.segments.rows, gate};
      Left left = grad;
      if (!has_dz && !need_weights) left.depth = 0;  // nobody looks at da
      const auto weight = weight_of(down_proj, transposed);
      check_support(
          "expert_mlp",
          grouped_product(left, weight, layer.segments, layer.inner, false, epilogue, device.stream()));
    };
    if (interleaved)
      gradient.template operator()<true>();
    else
      gradient.template operator()<false>();
    if (need_weights)
      check(weights_gradient(
          {sums, parts, grad, halves_of(down_bias), layer.segments, d_weights.mutable_data_ptr(), dtype_of(d_weights)},
          device.stream()));
    if (need_x) {
      const auto up = weight_of(gate_up_proj, transposed);
      d_x = layer.to_tokens(x, written(dz), wide, up, nullptr, {nullptr, Dtype::none}, device.stream());
    }
  }
  if (!need_z) dz = torch::stable::new_empty(x, {0, wide});
  return {d_x, d_weights, dz, scaled};
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CUDA, m) {
  m.impl("expert_mlp", TORCH_BOX(&moe_unlearn::expert_mlp));
  m.impl("expert_mlp_backward", TORCH_BOX(&moe_unlearn::expert_mlp_backward));
}
