// expert_wgrad on Hopper: dW = grad^T input over the rows of each listed expert, in bfloat16 with float32 sums, and
// the masked update applied to it in registers: dW is never stored. NOT YET RUN ON A GPU, and bound to no op.
//
// One persistent block per multiprocessor goes through a list of 128 x 128 tiles. A producer warpgroup gathers rows
// of grad and input into a ring of stages; two consumer warpgroups take turns at the tiles: while one updates
// weights, the other multiplies. Rows beyond an expert's last are zeros in shared memory and are not read. Sums run
// in the order of rows, tiles are disjoint, no atomics: the same bits for any grid.

#pragma once

#include "cuda/hopper.cuh"
#include "cuda/masked_update.cuh"

namespace moe_unlearn {

/// What a gradient is made of. Columns have stride 1 and start at 16-byte addresses; rows 16-byte strides.
struct Factors {
  const uint16_t *grad, *input;               // bfloat16 [R, M], [R', P]
  int64_t grad_stride, input_stride;          // of rows, in elements
  const int64_t *grad_rows, *input_rows;      // which row stands at each position; null: the position itself
  const int64_t* bounds;                      // [experts, 2] positions
  int64_t experts, rows, columns;             // rows and columns of dW; multiples of 8
};

struct WgradPlan {
  static constexpr int length = 128;  // of a tile's sides
  static constexpr int depth = 32;    // rows of the factors in a stage
  static constexpr int stages = 5;
  static constexpr int warpgroup = 128, threads = 3 * warpgroup;
  static constexpr int factor_bytes = depth * length * 2, stage_bytes = 2 * factor_bytes;
  static constexpr int alignment = 1024;  // of what swapped rows are counted from
  static constexpr int exchange_rows = 32, exchange_width = length + 4;  // a warp's part of a tile, float32
  static constexpr int exchange_bytes = exchange_rows * exchange_width * 4;
  static constexpr size_t shared_bytes =
      alignment + stages * stage_bytes + 8 * exchange_bytes + (2 * stages + 2) * sizeof(uint64_t);

  int64_t row_tiles, column_tiles, tiles, blocks;

  WgradPlan(int64_t experts, int64_t rows, int64_t columns, int64_t multiprocessors)
      : row_tiles(ceil_div<int64_t>(rows, length)), column_tiles(ceil_div<int64_t>(columns, length)),
        tiles(experts * row_tiles * column_tiles), blocks(std::min(tiles, multiprocessors)) {}

  struct Tile {
    int64_t expert, row, column;
  };

  /// Tiles of an expert stand together, so that its factors stay in L2.
  MOE_UNLEARN_HOST_DEVICE Tile tile(int64_t index) const {
    const int64_t line = divide(index, column_tiles), expert = divide(line, row_tiles);
    return {expert, (line - expert * row_tiles) * length, (index - line * column_tiles) * length};
  }

  static MOE_UNLEARN_HOST_DEVICE int64_t steps(int64_t positions) { return ceil_div<int64_t>(positions, depth); }
};

#if defined(__CUDACC__)

/// The masked update of a chunk of dW. Row m * M + i of the state is row i of the m-th listed expert.
template <class Rule, Dtype A>
struct WgradUpdate {
  Operands o;
  Rule rule;

  MOE_UNLEARN_DEVICE void operator()(const Place& place, int64_t width, const float* gradient) const {
    const uint32_t chosen = chosen_elements(o, place);
    if (chosen == 0) return;
    const auto get_gradient = [&](Chunk& g) {
      MOE_UNLEARN_UNROLL
      for (int j = 0; j < chunk_size; ++j) g[j] = gradient[j];
    };
    if (!update_chunk<A>(o, rule, place, chosen, width, get_gradient)) __trap();
  }
};

template <class Epilogue>
struct WgradArguments {
  Factors f;
  WgradPlan plan;
  Epilogue epilogue;
};

template <class Epilogue>
struct Wgrad {
  using Arguments = WgradArguments<Epilogue>;
  static constexpr int stages = WgradPlan::stages, depth = WgradPlan::depth, length = WgradPlan::length;
  static constexpr int width = WgradPlan::exchange_width;

  struct Barriers {
    uint64_t full[stages], empty[stages];
    uint64_t turn[2];  // of the consumers
  };

  /// The rows of a factor that a producer's thread copies: every eighth of a stage, a 16-byte piece each.
  struct Gather {
    static constexpr int apart = 8, rows = depth / apart, pieces = length / 8;
    int position[rows];  // row of the factor, -1 for zeros

