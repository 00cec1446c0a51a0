// expert_wgrad on Hopper: dW = grad^T input over the rows of each listed expert, in bfloat16 with float32 sums. What
// becomes of a tile of dW (stored, added, updating weights) happens in the block that computed it; inner products of
// two gradients are in wgrad_inner.cuh.
//
// Pairs of persistent blocks, one on each multiprocessor, go through a list of pairs of 128 x 128 tiles of one expert.
// A producer warpgroup fills a ring of stages with rows of grad and input; two consumer warpgroups take turns at the
// tiles: while one has its epilogue, the other multiplies. A factor whose rows stand in order is copied in boxes (TMA);
// where both tiles of a pair need it, each block copies half of it to both. A gathered factor, and the last rows of an
// expert, are copied row by row, with zeros behind them: no row of another expert is ever read. Both blocks of a pair
// go through the same stages. A pair whose masks are zero is not computed. Before the products of a tile begin L2 is
// asked for what its epilogue reads. Sums run in the order of rows, tiles are disjoint, no atomics: the same bits for
// any grid.
//
// Proven in emulated threads against the reference; not yet run on a GPU.

#pragma once

#include "cuda/exchange.cuh"
#include "cuda/wgrad_epilogue.cuh"
#include "cuda/wgrad_factors.cuh"

namespace moe_unlearn {

/// The factor of which both tiles of a pair need the same columns, in boxes.
enum class Shared : int { none, grad, input };

/// Two tiles a pair: neighbours in a line, which is a row of tiles if `along_columns`, else a column of them. Of lines
/// with an odd number of tiles, the last ones are neighbours across the lines; if those are odd too, one tile of an
/// expert has a partner outside of dW, all of whose input is zero.
struct WgradPlan {
  static constexpr int length = 128;  // of a tile's sides
  static constexpr int depth = 64;    // rows of the factors in a stage
  static constexpr int stages = 4;
  static constexpr int warpgroup = 128, threads = 3 * warpgroup;
  static constexpr int producer_registers = 88, consumer_registers = 208;
  static constexpr int factor_bytes = depth * length * 2, stage_bytes = 2 * factor_bytes;
  static constexpr int alignment = 1024;  // of what swapped rows are counted from
  static constexpr int exchange_bytes = 2 * warpgroup / warp_size * Exchange::bytes;
  static constexpr size_t shared_bytes =
      alignment + stages * stage_bytes + exchange_bytes + (2 * stages + 4) * sizeof(uint64_t);

  bool along_columns;
  Shared along, across;  // what neighbours in a line share, and neighbours across
  int64_t lines, line_tiles, pairs_of_expert, pairs, blocks;

  /// grad_boxed, input_boxed: which factors a pair can share. Of two, that of which all tiles of a line are in pairs:
  /// they save the same, half of one factor.
  WgradPlan(
      int64_t experts, int64_t rows, int64_t columns, bool grad_boxed, bool input_boxed, int64_t multiprocessors) {
    const int64_t row_tiles = ceil_div<int64_t>(rows, length), column_tiles = ceil_div<int64_t>(columns, length);
    along_columns = grad_boxed == input_boxed ? column_tiles % 2 == 0 || row_tiles % 2 != 0 : grad_boxed;
    const Shared grad = grad_boxed ? Shared::grad : Shared::none, input = input_boxed ? Shared::input : Shared::none;
    along = along_columns ? grad : input, across = along_columns ? input : grad;
    lines = along_columns ? row_tiles : column_tiles, line_tiles = along_columns ? column_tiles : row_tiles;
    pairs_of_expert = lines * (line_tiles / 2) + line_tiles % 2 * ceil_div<int64_t>(lines, 2);
    pairs = experts * pairs_of_expert;
    blocks = 2 * std::min(pairs, std::max<int64_t>(multiprocessors / 2, 1));
  }

  struct Tile {
    int64_t expert, row, column;
    Shared shared;  // with the other one of its pair
  };

