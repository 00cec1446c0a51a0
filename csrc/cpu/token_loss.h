// token_loss's arithmetic on a tile of logits [vocabulary, tokens]: 32 tokens side by side in vector lanes, the
// vocabulary walked down, so that a token's sums have one order on every instruction set.

#pragma once

#include "cpu/common.h"
#include "cpu/vector_math.h"

#include <limits>
#include <utility>
#include <vector>

namespace moe_unlearn {

constexpr float lowest = std::numeric_limits<float>::lowest();
constexpr int64_t flush = 32;  // terms added in float32 before they go to a float64 sum

struct Options {
  Rows bias;
  float scale, softcap;  // softcap 0: none
  bool kl, uce;
};

/// Per token, one array a quantity, padded to whole words.
struct Tokens {
  std::vector<int64_t> label;           // -1: none
  std::vector<float> peak, rescale;     // of the online softmax; rescale: what the last tile multiplied sums by
  std::vector<double> sum;              // of exp(z - peak), without the label's
  std::vector<float> picked, factor;    // the label's logit; what gradients are multiplied with
  std::vector<float> peak_ref, rescale_ref, inverse, inverse_ref;
  std::vector<double> sum_ref, cross;   // cross: sum of exp(z_ref - peak_ref) ((z_ref - peak_ref) - (z - peak))

  explicit Tokens(int64_t count) { reset(count); }