    MOE_UNLEARN_DEVICE void look_up(const int64_t* index, int64_t first, int64_t stop) {
      MOE_UNLEARN_UNROLL
      for (int i = 0; i < rows; ++i) {
        const int64_t at = first + threadIdx.x / pieces + i * apart;
        position[i] = static_cast<int>(at >= stop ? -1 : index ? index[at] : at);
      }
    }
    MOE_UNLEARN_DEVICE void copy(uint32_t to, const uint16_t* from, int64_t stride, int64_t column, int64_t columns) {
      const int piece = threadIdx.x % pieces;
      const int64_t own = column + piece * 8;
      MOE_UNLEARN_UNROLL
      for (int i = 0; i < rows; ++i) {
        const int row = static_cast<int>(threadIdx.x) / pieces + i * apart;
        const bool copied = position[i] >= 0 && own < columns;
        const uint16_t* const source = copied ? from + int64_t{position[i]} * stride + own : from;
        hopper::copy_or_zero(to + SwappedTile::offset(row, piece, depth), source, copied);
      }
    }
  };

  static MOE_UNLEARN_DEVICE void produce(const Arguments& a, uint32_t stage_memory, Barriers& barriers) {
    const Factors& f = a.f;
    constexpr int lag = 2;  // stages between a copy and the word that it is there
    int64_t step = 0;
    const auto publish = [&](int64_t done) {
      hopper::fence_writes();
      hopper::arrive(barriers.full[done % stages]);
    };
    for (int64_t index = blockIdx.x; index < a.plan.tiles; index += gridDim.x) {
      const auto tile = a.plan.tile(index);
      const int64_t start = f.bounds[2 * tile.expert], stop = f.bounds[2 * tile.expert + 1];
      Gather grad, input;
      grad.look_up(f.grad_rows, start, stop), input.look_up(f.input_rows, start, stop);
      for (int64_t first = start; first < stop; first += depth, ++step) {
        const int stage = static_cast<int>(step % stages);
        hopper::wait(barriers.empty[stage], static_cast<uint32_t>(step / stages & 1) ^ 1);
        const uint32_t memory = stage_memory + stage * WgradPlan::stage_bytes;
        grad.copy(memory, f.grad, f.grad_stride, tile.row, f.rows);
        input.copy(memory + WgradPlan::factor_bytes, f.input, f.input_stride, tile.column, f.columns);
        hopper::commit_copies();
        // the next stage's rows are looked up while this one's copies are on their way
        grad.look_up(f.grad_rows, first + depth, stop), input.look_up(f.input_rows, first + depth, stop);
        hopper::wait_for_copies<lag>();
        if (step >= lag) publish(step - lag);
      }
    }
    hopper::wait_for_copies<0>();
    for (int64_t done = step > lag ? step - lag : 0; done < step; ++done) publish(done);
  }

