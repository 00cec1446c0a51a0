// A strip of rows times a panel of columns is one tile of sums in registers. Of the operands the smaller one is widened
// as a whole, and the larger one, an expert's weight, part by part: each part is used up while it is in cache.

#include "cpu/widened_product.h"

#include "cpu/widened_tile.h"

namespace moe_unlearn {
namespace {

constexpr int64_t block_sums = 1 << 17;            // floats: a quarter of the second-level cache
constexpr int64_t few_rows = 42, many_rows = 252;  // of a weight at a time: whole strips of 14 and of 6 rows
constexpr int64_t kept_columns = 16 * word_bits;   // of panels that are visited again while they are in cache

template <ScalarType D>
MOE_UNLEARN_INLINE void widen_as(float* to, int64_t to_stride, const Matrix& from) {
  using Bits = typename Format<D>::Bits;
  const Bits* const data = reinterpret_cast<const Bits*>(from.data);
  if (from.row_stride != 1) {
    for (int64_t i = 0; i < from.rows; ++i) {
      const Bits* const row = data + i * from.row_stride;
      if (from.column_stride == 1)
        for (int64_t j = 0; j < from.columns; ++j) to[i * to_stride + j] = widen<Format<D>::dtype>(row[j]);
      else
        for (int64_t j = 0; j < from.columns; ++j)
          to[i * to_stride + j] = widen<Format<D>::dtype>(row[j * from.column_stride]);
    }
    return;
  }
  for (int64_t first = 0; first < from.rows; first += word_bits)  // a column's part at a time
    for (int64_t j = 0; j < from.columns; ++j)
      for (int64_t i = first; i < std::min<int64_t>(first + word_bits, from.rows); ++i)
        to[i * to_stride + j] = widen<Format<D>::dtype>(data[i + j * from.column_stride]);
}

/// to [rows, columns] = from
MOE_UNLEARN_INLINE void widen_matrix(float* to, int64_t to_stride, const Matrix& from) {
  switch (from.dtype) {
    case ScalarType::Float:
      return widen_as<ScalarType::Float>(to, to_stride, from);
    case ScalarType::BFloat16:
      return widen_as<ScalarType::BFloat16>(to, to_stride, from);
    default:
      return widen_as<ScalarType::Half>(to, to_stride, from);
  }
}

void widened(float* to, int64_t to_stride, const Matrix& from) {
  if (from.dtype == ScalarType::BFloat16 && from.column_stride == 1 && from.columns % word_bits == 0)
    return widen_words(to, to_stride, from);
  for_this_cpu<widen_matrix, float*, int64_t, const Matrix&>(to, to_stride, from);
}

/// A count in as few parts of at most `most` as there can be, of about equal size.
struct Parts {
  int64_t total, count;

  Parts(int64_t total, int64_t most) : total(total), count(ceil_div(total, most)) {}
  int64_t first(int64_t part) const { return part * total / count; }
  int64_t size(int64_t part) const { return first(part + 1) - first(part); }
};

/// What is left of a count from `first` on, at most `most`.
int64_t rest(int64_t count, int64_t first, int64_t most) { return std::min(count - first, most); }

/// out = sums, rounded
MOE_UNLEARN_INLINE void round_sums(const Matrix& out, const float* sums, int64_t stride) {
  const int64_t item = item_size(out.dtype) * out.column_stride;
  for (int64_t row = 0; row < out.rows; ++row)
    for (int64_t first = 0; first < out.columns; first += word_bits) {
      const int64_t n = std::min<int64_t>(out.columns - first, word_bits);
      Word value;
      load(value, ScalarType::Float, reinterpret_cast<const char*>(sums + row * stride + first), sizeof(float), n);
      store(value, out.dtype, out.row(row) + first * item, item, 0xFFFFFFFF, n);
    }
}

void write_sums(const Matrix& out, const float* sums, int64_t stride) {
  for_this_cpu<round_sums, const Matrix&, const float*, int64_t>(out, sums, stride);
}

/// out, dense along its columns, = rows of words; in squares of 32 x 32, so that a column's part is written at once.
MOE_UNLEARN_INLINE void transpose_words(const Matrix& out, const Bits16* words, int64_t stride) {
  constexpr int together = sizeof(uint64_t) / sizeof(Bits16);
  for (int64_t first = 0; first < out.rows; first += word_bits)
    for (int64_t column = 0; column < out.columns; column += word_bits) {
      const int64_t rows = std::min<int64_t>(out.rows - first, word_bits);
      uint64_t square[word_bits][word_bits / together], of_rows[word_bits];
      for (int64_t row = 0; row < rows; row += together) {
        const Bits16* from[together];
        for (int i = 0; i < together; ++i) from[i] = words + (first + std::min(row + i, rows - 1)) * stride + column;
        for (int j = 0; j < word_bits; ++j)
          of_rows[j] = uint64_t{from[0][j]} | uint64_t{from[1][j]} << 16 | uint64_t{from[2][j]} << 32 |
              uint64_t{from[3][j]} << 48;
        for (int j = 0; j < word_bits; ++j) square[j][row / together] = of_rows[j];
      }
      for (int64_t j = 0; j < std::min<int64_t>(out.columns - column, word_bits); ++j)
        std::memcpy(out.data + ((column + j) * out.column_stride + first) * 2, square[j], rows * 2);
    }
}

void write_transposed(const Matrix& out, const Bits16* words, int64_t stride) {
  for_this_cpu<transpose_words, const Matrix&, const Bits16*, int64_t>(out, words, stride);
}

/// The sums of a part of a product, at most 32 columns wide, and its place in the result.
class Part {
 public:
  /// `begun`: some of its terms have been added; `ends`: no others follow these; `streams`: the result is not read
  /// soon.
  Part(const Matrix& out, float* sums, int64_t stride, bool begun, bool ends, bool streams = false)
      : out_(out), sums_(sums), stride_(stride), begun_(begun), ends_(ends),
        in_tile_(ends && out.dtype == ScalarType::BFloat16 && out.column_stride == 1 && out.columns == word_bits),
        streams_(streams && in_tile_ && (reinterpret_cast<uintptr_t>(out.data) | out.row_stride * 2) % 64 == 0) {}