  /// The tile of a pair for the block of this rank. Those of an expert stand together, so that its factors stay in L2.
  MOE_UNLEARN_HOST_DEVICE Tile tile(int64_t pair, int rank) const {
    const int64_t expert = divide(pair, pairs_of_expert), local = pair - expert * pairs_of_expert;
    const int64_t half = line_tiles / 2, beyond = local - lines * half;
    int64_t line = 2 * beyond + rank, place = line_tiles - 1;
    if (beyond < 0) line = divide(local, half), place = 2 * (local - line * half) + rank;
    const int64_t row = along_columns ? line : place, column = along_columns ? place : line;
    return {expert, row * length, column * length, beyond < 0 ? along : across};
  }

  static MOE_UNLEARN_HOST_DEVICE int64_t steps(int64_t positions) {
    return positions > 0 ? ceil_div<int64_t>(positions, depth) : 0;
  }
};

/// The loop over tiles and stages, which does not know what becomes of dW.
struct WgradLoop {
  static constexpr int threads = WgradPlan::threads, resident = 1, cluster = 2;
  static constexpr int stages = WgradPlan::stages, depth = WgradPlan::depth, length = WgradPlan::length;
  static constexpr int lag = 1;  // stages between a copy and the word that it is there

  struct Barriers {
    hopper::Ring<stages> ring;
    uint64_t turn[2];  // of the consumers
    int64_t step[2];   // where a consumer's turn begins in the ring

    MOE_UNLEARN_DEVICE void init() {
      ring.init(WgradPlan::warpgroup, cluster * WgradPlan::warpgroup / warp_size);
      for (uint64_t& barrier : turn) hopper::init_barrier(barrier, WgradPlan::warpgroup);
      step[0] = 0;
    }
  };

  /// How many stages a pair takes; the same in every warp of both blocks.
  template <class Group>
  static MOE_UNLEARN_DEVICE int64_t count_steps(
      const Group& group, const Factors& f, const WgradPlan& plan, const Rows& mask, int64_t pair) {
    const int64_t expert = plan.tile(pair, 0).expert;
    const int64_t steps = WgradPlan::steps(f.stop(expert) - f.start(expert));
    if (!mask) return steps;
    constexpr int words = length / word_bits;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int rank = 0; rank < cluster; ++rank) {
      const auto tile = plan.tile(pair, rank);
      for (int word = group.thread() % warp_size; word < length * words; word += warp_size) {
        const int64_t row = tile.row + word / words, column = tile.column / word_bits + word % words;
        uint32_t bits = 0;
        if (row < f.grad.columns && column < mask.width)
          bits = *reinterpret_cast<const uint32_t*>(
              mask.row(expert * f.grad.columns + row) + column * mask.stride);
        if (group.any(bits != 0)) return steps;
      }
    }
    return 0;
  }

  /// How a producer's thread copies a factor: a 16-byte piece of every eighth row, or one thread everything in boxes.
  struct Source {
    static constexpr int apart = 8, rows = depth / apart, pieces = length / 8;
    const Factor& f;
    int thread;
    int64_t column;      // of the factor, where the tile begins
    bool shared;         // with the other block of the pair
    int position[rows];  // row of the factor, -1 for zeros

    MOE_UNLEARN_DEVICE Source(const Factor& f, int thread, int64_t column, bool shared)
        : f(f), thread(thread), column(column), shared(shared) {}

    MOE_UNLEARN_DEVICE void find_rows(int64_t first, int64_t stop) {
      MOE_UNLEARN_UNROLL
      for (int i = 0; i < rows; ++i) {
        const int64_t at = first + thread / pieces + i * apart;
        position[i] = static_cast<int>(at >= stop ? -1 : f.rows ? f.rows[at] : at);
      }
    }

