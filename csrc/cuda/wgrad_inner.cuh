// The inner products of two gradients of expert_wgrad on Hopper: neither dW is stored. Each consumer has the tiles of
// one gradient. The first hands its tile over through shared memory, in the order in which threads hold it, and the
// second multiplies it by its own. Products are exact in float64; sums run in one order: the same bits for any grid.
//
// Proven in emulated threads against the reference; not yet run on a GPU.

#pragma once

#include "cuda/expert_wgrad.cuh"

namespace moe_unlearn {

/// The sum of `value` over a warp, in every lane.
template <class Group, class T>
MOE_UNLEARN_DEVICE T warp_sum(const Group& group, T value) {
  MOE_UNLEARN_UNROLL
  for (int distance = 1; distance < warp_size; distance *= 2)
    value += group.shuffle(value, group.thread() % warp_size ^ distance);
  return value;
}

/// parts [pairs of tiles, block of a pair, warp, 3] = <a, a>, <a, b> and <b, b> of what a warp has of a tile.
struct WgradInner : WgradLoop {
  static constexpr int warps = WgradPlan::warpgroup / warp_size;
  static constexpr int exchange_bytes = length * length * 4;
  static constexpr size_t shared_bytes = WgradPlan::shared_bytes - WgradPlan::exchange_bytes + exchange_bytes + 16;

  struct Arguments {
    Factors f[2];
    WgradPlan plan;
    Rows mask;
    double* parts;
  };

  struct Barriers : WgradLoop::Barriers {
    uint64_t given, taken;  // the first consumer's tile

    MOE_UNLEARN_DEVICE void init() {
      WgradLoop::Barriers::init();
      hopper::init_barrier(given, WgradPlan::warpgroup);
      hopper::init_barrier(taken, WgradPlan::warpgroup);
    }
  };

  /// How many parts each listed expert has.
  static int64_t parts_of_expert(int64_t rows, int64_t columns) {
    const int64_t tiles = ceil_div<int64_t>(rows, length) * ceil_div<int64_t>(columns, length);
    return ceil_div<int64_t>(tiles, cluster) * cluster * warps;
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void produce(const Group& group, const Arguments& a, uint32_t memory, Barriers& barriers) {
    int64_t step = 0;
    for (int64_t pair = group.block() / cluster; pair < a.plan.pairs; pair += group.blocks() / cluster) {
      const auto tile = a.plan.tile(pair, hopper::cluster_rank());
      for (const Factors& f : a.f) {
        if (count_steps(group, f, a.plan, a.mask, pair) == 0) continue;
        fill(f, tile, group.thread(), memory, barriers, step);
      }
    }
    publish_rest(barriers, step);
  }

  /// Sets to 0 what the mask leaves out, and what lies beyond dW.
  static MOE_UNLEARN_DEVICE void clear(
      float (&sum)[2][64], const Arguments& a, const WgradPlan::Tile& tile, int thread) {
    const int64_t rows = a.f[0].grad.columns, columns = a.f[0].input.columns;
    const int lane = thread % warp_size;
    MOE_UNLEARN_UNROLL
    for (int part = 0; part < 2; ++part)
      MOE_UNLEARN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t row = tile.row + part * 64 + thread / warp_size * 16 + half * 8 + lane / 4;
        MOE_UNLEARN_UNROLL
        for (int word = 0; word < length / word_bits; ++word) {
          const int64_t first = tile.column + word * word_bits, left = row < rows ? columns - first : 0;
          uint32_t bits = left >= word_bits ? 0xFFFFFFFF : left > 0 ? (1u << left) - 1 : 0;
          if (a.mask && bits != 0)
            bits &= *reinterpret_cast<const uint32_t*>(
                a.mask.row(tile.expert * rows + row) + first / word_bits * a.mask.stride);
          bits >>= lane % 4 * 2;
          MOE_UNLEARN_UNROLL
          for (int i = 0; i < word_bits / 8; ++i)
            MOE_UNLEARN_UNROLL
            for (int j = 0; j < 2; ++j)
              if (!(bits >> (i * 8 + j) & 1)) sum[part][(word * 4 + i) * 4 + half * 2 + j] = 0;
        }
      }
  }

