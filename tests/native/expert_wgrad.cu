// The kernels of csrc/cuda/expert_wgrad.cuh, which has no binding yet, for the compiler.

#include "cuda/expert_wgrad.cuh"

namespace moe_unlearn {

template cudaError_t expert_wgrad<Sgd, Dtype::bfloat16>(const Factors&, const Operands&, const Sgd&, cudaStream_t);
template cudaError_t expert_wgrad<AdamW, Dtype::float32>(const Factors&, const Operands&, const AdamW&, cudaStream_t);

}  // namespace moe_unlearn