    /// Rows [first, first + depth) of a boxed factor, or those looked up. The block of this rank copies its half of
    /// what is shared, and gets the other half.
    MOE_UNLEARN_DEVICE void copy(uint32_t to, bool whole, int64_t first, uint64_t& full, int rank) const {
      constexpr int block = SwappedTile::block_columns, block_bytes = depth * SwappedTile::row_bytes;
      if (f.boxed && whole) {
        if (thread != 0) return;
        hopper::expect_bytes(full, WgradPlan::factor_bytes);
        for (int i = 0; i < length / block; ++i) {
          const uint32_t there = to + i * block_bytes;
          const int from = static_cast<int>(column) + i * block, row = static_cast<int>(first);
          if (!shared) hopper::load_box(there, f.boxes, from, row, full);
          if (shared && i == rank) hopper::load_box_for_both(there, f.boxes, from, row, full);
        }
        return;
      }
      const int piece = thread % pieces;
      const int64_t own = column + piece * 8;
      MOE_UNLEARN_UNROLL
      for (int i = 0; i < rows; ++i) {
        const bool copied = position[i] >= 0 && own < f.columns;
        const uint16_t* const source = copied ? f.data + int64_t{position[i]} * f.stride + own : f.data;
        hopper::copy_or_zero(to + SwappedTile::offset(thread / pieces + i * apart, piece, depth), source, copied);
      }
    }
  };

  /// Copies the rows of an expert, from the stage of `step` on, which is counted on.
  static MOE_UNLEARN_DEVICE void fill(
      const Factors& f, const WgradPlan::Tile& tile, int thread, uint32_t memory, Barriers& barriers, int64_t& step) {
    const int rank = hopper::cluster_rank();
    const int64_t start = f.start(tile.expert), stop = f.stop(tile.expert);
    Source grad(f.grad, thread, tile.row, tile.shared == Shared::grad);
    Source input(f.input, thread, tile.column, tile.shared == Shared::input);
    grad.find_rows(start, stop), input.find_rows(start, stop);
    for (int64_t first = start; first < stop; first += depth, ++step) {
      const int stage = barriers.ring.stage(step);
      barriers.ring.wait_until_empty(step);
      const uint32_t to = memory + stage * WgradPlan::stage_bytes;
      const bool whole = stop - first >= depth;
      grad.copy(to, whole, first, barriers.ring.full[stage], rank);
      input.copy(to + WgradPlan::factor_bytes, whole, first, barriers.ring.full[stage], rank);
      hopper::commit_copies();
      // the next stage's rows are looked up while this one's copies are on their way
      grad.find_rows(first + depth, stop), input.find_rows(first + depth, stop);
      hopper::wait_for_copies<lag>();
      if (step >= lag) barriers.ring.publish(step - lag);
    }
  }

  /// Publishes the last stages before `step`.
  static MOE_UNLEARN_DEVICE void publish_rest(Barriers& barriers, int64_t step) {
    hopper::wait_for_copies<0>();
    for (int64_t done = step > lag ? step - lag : 0; done < step; ++done) barriers.ring.publish(done);
  }

  /// sum = the tile's dW, from the stages of step and the following, which both blocks fill again.
  static MOE_UNLEARN_DEVICE void multiply(
      float (&sum)[2][64], int64_t step, int64_t steps, uint32_t memory, Barriers& barriers, int lane) {
    MOE_UNLEARN_UNROLL
    for (int i = 0; i < 64; ++i) sum[0][i] = sum[1][i] = 0;
    hopper::fence_uses(sum[0]), hopper::fence_uses(sum[1]);
    for (const int64_t last = step + steps; step < last; ++step) {
      barriers.ring.wait_until_full(step);
      const uint32_t grad = memory + barriers.ring.stage(step) * WgradPlan::stage_bytes;
      const uint32_t input = grad + WgradPlan::factor_bytes;
      hopper::begin_products();
      MOE_UNLEARN_UNROLL
      for (int k = 0; k < depth; k += 16) {
        const uint32_t upper = grad + k * SwappedTile::row_bytes, lower = upper + WgradPlan::factor_bytes / 2;
        const uint64_t right = SwappedTile::operand(input + k * SwappedTile::row_bytes, depth);
        hopper::multiply(sum[0], SwappedTile::operand(upper, depth), right);
        hopper::multiply(sum[1], SwappedTile::operand(lower, depth), right);
      }
      hopper::commit_products();
      hopper::wait_for_products<1>();  // the stage before has been read
      if (step > last - steps) barriers.ring.release_at_all(step - 1, lane, cluster);
    }
    hopper::wait_for_products<0>();
    if (steps > 0) barriers.ring.release_at_all(step - 1, lane, cluster);
    hopper::fence_uses(sum[0]), hopper::fence_uses(sum[1]);
  }