  /// Where a thread's four elements from 4 * quad on lie, those of neighbouring threads beside them.
  static MOE_UNLEARN_DEVICE float4& quad_at(float* tile, int part, int quad, int thread) {
    return reinterpret_cast<float4*>(tile)[(part * 16 + quad) * WgradPlan::warpgroup + thread];
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void consume(
      const Group& group, const Arguments& a, uint32_t memory, Barriers& barriers, float* given) {
    const int thread = group.thread() % WgradPlan::warpgroup, lane = thread % warp_size;
    const int self = group.thread() / WgradPlan::warpgroup - 1, rank = hopper::cluster_rank();
    float sum[2][64];
    uint32_t turn = 0;
    if (self == 1) hopper::arrive(barriers.turn[0]);
    for (int64_t pair = group.block() / cluster; pair < a.plan.pairs; pair += group.blocks() / cluster, ++turn) {
      const auto tile = a.plan.tile(pair, rank);
      const int64_t steps = count_steps(group, a.f[self], a.plan, a.mask, pair);
      hopper::wait(barriers.turn[self], turn & 1);
      const int64_t step = barriers.step[self];
      multiply(sum, step, steps, memory, barriers, lane);
      if (thread == 0) barriers.step[self ^ 1] = step + steps;
      hopper::arrive(barriers.turn[self ^ 1]);

      clear(sum, a, tile, thread);
      double own[2] = {}, both[2] = {};
      if (self == 0)
        hopper::wait(barriers.taken, (turn & 1) ^ 1);
      else
        hopper::wait(barriers.given, turn & 1);
      MOE_UNLEARN_UNROLL
      for (int quad = 0; quad < 16; ++quad)
        MOE_UNLEARN_UNROLL
        for (int part = 0; part < 2; ++part) {
          const float* const mine = &sum[part][quad * 4];
          float4& place = quad_at(given, part, quad, thread);
          if (self == 0) place = {mine[0], mine[1], mine[2], mine[3]};
          const float4 first = self == 0 ? float4{} : place;
          const float other[] = {first.x, first.y, first.z, first.w};
          MOE_UNLEARN_UNROLL
          for (int i = 0; i < 4; ++i) {
            const double value = mine[i];
            own[part] = fma(value, value, own[part]);
            if (self == 1) both[part] = fma(value, static_cast<double>(other[i]), both[part]);
          }
        }
      hopper::arrive(self == 0 ? barriers.given : barriers.taken);
      const double squares = warp_sum(group, own[0] + own[1]), product = warp_sum(group, both[0] + both[1]);
      if (lane != 0) continue;
      double* const to = a.parts + ((pair * cluster + rank) * warps + thread / warp_size) * 3;
      to[self * 2] = squares;
      if (self == 1) to[1] = product;
    }
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char* shared) {
    run_block<WgradInner>(group, a, shared);
  }
};

/// out [listed, count, count] = the sums of parts [pairs of gradients, listed, parts, 3]; the pairs are (0, 0) for a
/// single gradient, else (i, j) with i < j in order. A warp for each element and its mirror image.
struct WgradGram {
  static constexpr int threads = 256, resident = 4;

  struct Arguments {
    const double* from;
    double* out;
    int64_t listed, parts, count;
  };

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char*) {
    const int64_t index = group.block() * (threads / warp_size) + group.thread() / warp_size;
    const int64_t expert = divide(index, a.count * a.count), i = divide(index, a.count) % a.count, j = index % a.count;
    if (expert >= a.listed || i > j) return;
    // <i, i> is the first number of the pair (i, i + 1), that of the last gradient the third of the last pair
    const bool last = i == j && i > 0 && i == a.count - 1;
    const int64_t left = last ? i - 1 : i, right = i < j ? j : left + 1;
    const int64_t pair = left * a.count - left * (left + 1) / 2 + right - left - 1, which = last ? 2 : i < j;
    const double* const from = a.from + (pair * a.listed + expert) * a.parts * 3 + which;
    double total = 0;
    for (int64_t part = group.thread() % warp_size; part < a.parts; part += warp_size) total += from[part * 3];
    total = warp_sum(group, total);
    if (group.thread() % warp_size != 0) return;
    a.out[(expert * a.count + i) * a.count + j] = a.out[(expert * a.count + j) * a.count + i] = total;
  }
};

/// parts [experts, parts of an expert, 3] of two gradients of one shape; cudaErrorNotSupported as expert_wgrad.
inline cudaError_t expert_wgrad_parts(Factors a, Factors b, const Rows& mask, double* parts, cudaStream_t stream) {
  Device device{};
  bool compiled = false;
  cudaError_t error = get_device(device);
  if (error == cudaSuccess) error = hopper::is_compiled<WgradInner>(compiled, 2 * 64);
  if (error != cudaSuccess) return error;
  if (device.capability != 90 || !compiled || !a.fit() || !b.fit()) return cudaErrorNotSupported;
  for (Factors* const f : {&a, &b}) {
    error = f->make_boxes(WgradPlan::depth);
    if (error != cudaSuccess) return error;
  }
  const WgradPlan plan(
      a.experts, a.grad.columns, a.input.columns, a.grad.boxed && b.grad.boxed, a.input.boxed && b.input.boxed,
      device.multiprocessors);
  return launch<WgradInner>({{a, b}, plan, mask, parts}, plan.blocks, WgradInner::shared_bytes, stream);
}

inline cudaError_t expert_wgrad_gram(const WgradGram::Arguments& a, cudaStream_t stream) {
  const int64_t warps = a.listed * a.count * a.count, warps_per_block = WgradGram::threads / warp_size;
  return launch<WgradGram>(a, ceil_div(warps, warps_per_block), 0, stream);
}

}  // namespace moe_unlearn
