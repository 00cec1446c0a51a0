// What the bindings of Hopper's products share: the error of one that is not supported.

#pragma once

#include "cuda/binding.h"

namespace moe_unlearn {

inline void check_support(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(
      error != cudaErrorNotSupported, op,
      " in CUDA needs a Hopper GPU, a library compiled for sm_90a, bfloat16 rows at 16-byte addresses and as many "
      "columns as 8 divides");
  check(error);
}

}  // namespace moe_unlearn
