// The rows of a grouped product, and its tiles as pairs of blocks compute them. Pairs walk down 16 row tiles of an
// expert before they go on to the next columns, so that both operands stay in L2.

#pragma once

#include "cuda/hopper.cuh"

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
  static constexpr int rows = 128, half = 64, columns = 2 * half, depth = 64, stages = 6;
  static constexpr int product_rows = rows / 2;  // of one product of a warpgroup
  static constexpr int height = 8;  // pairs of row tiles that a column of tiles walks down
  static constexpr int warpgroup = 128, threads = 3 * warpgroup;
  static constexpr int producer_registers = 88, consumer_registers = 208;
  static constexpr int left_bytes = rows * depth * 2, right_bytes = columns * depth * 2;
  static constexpr int stage_bytes = left_bytes + right_bytes;
  static constexpr int alignment = 1024;  // of what swapped rows are counted from
  static constexpr int max_segments = 4096;

  struct Barriers {
    hopper::Ring<stages> ring;
    uint64_t turn[2];  // of the consumers
  };

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
    const int64_t most_items = most_row_tiles * ceil_div(column_tiles, 2);
    blocks = 2 * std::min<int64_t>(most_items, std::max(device.multiprocessors / 2, 1));
  }

  static bool fits(int64_t experts, int64_t num_rows, int64_t width, int64_t depth_of_all) {
    // tiles are counted in 32 bits
    const int64_t tiles = (ceil_div<int64_t>(num_rows, rows) + experts + 1) * ceil_div<int64_t>(width, half);
    return experts < max_segments && num_rows <= INT32_MAX && width % 8 == 0 && depth_of_all % 8 == 0 &&
           2 * width <= INT32_MAX && depth_of_all <= INT32_MAX && tiles <= INT32_MAX / 2;
  }

  size_t shared_bytes() const {
    return alignment + stages * stage_bytes + sizeof(Barriers) + (threads / warp_size + segments) * 4;
  }

  /// What a pair of blocks computes at once of a segment of so many rows: two row tiles with the same columns, or two
  /// column tiles of the last row tile.
  MOE_UNLEARN_HOST_DEVICE int32_t items(int32_t rows_of_segment) const {
    const int32_t row_tiles = ceil_div(rows_of_segment, int32_t{rows});
    return row_tiles / 2 * column_tiles + row_tiles % 2 * ceil_div(column_tiles, 2);
  }

  enum class Shared { nothing, columns, rows };

  /// Rows [first, stop) are those of the segment from the tile's first one on; a block may have none. What is shared is
  /// the same in the tile of the pair's other block.
  struct Tile {
    int32_t segment, first, stop, column_tile;
    Shared shared;

    MOE_UNLEARN_DEVICE int32_t rows() const { return stop - first; }
  };

  /// The tile of a pair's block of this rank in item `index`; ends: the number of items up to and with each segment.
  /// false behind the last.
  MOE_UNLEARN_DEVICE bool find(Tile& tile, int32_t index, int rank, const int32_t* ends, const Segments& s) const {
    int32_t low = 0, high = segments;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (ends[middle] > index)
        high = middle;
      else
        low = middle + 1;
    }
    if (low == segments) return false;
    const int32_t local = index - (low > 0 ? ends[low - 1] : 0);
    const int32_t start = s.start(low), stop = s.stop(low), pairs = ceil_div(stop - start, int32_t{rows}) / 2;
    tile = {low, stop, stop, 0, Shared::columns};
    if (local < pairs * column_tiles) {
      const int32_t group = local / (height * column_tiles) * height, within = local - group * column_tiles;
      const int32_t here = pairs - group < height ? pairs - group : int32_t{height};
      tile.first = start + (2 * (group + within % here) + rank) * rows;
      tile.column_tile = within / here;
    } else {
      const int32_t left = 2 * (local - pairs * column_tiles);
      tile.column_tile = left + rank;
      tile.shared = left + 1 < column_tiles ? Shared::rows : Shared::nothing;
      if (tile.column_tile < column_tiles) tile.first = start + 2 * pairs * rows;
    }
    return true;
  }
};

}  // namespace moe_unlearn
