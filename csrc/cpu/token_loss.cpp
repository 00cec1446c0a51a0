// token_loss: tiles of logits, a part of the vocabulary by a block of tokens, worked through while they are in cache;
// what is alive at a time is a few tiles per thread.
//
// Forward, in one pass over the vocabulary (two for the gradient of kl): the online softmax (a running maximum m and
// sum of exp(z - m), rescaled where m grows), and with it, if asked for, the gradient of l with respect to the hidden
// state. That is attention with the head's rows as keys and values,
//
//     dl/dh = scale * (sum_{v != y} e_v c_v w_v / s - (sum_{v != y} e_v / s) c_y w_y),   e_v = exp(z_v - m)
//
// with s = sum_v e_v and c_v the slope of the softcap. The label is kept out of the sums: nothing cancels for a
// confident token. So the backward recomputes logits for the gradients of head and bias alone.
//
// Products are torch's in float32, into which other dtypes are widened tile by tile; bfloat16 has its own where the
// CPU has AVX512-BF16. There exponentials and gradients are rounded to bfloat16 as the second factor of a product;
// the label's, which can outweigh all others, is added exactly, and for kl the rounding errors are multiplied too.

#include "cpu/token_loss_matrices.h"

#include <cmath>
#include <string>
#include <tuple>

namespace moe_unlearn {
namespace {

/// What the forward writes; rows that are not computed stay 0.
struct Output {
  float *value, *norm, *norm_ref;  // [tokens], [2, tokens], [2, tokens]
  float* direction;                // [tokens, hidden], null if not asked for
  Kept kept;
};

/// A thread's tiles of the forward.
class Forward {
 public:
  Forward(const Problem& p, const Output& out)
      : p_(p), out_(out), tokens_(tile_tokens), keys_(p, p.model, tile_tokens),
        keys_ref_(p, p.reference, p.options.kl ? tile_tokens : 0), values_(p, out.direction != nullptr),
        w_(entry_space(p, p.model, tile_entries)),
        w_ref_(entry_space(p, p.reference, p.options.kl ? tile_entries : 0)),
        z_(floats(p.model.head, tile_entries, tile_tokens)),
        z_ref_(floats(p.model.head, p.options.kl ? tile_entries : 0, tile_tokens)) {}

  /// The rows index[begin, begin + count).
  void run(int64_t begin, int64_t count) {
    tokens_.reset(tile_tokens);
    for (int64_t r = 0; r < count; ++r) tokens_.label[r] = p_.label(begin + r);
    keys_.gather(begin, count);
    if (p_.options.kl) keys_ref_.gather(begin, count);
    values_.reset();
    const bool direction = out_.direction != nullptr, kl = p_.options.kl;
    pass(begin, count, direction && !kl, [&](const Tile& t) {
      for_this_cpu<kl_or_label_tile, const Options&, const Tile&, Tokens&>(p_.options, t, tokens_);
    });
    finish(begin, count);
    if (!direction) return;
    if (kl)
      pass(begin, count, true, [&](const Tile& t) {
        for_this_cpu<gradient_tile, const Options&, const Tile&, const Tokens&, float*>(
            p_.options, t, tokens_, nullptr);  // no labels
      });
    for (int64_t r = 0; r < count; ++r) write_direction(begin, r);
  }

 private:
  MOE_UNLEARN_INLINE static void kl_or_label_tile(const Options& o, const Tile& t, Tokens& tokens) {
    return o.kl ? kl_tile(o, t, tokens) : label_tile(o, t, tokens);
  }

