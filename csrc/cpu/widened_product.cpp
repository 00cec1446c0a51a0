// A strip of rows times a panel of columns is one tile of sums in registers. Of the operands the smaller one is widened
// as a whole, and the larger one, an expert's weight, part by part: each part is used up while it is in cache.

#include "cpu/widened_product.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe_unlearn {
namespace {

constexpr int64_t depth_block = 256;                // terms between two visits to a tile's sums
constexpr int64_t strip_stride = depth_block + 16;  // rows of a strip begin in different sets of the cache
constexpr int64_t block_rows = 252;                 // of a weight: their sums stay in cache, and their next terms come
constexpr int64_t block_columns = 8 * word_bits;    // from memory meanwhile; the same, where a weight is cut in panels
constexpr int64_t kept_columns = 16 * word_bits;    // of panels that are visited again while they are in cache
constexpr int64_t prefetch_step = 32;               // terms between two requests to memory

/// Asks for the cache lines of a matrix with dense rows, a share of them at a time: one of `tiles` tiles of `depth`
/// terms asks for several shares.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const Matrix& m, int64_t tiles, int64_t depth)
      : row_(m.data), stride_(m.row_stride * item_size(m.dtype)), bytes_(m.column_stride == 1 ? m.row_bytes() : 0),
        rest_(bytes_ > 0 ? m.rows : 0),
        share_(ceil_div(rest_ * ceil_div(bytes_, line), tiles * ceil_div(depth, prefetch_step))) {}

  void next() {
    for (int64_t i = 0; i < share_ && rest_ > 0; ++i) {
      __builtin_prefetch(row_ + done_, 0, 2);
      if ((done_ += line) >= bytes_) row_ += stride_, done_ = 0, --rest_;
    }
  }

 private:
  static constexpr int64_t line = 64;
  const char* row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rest_ = 0, share_ = 0, done_ = 0;
};

/// Where the sums of a tile lie between two blocks of terms, if they have `begun`, and where they go after the last: to
/// `rounded`, in bfloat16, if that is not null. Strides are counted in elements.
struct Sums {
  float* at;
  int64_t stride;
  bool begun;
  Bits16* rounded = nullptr;
  int64_t rounded_stride = 0;

  Sums from_column(int64_t first) const {
    return {at + first, stride, begun, rounded == nullptr ? nullptr : rounded + first, rounded_stride};
  }
};

#if defined(__x86_64__)

/// What multiplies a tile of some number of rows and vectors (widened_tile.h).
using Tile = void (*)(const Sums&, const float*, const float*, int64_t, Prefetch&);

namespace avx512 {

#define MOE_UNLEARN_TILE __attribute__((target("avx512f,avx512bw")))
using Vector = __m512;
constexpr int width = 16, tile_rows = 14;
MOE_UNLEARN_TILE inline Vector zero() { return _mm512_setzero_ps(); }
MOE_UNLEARN_TILE inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
MOE_UNLEARN_TILE inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
MOE_UNLEARN_TILE inline void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
MOE_UNLEARN_TILE inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

/// The bits of x, of which the upper 16 are those of x in bfloat16; of NaNs too where there may be some.
MOE_UNLEARN_TILE inline __m512i round_bits(Vector x, bool nans) {
  const __m512i bits = _mm512_castps_si512(x), down = _mm512_set1_epi32(0x7FFF), up = _mm512_set1_epi32(0x8000);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_mask_blend_epi32(odd, down, up));
  if (__builtin_expect(!nans, 1)) return sum;
  return _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
}

MOE_UNLEARN_TILE inline void store_rounded(Bits16* to, Vector a, Vector b) {
  alignas(64) static constexpr uint16_t upper[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const bool nans = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0;
  const __m512i x = round_bits(a, nans), y = round_bits(b, nans);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, _mm512_load_si512(upper), y));
}

#include "cpu/widened_tile.h"
#undef MOE_UNLEARN_TILE

}  // namespace avx512

