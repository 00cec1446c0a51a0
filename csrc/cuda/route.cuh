// route: tokens per expert, offsets, stable sort by expert and the tilt of `log_weight`, in one cooperative launch.
//
//     1  every warp counts the experts of its span of rows in shared memory; the block writes its sums
//     -- grid barrier
//     2  one warp per expert turns the blocks' counts into the rows of that expert in earlier blocks
//     -- grid barrier
//     3  every block adds up offsets, blocks and warps to where each of its warps' next rows go, and every warp
//        walks its span again, 32 rows at a time, placing each behind the equal ones in lower lanes
//
// The order is that of a stable sort whatever the grid: spans, blocks, warps and lanes are all in order of rows.
// Atomics are integer counts only. Nothing is read back by the host.

#pragma once

#include "cuda/group.cuh"

namespace moe_unlearn {

enum class Integer : int { int8, int32, int64 };

struct Routing {
  const void* index;  // [T, K] contiguous, int32 or int64
  int64_t num_tokens, top_k, num_experts, num_groups;
  const void* group;  // [T] contiguous, or null: then all tokens are of group 0
  Integer group_type;
  const float* log_tilt;  // [E] contiguous, or null
  float* log_weight;
  int64_t log_weight_stride;
  int32_t *tokens_per_expert, *expert_offsets, *sorted_rows;  // [G, E], [E + 1], [T * K]
  int32_t* workspace;                                         // RoutePlan::workspace

  int64_t rows() const { return num_tokens * top_k; }
};

struct RoutePlan {
  static constexpr int threads = 256, warps = threads / warp_size;
  static constexpr int64_t most_experts = 1024, shared_limit = 48 * 1024;
  static constexpr int64_t rows_per_warp_at_least = 64;
  static constexpr int most_blocks_per_multiprocessor = 4;

  int64_t cells = 0;  // of tokens_per_expert, held in shared memory; 0: it is added to where it lies
  int64_t blocks = 1, rows_per_warp = 0, workspace = 0;
  size_t shared_bytes = 0;

  /// Shared memory, which decides how many blocks are resident.
  explicit RoutePlan(const Routing& r) {
    const int64_t bins = r.num_experts + 1, words = (warps + 1) * bins + warps;
    const int64_t wanted = r.group ? r.num_groups * r.num_experts : 0;
    cells = words + wanted <= shared_limit / 4 ? wanted : 0;
    shared_bytes = static_cast<size_t>(words + cells) * 4;
  }

  /// Spans of whole warps' steps, no more blocks than meet at a barrier.
  void spread(const Routing& r, int64_t resident_blocks) {
    const int64_t wanted = ceil_div<int64_t>(r.rows(), warps * rows_per_warp_at_least);
    blocks = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(resident_blocks, 1));
    rows_per_warp = ceil_div<int64_t>(ceil_div(r.rows(), blocks * warps), warp_size) * warp_size;
    workspace = (r.num_experts + 1) * (blocks + 1);
  }
};

template <class Index>
struct Route {
  static constexpr int threads = RoutePlan::threads, warps = RoutePlan::warps, resident = 4;

  struct Arguments {
    Routing r;
    int64_t cells, rows_per_warp;
  };

  /// Expert of a row, or E for "not here".
  static MOE_UNLEARN_DEVICE int expert_of(const Routing& r, int64_t row) {
    const auto expert = static_cast<int64_t>(static_cast<const Index*>(r.index)[row]);
    return static_cast<int>(expert >= 0 && expert < r.num_experts ? expert : r.num_experts);
  }

  static MOE_UNLEARN_DEVICE int64_t group_of(const Routing& r, int64_t token) {
    if (r.group_type == Integer::int8) return static_cast<const int8_t*>(r.group)[token];
    if (r.group_type == Integer::int32) return static_cast<const int32_t*>(r.group)[token];
    return static_cast<const int64_t*>(r.group)[token];
  }

