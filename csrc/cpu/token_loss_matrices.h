// token_loss's matrices: the problem, its rows as one factor of a product and the head as the other, and what the
// forward keeps for the gradient of the head.

#pragma once

#include "cpu/pair_product.h"
#include "cpu/product.h"
#include "cpu/token_loss.h"

namespace moe_unlearn {

constexpr int64_t tile_tokens = 128;   // of a forward tile: enough tiles to share, products at full speed
constexpr int64_t tile_entries = 512;  // of the vocabulary, of a forward tile
constexpr int64_t backward_tile_tokens = 512, backward_tile_entries = 256;

struct Side {
  Tensor head;
  Rows hidden, head_rows;

  Side(const Tensor& hidden, const Tensor& head) : head(head), hidden(hidden), head_rows(head) {}
  bool can_pair() const {
    return hidden.dtype == ScalarType::BFloat16 && head_rows.dtype == ScalarType::BFloat16 && head_rows.stride == 2 &&
        hidden.width % word_bits == 0;
  }
};

struct Problem {
  Side model, reference;  // the reference is that of kl, otherwise the model again
  Options options;
  const int64_t *labels, *index;  // [tokens]; the rows to compute [count], ascending
  int64_t count, tokens, vocabulary, hidden;
  bool pairs;  // products of bfloat16 pairs

  int64_t label(int64_t i) const { return options.kl ? -1 : labels[index[i]]; }
};

float* data(const Tensor& tensor) { return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr())); }

Tensor floats(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}

/// Computed rows of one side, ready to be multiplied with its head.
class Keys {
 public:
  Keys(const Problem& p, const Side& side, int64_t room)
      : p_(p), side_(side), dense_(floats(side.head, p.pairs ? 0 : room, p.hidden)),
        packed_(p.pairs ? ceil_div(room, word_bits) * word_bits * p.hidden / 2 : 0) {}

  /// Takes the rows index[begin, begin + count).
  void gather(int64_t begin, int64_t count) {
    if (p_.pairs)
      for_this_cpu<pack_along_rows, uint32_t*, const Rows&, const int64_t*, int64_t, int64_t>(
          packed_.data(), side_.hidden, p_.index, begin, count);
    else
      for_this_cpu<copy_rows, float*, const Rows&, const int64_t*, int64_t, int64_t>(
          data(dense_), side_.hidden, p_.index, begin, count);
  }

  Tensor rows(int64_t begin, int64_t count) const {
    Tensor dense = dense_;
    return torch::stable::narrow(dense, 0, begin, count);
  }

  /// `count` entries of the head as float32, a view or a copy in `space`; nothing where pairs are multiplied.
  Tensor entries(Tensor& space, int64_t first, int64_t count) const {
    Tensor head = side_.head;
    if (p_.pairs || side_.head_rows.dtype == ScalarType::Float) return torch::stable::narrow(head, 0, first, count);
    for_this_cpu<copy_rows, float*, const Rows&, const int64_t*, int64_t, int64_t>(
        data(space), side_.head_rows, nullptr, first, count);
    return first_rows(space, count);
  }

  /// z [columns, count] = entries w of the head times the rows taken, from `begin` of them on.
  void multiply_head(Tensor& z, const Tensor& w, int64_t first, int64_t columns, int64_t begin, int64_t count) const {
    if (!p_.pairs) return multiply(corner(z, columns, count), w, transposed(rows(begin, count)));
    const int64_t row = columns > 1 ? side_.head_rows.row(1) - side_.head_rows.row(0) : 0;
    multiply_pairs(
        data(z), z.size(1), {side_.head_rows.row(first), row, 4}, columns, packed_.data() + begin * p_.hidden / 2,
        ceil_div(count, word_bits), p_.hidden / 2, false, nullptr);
  }

 private:
  const Problem& p_;
  const Side& side_;
  Tensor dense_;
  std::vector<uint32_t> packed_;
};

/// Space for head entries as float32 where they are not.
Tensor entry_space(const Problem& p, const Side& side, int64_t columns) {
  return floats(side.head, p.pairs || side.head_rows.dtype == ScalarType::Float ? 0 : columns, p.hidden);
}

/// Tokens times entries of the head, summed over the vocabulary: [tokens, hidden].
class Values {
 public:
  Values(const Problem& p, bool wanted)
      : p_(p), sums_(floats(p.model.head, wanted ? tile_tokens : 0, p.hidden)),
        part_(floats(p.model.head, wanted && !p.pairs ? tile_tokens : 0, p.hidden)),
        head_(wanted && p.pairs ? tile_entries / 2 * p.hidden : 0),
        tile_(wanted && p.pairs ? tile_entries / 2 * tile_tokens : 0) {}

  void reset() { torch::stable::zero_(sums_); }