  /// A block: barriers behind the stages and what consumers exchange, then one warpgroup produces and two consume.
  template <class Kernel, class Group>
  static MOE_UNLEARN_DEVICE void run_block(
      [[maybe_unused]] const Group& group, [[maybe_unused]] const typename Kernel::Arguments& a,
      [[maybe_unused]] unsigned char* shared) {
#if defined(MOE_UNLEARN_HOPPER_CODE)
    const uint32_t start = hopper::shared_address(shared), alignment = WgradPlan::alignment;
    const uint32_t memory = (start + alignment - 1) / alignment * alignment;
    unsigned char* const behind = shared + (memory - start) + stages * WgradPlan::stage_bytes;
    auto& barriers = *reinterpret_cast<typename Kernel::Barriers*>(behind + Kernel::exchange_bytes);
    if (group.thread() == 0) {
      barriers.init();
      hopper::fence_barriers();
    }
    hopper::sync_cluster();
    if (group.thread() < WgradPlan::warpgroup) {
      hopper::decrease_registers<WgradPlan::producer_registers>();
      Kernel::produce(group, a, memory, barriers);
    } else {
      hopper::increase_registers<WgradPlan::consumer_registers>();
      Kernel::consume(group, a, memory, barriers, reinterpret_cast<float*>(behind));
    }
    hopper::sync_cluster();  // nobody is reached after its end
#endif
  }
};

/// Each chunk of dW goes to the epilogue.
template <class Epilogue>
struct Wgrad : WgradLoop {
  static constexpr int exchange_bytes = WgradPlan::exchange_bytes;

  struct Arguments {
    Factors f;
    WgradPlan plan;
    Epilogue epilogue;
  };