  static MOE_UNLEARN_DEVICE void consume(
      const Arguments& a, uint32_t stage_memory, Barriers& barriers, float* exchange) {
    const int thread = static_cast<int>(threadIdx.x) % WgradPlan::warpgroup, lane = thread % warp_size;
    const int self = static_cast<int>(threadIdx.x) / WgradPlan::warpgroup - 1;
    float sum[2][64];
    int64_t step = 0;
    uint32_t turn = 0;
    int owner = 0;
    exchange += threadIdx.x / warp_size % 8 * (WgradPlan::exchange_rows * width);
    if (self == 1) hopper::arrive(barriers.turn[0]);
    for (int64_t index = blockIdx.x; index < a.plan.tiles; index += gridDim.x, owner ^= 1) {
      const auto tile = a.plan.tile(index);
      const int64_t steps = WgradPlan::steps(a.f.bounds[2 * tile.expert + 1] - a.f.bounds[2 * tile.expert]);
      if (owner != self) {
        step += steps;
        continue;
      }
      // stages are told apart by the parity of their uses: nobody may wait for one before its turn
      hopper::wait(barriers.turn[self], turn++ & 1);
      MOE_UNLEARN_UNROLL
      for (int i = 0; i < 64; ++i) sum[0][i] = sum[1][i] = 0;
      for (int64_t i = 0; i < steps; ++i, ++step) {
        const int stage = static_cast<int>(step % stages);
        hopper::wait(barriers.full[stage], static_cast<uint32_t>(step / stages & 1));
        const uint32_t grad = stage_memory + stage * WgradPlan::stage_bytes;
        const uint32_t input = grad + WgradPlan::factor_bytes;
        hopper::begin_products();
        MOE_UNLEARN_UNROLL
        for (int k = 0; k < depth; k += 16) {
          const uint32_t rows = k * SwappedTile::row_bytes;
          const uint64_t right = hopper::operand(input + rows, depth);
          hopper::multiply(sum[0], hopper::operand(grad + rows, depth), right, true);
          hopper::multiply(sum[1], hopper::operand(grad + WgradPlan::factor_bytes / 2 + rows, depth), right, true);
        }
        hopper::commit_products();
        hopper::wait_for_products<0>();
        if (lane == 0) hopper::arrive(barriers.empty[stage]);
      }
      hopper::arrive(barriers.turn[self ^ 1]);

      // a thread holds, of every 8 columns, two of the rows lane / 4 and lane / 4 + 8 of its warp's 16 in each half
      MOE_UNLEARN_UNROLL
      for (int i = 0; i < 128; ++i) {
        const int row = lane / 4 + i % 4 / 2 * 8 + i / 64 * 16, column = i % 64 / 4 * 8 + lane % 4 * 2 + i % 2;
        exchange[row * width + column] = sum[i / 64][i % 64];
      }
      __syncwarp();
#pragma unroll 1
      for (int chunk = lane; chunk < WgradPlan::exchange_rows * length / chunk_size; chunk += warp_size) {
        const int local_row = chunk / (length / chunk_size), local_column = chunk % (length / chunk_size) * chunk_size;
        const int64_t row = tile.row + local_row / 16 * 64 + thread / warp_size * 16 + local_row % 16;
        const int64_t column = tile.column + local_column;
        const Place place{
            tile.expert * a.f.rows + row, column, row < a.f.rows && column < a.f.columns ? chunk_size : 0};
        a.epilogue(place, a.f.columns, exchange + local_row * width + local_column);
      }
      __syncwarp();
    }
  }
};

template <class Epilogue>
__global__ void __launch_bounds__(WgradPlan::threads, 1)
    wgrad_entry([[maybe_unused]] const __grid_constant__ WgradArguments<Epilogue> arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = Wgrad<Epilogue>;
  extern __shared__ unsigned char shared[];
  const uint32_t start = hopper::shared_address(shared), alignment = WgradPlan::alignment;
  const uint32_t stage_memory = (start + alignment - 1) / alignment * alignment;
  unsigned char* const behind = shared + (stage_memory - start) + WgradPlan::stages * WgradPlan::stage_bytes;
  auto& barriers = *reinterpret_cast<typename Kernel::Barriers*>(behind + 8 * WgradPlan::exchange_bytes);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < WgradPlan::stages; ++stage) {
      hopper::set_up(barriers.full[stage], WgradPlan::warpgroup);
      hopper::set_up(barriers.empty[stage], WgradPlan::warpgroup / warp_size);
    }
    for (uint64_t& turn : barriers.turn) hopper::set_up(turn, WgradPlan::warpgroup);
  }
  __syncthreads();
  if (threadIdx.x < WgradPlan::warpgroup) {
    hopper::give_registers<56>();
    Kernel::produce(arguments, stage_memory, barriers);
  } else {
    hopper::take_registers<224>();
    Kernel::consume(arguments, stage_memory, barriers, reinterpret_cast<float*>(behind));
  }
#endif
}

/// cudaErrorNotSupported on anything but Hopper, and for factors that cannot be copied 16 bytes at a time.
template <class Rule, Dtype A>
cudaError_t expert_wgrad(const Factors& f, const Operands& o, const Rule& rule, cudaStream_t stream) {
  using Epilogue = WgradUpdate<Rule, A>;
  int index = 0, major = 0, minor = 0;
  Device device{};
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) error = get_device(device);
  if (error != cudaSuccess) return error;
  const auto addresses = reinterpret_cast<uintptr_t>(f.grad) | reinterpret_cast<uintptr_t>(f.input);
  const bool aligned = addresses % 16 == 0 && (f.grad_stride | f.input_stride | f.rows | f.columns) % 8 == 0;
  if (major != 9 || minor != 0 || !aligned) return cudaErrorNotSupported;

  const WgradPlan plan(f.experts, f.rows, f.columns, device.multiprocessors);
  if (plan.tiles == 0) return cudaSuccess;
  constexpr size_t shared_bytes = WgradPlan::shared_bytes;
  error = cudaFuncSetAttribute(
      wgrad_entry<Epilogue>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(plan.blocks);
  wgrad_entry<Epilogue><<<blocks, WgradPlan::threads, shared_bytes, stream>>>({f, plan, {o, rule}});
  return cudaGetLastError();
}

#endif

}  // namespace moe_unlearn