  /// sums = rescale * sums + tile^T w
  void add(const Tile& t, Tensor& z, const Tensor& w, const float* rescale) {
    if (!p_.pairs) {
      multiply(first_rows(part_, t.count), transposed(corner(z, t.columns, t.count)), w);
      return for_this_cpu<fold, float*, const float*, int64_t, int64_t, const float*>(
          data(sums_), data(part_), t.count, p_.hidden, rescale);
    }
    const int64_t pairs = ceil_div(t.columns, 2), panel = pairs * word_bits;  // the words of 32 tokens or columns
    for_this_cpu<pack_row_pairs<word_bits>, uint32_t*, const Rows&, const int64_t*, int64_t, int64_t>(
        head_.data(), p_.model.head_rows, nullptr, t.first, t.columns);
    for (const bool residual : {false, true}) {
      if (residual && !p_.options.kl) continue;
      for_this_cpu<pack_tile, uint32_t*, const Tile&, bool>(tile_.data(), t, residual);
      for (int64_t c = 0; c < p_.hidden; c += word_bits)
        for (int64_t r = 0; r < t.count; r += word_bits)
          multiply_pairs(
              data(sums_) + r * p_.hidden + c, p_.hidden,
              {reinterpret_cast<const char*>(tile_.data() + r / word_bits * panel), 4, 4 * word_bits},
              std::min<int64_t>(t.count - r, word_bits), head_.data() + c / word_bits * panel, 1, pairs, true,
              residual ? nullptr : rescale + r);
    }
  }

  const float* of(int64_t token) const { return data(sums_) + token * p_.hidden; }

 private:
  const Problem& p_;
  Tensor sums_, part_;
  std::vector<uint32_t> head_, tile_;
};

/// What the forward leaves for the gradient of the head, so that fewer logits are made again: of each group of
/// `tile_entries` entries of the vocabulary the tile of the first ones, exp(z - peak) c by token. They lie in the very
/// memory that the group's gradient is written to, at its end, and further ones in `spare`: a group's rows are written
/// in order, each when the tiles that it covers have been used.
struct Kept {
  char *gradient = nullptr, *spare = nullptr;
  float *peaks = nullptr, *slopes = nullptr;  // [groups, tokens]; minus the gradient of l by the label's logit [tokens]
  int64_t tokens = 0, row_bytes = 0, spare_columns = 0, room = 0;  // row_bytes: of the gradient; room: for tokens
  ScalarType dtype = ScalarType::Float;

  Kept() = default;
  Kept(const Problem& p, const Tensor& gradient, const Tensor& peaks, const Tensor& spare)
      : gradient(static_cast<char*>(gradient.mutable_data_ptr())), spare(static_cast<char*>(spare.mutable_data_ptr())),
        peaks(data(peaks)), slopes(data(peaks) + ceil_div(p.vocabulary, tile_entries) * p.tokens), tokens(p.tokens),
        row_bytes(p.hidden * item_size(gradient.scalar_type())), room(ceil_div(p.count, word_bits) * word_bits),
        dtype(p.pairs ? ScalarType::BFloat16 : ScalarType::Float) {
    spare_columns = spare.size(1) * item_size(spare.scalar_type()) / item_size(dtype);
    const bool fits = gradient.is_contiguous() && peaks.size(0) == ceil_div(p.vocabulary, tile_entries) + 1;
    STD_TORCH_CHECK(fits, "no room as this kernel fills it");
  }

  explicit operator bool() const { return gradient != nullptr; }
  int64_t inside(int64_t columns) const { return std::min(columns, columns * row_bytes / tile_row()); }
  /// How many of the entries [first, first + columns), a group, are kept.
  int64_t count(int64_t columns) const { return std::min(columns, inside(columns) + spare_columns); }
  char* row(int64_t first, int64_t columns, int64_t entry) const {
    const int64_t within = inside(columns);
    return entry < within ? gradient + (first + columns) * row_bytes - (within - entry) * tile_row()
                          : spare + (first / tile_entries * spare_columns + entry - within) * tile_row();
  }

 private:
  int64_t tile_row() const { return std::max<int64_t>(room, 1) * item_size(dtype); }
};

/// Keeps what label_tile has left of a group; `begin` is the tile's first token among all.
MOE_UNLEARN_INLINE void keep_tile(const Kept& kept, const Tile& t, const Tokens& tokens, int64_t begin) {
  std::copy_n(tokens.peak.data(), t.count, kept.peaks + t.first / tile_entries * kept.tokens + begin);
  const int64_t item = item_size(kept.dtype);
  for (int64_t v = 0; v < kept.count(t.columns); ++v)
    for (int64_t r = 0; r < t.count; r += word_bits) {
      Word value;
      std::copy_n(t.z + v * t.stride + r, word_bits, value);
      store(value, kept.dtype, kept.row(t.first, t.columns, v) + (begin + r) * item, item, 0xFFFFFFFF, word_bits);
    }
}

/// Makes the gradients of a tile, entries [entry, ...) of its group, of what was kept; `factor` is that of each token.
MOE_UNLEARN_INLINE void read_kept_tile(
    const Kept& kept, const Tile& t, int64_t group, int64_t group_columns, const float* factor) {
  const int64_t item = item_size(kept.dtype);
  for (int64_t v = 0; v < t.columns; ++v)
    for (int64_t r = 0; r < t.count; r += word_bits) {
      const int64_t n = std::min<int64_t>(t.count - r, word_bits);
      Word value;
      load(value, kept.dtype, kept.row(group, group_columns, t.first - group + v) + (t.begin + r) * item, item, n);
      float* const to = t.z + v * t.stride + r;
      for (int j = 0; j < word_bits; ++j) to[j] = j < n ? value[j] * factor[t.begin + r + j] : 0.0f;
    }
}

}  // namespace moe_unlearn