  static MOE_UNLEARN_DEVICE void add_tilt(const Routing& r, int64_t token) {
    float& weight = r.log_weight[token * r.log_weight_stride];
    float sum = weight;
    for (int64_t k = 0; k < r.top_k; ++k) {
      const int expert = expert_of(r, token * r.top_k + k);
      sum += expert < r.num_experts ? r.log_tilt[expert] : 0.0f;
    }
    weight = sum;
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char* shared) {
    const Routing& r = a.r;
    const int bins = static_cast<int>(r.num_experts) + 1, cells = static_cast<int>(a.cells);
    const int thread = group.thread(), warp = thread / warp_size, lane = thread % warp_size;
    const int64_t block = group.block(), blocks = group.blocks();
    const int64_t first_thread = block * threads + thread, all_threads = blocks * threads;
    const int64_t num_cells = r.num_groups * r.num_experts;
    int* const next_rows = reinterpret_cast<int*>(shared);  // [warps, bins]: counts, then where the next row goes
    int* const bin_offsets = next_rows + warps * bins;      // [bins]
    int* const sums = bin_offsets + bins;                   // [warps]
    int* const block_tokens = sums + warps;                 // [cells]: tokens_per_expert of this block
    int* const own_rows = next_rows + warp * bins;
    int32_t* const rows_per_block = r.workspace;                // [bins, blocks]
    int32_t* const rows_per_bin = r.workspace + bins * blocks;  // [bins]

    // 1
    for (int i = thread; i < warps * bins; i += threads) next_rows[i] = 0;
    for (int i = thread; i < cells; i += threads) block_tokens[i] = 0;
    for (int64_t i = first_thread; i < num_cells; i += all_threads) r.tokens_per_expert[i] = 0;
    if (r.log_tilt)
      for (int64_t t = first_thread; t < r.num_tokens; t += all_threads) add_tilt(r, t);
    group.sync();
    const int64_t rows = r.num_tokens * r.top_k;
    const int64_t begin = (block * warps + warp) * a.rows_per_warp;
    const int64_t end = begin + a.rows_per_warp < rows ? begin + a.rows_per_warp : rows;
    for (int64_t row = begin + lane; row < end; row += warp_size) group.add(&own_rows[expert_of(r, row)], 1);
    group.sync();
    for (int bin = thread; bin < bins; bin += threads) {
      int sum = 0;
      MOE_UNLEARN_UNROLL
      for (int w = 0; w < warps; ++w) sum += next_rows[w * bins + bin];
      rows_per_block[bin * blocks + block] = sum;
    }
    group.sync_grid();

    // 2
    for (int64_t bin = block * warps + warp; bin < bins; bin += blocks * warps) {
      int before = 0;
      for (int64_t first = 0; first < blocks; first += warp_size) {
        const bool inside = first + lane < blocks;
        int32_t* const place = rows_per_block + bin * blocks + first + lane;
        const int count = inside ? *place : 0, inclusive = warp_scan(group, count);
        if (inside) *place = before + inclusive - count;
        before += group.shuffle(inclusive, warp_size - 1);
      }
      if (lane == 0) rows_per_bin[bin] = before;
    }
    group.sync_grid();

    // 3
    const int per_thread = ceil_div(bins, threads), first_bin = thread * per_thread;
    const int last_bin = first_bin + per_thread < bins ? first_bin + per_thread : bins;
    int mine = 0, all;
    for (int bin = first_bin; bin < last_bin; ++bin) mine += rows_per_bin[bin];
    int start = block_scan<threads>(group, mine, sums, all);
    for (int bin = first_bin; bin < last_bin; ++bin) {
      const int total = rows_per_bin[bin];
      bin_offsets[bin] = start;
      if (block == 0) r.expert_offsets[bin] = start;
      if (block == 0 && !r.group && bin < r.num_experts) r.tokens_per_expert[bin] = total;
      start += total;
    }
    group.sync();
    for (int bin = thread; bin < bins; bin += threads) {
      int place = bin_offsets[bin] + rows_per_block[bin * blocks + block];
      MOE_UNLEARN_UNROLL
      for (int w = 0; w < warps; ++w) {
        const int count = next_rows[w * bins + bin];
        next_rows[w * bins + bin] = place;
        place += count;
      }
    }
    group.sync();

    for (int64_t first = begin; first < end; first += warp_size) {
      const int64_t row = first + lane;
      const bool inside = row < end;
      const int expert = inside ? expert_of(r, row) : bins;
      const uint32_t equal = group.match(static_cast<uint32_t>(expert));
      const int rank = count_bits(equal & ((1u << lane) - 1));
      const int place = inside ? own_rows[expert] : 0;
      group.sync_warp();
      if (inside && rank == 0) own_rows[expert] = place + count_bits(equal);
      group.sync_warp();
      if (!inside) continue;
      r.sorted_rows[place + rank] = static_cast<int32_t>(row);
      if (!r.group || expert >= r.num_experts) continue;
      const int64_t of_token = group_of(r, divide(row, r.top_k));
      if (of_token < 0 || of_token >= r.num_groups) continue;
      group.add((cells > 0 ? block_tokens : r.tokens_per_expert) + of_token * r.num_experts + expert, 1);
    }
    if (cells == 0) return;
    group.sync();
    for (int i = thread; i < cells; i += threads)
      if (block_tokens[i] != 0) group.add(&r.tokens_per_expert[i], block_tokens[i]);
  }
};

/// The plan of a launch on the current device; at most `most_experts` experts.
template <class Index>
cudaError_t plan_route(RoutePlan& plan, const Routing& r) {
  if (r.num_experts > RoutePlan::most_experts) return cudaErrorInvalidValue;
  Device device{};
  int resident = 0;
  cudaError_t error = get_device(device);
  if (error == cudaSuccess) error = get_resident_blocks<Route<Index>>(resident, plan.shared_bytes);
  plan.spread(r, int64_t{device.multiprocessors} * std::min(resident, RoutePlan::most_blocks_per_multiprocessor));
  return error;
}

template <class Index>
cudaError_t route(const Routing& r, const RoutePlan& plan, cudaStream_t stream) {
  return launch<Route<Index>>({r, plan.cells, plan.rows_per_warp}, plan.blocks, plan.shared_bytes, stream, true);
}

}  // namespace moe_unlearn
