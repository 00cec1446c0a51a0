// The instructions of Hopper's asynchronous kernels, by name: barriers in shared memory, clusters, copies of gathered
// rows and of whole boxes, and the tensor cores' wgmma on tiles of blocks that lie [rows, 64] in shared memory. sm_90a
// only; an emulation has the same names.

#pragma once

#if defined(__CUDACC__)
#include <cuda.h>
#endif

#include "cuda/group.cuh"

namespace moe_unlearn {

/// A tile of bfloat16 [rows, 64 * blocks], in blocks of 64 columns: a row of a block is 128 bytes, whose 16-byte pieces
/// are swapped by the row's number so that 8 rows lie in different banks. A product's depth runs along the rows, or
/// along the columns of one block.
struct SwappedTile {
  static constexpr int block_columns = 64, row_bytes = 128;

  /// Where 8 columns from 8 * piece on lie.
  static MOE_UNLEARN_HOST_DEVICE int offset(int row, int piece, int depth) {
    return piece / 8 * depth * row_bytes + row * row_bytes + ((piece % 8 ^ row % 8) << 4);
  }

  /// What wgmma needs to know of 16 rows at `address`, the depth outermost: the distances of blocks of 64 columns and
  /// of groups of 8 rows, in units of 16 bytes, and the swapping in 128 bytes.
  static MOE_UNLEARN_HOST_DEVICE uint64_t operand(uint32_t address, int depth) {
    const uint64_t blocks = depth * row_bytes >> 4, groups = 8 * row_bytes >> 4;
    return (address & 0x3FFFF) >> 4 | blocks << 16 | groups << 32 | uint64_t{1} << 62;
  }

  /// The same of 16 columns at `address`, which the depth runs along: groups of 8 rows stand one after the other.
  static MOE_UNLEARN_HOST_DEVICE uint64_t operand_by_row(uint32_t address) {
    return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{8 * row_bytes >> 4} << 32 | uint64_t{1} << 62;
  }
};

/// Matrices of bfloat16 from which boxes are copied; all strides in elements and multiples of 8.
struct Matrices {
  const uint16_t* data;
  int64_t rows, columns, stride;
  int64_t count = 0, apart = 0;  // 0: one matrix, whose boxes have no third coordinate
};

}  // namespace moe_unlearn

// other architectures compile a kernel without its body
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOE_UNLEARN_HOPPER_CODE 1
#endif

#if defined(__CUDACC__)

namespace moe_unlearn::hopper {

MOE_UNLEARN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Barriers: a phase ends when `count` have arrived --------------------------------------------------------

MOE_UNLEARN_DEVICE void init_barrier(uint64_t& barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count));
}

MOE_UNLEARN_DEVICE void arrive(uint64_t& barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(&barrier))
               : "memory");
}

/// Waits for the end of the phase of this parity; phase 0 is the first, and the one before it has ended.
MOE_UNLEARN_DEVICE void wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

/// The phase ends only when as many bytes more have been copied by load_box.
MOE_UNLEARN_DEVICE void expect_bytes(uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

/// Makes initialised barriers visible to load_box, and after sync_cluster to the cluster.
MOE_UNLEARN_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/// Makes ordinary writes to shared memory visible to wgmma.
MOE_UNLEARN_DEVICE void fence_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Clusters: blocks whose shared memory is laid out alike, and reached by offset and rank --------------

MOE_UNLEARN_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

/// All threads of the cluster meet. Nothing may reach a block before it has met the others once, nor after its end: a
/// block whose barriers or memory others use meets them first and last.
MOE_UNLEARN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

/// Arrives at the barrier that stands at this one's offset in the block of this rank, which may be the own one. This
/// says that products have read a stage; it makes no ordinary write visible to another block, which would cost a fence
/// of the whole GPU each time.
MOE_UNLEARN_DEVICE void arrive_at(uint64_t& barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// ---- Copies --------------------------------------------------------------------------------------------------

/// 16 bytes from global to shared memory, or 16 zeros: `from` is not read then.
MOE_UNLEARN_DEVICE void copy_or_zero(uint32_t to, const void* from, bool copied) {
  const int bytes = copied ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

MOE_UNLEARN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
MOE_UNLEARN_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/// Asks L2 for `bytes` from a 16-byte address on, a multiple of 16.
MOE_UNLEARN_DEVICE void prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

/// A matrix of bfloat16 from which boxes of [rows of a box, 64] are copied.
using Boxes = CUtensorMap;

/// `data` at a 16-byte address; libcuda is found at run time.
inline cudaError_t make_boxes(Boxes& boxes, const Matrices& from, int rows_of_a_box) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const auto size = [](int64_t of) { return static_cast<cuuint64_t>(of); };
  const cuuint64_t sizes[] = {size(from.columns), size(from.rows), size(from.count)};
  const cuuint64_t strides[] = {size(from.stride) * 2, size(from.apart) * 2};
  const cuuint32_t box[] = {SwappedTile::block_columns, static_cast<cuuint32_t>(rows_of_a_box), 1};
  const cuuint32_t every[] = {1, 1, 1};
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  const CUresult result = encode(
      &boxes, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, from.count > 0 ? 3 : 2, const_cast<uint16_t*>(from.data), sizes,
      strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

/// One thread copies a box, zeros where it leaves the matrix, to a block of a SwappedTile; its bytes count for the
/// barrier. `boxes` is a parameter of the kernel.
MOE_UNLEARN_DEVICE void load_box(uint32_t to, const Boxes& boxes, int column, int row, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to), "l"(&boxes), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

/// The same from one of several matrices.
MOE_UNLEARN_DEVICE void load_box(
    uint32_t to, const Boxes& boxes, int column, int row, int matrix, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to), "l"(&boxes), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(&barrier))
      : "memory");
}

/// load_box to the same offset of both blocks of a cluster of two: in each, the bytes count for its own barrier at this
/// one's offset, and may come before it expects them, but not before its phase.
MOE_UNLEARN_DEVICE void load_box_for_both(uint32_t to, const Boxes& boxes, int column, int row, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&boxes), "r"(column), "r"(row), "r"(shared_address(&barrier)), "h"(uint16_t{3})
      : "memory");
}

