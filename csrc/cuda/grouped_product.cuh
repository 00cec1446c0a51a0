// Products of rows sorted by expert with the weights of their experts on Hopper: bfloat16 operands, float32 sums, and
// an epilogue in the warps that computed them. Rows [offsets[e], offsets[e + 1]) are multiplied by weight [e]; those
// behind the last expert form one more segment, whose product is zero.
//
// One persistent block per multiprocessor goes through a list of tiles of 128 rows x 256 columns, in two halves of 128
// that need not stand side by side: gate and up of the same activations meet in one thread. A producer warpgroup fills
// a ring of stages, 64 columns of the rows and of the weights; weights, and rows that stand in order, come in boxes
// (TMA), gathered rows in pieces, whose numbers are read a tile ahead. Two consumer warpgroups have 64 rows each, and
// multiply nothing where no row is. While they have their epilogue the producer fills the next tile's stages. Tiles
// walk down 16 row tiles before they go on to the next columns, so that both operands stay in L2. Sums run in the order
// of the depth and tiles are disjoint: the same bits for any grid.
//
// Proven in emulated threads against the reference; not yet run on a GPU.

#pragma once

#include "cuda/hopper.cuh"
#include "cuda/rows.cuh"

namespace moe_unlearn {

/// Rows sorted by expert; segment `experts` are those behind the last one.
struct Segments {
  const int32_t* offsets;  // [experts + 1]
  int32_t experts, rows;

  MOE_UNLEARN_DEVICE int32_t start(int32_t segment) const { return offsets[segment]; }
  MOE_UNLEARN_DEVICE int32_t stop(int32_t segment) const { return segment < experts ? offsets[segment + 1] : rows; }
};

/// The rows that are multiplied, [rows, depth]: columns of stride 1, rows at 16-byte addresses.
struct Left {
  const uint16_t* data;
  int64_t height, depth, stride;  // stride of rows, in elements
  const int32_t* slots;           // position -> slot: row slot / top_k stands there; null: the position's own, in boxes
  int32_t top_k;
  hopper::Boxes boxes{};

  bool fits() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0; }
};

struct ProductPlan {
  static constexpr int rows = 128, half = 128, columns = 2 * half, depth = 64, stages = 4, height = 16;
  static constexpr int consumer_rows = rows / 2;
  static constexpr int warpgroup = 128, threads = 3 * warpgroup, consumer_warps = 2 * warpgroup / warp_size;
  static constexpr int producer_registers = 88, consumer_registers = 208;
  static constexpr int left_bytes = rows * depth * 2, right_bytes = columns * depth * 2;
  static constexpr int stage_bytes = left_bytes + right_bytes;
  static constexpr int alignment = 1024;  // of what swapped rows are counted from
  static constexpr int max_segments = 4096;

  int32_t column_tiles, step, distance;  // columns between tiles, and between the halves of one
  int32_t steps;                         // stages of a tile
  int32_t segments;
  int64_t blocks;

  /// Of `width` columns, or of two halves of as many if `halves`.
  ProductPlan(const Segments& s, int64_t width, bool halves, int64_t depth_of_all, const Device& device)
      : column_tiles(static_cast<int32_t>(ceil_div<int64_t>(width, halves ? half : columns))),
        step(halves ? half : columns), distance(halves ? static_cast<int32_t>(width) : half),
        steps(static_cast<int32_t>(ceil_div<int64_t>(depth_of_all, depth))), segments(s.experts + 1) {
    const int64_t most_row_tiles = ceil_div<int64_t>(s.rows, rows) + std::min(s.rows, segments);
    blocks = std::min<int64_t>(most_row_tiles * column_tiles, device.multiprocessors);
  }

  static bool fits(int64_t experts, int64_t num_rows, int64_t width, int64_t depth_of_all) {
    // tiles are counted in 32 bits
    const int64_t tiles = (ceil_div<int64_t>(num_rows, rows) + experts + 1) * ceil_div<int64_t>(width, half);
    return experts < max_segments && num_rows <= INT32_MAX && width % 8 == 0 && depth_of_all % 8 == 0 &&
           2 * width <= INT32_MAX && depth_of_all <= INT32_MAX && tiles <= INT32_MAX / 2;
  }

  size_t shared_bytes() const {
    return alignment + stages * stage_bytes + sizeof(hopper::Ring<stages>) + (threads / warp_size + segments) * 4;
  }

  struct Tile {
    int32_t segment, first, stop, column_tile;  // rows [first, stop) are those of its segment from its first one on
  };

