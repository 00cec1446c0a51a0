// Products of rows sorted by expert with the weights of their experts on Hopper: bfloat16 operands, float32 sums, and
// an epilogue in the warps that computed them. Rows [offsets[e], offsets[e + 1]) are multiplied by weight [e]; those
// behind the last expert form one more segment, whose product is zero.
//
// Persistent blocks, one per multiprocessor, go in pairs through a list of tiles of 128 rows x 128 columns, in two
// halves of 64 that need not stand side by side: gate and up of the same activations meet in one thread. The blocks of
// a pair have neighbouring row tiles of one expert and the same columns: each loads half of the weights, for both.
// Where an expert has one more row tile, they split its columns and share the rows, unless those are gathered.
//
// A producer warpgroup fills a ring of stages, 64 columns of the rows and of the weights; weights, and rows that stand
// in order, come in boxes (TMA), gathered rows in pieces, whose numbers are read a tile ahead. Two consumer warpgroups
// take turns at the tiles: while one has its epilogue, the other multiplies. The lower half of a tile's rows is
// multiplied only where there are any. A stage is filled again when both blocks have read it, so both take the same
// steps, a block without a tile too. Sums run in the order of the depth and tiles are disjoint: the same bits for any
// grid.
//
// Proven in emulated threads against the reference; not yet run on a GPU.

#pragma once

#include "cuda/product_plan.cuh"
#include "cuda/rows.cuh"

namespace moe_unlearn {

/// Exchanges among 4 neighbouring lanes: word i of lane j goes to word j of lane i.
template <class Group>
MOE_UNLEARN_DEVICE void transpose_quad(const Group& group, float (&word)[4]) {
  const int lane = group.thread() % warp_size;
  MOE_UNLEARN_UNROLL
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = lane & distance;
    MOE_UNLEARN_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      float &low = word[i], &high = word[i | distance];
      const float got = group.shuffle(upper ? low : high, lane ^ distance);
      low = upper ? got : low;
      high = upper ? high : got;
    }
  }
}

/// Of a fragment's rows in `half` (0 or 1) and its 32 columns from 8 * block on: the 8 neighbouring columns that are
/// this lane's, 8 * (lane % 4) behind them.
template <class Group>
MOE_UNLEARN_DEVICE void take_chunk(const Group& group, const float (&sum)[64], int block, int half, Chunk& chunk) {
  MOE_UNLEARN_UNROLL
  for (int j = 0; j < 2; ++j) {
    float word[4];
    MOE_UNLEARN_UNROLL
    for (int i = 0; i < 4; ++i) word[i] = sum[(block + i) * 4 + half * 2 + j];
    transpose_quad(group, word);
    MOE_UNLEARN_UNROLL
    for (int i = 0; i < 4; ++i) chunk[2 * i + j] = word[i];
  }
}

/// What an epilogue knows of a row beside its product.
struct ProductRow {
  int32_t position, segment;
  bool exists, used;  // whether there is such a row, and whether an expert has it
};

/// Epilogue: `Row find(ProductRow)`, `store(group, Row&, column, first, second)` for 8 columns of
/// each half, those of the first from `column` on, and `finish(group, Row&, column tile)`; all lanes of a warp call
/// each.
template <class Epilogue, bool right_by_row>
struct GroupedProduct {
  using Plan = ProductPlan;
  using Barriers = Plan::Barriers;
  static constexpr int threads = Plan::threads, resident = 1, cluster = 2;

  struct Arguments {
    Left left;
    hopper::Boxes right;  // [experts, columns, depth] if right_by_row, else [experts, depth, columns]
    Segments segments;
    Plan plan;
    Epilogue epilogue;
  };

  /// ends[i] = the items of the segments up to i.
  template <class Group>
  static MOE_UNLEARN_DEVICE void count_tiles(const Group& group, const Arguments& a, int32_t* ends, int32_t* sums) {
    for (int32_t first = 0, before = 0, total; first < a.plan.segments; first += threads, before += total) {
      const int32_t segment = first + group.thread();
      int32_t own = 0;
      if (segment < a.plan.segments)
        own = a.plan.items(a.segments.stop(segment) - a.segments.start(segment));
      const int32_t others = block_scan<threads>(group, own, sums, total);
      if (segment < a.plan.segments) ends[segment] = before + others + own;
    }
  }

