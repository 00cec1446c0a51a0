// The sums of wgmma brought into rows through shared memory, warp by warp. Of 16 rows of a product a lane holds, of
// every 8 columns, two of row lane / 4 and two of row lane / 4 + 8, at columns lane % 4 * 2.

#pragma once

#include "cuda/rows.cuh"

namespace moe_unlearn {

/// Room for some of a warp's 32 rows of 128 columns in float32. Pieces of 4 columns are swapped so that lanes meet in
/// no bank, neither those that write pairs of 8 rows nor those that read chunks of one.
struct Exchange {
  static constexpr int columns = 128, warp_rows = 32, rows = 24, bytes = rows * columns * 4;
  static constexpr int group = 8;  // rows that are written at once

  float* memory;

  static MOE_UNLEARN_HOST_DEVICE int offset(int row, int column) {
    const int piece = column / 4;
    return row * columns + (piece ^ piece / 8 % 2 ^ row % 4 * 2) * 4 + column % 4;
  }

  /// Rows [from, from + 8) of a warp's two fragments, 16 rows each, to row `to` and the following.
  MOE_UNLEARN_DEVICE void write(const float (&sum)[2][columns / 2], int from, int to, int lane) const {
    MOE_UNLEARN_UNROLL
    for (int i = 0; i < columns / 8; ++i) {
      const float* const pair = &sum[from / 16][i * 4 + from % 16 / 8 * 2];
      *reinterpret_cast<float2*>(memory + offset(to + lane / 4, i * 8 + lane % 4 * 2)) = {pair[0], pair[1]};
    }
  }

  MOE_UNLEARN_DEVICE void read(Chunk& chunk, int row, int column) const {
    MOE_UNLEARN_UNROLL
    for (int i = 0; i < chunk_size; i += 4) {
      const float4 quad = *reinterpret_cast<const float4*>(memory + offset(row, column + i));
      chunk[i] = quad.x, chunk[i + 1] = quad.y, chunk[i + 2] = quad.z, chunk[i + 3] = quad.w;
    }
  }
};

}  // namespace moe_unlearn