  /// Which tile stands at `index`; ends: the number of row tiles up to and with each segment. false behind the last.
  MOE_UNLEARN_DEVICE bool find(Tile& tile, int32_t index, const int32_t* ends, const Segments& s) const {
    int32_t low = 0, high = segments;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (ends[middle] * column_tiles > index)
        high = middle;
      else
        low = middle + 1;
    }
    if (low == segments) return false;
    const int32_t before = low > 0 ? ends[low - 1] : 0, all = ends[low] - before;
    const int32_t local = index - before * column_tiles, group = local / (height * column_tiles) * height;
    const int32_t within = local - group * column_tiles, here = all - group < height ? all - group : int32_t{height};
    const int32_t first = s.start(low) + (group + within % here) * rows;
    tile = {low, first, s.stop(low), within / here};
    return true;
  }
};

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
MOE_UNLEARN_DEVICE void take_chunk(const Group& group, const float (&sum)[128], int block, int half, Chunk& chunk) {
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

/// What an epilogue knows of a row before its product.
struct ProductRow {
  int32_t position, segment;
  bool exists, used;  // whether there is such a row, and whether an expert has it
};

/// Epilogue: `Row find(ProductRow)` before the product, `store(group, Row&, column, first, second)` for 8 columns of
/// each half, those of the first from `column` on, and `finish(group, Row&, column tile)`; all lanes of a warp call
/// each.
template <class Epilogue, bool right_by_row>
struct GroupedProduct {
  using Plan = ProductPlan;
  using Ring = hopper::Ring<Plan::stages>;
  static constexpr int threads = Plan::threads, resident = 1;

  struct Arguments {
    Left left;
    hopper::Boxes right;  // [experts, columns, depth] if right_by_row, else [experts, depth, columns]
    Segments segments;
    Plan plan;
    Epilogue epilogue;
  };

  /// ends[i] = the row tiles of the segments up to i.
  template <class Group>
  static MOE_UNLEARN_DEVICE void count_tiles(const Group& group, const Arguments& a, int32_t* ends, int32_t* sums) {
    for (int32_t first = 0, before = 0, total; first < a.plan.segments; first += threads, before += total) {
      const int32_t segment = first + group.thread();
      int32_t own = 0;
      if (segment < a.plan.segments)
        own = ceil_div(a.segments.stop(segment) - a.segments.start(segment), int32_t{Plan::rows});
      const int32_t others = block_scan<threads>(group, own, sums, total);
      if (segment < a.plan.segments) ends[segment] = before + others + own;
    }
    group.sync();
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

  /// One thread asks for a stage's boxes: weights, and rows that stand in order.
  static MOE_UNLEARN_DEVICE void load_boxes(
      const Arguments& a, const Plan::Tile& tile, int32_t first, uint32_t to, uint64_t& full) {
    constexpr int block = SwappedTile::block_columns, half_bytes = Plan::right_bytes / 2;
    const bool short_tile = tile.stop - tile.first <= Plan::consumer_rows;
    const int left_boxes = a.left.slots ? 0 : short_tile ? 1 : 2;
    hopper::expect_bytes(full, Plan::right_bytes + left_boxes * (Plan::left_bytes / 2));
    for (int i = 0; i < left_boxes; ++i)
      hopper::load_box(
          to + i * (Plan::left_bytes / 2), a.left.boxes, first, tile.first + i * Plan::consumer_rows, full);
    for (int i = 0; i < 2; ++i) {
      const uint32_t there = to + Plan::left_bytes + i * half_bytes;
      const int32_t column = tile.column_tile * a.plan.step + i * a.plan.distance;
      if constexpr (right_by_row) {
        hopper::load_box(there, a.right, first, column, tile.segment, full);
      } else {
        hopper::load_box(there, a.right, column, first, tile.segment, full);
        hopper::load_box(there + half_bytes / 2, a.right, column + block, first, tile.segment, full);
      }
    }
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void produce(
      const Group& group, const Arguments& a, uint32_t memory, Ring& ring, const int32_t* ends) {
    constexpr int lag = 1;  // stages between a copy and the word that it is there
    int64_t step = 0;
    int32_t index = static_cast<int32_t>(group.block());
    Plan::Tile tile, next;
    Gather gather;
    bool more = a.plan.find(next, index, ends, a.segments);
    if (more && a.left.slots) gather.find_next(a.left, next, group.thread());
    while (more) {
      tile = next;
      if (a.left.slots) gather.take(a.left);
      more = a.plan.find(next, index += static_cast<int32_t>(group.blocks()), ends, a.segments);
      if (more && a.left.slots) gather.find_next(a.left, next, group.thread());
      for (int32_t i = 0, steps = steps_of(a, tile); i < steps; ++i, ++step) {
        const int stage = Ring::stage(step);
        ring.wait_until_empty(step);
        const uint32_t to = memory + stage * Plan::stage_bytes;
        if (group.thread() == 0) load_boxes(a, tile, i * Plan::depth, to, ring.full[stage]);
        if (a.left.slots) gather.copy(a.left, to, group.thread(), i * Plan::depth);
        hopper::commit_copies();
        hopper::wait_for_copies<lag>();
        if (step >= lag) ring.publish(step - lag);
      }
    }
    hopper::wait_for_copies<0>();
    for (int64_t done = step > lag ? step - lag : 0; done < step; ++done) ring.publish(done);
  }

  /// sum = the product of this consumer's rows, from the stages of step and the following; nothing if it has none.
  static MOE_UNLEARN_DEVICE void multiply(
      float (&sum)[128], int64_t step, int32_t steps, bool has_rows, uint32_t left, uint32_t right, Ring& ring,
      bool leader) {
    MOE_UNLEARN_UNROLL
    for (int i = 0; i < 128; ++i) sum[i] = 0;
    hopper::fence_uses(sum);
    for (const int64_t last = step + steps; step < last; ++step) {
      ring.wait_until_full(step);
      if (!has_rows) {
        if (leader) ring.release(step);
        continue;
      }
      const uint32_t own = left + Ring::stage(step) * Plan::stage_bytes;
      const uint32_t other = right + Ring::stage(step) * Plan::stage_bytes;
      hopper::begin_products();
      MOE_UNLEARN_UNROLL
      for (int k = 0; k < Plan::depth; k += 16) {
        const uint64_t operand = right_by_row ? SwappedTile::operand_by_row(other + k * 2)
                                              : SwappedTile::operand(other + k * SwappedTile::row_bytes, Plan::depth);
        hopper::multiply_wide<right_by_row>(sum, SwappedTile::operand_by_row(own + k * 2), operand);
      }
      hopper::commit_products();
      hopper::wait_for_products<1>();  // the stage before has been read
      if (leader && step > last - steps) ring.release(step - 1);
    }
    hopper::wait_for_products<0>();
    if (leader && has_rows && steps > 0) ring.release(step - 1);
    hopper::fence_uses(sum);
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void consume(
      const Group& group, const Arguments& a, uint32_t memory, Ring& ring, const int32_t* ends) {
    const int lane = group.thread() % warp_size, warp = group.thread() % Plan::warpgroup / warp_size;
    const int self = group.thread() / Plan::warpgroup - 1;
    const uint32_t left = memory + self * (Plan::left_bytes / 2), right = memory + Plan::left_bytes;
    int64_t step = 0;
    float sum[128];
    Plan::Tile tile;
    for (int32_t index = static_cast<int32_t>(group.block()); a.plan.find(tile, index, ends, a.segments);
         index += static_cast<int32_t>(group.blocks())) {
      const int32_t first = tile.first + self * Plan::consumer_rows, steps = steps_of(a, tile);
      typename Epilogue::Row row[2];
      MOE_UNLEARN_UNROLL
      for (int half = 0; half < 2; ++half) {
        // a thread holds, of every 8 columns, two of the rows lane / 4 and lane / 4 + 8 of its warp's 16
        const int32_t position = first + warp * 16 + half * 8 + lane / 4;
        const bool exists = position < tile.stop;
        row[half] = a.epilogue.find({position, tile.segment, exists, exists && tile.segment < a.segments.experts});
      }
      multiply(sum, step, steps, first < tile.stop, left, right, ring, lane == 0);
      step += steps;
      if (first >= tile.stop) continue;
      MOE_UNLEARN_UNROLL
      for (int half = 0; half < 2; ++half) {
        MOE_UNLEARN_UNROLL
        for (int block = 0; block < Plan::half / 8; block += 4) {
          Chunk chunk[2];
          take_chunk(group, sum, block, half, chunk[0]);
          take_chunk(group, sum, block + Plan::half / 8, half, chunk[1]);
          const int32_t column = tile.column_tile * a.plan.step + (block + lane % 4) * 8;
          a.epilogue.store(group, row[half], column, chunk[0], chunk[1]);
        }
        a.epilogue.finish(group, row[half], tile.column_tile);
      }
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
    auto& ring = *reinterpret_cast<Ring*>(behind);
    auto* const sums = reinterpret_cast<int32_t*>(behind + sizeof(Ring));
    int32_t* const ends = sums + threads / warp_size;
    if (group.thread() == 0) {
      ring.init(Plan::warpgroup, Plan::consumer_warps);
      hopper::fence_barriers();
    }
    count_tiles(group, a, ends, sums);
    if (group.thread() < Plan::warpgroup) {
      hopper::decrease_registers<Plan::producer_registers>();
      produce(group, a, memory, ring, ends);
    } else {
      hopper::increase_registers<Plan::consumer_registers>();
      consume(group, a, memory, ring, ends);
    }
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
    error = hopper::make_boxes(left.boxes, rows, ProductPlan::consumer_rows);
    if (error != cudaSuccess) return error;
  }
  hopper::Boxes right{};
  error = hopper::make_boxes(right, weight, right_by_row ? ProductPlan::half : ProductPlan::depth);
  if (error != cudaSuccess) return error;
  const ProductPlan plan(segments, width, halves, left.depth, device);
  return launch<Kernel>({left, right, segments, plan, epilogue}, plan.blocks, plan.shared_bytes(), stream);
}

}  // namespace moe_unlearn