  static MOE_UNLEARN_DEVICE int32_t steps_of(const Arguments& a, const Plan::Tile& tile) {
    return tile.segment < a.segments.experts ? a.plan.steps : 0;
  }

  /// What a producer's thread copies of gathered rows: a 16-byte piece of every 16th one.
  struct Gather {
    static constexpr int pieces = Plan::depth / 8, apart = Plan::warpgroup / pieces, count = Plan::rows / apart;
    int32_t slot[count];  // of the next tile, -1 for zeros
    int32_t row[count];   // of this one

    MOE_UNLEARN_DEVICE void find_next(const Left& left, const Plan::Tile& tile, int thread) {
      MOE_UNLEARN_UNROLL
      for (int i = 0; i < count; ++i) {
        const int32_t at = tile.first + thread / pieces + i * apart;
        slot[i] = at < tile.stop ? left.slots[at] : -1;
      }
    }

    MOE_UNLEARN_DEVICE void take(const Left& left) {
      MOE_UNLEARN_UNROLL
      for (int i = 0; i < count; ++i) row[i] = slot[i] < 0 ? -1 : slot[i] / left.top_k;
    }

    MOE_UNLEARN_DEVICE void copy(const Left& left, uint32_t to, int thread, int32_t first) const {
      const int piece = thread % pieces;
      const int32_t own = first + piece * 8;
      MOE_UNLEARN_UNROLL
      for (int i = 0; i < count; ++i) {
        const bool copied = row[i] >= 0 && own < left.depth;
        const uint16_t* const from = copied ? left.data + row[i] * left.stride + own : left.data;
        hopper::copy_or_zero(to + SwappedTile::offset(thread / pieces + i * apart, piece, Plan::rows), from, copied);
      }
    }
  };