  void reset(int64_t count) {
    const int64_t padded = ceil_div(count, word_bits) * word_bits;
    label.assign(padded, -1);
    for (auto* array : {&peak, &peak_ref}) array->assign(padded, lowest);
    for (auto* array : {&rescale, &rescale_ref, &inverse, &inverse_ref, &factor}) array->assign(padded, 1.0f);
    picked.assign(padded, 0.0f);
    for (auto* array : {&sum, &sum_ref, &cross}) array->assign(padded, 0.0);
  }
};

/// Logits of tokens [begin, begin + count) under the entries [first, first + columns): entry v's at v * stride.
struct Tile {
  float *z, *z_ref;
  int64_t stride, begin, count, first, columns;
};

MOE_UNLEARN_INLINE float bias_of(const Options& o, int64_t entry) {
  Word bias{};
  if (o.bias) load(bias, o.bias.dtype, o.bias.data + entry * o.bias.stride, o.bias.stride, 1);
  return bias[0];
}

/// The logit of a product h . w.
MOE_UNLEARN_INLINE float logit(const Options& o, float product, float bias) {
  const float z = (product + bias) * o.scale;
  return o.softcap > 0 ? o.softcap * tanh_float(z / o.softcap) : z;
}

/// dz / d(scaled product) at a logit.
MOE_UNLEARN_INLINE float slope(const Options& o, float z) {
  const float ratio = z / o.softcap;
  return o.softcap > 0 ? 1 - ratio * ratio : 1.0f;
}

/// The 32 values of a word of tokens, where a compiler sees that no store touches them.
template <class T>
MOE_UNLEARN_INLINE void read_word(T (&out)[word_bits], const std::vector<T>& from, int64_t token) {
  for (int j = 0; j < word_bits; ++j) out[j] = from[token + j];
}

template <class T>
MOE_UNLEARN_INLINE void write_word(std::vector<T>& to, int64_t token, const T (&values)[word_bits]) {
  for (int j = 0; j < word_bits; ++j) to[token + j] = values[j];
}

/// Adds a float32 sum per token to the float64 one.
MOE_UNLEARN_INLINE void add_to(std::vector<double>& sums, int64_t token, const Word& terms) {
  for (int j = 0; j < word_bits; ++j) sums[token + j] += static_cast<double>(terms[j]);
}

/// f(token in the tile, its label's entry in the tile) for the tokens whose label is there.
template <class F>
MOE_UNLEARN_INLINE void for_each_label(const Tile& t, const Tokens& tokens, const F& f) {
  for (int64_t r = 0; r < t.count; ++r) {
    const int64_t v = tokens.label[t.begin + r] - t.first;
    if (v >= 0 && v < t.columns) f(r, v);
  }
}

/// Products of a word of tokens to logits, in place, and their maximum.
MOE_UNLEARN_INLINE void finish_logits(const Options& o, const Tile& t, float* z, Word& peak) {
  for (int64_t v = 0; v < t.columns; ++v) {
    const float bias = bias_of(o, t.first + v);
    float* const at = z + v * t.stride;
    for (int j = 0; j < word_bits; ++j) {
      const float value = logit(o, at[j], bias);
      at[j] = value;
      peak[j] = value > peak[j] ? value : peak[j];
    }
  }
}

/// Moves a softmax from the maximum `before` to `peak`, which is higher by `rise`; `before` becomes the factor of sums.
MOE_UNLEARN_INLINE void move_to_peak(
    Word& before, const Word& peak, std::vector<float>& rescale, std::vector<double>& sum, int64_t token,
    double (&rise)[word_bits]) {
  for (int j = 0; j < word_bits; ++j) {
    rise[j] = static_cast<double>(peak[j]) - static_cast<double>(before[j]);
    before[j] = exp_float(before[j] - peak[j]);
    sum[token + j] *= static_cast<double>(before[j]);
  }
  write_word(rescale, token, before);
}

/// The softmax of labelled tokens so far; leaves e_v c_v, 0 at the label.
MOE_UNLEARN_INLINE void label_tile(const Options& o, const Tile& t, Tokens& tokens) {
  for (int64_t r = 0; r < t.count; r += word_bits) {
    const int64_t token = t.begin + r;
    Word before, peak;
    double rise[word_bits];
    read_word(before, tokens.peak, token);
    read_word(peak, tokens.peak, token);
    finish_logits(o, t, t.z + r, peak);
    write_word(tokens.peak, token, peak);
    move_to_peak(before, peak, tokens.rescale, tokens.sum, token, rise);
  }
  for_each_label(t, tokens, [&](int64_t r, int64_t v) MOE_UNLEARN_INLINE_LAMBDA {
    tokens.picked[t.begin + r] = std::exchange(t.z[v * t.stride + r], -std::numeric_limits<float>::infinity());
  });
  for (int64_t r = 0; r < t.count; r += word_bits) {
    Word peak;
    read_word(peak, tokens.peak, t.begin + r);
    for (int64_t start = 0; start < t.columns; start += flush) {
      Word sums{};
      for (int64_t v = start; v < std::min(start + flush, t.columns); ++v) {
        float* const at = t.z + v * t.stride + r;
        for (int j = 0; j < word_bits; ++j) {
          const float e = exp_float(at[j] - peak[j]);
          sums[j] += e;
          at[j] = e * slope(o, at[j]);
        }
      }
      add_to(tokens.sum, t.begin + r, sums);
    }
  }
  for_each_label(t, tokens, [&](int64_t r, int64_t v) MOE_UNLEARN_INLINE_LAMBDA { t.z[v * t.stride + r] = 0; });
}

/// Both softmaxes and the divergence of tokens from their reference so far.
MOE_UNLEARN_INLINE void kl_tile(const Options& o, const Tile& t, Tokens& tokens) {
  for (int64_t r = 0; r < t.count; r += word_bits) {
    const int64_t token = t.begin + r;
    Word before, before_ref, peak, peak_ref;
    double rise[word_bits], rise_ref[word_bits], sum_ref[word_bits];
    read_word(before, tokens.peak, token);
    read_word(peak, tokens.peak, token);
    read_word(before_ref, tokens.peak_ref, token);
    read_word(peak_ref, tokens.peak_ref, token);
    read_word(sum_ref, tokens.sum_ref, token);
    finish_logits(o, t, t.z + r, peak);
    finish_logits(o, t, t.z_ref + r, peak_ref);
    write_word(tokens.peak, token, peak);
    write_word(tokens.peak_ref, token, peak_ref);
    move_to_peak(before, peak, tokens.rescale, tokens.sum, token, rise);
    move_to_peak(before_ref, peak_ref, tokens.rescale_ref, tokens.sum_ref, token, rise_ref);
    for (int j = 0; j < word_bits; ++j) {
      double& cross = tokens.cross[token + j];
      cross = (cross + sum_ref[j] * (rise[j] - rise_ref[j])) * static_cast<double>(before_ref[j]);
    }
    for (int64_t start = 0; start < t.columns; start += flush) {
      Word sums{}, sums_ref{}, crosses{};
      for (int64_t v = start; v < std::min(start + flush, t.columns); ++v) {
        const float* const z = t.z + v * t.stride + r;
        const float* const z_ref = t.z_ref + v * t.stride + r;
        for (int j = 0; j < word_bits; ++j) {
          const float x = z[j] - peak[j], x_ref = z_ref[j] - peak_ref[j], e_ref = exp_float(x_ref);
          sums[j] += exp_float(x);
          sums_ref[j] += e_ref;
          crosses[j] += e_ref == 0 ? 0.0f : e_ref * (x_ref - x);
        }
      }
      add_to(tokens.sum, token, sums);
      add_to(tokens.sum_ref, token, sums_ref);
      add_to(tokens.cross, token, crosses);
    }
  }
}

/// Products to gradients of the logits where the softmax is known, times the token's factor: (p_v - q_v) c_v; under a
/// label p_v c_v, but 0 at the label itself, whose (p_v - 1) c_v goes to `of_label`.
MOE_UNLEARN_INLINE void gradient_tile(const Options& o, const Tile& t, const Tokens& tokens, float* of_label) {
  for_each_label(t, tokens, [&](int64_t r, int64_t v) MOE_UNLEARN_INLINE_LAMBDA {
    const int64_t token = t.begin + r;
    const float z = logit(o, t.z[v * t.stride + r], bias_of(o, t.first + v));
    const float p = exp_float(z - tokens.peak[token]) * tokens.inverse[token];
    of_label[r] = (p - 1) * tokens.factor[token] * slope(o, z);
  });
  for (int64_t r = 0; r < t.count; r += word_bits) {
    const int64_t token = t.begin + r, n = std::min<int64_t>(t.count - r, word_bits);
    Word peak, peak_ref, inverse, inverse_ref, factor, share, change;
    read_word(peak, tokens.peak, token);
    read_word(peak_ref, tokens.peak_ref, token);
    read_word(inverse, tokens.inverse, token);
    read_word(inverse_ref, tokens.inverse_ref, token);
    read_word(factor, tokens.factor, token);
    for (int64_t v = 0; v < t.columns; ++v) {
      const float bias = bias_of(o, t.first + v);
      float* const at = t.z + v * t.stride + r;
      for (int j = 0; j < word_bits; ++j) {
        const float z = logit(o, at[j], bias);
        share[j] = exp_float(z - peak[j]) * inverse[j];
        change[j] = factor[j] * slope(o, z);
      }
      if (o.kl) {
        const float* const at_ref = t.z_ref + v * t.stride + r;
        for (int j = 0; j < word_bits; ++j)
          share[j] -= exp_float(logit(o, at_ref[j], bias) - peak_ref[j]) * inverse_ref[j];
      }
      for (int j = 0; j < word_bits; ++j) at[j] = j < n ? share[j] * change[j] : 0.0f;
    }
  }
  for_each_label(t, tokens, [&](int64_t r, int64_t v) MOE_UNLEARN_INLINE_LAMBDA { t.z[v * t.stride + r] = 0; });
}

/// Adds the sums over tokens of a tile of gradients and of its labels' own.
inline void add_bias_sums(const Tile& t, const Tokens& tokens, const float* of_label, double* bias_sums) {
  for (int64_t v = 0; v < t.columns; ++v)
    for (int64_t r = 0; r < t.count; ++r) bias_sums[v] += static_cast<double>(t.z[v * t.stride + r]);
  for_each_label(t, tokens, [&](int64_t r, int64_t v) {
    bias_sums[v] += static_cast<double>(of_label[r]);
  });
}

// ---- Matrices -----------------------------------------------------------------------------------------------

/// Rows of any float dtype as dense float32: rows index[first], ..., or first, ... without an index.
MOE_UNLEARN_INLINE void copy_rows(float* to, const Rows& from, const int64_t* index, int64_t first, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    const char* const row = from.row(index != nullptr ? index[first + r] : first + r);
    for (int64_t c = 0; c < from.width; c += word_bits) {
      const int64_t n = std::min<int64_t>(from.width - c, word_bits);
      Word value;
      load(value, from.dtype, row + c * from.stride, from.stride, n);
      std::copy_n(value, n, to + r * from.width + c);
    }
  }
}

