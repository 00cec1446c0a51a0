// route: a stable counting sort of the routed rows by expert, the histogram of token groups, and the tilt.
//
// Three passes over parts of the tokens, one part per thread: count; exclusive scan over (expert, part);
// scatter. A part writes the rows of an expert behind those of the parts before it, so the order is that of a
// stable sort however many parts there are.

#include "cpu/common.h"

#include <vector>

namespace moe_unlearn {
namespace {

constexpr int64_t smallest_part = 2048;  // routed rows; below, a second thread costs more than it saves

int64_t integer_at(const void* data, ScalarType dtype, int64_t index) {
  switch (dtype) {
    case ScalarType::Char:
      return static_cast<const int8_t*>(data)[index];
    case ScalarType::Int:
      return static_cast<const int32_t*>(data)[index];
    default:
      return static_cast<const int64_t*>(data)[index];
  }
}

struct Arguments {
  const void* index;  // [T, K] contiguous
  int64_t num_tokens, top_k, num_experts, num_groups;
  const void* group;  // [T] contiguous, or null
  ScalarType group_dtype;
  const float* log_tilt;  // [E] contiguous, or null
  float* log_weight;
  int64_t log_weight_stride;
};

/// Expert of a row, or E for "not here".
template <class Index>
int64_t expert_of(const Arguments& a, int64_t row) {
  const auto expert = static_cast<int64_t>(static_cast<const Index*>(a.index)[row]);
  return expert >= 0 && expert < a.num_experts ? expert : a.num_experts;
}

/// Adds the tokens [begin, end) to rows_per_expert [E + 1] and histogram [G, E]; adds their tilt.
template <class Index>
void count(const Arguments& a, int64_t begin, int64_t end, int32_t* rows_per_expert, int32_t* histogram) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t group = a.group == nullptr ? 0 : integer_at(a.group, a.group_dtype, t);
    int32_t* counts = group >= 0 && group < a.num_groups ? histogram + group * a.num_experts : nullptr;
    float tilt = a.log_tilt == nullptr ? 0.0f : a.log_weight[t * a.log_weight_stride];
    for (int64_t k = 0; k < a.top_k; ++k) {
      const int64_t expert = expert_of<Index>(a, t * a.top_k + k);
      ++rows_per_expert[expert];
      const bool here = expert < a.num_experts;
      if (here && counts != nullptr) ++counts[expert];
      if (a.log_tilt != nullptr) tilt += here ? a.log_tilt[expert] : 0.0f;
    }
    if (a.log_tilt != nullptr) a.log_weight[t * a.log_weight_stride] = tilt;
  }
}

template <class Index>
void run(const Arguments& a, int32_t* histogram, int32_t* offsets, int32_t* sorted_rows) {
  const int64_t experts = a.num_experts, cells = a.num_groups * experts;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(a.num_tokens * a.top_k / smallest_part, 1, threads);
  const int64_t size = std::max<int64_t>(ceil_div(a.num_tokens, parts), 1);
  // the parts' own counts: first the rows of each expert, then where its next row goes
  std::vector<int32_t> next(parts * (experts + 1), 0), cell_counts(parts * cells, 0);

  parallel_blocks(a.num_tokens, size, [&](int64_t part, int64_t begin, int64_t end) {
    count<Index>(a, begin, end, next.data() + part * (experts + 1), cell_counts.data() + part * cells);
  });

  int32_t total = 0;
  for (int64_t expert = 0; expert <= experts; ++expert) {
    offsets[expert] = total;
    for (int64_t part = 0; part < parts; ++part) {
      int32_t& place = next[part * (experts + 1) + expert];
      total += std::exchange(place, total);
    }
  }
  std::copy_n(cell_counts.data(), cells, histogram);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t cell = 0; cell < cells; ++cell) histogram[cell] += cell_counts[part * cells + cell];

  parallel_blocks(a.num_tokens, size, [&](int64_t part, int64_t begin, int64_t end) {
    int32_t* place = next.data() + part * (experts + 1);
    for (int64_t row = begin * a.top_k; row < end * a.top_k; ++row)
      sorted_rows[place[expert_of<Index>(a, row)]++] = static_cast<int32_t>(row);
  });
}

std::tuple<Tensor, Tensor, Tensor> route(
    const Tensor& top_k_index, int64_t num_experts, const std::optional<Tensor>& group, int64_t num_groups,
    const std::optional<Tensor>& log_tilt, const std::optional<Tensor>& log_weight) {
  STD_TORCH_CHECK(top_k_index.is_contiguous(), "top_k_index must be contiguous");
  const int64_t rows = top_k_index.numel();
  STD_TORCH_CHECK(rows <= INT32_MAX, "sorted_rows are int32; got ", rows, " routed rows");
  const Arguments a{
      .index = top_k_index.const_data_ptr(),
      .num_tokens = top_k_index.size(0),
      .top_k = top_k_index.size(1),
      .num_experts = num_experts,
      .num_groups = num_groups,
      .group = group.has_value() ? group->const_data_ptr() : nullptr,
      .group_dtype = group.has_value() ? group->scalar_type() : ScalarType::Undefined,
      .log_tilt = log_tilt.has_value() ? log_tilt->const_data_ptr<float>() : nullptr,
      .log_weight = log_weight.has_value() ? log_weight->mutable_data_ptr<float>() : nullptr,
      .log_weight_stride = log_weight.has_value() ? log_weight->stride(0) : 0,
  };
  auto histogram = torch::stable::new_empty(top_k_index, {num_groups, num_experts}, ScalarType::Int);
  auto offsets = torch::stable::new_empty(top_k_index, {num_experts + 1}, ScalarType::Int);
  auto sorted_rows = torch::stable::new_empty(top_k_index, {rows}, ScalarType::Int);
  const auto sort = top_k_index.scalar_type() == ScalarType::Int ? &run<int32_t> : &run<int64_t>;
  sort(a, histogram.mutable_data_ptr<int32_t>(), offsets.mutable_data_ptr<int32_t>(),
       sorted_rows.mutable_data_ptr<int32_t>());
  return {histogram, offsets, sorted_rows};
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) { m.impl("route", TORCH_BOX(&moe_unlearn::route)); }
