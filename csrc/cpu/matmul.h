// Matrix products of torch itself (MKL, oneDNN), from the stable ABI.

#pragma once

#include "cpu/common.h"

#include <array>

namespace moe_unlearn {

/// out = a b, of any strides; none may require a gradient, for threads do not inherit that it is off.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
}

}  // namespace moe_unlearn
