// The tile of a widened product, for one instruction set: widened_tile.cpp includes this once for each, in a
// namespace that defines Vector and its width, tile_rows, MOE_UNLEARN_TILE (the functions' target), load, store,
// store_rounded, broadcast, zero and multiply_add. All of a tile's sums stay in registers.

/// Adds left right to the sums [rows, vectors]; the terms of each sum are added in their order. Between them lines are
/// asked for `ahead`, a few at a time, because a processor waits for few of them at once.
template <int rows, int vectors>
MOE_UNLEARN_TILE void add_terms(const Sums& to, const float* left, const float* right, int64_t depth, Ahead& ahead) {
  Vector sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sums[i][v] = to.begun ? load(to.at + i * to.stride + v * width) : zero();
  for (int64_t first = 0; first < depth; first += prefetch_step) {
    ahead.next();
    for (int64_t k = first; k < std::min(first + prefetch_step, depth); ++k) {
      Vector b[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) b[v] = load(right + k * word_bits + v * width);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Vector a = broadcast(left[i * strip_stride + k]);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sums[i][v] = multiply_add(a, b[v], sums[i][v]);
      }
    }
  }
  if (to.rounded != nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
      store_rounded(to.rounded + i * to.rounded_stride, sums[i][0], sums[i][vectors - 1], to.streams);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(to.at + i * to.stride + v * width, sums[i][v]);
}

template <int... rows>
Tile tile_of(int64_t count, bool wide, std::integer_sequence<int, rows...>) {
  static constexpr Tile tiles[2][sizeof...(rows)] = {{add_terms<rows + 1, 1>...}, {add_terms<rows + 1, 2>...}};
  return tiles[wide][count - 1];
}

/// The sums [rows, columns] of a strip and a panel, with space for the whole of the panel's vectors.
inline void multiply_tile(
    const Sums& to, const float* strip, int64_t rows, const float* panel, int64_t columns, int64_t depth,
    Ahead& ahead) {
  for (int64_t first = 0; first < columns; first += 2 * width)
    tile_of(rows, columns - first > width, std::make_integer_sequence<int, tile_rows>())(
        to.from_column(first), strip, panel + first, depth, ahead);
}

/// to [rows, columns] = bfloat16 numbers, dense along their rows; 32 divides columns
MOE_UNLEARN_TILE inline void widen_words(float* to, int64_t to_stride, const Matrix& from) {
  const int64_t rows = from.rows, columns = from.columns, stride = from.row_stride;
  const Bits16* row = reinterpret_cast<const Bits16*>(from.data);
  for (int64_t i = 0; i < rows; ++i, row += stride, to += to_stride)
    for (int64_t j = 0; j < columns; j += word_bits)
#pragma GCC unroll 4
      for (int k = 0; k < word_bits; k += width) store(to + j + k, load(row + j + k));
}
