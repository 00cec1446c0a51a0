// The threads of a launch as a kernel sees them, and how a kernel is launched.
//
// A kernel is a struct with `threads` (per block), `resident` (blocks a multiprocessor has to hold, which bounds the
// registers), `Arguments`, and
//
//     template <class Group> static MOE_UNLEARN_DEVICE void run(const Group&, const Arguments&, unsigned char* shared)
//
// and, if it needs them, `cluster`: so many neighbouring blocks run at once and reach each other's shared memory; a
// launch has a multiple of it.
//
// It touches its threads only through Group, so that the same code runs on a GPU and, compiled by a C++ compiler
// with -DMOE_UNLEARN_EMULATION=<header>, in simulated threads with their order shuffled between barriers. No torch.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "element.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#define MOE_UNLEARN_DEVICE __device__ __forceinline__
#define MOE_UNLEARN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOE_UNLEARN_DEVICE inline
#define MOE_UNLEARN_HOST_DEVICE inline
#endif

namespace moe_unlearn {

constexpr int warp_size = 32;
constexpr int word_bits = 32;

template <class T>
MOE_UNLEARN_HOST_DEVICE T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

/// a / b for a >= 0, b > 0; a 64-bit division costs five times a 32-bit one, and is rarely needed.
MOE_UNLEARN_HOST_DEVICE int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

MOE_UNLEARN_HOST_DEVICE int count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

/// How many blocks of a kernel form a cluster.
template <class Kernel>
constexpr int cluster_of() {
  if constexpr (requires { Kernel::cluster; })
    return Kernel::cluster;
  else
    return 1;
}

/// What a plan needs to know of a GPU.
struct Device {
  int multiprocessors;
  int64_t shared_limit;  // bytes a block may ask for
  int capability;        // 10 * major + minor
};

#if defined(__CUDACC__)

struct Group {
  MOE_UNLEARN_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
  MOE_UNLEARN_DEVICE int64_t block() const { return blockIdx.x; }
  MOE_UNLEARN_DEVICE int64_t blocks() const { return gridDim.x; }

  MOE_UNLEARN_DEVICE void sync() const { __syncthreads(); }
  MOE_UNLEARN_DEVICE void sync_warp() const { __syncwarp(); }
  MOE_UNLEARN_DEVICE void sync_grid() const { cooperative_groups::this_grid().sync(); }

  // among the 32 lanes of a warp, all of which call
  template <class T>
  MOE_UNLEARN_DEVICE T shuffle(T value, int lane) const {
    return __shfl_sync(0xFFFFFFFF, value, lane);
  }
  template <class T>
  MOE_UNLEARN_DEVICE T shuffle_up(T value, int distance) const {
    return __shfl_up_sync(0xFFFFFFFF, value, distance);
  }
  /// The lanes whose key is this lane's.
  MOE_UNLEARN_DEVICE uint32_t match(uint32_t key) const { return __match_any_sync(0xFFFFFFFF, key); }
  MOE_UNLEARN_DEVICE bool any(bool condition) const { return __any_sync(0xFFFFFFFF, condition); }

  template <class T>
  MOE_UNLEARN_DEVICE void add(T* to, T value) const {
    atomicAdd(to, value);
  }
  MOE_UNLEARN_DEVICE void fail() const { __trap(); }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::resident)
    entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  extern __shared__ __align__(16) unsigned char shared[];
  Kernel::run(Group(), arguments, shared);
}

/// One launch; `cooperative`: all blocks at once, so that they can meet in sync_grid.
template <class Kernel>
cudaError_t launch(
    const typename Kernel::Arguments& arguments, int64_t blocks, size_t shared_bytes, cudaStream_t stream,
    bool cooperative = false) {
  if (blocks <= 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const auto error = cudaFuncSetAttribute(entry<Kernel>, attribute, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  constexpr int cluster = cluster_of<Kernel>();
  if (blocks % cluster != 0) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = Kernel::threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, entry<Kernel>, arguments);
}

/// The current device.
inline cudaError_t get_device(Device& device) {
  int index = 0, shared = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  device.shared_limit = shared;
  device.capability = 10 * major + minor;
  return error;
}

/// How many blocks of a kernel a multiprocessor holds at once.
template <class Kernel>
cudaError_t get_resident_blocks(int& blocks, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry<Kernel>, Kernel::threads, shared_bytes);
}

#elif defined(MOE_UNLEARN_EMULATION)
#include MOE_UNLEARN_EMULATION
#endif

// ---- Sums over threads, in a fixed order -------------------------------------------------------------------

/// The sum of `value` over this lane and those below it.
template <class Group, class T>
MOE_UNLEARN_DEVICE T warp_scan(const Group& group, T value) {
  const int lane = group.thread() % warp_size;
  MOE_UNLEARN_UNROLL
  for (int distance = 1; distance < warp_size; distance *= 2) {
    const T below = group.shuffle_up(value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

/// The sum of `value` over the threads of the block before this one; `total` that over all. `sums` is shared, one
/// element per warp.
template <int threads, class Group, class T>
MOE_UNLEARN_DEVICE T block_scan(const Group& group, T value, T* sums, T& total) {
  const int warp = group.thread() / warp_size;
  const T inclusive = warp_scan(group, value);
  if (group.thread() % warp_size == warp_size - 1) sums[warp] = inclusive;
  group.sync();
  T before = 0;
  total = 0;
  MOE_UNLEARN_UNROLL
  for (int other = 0; other < threads / warp_size; ++other) {
    if (other == warp) before = total;
    total += sums[other];
  }
  group.sync();  // sums is free again
  return before + inclusive - value;
}

}  // namespace moe_unlearn