  /// f(tile) on products down the vocabulary; with `add` what it leaves goes to the values.
  template <class F>
  void pass(int64_t begin, int64_t count, bool add, const F& f) {
    for (int64_t first = 0; first < p_.vocabulary; first += tile_entries) {
      const int64_t columns = std::min(tile_entries, p_.vocabulary - first);
      if (p_.options.kl) {
        const Tensor w_ref = keys_ref_.entries(w_ref_, first, columns);
        keys_ref_.multiply_head(z_ref_, w_ref, first, columns, 0, count);
      }
      const Tensor w = keys_.entries(w_, first, columns);
      keys_.multiply_head(z_, w, first, columns, 0, count);
      const Tile tile{data(z_), data(z_ref_), tile_tokens, 0, count, first, columns};
      f(tile);
      if (out_.kept)
        for_this_cpu<keep_tile, const Kept&, const Tile&, const Tokens&, int64_t>(out_.kept, tile, tokens_, begin);
      if (add) values_.add(tile, z_, w, tokens_.rescale.data());
    }
  }

  /// Values and normalisers of the rows; prepares the gradients.
  void finish(int64_t begin, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = p_.index[begin + r];
      const double others = tokens_.sum[r], sum_ref = tokens_.sum_ref[r];
      // of the label's share what exceeds 1, which is 0 where it is the maximum: log1p then keeps a small loss
      const double x = static_cast<double>(tokens_.picked[r]) - static_cast<double>(tokens_.peak[r]);
      const double excess = p_.options.kl ? -1 : std::expm1(x), sum = others + excess + 1;
      const double nll = std::log1p(others + excess) - x;
      const double value = p_.options.kl ? tokens_.cross[r] / sum_ref + std::log(sum / sum_ref)
          : p_.options.uce               ? -std::log1p(-std::exp(-nll) / 2)
                                         : nll;
      out_.value[t] = static_cast<float>(value);
      out_.norm[t] = tokens_.peak[r];
      out_.norm[p_.tokens + t] = static_cast<float>(sum);
      tokens_.rescale[r] = 1;
      tokens_.inverse[r] = static_cast<float>(1 / sum);
      tokens_.factor[r] = p_.options.scale;
      tokens_.picked[r] = static_cast<float>(others / sum) * p_.options.scale * slope(p_.options, tokens_.picked[r]);
      if (out_.kept) out_.kept.slopes[begin + r] = tokens_.picked[r];
      if (!p_.options.kl) continue;
      out_.norm_ref[t] = tokens_.peak_ref[r];
      out_.norm_ref[p_.tokens + t] = static_cast<float>(sum_ref);
      tokens_.inverse_ref[r] = static_cast<float>(1 / sum_ref);
    }
  }

  void write_direction(int64_t begin, int64_t r) {
    const Rows& head = p_.model.head_rows;
    const bool kl = p_.options.kl;
    const float factor = kl ? 1.0f : tokens_.inverse[r] * p_.options.scale, label = kl ? 0.0f : tokens_.picked[r];
    const char* const w_y = head.row(kl ? 0 : tokens_.label[r]);
    const float* const sums = values_.of(r);
    float* const to = out_.direction + p_.index[begin + r] * p_.hidden;
    for (int64_t c = 0; c < p_.hidden; c += word_bits) {
      const int64_t n = std::min<int64_t>(p_.hidden - c, word_bits);
      Word w{};
      if (!kl) load(w, head.dtype, w_y + c * head.stride, head.stride, n);
      for (int64_t j = 0; j < n; ++j) to[c + j] = sums[c + j] * factor - w[j] * label;
    }
  }