  /// One thread asks for a stage's boxes: weights, and rows that stand in order. Of those that both blocks need, each
  /// loads one for both.
  static MOE_UNLEARN_DEVICE void load_boxes(
      const Arguments& a, const Plan::Tile& tile, int rank, int32_t first, uint32_t to, uint64_t& full) {
    constexpr int half_bytes = Plan::right_bytes / 2, product_bytes = Plan::left_bytes / 2;
    const int left_boxes = a.left.slots ? 0 : tile.rows() <= Plan::product_rows ? 1 : 2;
    hopper::expect_bytes(full, Plan::right_bytes + left_boxes * product_bytes);
    const auto load = [=](Plan::Shared what, int own, auto&&... box) {
      if (tile.shared != what)
        hopper::load_box(box...);
      else if (own == rank)
        hopper::load_box_for_both(box...);
    };
    for (int i = 0; i < left_boxes; ++i) {
      const int32_t row = tile.first + i * Plan::product_rows;
      load(Plan::Shared::rows, i, to + i * product_bytes, a.left.boxes, first, row, full);
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t there = to + Plan::left_bytes + i * half_bytes;
      const int32_t column = tile.column_tile * a.plan.step + i * a.plan.distance;
      const int32_t x = right_by_row ? first : column, y = right_by_row ? column : first;
      load(Plan::Shared::columns, i, there, a.right, x, y, tile.segment, full);
    }
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void produce(
      const Group& group, const Arguments& a, uint32_t memory, Barriers& barriers, const int32_t* ends) {
    constexpr int lag = 2;  // stages between a copy and the word that it is there
    const int rank = hopper::cluster_rank();
    const auto pairs = static_cast<int32_t>(group.blocks() / 2);
    auto index = static_cast<int32_t>(group.block() / 2);
    int64_t step = 0;
    Plan::Tile tile, next;
    Gather gather;
    bool more = a.plan.find(next, index, rank, ends, a.segments);
    if (more && a.left.slots) gather.find_next(a.left, next, group.thread());
    while (more) {
      tile = next;
      if (a.left.slots) gather.take(a.left);
      more = a.plan.find(next, index += pairs, rank, ends, a.segments);
      if (more && a.left.slots) gather.find_next(a.left, next, group.thread());
      for (int32_t i = 0, steps = steps_of(a, tile); i < steps; ++i, ++step) {
        barriers.ring.wait_until_empty(step);
        const int stage = barriers.ring.stage(step);
        const uint32_t to = memory + stage * Plan::stage_bytes;
        if (tile.rows() > 0) {
          if (group.thread() == 0) load_boxes(a, tile, rank, i * Plan::depth, to, barriers.ring.full[stage]);
          if (a.left.slots) gather.copy(a.left, to, group.thread(), i * Plan::depth);
        }
        hopper::commit_copies();
        hopper::wait_for_copies<lag>();
        if (step >= lag) barriers.ring.publish(step - lag);
      }
    }
    hopper::wait_for_copies<0>();
    for (int64_t done = step > lag ? step - lag : 0; done < step; ++done) barriers.ring.publish(done);
  }

  /// sum = the products of the tile's first `parts` times 64 rows, from the stages of step and the following.
  template <int parts>
  static MOE_UNLEARN_DEVICE void multiply(
      float (&sum)[2][64], int64_t step, int32_t steps, uint32_t memory, Barriers& barriers, int lane) {
    MOE_UNLEARN_UNROLL
    for (int i = 0; i < 64; ++i) sum[0][i] = sum[1][i] = 0;
    hopper::fence_uses(sum[0]), hopper::fence_uses(sum[1]);
    for (const int64_t last = step + steps; step < last; ++step) {
      barriers.ring.wait_until_full(step);
      const uint32_t left = memory + barriers.ring.stage(step) * Plan::stage_bytes, right = left + Plan::left_bytes;
      hopper::begin_products();
      MOE_UNLEARN_UNROLL
      for (int k = 0; k < Plan::depth; k += 16) {
        const uint64_t operand = right_by_row ? SwappedTile::operand_by_row(right + k * 2)
                                              : SwappedTile::operand(right + k * SwappedTile::row_bytes, Plan::depth);
        MOE_UNLEARN_UNROLL
        for (int part = 0; part < parts; ++part)
          hopper::multiply<true, right_by_row>(
              sum[part], SwappedTile::operand_by_row(left + part * (Plan::left_bytes / 2) + k * 2), operand);
      }
      hopper::commit_products();
      hopper::wait_for_products<1>();  // the stage before has been read
      if (step > last - steps) barriers.ring.release_at_all(step - 1, lane, cluster);
    }
    hopper::wait_for_products<0>();
    if (steps > 0) barriers.ring.release_at_all(step - 1, lane, cluster);
    hopper::fence_uses(sum[0]), hopper::fence_uses(sum[1]);
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void consume(
      const Group& group, const Arguments& a, uint32_t memory, Barriers& barriers, const int32_t* ends) {
    const int lane = group.thread() % warp_size, warp = group.thread() % Plan::warpgroup / warp_size;
    const int self = group.thread() / Plan::warpgroup - 1, rank = hopper::cluster_rank();
    const auto pair = static_cast<int32_t>(group.block() / 2), pairs = static_cast<int32_t>(group.blocks() / 2);
    float sum[2][64];
    Plan::Tile tile;
    if (self == 1) hopper::arrive(barriers.turn[0]);
    for (int32_t item = self; a.plan.find(tile, pair + item * pairs, rank, ends, a.segments); item += 2) {
      hopper::wait(barriers.turn[self], item / 2 & 1);
      const int32_t steps = steps_of(a, tile);
      const int64_t step = int64_t{item} * a.plan.steps;  // segments without a product are the last
      if (tile.rows() > Plan::product_rows) {
        multiply<2>(sum, step, steps, memory, barriers, lane);
      } else if (tile.rows() > 0) {
        multiply<1>(sum, step, steps, memory, barriers, lane);
      } else {
        for (int32_t i = 0; i < steps; ++i) {
          barriers.ring.wait_until_full(step + i);
          group.sync_warp();  // or a lane sees the phase after the next, and waits for ever
          barriers.ring.release_at_all(step + i, lane, cluster);
        }
      }
      hopper::arrive(barriers.turn[self ^ 1]);
      MOE_UNLEARN_UNROLL
      for (int part = 0; part < 2; ++part) {
        const int32_t first = tile.first + part * Plan::product_rows;
        if (first < tile.stop) store(group, a, tile, sum[part], first + warp * 16 + lane / 4);
      }
    }
  }

  /// A warp's part of an epilogue: of every 8 columns a thread holds two, of the rows at `position` and 8 behind it.
  template <class Group>
  static MOE_UNLEARN_DEVICE void store(
      const Group& group, const Arguments& a, const Plan::Tile& tile, const float (&sum)[64], int32_t position) {
    const int lane = group.thread() % warp_size;
    MOE_UNLEARN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t at = position + half * 8;
      const bool exists = at < tile.stop;
      typename Epilogue::Row row =
          a.epilogue.find({at, tile.segment, exists, exists && tile.segment < a.segments.experts});
      MOE_UNLEARN_UNROLL
      for (int block = 0; block < Plan::half / 8; block += 4) {
        Chunk chunk[2];
        take_chunk(group, sum, block, half, chunk[0]);
        take_chunk(group, sum, block + Plan::half / 8, half, chunk[1]);
        const int32_t column = tile.column_tile * a.plan.step + (block + lane % 4) * 8;
        a.epilogue.store(group, row, column, chunk[0], chunk[1]);
      }
      a.epilogue.finish(group, row, tile.column_tile);
    }
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(
      [[maybe_unused]] const Group& group, [[maybe_unused]] const Arguments& a,
      [[maybe_unused]] unsigned char* shared) {
#if defined(MOE_UNLEARN_HOPPER_CODE)
    const uint32_t start = hopper::shared_address(shared), alignment = Plan::alignment;
    const uint32_t memory = (start + alignment - 1) / alignment * alignment;
    unsigned char* const behind = shared + (memory - start) + Plan::stages * Plan::stage_bytes;
    auto& barriers = *reinterpret_cast<Barriers*>(behind);
    auto* const sums = reinterpret_cast<int32_t*>(behind + sizeof(Barriers));
    int32_t* const ends = sums + threads / warp_size;
    if (group.thread() == 0) {
      barriers.ring.init(Plan::warpgroup, cluster * Plan::warpgroup / warp_size);
      for (uint64_t& turn : barriers.turn) hopper::init_barrier(turn, Plan::warpgroup);
      hopper::fence_barriers();
    }
    count_tiles(group, a, ends, sums);
    hopper::sync_cluster();
    if (group.thread() < Plan::warpgroup) {
      hopper::decrease_registers<Plan::producer_registers>();
      produce(group, a, memory, barriers, ends);
    } else {
      hopper::increase_registers<Plan::consumer_registers>();
      consume(group, a, memory, barriers, ends);
    }
    hopper::sync_cluster();
#endif
  }
};

/// Runs the product; cudaErrorNotSupported on anything but Hopper, in a library that was compiled without sm_90a, and
/// for operands that cannot be copied 16 bytes at a time. weight: [experts, columns, depth] as `right_by_row` says.
template <bool right_by_row, class Epilogue>
cudaError_t grouped_product(
    Left left, const Matrices& weight, const Segments& segments, int64_t width, bool halves,
    const Epilogue& epilogue, cudaStream_t stream) {
  using Kernel = GroupedProduct<Epilogue, right_by_row>;
  Device device{};
  bool compiled = false;
  cudaError_t error = get_device(device);
  if (error == cudaSuccess) error = hopper::is_compiled<Kernel>(compiled, 128);
  if (error != cudaSuccess) return error;
  const bool fits = left.fits() && ProductPlan::fits(segments.experts, segments.rows, width, left.depth);
  if (device.capability != 90 || !compiled || !fits) return cudaErrorNotSupported;
  if (!left.slots) {
    const Matrices rows{left.data, left.height, left.depth, left.stride};
    error = hopper::make_boxes(left.boxes, rows, ProductPlan::product_rows);
    if (error != cudaSuccess) return error;
  }
  hopper::Boxes right{};
  error = hopper::make_boxes(right, weight, right_by_row ? ProductPlan::half : ProductPlan::depth);
  if (error != cudaSuccess) return error;
  const ProductPlan plan(segments, width, halves, left.depth, device);
  return launch<Kernel>({left, right, segments, plan, epilogue}, plan.blocks, plan.shared_bytes(), stream);
}

}  // namespace moe_unlearn