  /// Asks for what the epilogue of a tile reads, a row a thread, while products of the tile before are under way. Not
  /// of short tiles, several of which the ring may hold: L2 could not.
  template <class Group>
  static MOE_UNLEARN_DEVICE void prefetch(
      const Group& group, const Arguments& a, const WgradPlan::Tile& tile, int64_t steps) {
    static_assert(WgradPlan::warpgroup == length);
    if (steps < stages) return;
    const int64_t rows = a.f.grad.columns, row = tile.row + group.thread(), left = a.f.input.columns - tile.column;
    if (row >= rows || left <= 0) return;
    a.epilogue.prefetch({tile.expert * rows + row, tile.column, static_cast<int>(left < length ? left : length)});
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void produce(const Group& group, const Arguments& a, uint32_t memory, Barriers& barriers) {
    int64_t step = 0;
    for (int64_t pair = group.block() / cluster; pair < a.plan.pairs; pair += group.blocks() / cluster) {
      const int64_t steps = count_steps(group, a.f, a.plan, a.epilogue.kept(), pair);
      if (steps == 0) continue;
      const auto tile = a.plan.tile(pair, hopper::cluster_rank());
      prefetch(group, a, tile, steps);
      fill(a.f, tile, group.thread(), memory, barriers, step);
    }
    publish_rest(barriers, step);
  }

  /// The epilogue of `count` of a warp's rows of a tile from `first` on, which lie in its exchange.
  template <class Group>
  static MOE_UNLEARN_DEVICE void finish_rows(
      const Group& group, const Arguments& a, const WgradPlan::Tile& tile, const Exchange& exchange, int first,
      int count) {
    const int warp = group.thread() % WgradPlan::warpgroup / warp_size, chunks = length / chunk_size;
    const int64_t rows = a.f.grad.columns, columns = a.f.input.columns;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int i = group.thread() % warp_size; i < count * chunks; i += warp_size) {
      const int there = i / chunks, local = first + there, local_column = i % chunks * chunk_size;
      const int64_t row = tile.row + local / 16 * 64 + warp * 16 + local % 16, column = tile.column + local_column;
      const bool inside = row < rows && column < columns;
      Chunk gradient;
      exchange.read(gradient, there, local_column);
      const Place place{tile.expert * rows + row, column, inside ? chunk_size : 0};
      if (!a.epilogue(group, place, columns, gradient)) group.fail();
    }
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void consume(
      const Group& group, const Arguments& a, uint32_t memory, Barriers& barriers, float* exchanges) {
    const int thread = group.thread() % WgradPlan::warpgroup, lane = thread % warp_size;
    const int self = group.thread() / WgradPlan::warpgroup - 1;
    const Exchange exchange{exchanges + (group.thread() / warp_size - 4) * (Exchange::bytes / 4)};
    const int64_t clusters = group.blocks() / cluster;
    float sum[2][64];
    uint32_t turn = 0;
    if (self == 1) hopper::arrive(barriers.turn[0]);
    for (int64_t pair = group.block() / cluster + self * clusters; pair < a.plan.pairs; pair += 2 * clusters) {
      const auto tile = a.plan.tile(pair, hopper::cluster_rank());
      const int64_t steps = count_steps(group, a.f, a.plan, a.epilogue.kept(), pair);
      hopper::wait(barriers.turn[self], turn++ & 1);
      const int64_t step = barriers.step[self];
      multiply(sum, step, steps, memory, barriers, lane);
      if (thread == 0) barriers.step[self ^ 1] = step + steps;
      hopper::arrive(barriers.turn[self ^ 1]);

      constexpr int held = Exchange::rows;  // at once; the others wait in registers
      static_assert(Exchange::columns == length && held < Exchange::warp_rows && 2 * held >= Exchange::warp_rows);
      MOE_UNLEARN_UNROLL
      for (int row = 0; row < held; row += Exchange::group) exchange.write(sum, row, row, lane);
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
      for (int first = 0; first < Exchange::warp_rows; first += held) {
        group.sync_warp();
        finish_rows(group, a, tile, exchange, first, first == 0 ? held : Exchange::warp_rows - held);
        group.sync_warp();
        if (first > 0) break;
        MOE_UNLEARN_UNROLL
        for (int row = held; row < Exchange::warp_rows; row += Exchange::group)
          exchange.write(sum, row, row - held, lane);
      }
    }
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char* shared) {
    run_block<Wgrad>(group, a, shared);
  }
};

/// epilogue(group, place, columns of dW, float32 dW[8]) for each chunk of dW. cudaErrorNotSupported on anything but
/// Hopper, in a library that was compiled without sm_90a, and for factors that cannot be copied 16 bytes at a time.
template <class Epilogue>
cudaError_t expert_wgrad(Factors f, const Epilogue& epilogue, cudaStream_t stream) {
  using Kernel = Wgrad<Epilogue>;
  Device device{};
  bool compiled = false;
  cudaError_t error = get_device(device);
  if (error == cudaSuccess) error = hopper::is_compiled<Kernel>(compiled, 2 * 64);
  if (error != cudaSuccess) return error;
  if (device.capability != 90 || !compiled || !f.fit()) return cudaErrorNotSupported;
  error = f.make_boxes(WgradPlan::depth);
  if (error != cudaSuccess) return error;
  const WgradPlan plan(
      f.experts, f.grad.columns, f.input.columns, f.grad.boxed, f.input.boxed, device.multiprocessors);
  return launch<Kernel>({f, plan, epilogue}, plan.blocks, WgradPlan::shared_bytes, stream);
}

/// One step of Sgd or AdamW; not of a float16 parameter with float16 state.
template <class Rule>
cudaError_t expert_wgrad_update(const Factors& f, const Operands& o, const Rule& rule, cudaStream_t stream) {
  static_assert(WgradPlan::length % moment_block == 0);
  if (rule.has_state && o.packed()) return expert_wgrad(f, WgradPackedUpdate<Rule>{o, rule}, stream);
  switch (arithmetic_dtype(o)) {
    case Dtype::bfloat16:
      return expert_wgrad(f, WgradUpdate<Rule, Dtype::bfloat16>{o, rule}, stream);
    case Dtype::float32:
      return expert_wgrad(f, WgradUpdate<Rule, Dtype::float32>{o, rule}, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace moe_unlearn