/// Dense float32 rows rounded to those of `to` from `first` on.
MOE_UNLEARN_INLINE void round_rows(const Rows& to, int64_t first, const float* from, int64_t count) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < to.width; c += word_bits) {
      const int64_t n = std::min<int64_t>(to.width - c, word_bits);
      Word value{};
      std::copy_n(from + r * to.width + c, n, value);
      store(value, to.dtype, to.row(first + r) + c * to.stride, to.stride, 0xFFFFFFFF, n);
    }
}

MOE_UNLEARN_INLINE void add_floats(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

/// sums = rescale * sums + part, a row at a time.
MOE_UNLEARN_INLINE void fold(float* sums, const float* part, int64_t count, int64_t length, const float* rescale) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = r * length; c < (r + 1) * length; ++c) sums[c] = __builtin_fmaf(sums[c], rescale[r], part[c]);
}

/// to += factor * a row
MOE_UNLEARN_INLINE void add_row(float* to, const Rows& rows, int64_t row, float factor) {
  const char* const from = rows.row(row);
  for (int64_t c = 0; c < rows.width; c += word_bits) {
    const int64_t n = std::min<int64_t>(rows.width - c, word_bits);
    Word value;
    load(value, rows.dtype, from + c * rows.stride, rows.stride, n);
    for (int64_t j = 0; j < n; ++j) to[c + j] = __builtin_fmaf(value[j], factor, to[c + j]);
  }
}