  const Problem& p_;
  const Output& out_;
  Tokens tokens_;
  Keys keys_, keys_ref_;
  Values values_;
  Tensor w_, w_ref_, z_, z_ref_;
};

/// A thread's tiles of the backward.
class Backward {
 public:
  Backward(
      const Problem& p, const Tokens& tokens, const Keys& keys, const Keys& keys_ref,
      const std::vector<uint32_t>& packed, const Kept& kept, const Rows& grad_head, const Rows& grad_bias)
      : p_(p), tokens_(tokens), keys_(keys), keys_ref_(keys_ref), packed_(packed), kept_(kept), grad_head_(grad_head),
        grad_bias_(grad_bias), w_(entry_space(p, p.model, backward_tile_entries)),
        w_ref_(entry_space(p, p.reference, p.options.kl ? backward_tile_entries : 0)),
        z_(floats(p.model.head, backward_tile_entries, backward_tile_tokens)),
        z_ref_(floats(p.model.head, p.options.kl ? backward_tile_entries : 0, backward_tile_tokens)),
        sums_(floats(p.model.head, grad_head ? backward_tile_entries : 0, p.hidden)),
        part_(floats(p.model.head, grad_head && !p.pairs ? backward_tile_entries : 0, p.hidden)),
        rounded_(grad_head && p.pairs ? backward_tile_entries * backward_tile_tokens : 0),
        of_label_(backward_tile_tokens), factor_(kept ? kept.room : 0) {}

  /// The entries [first, first + columns) of the vocabulary, a group.
  void run(int64_t first, int64_t columns) {
    const int64_t kept = kept_ ? kept_.count(columns) : 0;
    if (kept > 0)
      for_this_cpu<scale_group, const Kept&, const Tokens&, int64_t, float*>(kept_, tokens_, first, factor_.data());
    for (int64_t entry = 0, next; entry < columns; entry = next) {
      next = std::min(entry + backward_tile_entries, entry < kept ? kept : columns);
      run_tiles(first + entry, next - entry, entry < kept ? first : -1, columns);
    }
  }

 private:
  /// factor = by how much what was kept of a group's tiles is multiplied
  MOE_UNLEARN_INLINE static void scale_group(const Kept& kept, const Tokens& tokens, int64_t first, float* factor) {
    const float* const peaks = kept.peaks + first / tile_entries * kept.tokens;
    for (int64_t i = 0; i < std::min(kept.room, kept.tokens); ++i)
      factor[i] = exp_float(peaks[i] - tokens.peak[i]) * tokens.inverse[i] * tokens.factor[i];
  }

  /// Entries of the group that starts at `group`, from what was kept of it; -1: from their logits.
  void run_tiles(int64_t first, int64_t columns, int64_t group, int64_t group_columns) {
    const bool kept = group >= 0;
    const Tensor w = kept ? w_ : keys_.entries(w_, first, columns);
    const Tensor w_ref = p_.options.kl ? keys_ref_.entries(w_ref_, first, columns) : w;
    double bias_sums[backward_tile_entries] = {};
    torch::stable::zero_(sums_);
    for (int64_t begin = 0; begin < p_.count; begin += backward_tile_tokens) {
      const int64_t count = std::min(backward_tile_tokens, p_.count - begin);
      const Tile tile{data(z_), data(z_ref_), backward_tile_tokens, begin, count, first, columns};
      if (kept) {
        for_this_cpu<read_kept_tile, const Kept&, const Tile&, int64_t, int64_t, const float*>(
            kept_, tile, group, group_columns, factor_.data());
        std::copy_n(tokens_.picked.data() + begin, count, of_label_.data());
      } else {
        keys_.multiply_head(z_, w, first, columns, begin, count);
        if (p_.options.kl) keys_ref_.multiply_head(z_ref_, w_ref, first, columns, begin, count);
        for_this_cpu<gradient_tile, const Options&, const Tile&, const Tokens&, float*>(
            p_.options, tile, tokens_, of_label_.data());
      }
      if (grad_bias_) add_bias_sums(tile, tokens_, of_label_.data(), bias_sums);
      if (grad_head_) add(tile);
    }
    if (grad_head_)
      for_this_cpu<round_rows, const Rows&, int64_t, const float*, int64_t>(grad_head_, first, data(sums_), columns);
    for (int64_t v = 0; grad_bias_ && v < columns; ++v) {
      const Word value{static_cast<float>(bias_sums[v])};
      store(value, grad_bias_.dtype, grad_bias_.data + (first + v) * grad_bias_.stride, grad_bias_.stride, 1, 1);
    }
  }