/// The same from one of several matrices.
MOE_UNLEARN_DEVICE void load_box_for_both(
    uint32_t to, const Boxes& boxes, int column, int row, int matrix, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(&boxes), "r"(column), "r"(row), "r"(matrix), "r"(shared_address(&barrier)), "h"(uint16_t{3})
      : "memory");
}

// ---- Products ------------------------------------------------------------------------------------------------

MOE_UNLEARN_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MOE_UNLEARN_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending>
MOE_UNLEARN_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/// The compiler moves no use of d across this: products write it until they have been waited for.
template <int size>
MOE_UNLEARN_DEVICE void fence_uses(float (&d)[size]) {
  MOE_UNLEARN_UNROLL
  for (int i = 0; i < size; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// d [64, 128] += a [64, 16] b [16, 128] by a warpgroup. a^T lies as `operand` describes it, or, if `left_by_row`, a as
/// `operand_by_row` does; b as `operand` does, or, if `right_by_row`, b^T as `operand_by_row` does.
template <bool left_by_row = false, bool right_by_row = false>
MOE_UNLEARN_DEVICE void multiply(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.eq.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, %66, %67; }\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
        "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
        "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]),
        "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
        "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(a), "l"(b), "n"(left_by_row ? 0 : 1), "n"(right_by_row ? 0 : 1));
}

/// Two floats to the nearest bfloat16 numbers, the first in the lower half.
MOE_UNLEARN_DEVICE uint32_t narrow_pair(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

/// 1 / (1 + exp(-v)), to a few of float32's last places.
MOE_UNLEARN_DEVICE float sigmoid(float v) { return __fdividef(1.0f, 1.0f + __expf(-v)); }

template <int registers>
MOE_UNLEARN_DEVICE void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
MOE_UNLEARN_DEVICE void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

/// Whether the binary on the current device holds the body of a kernel whose threads need as many registers.
template <class Kernel>
cudaError_t is_compiled(bool& compiled, int registers) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, entry<Kernel>);
  compiled = attributes.numRegs >= registers;
  return error;
}

}  // namespace moe_unlearn::hopper

#endif

namespace moe_unlearn::hopper {

/// Stages in shared memory that producers fill and consumers empty, told apart by the parity of their uses: nobody may
/// wait for one before its turn. Steps count from 0 on.
template <int stages>
struct Ring {
  uint64_t full[stages], empty[stages];

  MOE_UNLEARN_DEVICE void init(int producers, int consumers) {
    for (uint64_t& barrier : full) init_barrier(barrier, producers);
    for (uint64_t& barrier : empty) init_barrier(barrier, consumers);
  }

  MOE_UNLEARN_DEVICE static int stage(int64_t step) { return static_cast<int>(step % stages); }
  MOE_UNLEARN_DEVICE static uint32_t parity(int64_t step) { return static_cast<uint32_t>(step / stages & 1); }

  MOE_UNLEARN_DEVICE void wait_until_empty(int64_t step) { wait(empty[stage(step)], parity(step) ^ 1); }
  MOE_UNLEARN_DEVICE void wait_until_full(int64_t step) { wait(full[stage(step)], parity(step)); }
  /// What this thread has copied by itself must have landed.
  MOE_UNLEARN_DEVICE void publish(int64_t step) {
    fence_writes();
    arrive(full[stage(step)]);
  }
  MOE_UNLEARN_DEVICE void release(int64_t step) { arrive(empty[stage(step)]); }
  /// For a warp, all of whose lanes call: the stage of each block of the cluster, which all of them fill.
  MOE_UNLEARN_DEVICE void release_at_all(int64_t step, int lane, int cluster) {
    if (lane < cluster) arrive_at(empty[stage(step)], lane);
  }
};

}  // namespace moe_unlearn::hopper
