// The CUDA bindings, launchers and kernels as ops `moe_unlearn_emulated::*` of CPU tensors, in emulated threads: the
// very sources of csrc/, with what a CUDA build of torch would provide replaced below.

#include "cuda/binding.h"

extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated launch"; }

[[gnu::visibility("default")]] void emulate(
    int multiprocessors, int64_t shared_limit, uint32_t seed, int capability) {
  moe_unlearn::emulation::device = {multiprocessors, shared_limit, capability};
  moe_unlearn::emulation::seed = seed;
  moe_unlearn::emulation::prefetched.clear();
}

/// What L2 was asked for since `emulate`, as pairs of an address and bytes.
[[gnu::visibility("default")]] const int64_t* prefetched(int64_t* count) {
  *count = static_cast<int64_t>(moe_unlearn::emulation::prefetched.size());
  return moe_unlearn::emulation::prefetched.data();
}
}

#define moe_unlearn_native moe_unlearn_emulated
#define CUDA CPU

#include "cuda/expert_mlp.cu"
#include "cuda/expert_wgrad.cu"
#include "cuda/masked_update.cu"
#include "cuda/retain_weights.cu"
#include "cuda/route.cu"
#include "cuda/weight_score.cu"
#include "registration.cpp"