  /// sums += tile h, and the labels' own terms
  void add(const Tile& t) {
    if (p_.pairs) {
      for (const bool residual : {false, true}) {
        if (residual && !p_.options.kl) continue;
        for_this_cpu<round_tile, uint16_t*, const Tile&, bool>(rounded_.data(), t, residual);
        multiply_pairs(
            data(sums_), p_.hidden, {reinterpret_cast<const char*>(rounded_.data()), 2 * backward_tile_tokens, 4},
            t.columns, packed_.data() + t.begin / 2 * p_.hidden, p_.hidden / word_bits, ceil_div(t.count, 2), true,
            nullptr);
      }
    } else {
      multiply(first_rows(part_, t.columns), corner(z_, t.columns, t.count), keys_.rows(t.begin, t.count));
      for_this_cpu<add_floats, float*, const float*, int64_t>(data(sums_), data(part_), t.columns * p_.hidden);
    }
    for_each_label(t, tokens_, [&](int64_t r, int64_t v) {
      for_this_cpu<add_row, float*, const Rows&, int64_t, float>(
          data(sums_) + v * p_.hidden, p_.model.hidden, p_.index[t.begin + r], of_label_[r]);
    });
  }

  const Problem& p_;
  const Tokens& tokens_;
  const Keys &keys_, &keys_ref_;
  const std::vector<uint32_t>& packed_;  // the hidden states in pairs of rows, a block after the other
  const Kept& kept_;
  Rows grad_head_, grad_bias_;
  Tensor w_, w_ref_, z_, z_ref_, sums_, part_;
  std::vector<uint16_t> rounded_;
  std::vector<float> of_label_, factor_;
};

Problem problem(
    const Tensor& hidden, const Tensor& head, const Tensor& labels, const Tensor& index,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& ref_hidden, const std::optional<Tensor>& ref_head,
    const std::string& kind, double scale, double softcap) {
  STD_TORCH_CHECK(labels.is_contiguous() && index.is_contiguous(), "labels and index must be contiguous");
  const Side model(hidden, head), reference(ref_hidden.value_or(hidden), ref_head.value_or(head));
  const Options options{
      Rows(bias), static_cast<float>(scale), static_cast<float>(softcap), kind == "kl", kind == "uce"};
  return {model, reference, options, labels.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>(), index.size(0),
          hidden.size(0), head.size(0), hidden.size(1),
          has_pair_products() && model.can_pair() && reference.can_pair()};
}

Kept kept_of(
    const Problem& p, const std::optional<Tensor>& gradient, const std::optional<Tensor>& peaks,
    const std::optional<Tensor>& spare) {
  return peaks.has_value() ? Kept(p, *gradient, *peaks, *spare) : Kept();
}

/// (l, norm, ref_norm, dl/dh) as float32, 0 in the rows outside the index; dl/dh is empty unless asked for. What is
/// kept of the tiles goes to `kept`, which becomes the head's gradient, peaks and spare.
std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss(
    const Tensor& hidden, const Tensor& head, const Tensor& labels, const Tensor& index,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& ref_hidden, const std::optional<Tensor>& ref_head,
    const std::string& kind, double scale, double softcap, bool direction, const std::optional<Tensor>& kept,
    const std::optional<Tensor>& peaks, const std::optional<Tensor>& spare) {
  const Problem p = problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap);
  auto value = torch::stable::new_zeros(hidden, {p.tokens}, ScalarType::Float);
  auto norm = torch::stable::new_zeros(hidden, {2, p.tokens}, ScalarType::Float);
  auto ref_norm = torch::stable::new_zeros(hidden, {2, p.tokens}, ScalarType::Float);
  auto directions = torch::stable::new_zeros(hidden, {direction ? p.tokens : 0, p.hidden}, ScalarType::Float);
  const Output out{
      data(value), data(norm), data(ref_norm), direction ? data(directions) : nullptr, kept_of(p, kept, peaks, spare)};
  parallel_products(ceil_div(p.count, tile_tokens), [&](int64_t first, int64_t last) {
    Forward forward(p, out);
    for (int64_t begin = first * tile_tokens; begin < std::min(last * tile_tokens, p.count); begin += tile_tokens)
      forward.run(begin, std::min(tile_tokens, p.count - begin));
  });
  return {value, norm, ref_norm, directions};
}