namespace avx2 {

#define MOE_UNLEARN_TILE __attribute__((target("avx2,fma")))
using Vector = __m256;
constexpr int width = 8, tile_rows = 6;
MOE_UNLEARN_TILE inline Vector zero() { return _mm256_setzero_ps(); }
MOE_UNLEARN_TILE inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
MOE_UNLEARN_TILE inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
MOE_UNLEARN_TILE inline void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
MOE_UNLEARN_TILE inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

/// x in bfloat16, as integers of 32 bits.
MOE_UNLEARN_TILE inline __m256i round_bits(Vector x) {
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7FC00000), nan), 16);
}

MOE_UNLEARN_TILE inline void store_rounded(Bits16* to, Vector a, Vector b) {
  const __m256i lanes = _mm256_packus_epi32(round_bits(a), round_bits(b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(lanes, 0xD8));
}

#include "cpu/widened_tile.h"
#undef MOE_UNLEARN_TILE

}  // namespace avx2

int64_t tile_rows() {
  return instruction_set() == InstructionSet::avx512 ? avx512::tile_rows : avx2::tile_rows;
}

void multiply_tile(
    const Sums& to, const float* strip, int64_t rows, const float* panel, int64_t columns, int64_t depth,
    Prefetch& ahead) {
  const auto tile = instruction_set() == InstructionSet::avx512 ? avx512::multiply_tile : avx2::multiply_tile;
  tile(to, strip, rows, panel, columns, depth, ahead);
}

#else

int64_t tile_rows() { return 1; }

void multiply_tile(const Sums&, const float*, int64_t, const float*, int64_t, int64_t, Prefetch&) {
  STD_TORCH_CHECK(false, "no widened products on this CPU");
}

#endif

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
  for_this_cpu<widen_matrix, float*, int64_t, const Matrix&>(to, to_stride, from);
}

/// A panel from a matrix of at most 32 columns.
void widen_panel(float* to, const Matrix& from) {
  if (from.columns < word_bits) std::memset(to, 0, from.rows * word_bits * sizeof(float));
  widened(to, word_bits, from);
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
  const int64_t item = item_size(out.dtype);
  const bool along_rows = out.row_stride != 1;
  const int64_t lines = along_rows ? out.rows : out.columns, length = along_rows ? out.columns : out.rows;
  const int64_t line_stride = along_rows ? out.row_stride : out.column_stride;
  const int64_t element_stride = along_rows ? out.column_stride : 1;
  for (int64_t first = 0; first < length; first += word_bits) {
    const int64_t n = std::min<int64_t>(length - first, word_bits);
    for (int64_t line = 0; line < lines; ++line) {
      const float* const from = along_rows ? sums + line * stride + first : sums + first * stride + line;
      Word value;
      load(value, ScalarType::Float, reinterpret_cast<const char*>(from), (along_rows ? 1 : stride) * 4, n);
      store(value, out.dtype, out.data + (line * line_stride + first * element_stride) * item, element_stride * item,
            0xFFFFFFFF, n);
    }
  }
}

void write_sums(const Matrix& out, const float* sums, int64_t stride) {
  for_this_cpu<round_sums, const Matrix&, const float*, int64_t>(out, sums, stride);
}

/// The sums of a part of a product, at most 32 columns wide, and its place in the result.
class Part {
 public:
  /// `begun`: some of its terms have been added; `ends`: no others follow these.
  Part(const Matrix& out, float* sums, int64_t stride, bool begun, bool ends)
      : out_(out), sums_(sums), stride_(stride), begun_(begun), ends_(ends),
        in_tile_(ends && out.dtype == ScalarType::BFloat16 && out.column_stride == 1 && out.columns == word_bits) {}

  Sums from_row(int64_t first) const {
    const Sums sums{sums_ + first * stride_, stride_, begun_};
    if (!in_tile_) return sums;
    return {sums.at, stride_, begun_, reinterpret_cast<Bits16*>(out_.row(first)), out_.row_stride};
  }
  /// After the tiles: writes what they have not.
  void end() const {
    if (ends_ && !in_tile_) write_sums(out_, sums_, stride_);
  }

