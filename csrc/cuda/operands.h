// What the bindings of updates share: tensors as Operands.

#pragma once

#include "cuda/binding.h"
#include "cuda/masked_update.cuh"

namespace moe_unlearn {

inline const int64_t* indices(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "indices must be contiguous");
  return tensor.const_data_ptr<int64_t>();
}

inline const int64_t* indices(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? indices(*tensor) : nullptr;
}

/// Moments; packed ones, contiguous bytes, as words.
inline Rows state_of(const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Byte) return rows_of(tensor);
  const int64_t shape[] = {tensor.numel() / std::max<int64_t>(tensor.size(-1), 1), tensor.size(-1) / 4};
  const int64_t strides[] = {shape[1], 1};
  Rows rows;
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.size(-1) % 4 == 0, "packed moments must be contiguous words");
  rows.set(const_cast<void*>(tensor.const_data_ptr()), Dtype::word, 2, shape, strides);
  return rows;
}

inline Rows state_of(const std::optional<Tensor>& tensor) { return tensor.has_value() ? state_of(*tensor) : Rows(); }

/// All but the gradient and the state; `rows` of both.
inline Operands operands_of(
    const Tensor& param, int64_t rows, const std::optional<Tensor>& mask, const std::optional<Tensor>& master,
    const std::optional<Tensor>& slices, const Update& update) {
  Operands o;
  param.mutable_data_ptr();  // a lazily copied tensor becomes its own before it is written
  o.param = rows_of(param), o.mask = rows_of(mask), o.master = rows_of(master);
  o.step = update.step, o.seed = update.seed, o.parameter_id = update.parameter_id;
  o.first_element = update.first_row * (param.numel() / std::max<int64_t>(param.size(0), 1));
  o.stochastic = update.stochastic && o.param.dtype == Dtype::bfloat16;
  if (slices.has_value()) {
    STD_TORCH_CHECK(param.dim() > 1, "rows must be at least 1-d");
    o.slices = indices(*slices);
    o.num_slices = param.size(0);
    o.rows_per_slice = std::max<int64_t>(rows / std::max<int64_t>(slices->numel(), 1), 1);
  }
  return o;
}

}  // namespace moe_unlearn