  Sums from_row(int64_t first) const {
    const Sums sums{sums_ + first * stride_, stride_, begun_};
    if (!in_tile_) return sums;
    return {sums.at, stride_, begun_, reinterpret_cast<Bits16*>(out_.row(first)), out_.row_stride, streams_};
  }
  /// After the tiles: writes what they have not.
  void end() const {
    if (ends_ && !in_tile_) write_sums(out_, sums_, stride_);
  }

 private:
  Matrix out_;
  float* sums_;
  int64_t stride_;
  bool begun_, ends_, in_tile_, streams_;
};

}  // namespace

float* Floats::room_for(int64_t count) {
  if (count > count_) memory_ = Buffer(count * sizeof(float)), count_ = count;
  return data();
}

void Panels::pack(const Matrix& b) {
  depth_ = b.rows, columns_ = b.columns;
  float* const to = floats_.room_for(ceil_div(columns_, word_bits) * depth_ * word_bits);
  for (int64_t first = 0; first < columns_; first += word_bits)
    widened(to + first * depth_, word_bits, b.block(0, depth_, first, rest(columns_, first, word_bits)));
}

void Strips::pack(const Matrix& a) {
  rows_ = a.rows;
  float* const to = floats_.room_for(ceil_div(a.columns, depth_block) * rows_ * strip_stride);
  for (int64_t k = 0; k < a.columns; k += depth_block)
    widened(to + k / depth_block * rows_ * strip_stride, strip_stride,
            a.block(0, rows_, k, rest(a.columns, k, depth_block)));
}

const float* Strips::at(int64_t row, int64_t k) const {
  return floats_.data() + (k / depth_block * rows_ + row) * strip_stride;
}

void WidenedProducts::multiply(const Matrix& out, const Matrix& a, const Matrix& b) {
  if (out.rows == 0 || out.columns == 0) return;
  if (b.row_stride == 1 && b.column_stride != 1) {
    panels_.pack(a.transposed());
    return multiply_rows(out.transposed(), b.transposed());
  }
  strips_.pack(a);
  multiply_columns(out, b);
}

/// out = a panels_
void WidenedProducts::multiply_rows(const Matrix& out, const Matrix& a) {
  const int64_t panels = ceil_div(panels_.columns(), word_bits), stride = panels * word_bits;
  // all panels pass by for each block of rows: many rows where they come from beyond the cache, else few with sums near
  const int64_t block_rows = std::min(stride * a.columns <= 2 * block_sums ? few_rows : many_rows, a.rows);
  const int64_t depths = ceil_div(a.columns, depth_block), parts = ceil_div(a.rows, block_rows) * depths;
  float* const sums = sums_.room_for(block_rows * stride);
  const bool in_tile = out.dtype == ScalarType::BFloat16 && out.row_stride == 1;
  Bits16* const rounded = in_tile ? reinterpret_cast<Bits16*>(rounded_.room_for(block_rows * stride / 2)) : nullptr;
  float* const strip = part_.room_for(tile_rows() * strip_stride);
  const auto part = [&](int64_t i) {
    const int64_t row = i / depths * block_rows, k = i % depths * depth_block;
    return a.block(row, rest(a.rows, row, block_rows), k, rest(a.columns, k, depth_block));
  };
  Ahead ahead;
  for (int64_t i = 0; i < parts; ++i) {
    const Matrix now = part(i);
    const Parts strips(now.rows, tile_rows());
    const int64_t k = i % depths * depth_block;
    const bool ends = k + now.columns == a.columns;
    ahead.part = Prefetch<2>(part(std::min(i + 1, parts - 1)), strips.count * panels, now.columns);
    for (int64_t s = 0; s < strips.count; ++s) {
      widened(strip, strip_stride, now.slice(strips.first(s), strips.size(s)));
      const int64_t first = strips.first(s) * stride;
      const Sums to{sums + first, stride, k > 0, ends && in_tile ? rounded + first : nullptr, stride};
      for (int64_t p = 0; p < panels; ++p)
        multiply_tile(
            to.from_column(p * word_bits), strip, strips.size(s), panels_.at(p, k),
            rest(panels_.columns(), p * word_bits, word_bits), now.columns, ahead);
    }
    if (!ends) continue;
    const Matrix target = out.slice(i / depths * block_rows, now.rows);
    if (in_tile)
      write_transposed(target, rounded, stride);
    else
      write_sums(target, sums, stride);
  }
}

/// out = strips_ b
void WidenedProducts::multiply_columns(const Matrix& out, const Matrix& b) {
  const Parts strips(out.rows, tile_rows());
  // the longer the rows of a part, the fewer pages it touches; their sums stay in cache
  const int64_t most_panels = std::max<int64_t>(block_sums / out.rows / word_bits, 8);
  const int64_t block_columns = std::min(most_panels, ceil_div(b.columns, word_bits)) * word_bits;
  const int64_t depths = ceil_div(b.rows, depth_block), parts = ceil_div(b.columns, block_columns) * depths;
  float* const sums = sums_.room_for(out.rows * block_columns);
  float* const panel = part_.room_for(depth_block * word_bits);
  const auto part = [&](int64_t i) {
    const int64_t column = i / depths * block_columns, k = i % depths * depth_block;
    return b.block(k, rest(b.rows, k, depth_block), column, rest(b.columns, column, block_columns));
  };
  Ahead ahead;
  for (int64_t i = 0; i < parts; ++i) {
    const Matrix now = part(i);
    const int64_t k = i % depths * depth_block;
    const int64_t tiles = strips.count * ceil_div(now.columns, word_bits);
    ahead.part = Prefetch<2>(part(std::min(i + 1, parts - 1)), tiles, now.rows);
    for (int64_t column = 0; column < now.columns; column += word_bits) {
      const int64_t columns = rest(now.columns, column, word_bits), next = column + columns;
      const Part to(
          out.block(0, out.rows, i / depths * block_columns + column, columns), sums + column, block_columns, k > 0,
          k + now.rows == b.rows);
      widened(panel, word_bits, now.block(0, now.rows, column, columns));
      ahead.panel =
          Prefetch<1>(now.block(0, now.rows, next, rest(now.columns, next, word_bits)), strips.count, now.rows);
      for (int64_t s = 0; s < strips.count; ++s)
        multiply_tile(
            to.from_row(strips.first(s)), strips_.at(strips.first(s), k), strips.size(s), panel, columns, now.rows,
            ahead);
      to.end();
    }
  }
}

void WidenedProducts::multiply(const Matrix& out, const Matrix& a, const Panels& b, bool streams) {
  const Parts strips(a.rows, tile_rows());
  strips_.pack(a);
  float* const sums = sums_.room_for(tile_rows() * kept_columns);
  Ahead nothing;
  for (int64_t first = 0; first < b.columns(); first += kept_columns)
    for (int64_t s = 0; s < strips.count; ++s)
      for (int64_t k = 0; k < b.depth(); k += depth_block) {
        const int64_t depth = rest(b.depth(), k, depth_block);
        for (int64_t column = first; column < std::min(first + kept_columns, b.columns()); column += word_bits) {
          const int64_t columns = rest(b.columns(), column, word_bits);
          const Part to(
              out.block(strips.first(s), strips.size(s), column, columns), sums + column - first, kept_columns, k > 0,
              k + depth == b.depth(), streams);
          multiply_tile(
              to.from_row(0), strips_.at(strips.first(s), k), strips.size(s), b.at(column / word_bits, k), columns,
              depth, nothing);
          to.end();
        }
      }
  if (streams) end_streams();
}

}  // namespace moe_unlearn
