// What every CUDA binding needs: torch's device and stream, and tensors as rows. libtorch's stable ABI only.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/rows.cuh"

namespace moe_unlearn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Makes a tensor's device current while it lives, and knows that device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Int:
      return Dtype::word;
    default:
      STD_TORCH_CHECK(false, "no kernel for this dtype");
  }
}

inline Rows rows_of(const Tensor& tensor) {
  Rows rows;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const bool few = rows.set(
      const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor), tensor.dim(), sizes.data(), strides.data());
  STD_TORCH_CHECK(few, "more than ", Rows::max_dims + 1, " dimensions that do not merge");
  return rows;
}

inline Rows rows_of(const std::optional<Tensor>& tensor) { return tensor.has_value() ? rows_of(*tensor) : Rows(); }

}  // namespace moe_unlearn