 private:
  Matrix out_;
  float* sums_;
  int64_t stride_;
  bool begun_, ends_, in_tile_;
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
    widen_panel(to + first * depth_, b.block(0, depth_, first, rest(columns_, first, word_bits)));
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
  const int64_t depths = ceil_div(a.columns, depth_block), parts = ceil_div(a.rows, block_rows) * depths;
  float* const sums = sums_.room_for(std::min(a.rows, block_rows) * stride);
  float* const strip = part_.room_for(tile_rows() * strip_stride);
  const auto part = [&](int64_t i) {
    const int64_t row = i / depths * block_rows, k = i % depths * depth_block;
    return a.block(row, rest(a.rows, row, block_rows), k, rest(a.columns, k, depth_block));
  };
  for (int64_t i = 0; i < parts; ++i) {
    const Matrix now = part(i);
    const Parts strips(now.rows, tile_rows());
    const int64_t k = i % depths * depth_block;
    Prefetch ahead(part(std::min(i + 1, parts - 1)), strips.count * panels, now.columns);
    for (int64_t s = 0; s < strips.count; ++s) {
      widened(strip, strip_stride, now.slice(strips.first(s), strips.size(s)));
      for (int64_t p = 0; p < panels; ++p) {
        multiply_tile(
            {sums + strips.first(s) * stride + p * word_bits, stride, k > 0}, strip, strips.size(s), panels_.at(p, k),
            rest(panels_.columns(), p * word_bits, word_bits), now.columns, ahead);
      }
    }
    if ((i + 1) % depths == 0) write_sums(out.slice(i / depths * block_rows, now.rows), sums, stride);
  }
}

/// out = strips_ b
void WidenedProducts::multiply_columns(const Matrix& out, const Matrix& b) {
  const Parts strips(out.rows, tile_rows());
  const int64_t depths = ceil_div(b.rows, depth_block), parts = ceil_div(b.columns, block_columns) * depths;
  float* const sums = sums_.room_for(out.rows * block_columns);
  float* const panel = part_.room_for(depth_block * word_bits);
  const auto part = [&](int64_t i) {
    const int64_t column = i / depths * block_columns, k = i % depths * depth_block;
    return b.block(k, rest(b.rows, k, depth_block), column, rest(b.columns, column, block_columns));
  };
  for (int64_t i = 0; i < parts; ++i) {
    const Matrix now = part(i);
    const int64_t k = i % depths * depth_block;
    Prefetch ahead(part(std::min(i + 1, parts - 1)), strips.count * ceil_div(now.columns, word_bits), now.rows);
    for (int64_t column = 0; column < now.columns; column += word_bits) {
      const int64_t columns = rest(now.columns, column, word_bits);
      const Part to(
          out.block(0, out.rows, i / depths * block_columns + column, columns), sums + column, block_columns, k > 0,
          k + now.rows == b.rows);
      widen_panel(panel, now.block(0, now.rows, column, columns));
      for (int64_t s = 0; s < strips.count; ++s)
        multiply_tile(
            to.from_row(strips.first(s)), strips_.at(strips.first(s), k), strips.size(s), panel, columns, now.rows,
            ahead);
      to.end();
    }
  }
}

void WidenedProducts::multiply(const Matrix& out, const Matrix& a, const Panels& b) {
  const Parts strips(a.rows, tile_rows());
  strips_.pack(a);
  float* const sums = sums_.room_for(tile_rows() * kept_columns);
  Prefetch nothing;
  for (int64_t first = 0; first < b.columns(); first += kept_columns)
    for (int64_t s = 0; s < strips.count; ++s)
      for (int64_t k = 0; k < b.depth(); k += depth_block) {
        const int64_t depth = rest(b.depth(), k, depth_block);
        for (int64_t column = first; column < std::min(first + kept_columns, b.columns()); column += word_bits) {
          const int64_t columns = rest(b.columns(), column, word_bits);
          const Part to(
              out.block(strips.first(s), strips.size(s), column, columns), sums + column - first, kept_columns, k > 0,
              k + depth == b.depth());
          multiply_tile(
              to.from_row(0), strips_.at(strips.first(s), k), strips.size(s), b.at(column / word_bits, k), columns,
              depth, nothing);
          to.end();
        }
      }
}

}  // namespace moe_unlearn