/// The sizes of forward and backward tiles, for whoever has to know what they take.
std::tuple<int64_t, int64_t, int64_t, int64_t> token_loss_tiles() {
  return {tile_tokens, tile_entries, backward_tile_tokens, backward_tile_entries};
}

/// Writes the gradients of head and bias for dloss/dl = upstream; that of the head in the place of the kept tiles.
void token_loss_head(
    const std::optional<Tensor>& grad_head, const std::optional<Tensor>& grad_bias, const Tensor& upstream,
    const Tensor& norm, const Tensor& ref_norm, const Tensor& hidden, const Tensor& head, const Tensor& labels,
    const Tensor& index, const std::optional<Tensor>& bias, const std::optional<Tensor>& ref_hidden,
    const std::optional<Tensor>& ref_head, const std::string& kind, double scale, double softcap,
    const std::optional<Tensor>& tiles, const std::optional<Tensor>& peaks, const std::optional<Tensor>& spare) {
  const Problem p = problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap);
  const Kept kept = kept_of(p, tiles, peaks, spare);
  Tokens tokens(p.count);
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t t = p.index[i];
    tokens.label[i] = p.label(i);
    tokens.factor[i] = data(upstream)[t] * p.options.scale;
    tokens.peak[i] = data(norm)[t];
    tokens.inverse[i] = 1 / data(norm)[p.tokens + t];
    tokens.peak_ref[i] = data(ref_norm)[t];
    tokens.inverse_ref[i] = 1 / data(ref_norm)[p.tokens + t];
    if (kept) tokens.picked[i] = -kept.slopes[i] * data(upstream)[t];
  }
  Keys keys(p, p.model, p.count), keys_ref(p, p.reference, p.options.kl ? p.count : 0);
  keys.gather(0, p.count);
  if (p.options.kl) keys_ref.gather(0, p.count);
  std::vector<uint32_t> packed(p.pairs && grad_head.has_value() ? ceil_div(p.count, 2) * p.hidden : 0);
  for (int64_t begin = 0; begin < p.count && !packed.empty(); begin += backward_tile_tokens)
    for_this_cpu<pack_row_pairs<word_bits>, uint32_t*, const Rows&, const int64_t*, int64_t, int64_t>(
        packed.data() + begin / 2 * p.hidden, p.model.hidden, p.index, begin,
        std::min(backward_tile_tokens, p.count - begin));
  parallel_products(ceil_div(p.vocabulary, tile_entries), [&](int64_t first, int64_t last) {
    Backward backward(p, tokens, keys, keys_ref, packed, kept, Rows(grad_head), Rows(grad_bias));
    for (int64_t v = first * tile_entries; v < std::min(last * tile_entries, p.vocabulary); v += tile_entries)
      backward.run(v, std::min(tile_entries, p.vocabulary - v));
  });
}

}  // namespace
}  // namespace moe_unlearn

// no tensor among the arguments, so no dispatch key: one function for all devices
STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CompositeExplicitAutograd, m) {
  m.impl("token_loss_tiles", TORCH_BOX(&moe_unlearn::token_loss_tiles));
  m.impl("has_pair_products", TORCH_BOX(&moe_unlearn::has_pair_products));
}

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("token_loss", TORCH_BOX(&moe_unlearn::token_loss));
  m.impl("token_loss_head", TORCH_BOX(&moe_unlearn::token_loss_head));
}