// The layouts of bfloat16 pairs that `multiply_pairs` takes; the low half of a word is the first of a pair.

MOE_UNLEARN_INLINE uint32_t narrowed(float value, bool residual) {
  const uint32_t bits = narrow<Dtype::bfloat16>(value);
  return residual ? narrow<Dtype::bfloat16>(value - widen<Dtype::bfloat16>(bits)) : bits;
}

MOE_UNLEARN_INLINE uint32_t half_at(const Rows& rows, int64_t row, int64_t column) {
  uint16_t bits;
  std::memcpy(&bits, rows.row(row) + column * rows.stride, sizeof(bits));
  return bits;
}

/// [rows / 32][width / 2][32]: pairs along a row, 32 rows side by side.
MOE_UNLEARN_INLINE void pack_along_rows(
    uint32_t* to, const Rows& from, const int64_t* index, int64_t first, int64_t count) {
  const int64_t pairs = from.width / 2;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t k = 0; k < pairs; ++k)
      to[(r / word_bits * pairs + k) * word_bits + r % word_bits] =
          half_at(from, index[first + r], 2 * k) | half_at(from, index[first + r], 2 * k + 1) << 16;
}

/// [width / lanes][ceil(count / 2)][lanes]: pairs of rows, `lanes` columns side by side; 0 after the last row.
template <int lanes>
MOE_UNLEARN_INLINE void pack_row_pairs(
    uint32_t* to, const Rows& from, const int64_t* index, int64_t first, int64_t count) {
  const int64_t pairs = ceil_div(count, 2);
  for (int64_t k = 0; k < pairs; ++k) {
    const auto row = [&](int64_t r) MOE_UNLEARN_INLINE_LAMBDA {
      return reinterpret_cast<const Bits16*>(from.row(index != nullptr ? index[first + r] : first + r));
    };
    const bool both = 2 * k + 1 < count;
    const Bits16 *const low = row(2 * k), *const high = row(both ? 2 * k + 1 : 2 * k);
    const uint32_t kept = both ? 0xFFFFFFFF : 0;
    const auto pack = [&](int64_t stride) MOE_UNLEARN_INLINE_LAMBDA {
      for (int64_t c = 0; c < from.width; c += lanes)
        for (int j = 0; j < lanes; ++j)
          to[(c / lanes * pairs + k) * lanes + j] =
              low[(c + j) * stride] | (static_cast<uint32_t>(high[(c + j) * stride]) << 16 & kept);
    };
    if (from.stride == 2)  // a constant stride: vector loads
      pack(1);
    else
      pack(from.stride / 2);
  }
}

/// A tile [columns, tokens] as [tokens / 32][ceil(columns / 2)][32]: pairs down the vocabulary.
MOE_UNLEARN_INLINE void pack_tile(uint32_t* to, const Tile& t, bool residual) {
  const int64_t pairs = ceil_div(t.columns, 2);
  for (int64_t r = 0; r < t.count; r += word_bits)
    for (int64_t k = 0; k < pairs; ++k) {
      const float* const low = t.z + 2 * k * t.stride + r;
      const bool both = 2 * k + 1 < t.columns;
      const float* const high = both ? low + t.stride : low;
      uint32_t* const out = to + (r / word_bits * pairs + k) * word_bits;
      for (int j = 0; j < word_bits; ++j)
        out[j] = narrowed(low[j], residual) | (both ? narrowed(high[j], residual) << 16 : 0);
    }
}

/// A tile rounded as it lies, its tokens padded to whole words.
MOE_UNLEARN_INLINE void round_tile(uint16_t* to, const Tile& t, bool residual) {
  for (int64_t v = 0; v < t.columns; ++v)
    for (int64_t r = 0; r < t.count; r += word_bits)
      for (int j = 0; j < word_bits; ++j)
        to[v * t.stride + r + j] = static_cast<uint16_t>(narrowed(t.z[v * t.stride + r + j], residual));
}

}  // namespace moe_unlearn
