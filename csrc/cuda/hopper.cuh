// The instructions of Hopper's asynchronous kernels, by name: barriers in shared memory, copies that may be gathered
// and cut off, and the tensor cores' wgmma on tiles that lie [depth, 64] in shared memory. sm_90a only.

#pragma once

#include "cuda/group.cuh"

namespace moe_unlearn {

/// A tile of bfloat16 [depth, 64 * blocks] whose rows run along the depth, in blocks of 64 columns: a row of a block
/// is 128 bytes, whose 16-byte pieces are swapped by the row's number so that 8 rows lie in different banks.
struct SwappedTile {
  static constexpr int block_columns = 64, row_bytes = 128;

  /// Where 8 columns from 8 * piece on lie.
  static MOE_UNLEARN_HOST_DEVICE int offset(int row, int piece, int depth) {
    return piece / 8 * depth * row_bytes + row * row_bytes + ((piece % 8 ^ row % 8) << 4);
  }
};

}  // namespace moe_unlearn

#if defined(__CUDACC__)

namespace moe_unlearn::hopper {

MOE_UNLEARN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Barriers: a phase ends when `count` have arrived --------------------------------------------------------

MOE_UNLEARN_DEVICE void set_up(uint64_t& barrier, int count) {
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

/// Makes ordinary writes to shared memory visible to wgmma.
MOE_UNLEARN_DEVICE void fence_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

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

// ---- Products ------------------------------------------------------------------------------------------------

/// What wgmma needs to know of 16 rows of a SwappedTile at `address`, both operands with their depth outermost:
/// distances of the blocks of 64 columns and of groups of 8 rows, in units of 16 bytes, and the swapping in 128 bytes.
MOE_UNLEARN_DEVICE uint64_t operand(uint32_t address, int depth) {
  const uint64_t blocks = depth * SwappedTile::row_bytes >> 4, groups = 8 * SwappedTile::row_bytes >> 4;
  return (address & 0x3FFFF) >> 4 | blocks << 16 | groups << 32 | uint64_t{1} << 62;
}

MOE_UNLEARN_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MOE_UNLEARN_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending>
MOE_UNLEARN_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/// d [64, 128] (+)= a^T [64, 16] b [16, 128] by a warpgroup, both operands with their depth outermost.
MOE_UNLEARN_DEVICE void multiply(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 1, 1; }\n"
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
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

template <int registers>
MOE_UNLEARN_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
MOE_UNLEARN_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace moe_unlearn::hopper

#endif
