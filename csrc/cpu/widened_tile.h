// The tile of a widened product: a strip of rows times a panel of columns, and what is done beside its terms.

#pragma once

#include "cpu/matmul.h"

namespace moe_unlearn {

constexpr int64_t depth_block = 128;                // terms between two visits to a tile's sums
constexpr int64_t strip_stride = depth_block + 16;  // rows of a strip begin in different sets of the cache
constexpr int64_t prefetch_step = 32;               // terms between two requests to memory

/// Asks for the cache lines of a matrix with dense rows to come to a level of the cache (1 or 2), a share of them at a
/// time: one of `tiles` tiles of `depth` terms asks for several shares.
template <int level>
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const Matrix& m, int64_t tiles, int64_t depth)
      : row_(m.data), stride_(m.row_stride * item_size(m.dtype)), bytes_(m.column_stride == 1 ? m.row_bytes() : 0),
        rest_(bytes_ > 0 ? m.rows : 0),
        share_(ceil_div(rest_ * ceil_div(bytes_, line), tiles * ceil_div(depth, prefetch_step))) {}

  void next() {
    for (int64_t i = 0; i < share_ && rest_ > 0; ++i) {
      __builtin_prefetch(row_ + done_, 0, 4 - level);
      if ((done_ += line) >= bytes_) row_ += stride_, done_ = 0, --rest_;
    }
  }

 private:
  static constexpr int64_t line = 64;
  const char* row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rest_ = 0, share_ = 0, done_ = 0;
};

/// What is asked for while tiles are multiplied.
struct Ahead {
  Prefetch<2> part;   // of an operand in memory: the next one
  Prefetch<1> panel;  // of that part: the next one

  void next() { part.next(), panel.next(); }
};

/// Where the sums of a tile lie between two blocks of terms, if they have `begun`, and where they go after the last: to
/// `rounded`, in bfloat16, if that is not null, past the cache if it `streams`. Strides are counted in elements.
struct Sums {
  float* at;
  int64_t stride;
  bool begun;
  Bits16* rounded = nullptr;
  int64_t rounded_stride = 0;
  bool streams = false;

  Sums from_column(int64_t first) const {
    return {at + first, stride, begun, rounded == nullptr ? nullptr : rounded + first, rounded_stride, streams};
  }
};

/// The most rows of a strip.
int64_t tile_rows();

/// Adds the products of a strip and a panel to the sums [rows, columns] of at most 32 columns; where they lie and where
/// they go there is space for 32.
void multiply_tile(
    const Sums& to, const float* strip, int64_t rows, const float* panel, int64_t columns, int64_t depth,
    Ahead& ahead);

/// to = bfloat16 numbers, dense along their rows; 32 divides their columns
void widen_words(float* to, int64_t to_stride, const Matrix& from);

/// What went past the cache is seen by other threads before what follows.
void end_streams();

}  // namespace moe_unlearn
