// token_loss: tiles of logits, a block of rows by a part of the vocabulary, made by torch's matrix product and worked
// through while they are in cache; what is alive at a time is a few tiles per thread.
//
// Forward, in one pass over the vocabulary (two for the gradient of kl): the online softmax (a running maximum m and sum of exp(z - m), rescaled
// where m grows), and with it, if asked for, the gradient of l with respect to the hidden state. That is attention
// with the head's rows as keys and values,
//
//     dl/dh = scale * (sum_{v != y} e_v c_v w_v / s - (sum_{v != y} e_v / s) c_y w_y),   e_v = exp(z_v - m)
//
// with s = sum_v e_v and c_v the slope of the softcap. The label is kept out of the sums: nothing cancels for a
// confident token. So the backward recomputes logits for the gradients of head and bias alone.

#include "cpu/common.h"
#include "cpu/product.h"
#include "cpu/vector_math.h"

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace moe_unlearn {
namespace {

constexpr int64_t row_block = 128;    // rows of a forward tile: enough blocks to share, and products at full speed
constexpr int64_t tile_width = 512;   // columns of a forward tile
constexpr int64_t head_block = 1024;  // rows of a backward tile
constexpr int64_t head_width = 128;   // columns of a backward tile
constexpr float lowest = std::numeric_limits<float>::lowest(), infinity = std::numeric_limits<float>::infinity();

/// Hidden states and the head they are multiplied with.
struct Side {
  Tensor hidden, head;
  Rows hidden_rows, head_rows;

  Side(const Tensor& hidden, const Tensor& head) : hidden(hidden), head(head), hidden_rows(hidden), head_rows(head) {}
};

struct Problem {
  Side model, reference;  // the reference is that of kl, otherwise the model again
  Rows bias;
  const int64_t *labels, *index;  // [tokens]; the rows to compute [count], ascending
  int64_t count, tokens, vocabulary, hidden;
  float scale, softcap;  // softcap 0: none
  bool kl, uce;
};

/// The online softmax of a row: sum = sum exp(z - peak), without the label where there is one.
struct Softmax {
  float peak = lowest, rescale = 1;  // rescale: what the last tile multiplied earlier sums by
  double sum = 0;
};

struct Row {
  int64_t label = 0;
  float picked = 0;  // the label's logit
  Softmax model, reference;
  double others = 0;  // the sum without the label
  double cross = 0;   // kl: sum exp(z_ref - peak_ref) ((z_ref - peak_ref) - (z - peak))
};

MOE_UNLEARN_INLINE float slope(const Problem& p, float z) {
  const float ratio = z / p.softcap;
  return 1 - ratio * ratio;
}

/// The logit of a product h . w.
MOE_UNLEARN_INLINE float logit(const Problem& p, float product, float bias) {
  const float z = (product + bias) * p.scale;
  return p.softcap > 0 ? p.softcap * tanh_float(z / p.softcap) : z;
}

MOE_UNLEARN_INLINE void load_bias(Word& out, const Problem& p, int64_t first, int64_t n) {
  for (int j = 0; j < word_bits; ++j) out[j] = 0;
  if (p.bias) load(out, p.bias.dtype, p.bias.data + first * p.bias.step, p.bias.step, n);
}

/// Products to logits, in place; beyond `columns`, up to a whole word, -infinity. Returns their maximum.
MOE_UNLEARN_INLINE float finish_logits(const Problem& p, float* z, int64_t first, int64_t columns) {
  Word peaks;
  for (int j = 0; j < word_bits; ++j) peaks[j] = lowest;
  for (int64_t c = 0; c < columns; c += word_bits) {
    Word bias;
    load_bias(bias, p, first + c, std::min<int64_t>(columns - c, word_bits));
    for (int j = 0; j < word_bits; ++j) {
      const float value = logit(p, z[c + j], bias[j]);
      z[c + j] = value;
      peaks[j] = c + j < columns && value > peaks[j] ? value : peaks[j];
    }
  }
  for (int64_t c = columns; c % word_bits != 0; ++c) z[c] = -infinity;
  float peak = lowest;
  for (int j = 0; j < word_bits; ++j) peak = std::max(peak, peaks[j]);
  return peak;
}

MOE_UNLEARN_INLINE double sum_lanes(const Word& lanes) {
  double sum = 0;
  for (int j = 0; j < word_bits; ++j) sum += static_cast<double>(lanes[j]);
  return sum;
}

/// Moves the maximum to that of the next tile too; returns by how much.
MOE_UNLEARN_INLINE double raise(Softmax& softmax, float peak) {
  const float before = softmax.peak;
  softmax.peak = std::max(before, peak);
  softmax.rescale = exp_float(before - softmax.peak);
  softmax.sum *= static_cast<double>(softmax.rescale);
  return static_cast<double>(softmax.peak) - static_cast<double>(before);
}

/// A tile of a row under a label; leaves e_v c_v, 0 at the label.
MOE_UNLEARN_INLINE void label_row(const Problem& p, float* z, int64_t first, int64_t columns, Row& row) {
  raise(row.model, finish_logits(p, z, first, columns));
  const int64_t column = row.label - first;
  const bool inside = column >= 0 && column < columns;
  if (inside) row.picked = std::exchange(z[column], -infinity);
  Word sums{};
  for (int64_t c = 0; c < columns; c += word_bits)
    for (int j = 0; j < word_bits; ++j) {
      const float e = exp_float(z[c + j] - row.model.peak);
      sums[j] += e;
      z[c + j] = p.softcap > 0 ? e * slope(p, z[c + j]) : e;
    }
  row.model.sum += sum_lanes(sums);
  if (inside) z[column] = 0;
}

/// A tile of a row against its reference: both softmaxes and the divergence so far.
MOE_UNLEARN_INLINE void kl_row(
    const Problem& p, float* z, float* z_ref, int64_t first, int64_t columns, Row& row) {
  const double sum_ref = row.reference.sum, up = raise(row.model, finish_logits(p, z, first, columns));
  const double up_ref = raise(row.reference, finish_logits(p, z_ref, first, columns));
  row.cross = (row.cross + sum_ref * (up - up_ref)) * static_cast<double>(row.reference.rescale);
  Word sums{}, sums_ref{}, crosses{};
  for (int64_t c = 0; c < columns; c += word_bits)
    for (int j = 0; j < word_bits; ++j) {
      const float x = z[c + j] - row.model.peak, x_ref = z_ref[c + j] - row.reference.peak;
      const float e = exp_float(x), e_ref = exp_float(x_ref);
      sums[j] += e;
      sums_ref[j] += e_ref;
      crosses[j] += e_ref == 0 ? 0.0f : e_ref * (x_ref - x);
    }
  row.model.sum += sum_lanes(sums);
  row.reference.sum += sum_lanes(sums_ref);
  row.cross += sum_lanes(crosses);
}

/// The same tile once more, both softmaxes known; leaves (p_v - q_v) c_v.
MOE_UNLEARN_INLINE void kl_gradient_row(
    const Problem& p, float* z, float* z_ref, int64_t first, int64_t columns, const Row& row) {
  finish_logits(p, z, first, columns);
  finish_logits(p, z_ref, first, columns);
  const float inverse = static_cast<float>(1 / row.model.sum), inverse_ref = static_cast<float>(1 / row.reference.sum);
  for (int64_t c = 0; c < columns; c += word_bits)
    for (int j = 0; j < word_bits; ++j) {
      const float q = exp_float(z_ref[c + j] - row.reference.peak) * inverse_ref;
      const float difference = exp_float(z[c + j] - row.model.peak) * inverse - q;
      z[c + j] = p.softcap > 0 ? difference * slope(p, z[c + j]) : difference;
    }
}

enum class Pass { label, kl, kl_gradient };

MOE_UNLEARN_INLINE void work_through(
    const Problem& p, Pass pass, float* z, float* z_ref, int64_t count, int64_t first, int64_t columns, Row* rows) {
  for (int64_t r = 0; r < count; ++r, z += tile_width, z_ref += tile_width) switch (pass) {
      case Pass::label:
        label_row(p, z, first, columns, rows[r]);
        break;
      case Pass::kl:
        kl_row(p, z, z_ref, first, columns, rows[r]);
        break;
      case Pass::kl_gradient:
        kl_gradient_row(p, z, z_ref, first, columns, rows[r]);
    }
}

/// sums = rescale * sums + part, a row at a time.
MOE_UNLEARN_INLINE void fold(float* sums, const float* part, int64_t count, int64_t width, const Row* rows) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = r * width; c < (r + 1) * width; ++c)
      sums[c] = __builtin_fmaf(sums[c], rows[r].model.rescale, part[c]);
}

/// Rows of any float dtype as dense float32: rows index[first], ..., or first, ... without an index.
MOE_UNLEARN_INLINE void copy_rows(float* to, const Rows& from, const int64_t* index, int64_t first, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    const char* const row = from.row(index != nullptr ? index[first + r] : first + r);
    for (int64_t c = 0; c < from.width; c += word_bits) {
      const int64_t n = std::min<int64_t>(from.width - c, word_bits);
      Word value;
      load(value, from.dtype, row + c * from.step, from.step, n);
      std::copy_n(value, n, to + r * from.width + c);
    }
  }
}

Tensor corner(Tensor& tensor, int64_t rows, int64_t columns) {
  Tensor top = first_rows(tensor, rows);
  return first_columns(top, columns);
}

Tensor floats(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}

float* data(const Tensor& tensor) { return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr())); }

/// `count` rows of a head from `first` on as float32: a view of it, or a copy in `space`.
Tensor head_tile(const Side& side, Tensor& space, int64_t first, int64_t count) {
  if (side.head_rows.dtype == ScalarType::Float) {
    Tensor head = side.head;
    return torch::stable::narrow(head, 0, first, count);
  }
  for_this_cpu<copy_rows, float*, const Rows&, const int64_t*, int64_t, int64_t>(
      data(space), side.head_rows, nullptr, first, count);
  return first_rows(space, count);
}

void gather(const Tensor& to, const Rows& from, const int64_t* index, int64_t first, int64_t count) {
  for_this_cpu<copy_rows, float*, const Rows&, const int64_t*, int64_t, int64_t>(
      data(to), from, index, first, count);
}

/// What the forward writes; rows that are not computed stay 0.
struct Output {
  float *value, *peak, *sum, *peak_ref, *sum_ref;  // [tokens] each
  float* direction;                                // [tokens, hidden], null if not asked for
};

/// Values of the rows [begin, begin + count) of the index, the label joining its softmax.
void finish(const Problem& p, const Output& out, Row* rows, int64_t begin, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    Row& row = rows[r];
    const int64_t t = p.index[begin + r];
    row.others = row.model.sum;
    if (p.kl) {
      out.value[t] = static_cast<float>(row.cross / row.reference.sum + std::log(row.model.sum / row.reference.sum));
      out.peak_ref[t] = row.reference.peak;
      out.sum_ref[t] = static_cast<float>(row.reference.sum);
    } else {
      const double x = static_cast<double>(row.picked) - static_cast<double>(row.model.peak);
      row.model.sum += static_cast<double>(exp_float(static_cast<float>(x)));
      const double nll = std::log(row.model.sum) - x;
      out.value[t] = static_cast<float>(p.uce ? -std::log1p(-std::exp(-nll) / 2) : nll);
    }
    out.peak[t] = row.model.peak;
    out.sum[t] = static_cast<float>(row.model.sum);
  }
}

/// dl/dh of those rows from sum_{v != y} e_v c_v w_v, for kl from sum_v (p_v - q_v) c_v w_v.
MOE_UNLEARN_INLINE void write_direction(
    const Problem& p, float* direction, const float* sums, const Row* rows, int64_t begin, int64_t count) {
  const Rows& head = p.model.head_rows;
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = rows[r];
    const double scale = static_cast<double>(p.scale), share = p.kl ? 0 : row.others / row.model.sum;
    const float factor = static_cast<float>(p.kl ? scale : scale / row.model.sum);
    const float label_factor = static_cast<float>(scale * share) * (p.softcap > 0 ? slope(p, row.picked) : 1.0f);
    const char* const w_y = p.kl ? nullptr : head.row(row.label);
    float* const to = direction + p.index[begin + r] * p.hidden;
    for (int64_t c = 0; c < p.hidden; c += word_bits) {
      const int64_t n = std::min<int64_t>(p.hidden - c, word_bits);
      Word w{};
      if (!p.kl) load(w, head.dtype, w_y + c * head.step, head.step, n);
      for (int64_t j = 0; j < n; ++j) to[c + j] = sums[r * p.hidden + c + j] * factor - w[j] * label_factor;
    }
  }
}

/// A thread's tiles of the forward.
class Forward {
 public:
  Forward(const Problem& p, const Output& out)
      : p_(p), out_(out), rows_(row_block), model_(p.model, p), reference_(p.reference, p),
        sums_(floats(p.model.hidden, out.direction != nullptr ? row_block : 0, p.hidden)),
        part_(floats(p.model.hidden, out.direction != nullptr ? row_block : 0, p.hidden)) {}

  /// The rows index[begin, begin + count).
  void run(int64_t begin, int64_t count) {
    const bool direction = out_.direction != nullptr;
    rows_.assign(row_block, {});
    for (int64_t r = 0; r < count; ++r) rows_[r].label = p_.labels[p_.index[begin + r]];
    gather(model_.h, p_.model.hidden_rows, p_.index, begin, count);
    if (p_.kl) gather(reference_.h, p_.reference.hidden_rows, p_.index, begin, count);
    torch::stable::zero_(sums_);
    run(p_.kl ? Pass::kl : Pass::label, count, direction && !p_.kl);
    finish(p_, out_, rows_.data(), begin, count);
    if (!direction) return;
    if (p_.kl) {
      for (Row& row : rows_) row.model.rescale = 1;
      run(Pass::kl_gradient, count, true);
    }
    for_this_cpu<write_direction, const Problem&, float*, const float*, const Row*, int64_t, int64_t>(
        p_, out_.direction, data(sums_), rows_.data(), begin, count);
  }

 private:
  struct Tiles {
    Tiles(const Side& side, const Problem& p)
        : side(side), h(floats(side.hidden, row_block, p.hidden)), z(floats(side.hidden, row_block, tile_width)),
          w(floats(side.hidden, side.head_rows.dtype == ScalarType::Float ? 0 : tile_width, p.hidden)) {}

    /// z = h w^T for a part of the vocabulary; returns w.
    Tensor multiply_head(int64_t first, int64_t count, int64_t columns) {
      Tensor tile = head_tile(side, w, first, columns);
      multiply(corner(z, count, columns), first_rows(h, count), torch::stable::transpose(tile, 0, 1));
      return tile;
    }

    const Side& side;
    Tensor h, z, w;
  };

  /// One pass over the vocabulary; with `add` what it leaves, times the head's rows, goes to sums_.
  void run(Pass pass, int64_t count, bool add) {
    for (int64_t first = 0; first < p_.vocabulary; first += tile_width) {
      const int64_t columns = std::min(tile_width, p_.vocabulary - first);
      if (p_.kl) reference_.multiply_head(first, count, columns);
      const Tensor w = model_.multiply_head(first, count, columns);
      for_this_cpu<work_through, const Problem&, Pass, float*, float*, int64_t, int64_t, int64_t, Row*>(
          p_, pass, data(model_.z), data(reference_.z), count, first, columns, rows_.data());
      if (!add) continue;
      multiply(first_rows(part_, count), corner(model_.z, count, columns), w);
      for_this_cpu<fold, float*, const float*, int64_t, int64_t, const Row*>(
          data(sums_), data(part_), count, p_.hidden, rows_.data());
    }
  }

  const Problem& p_;
  const Output& out_;
  std::vector<Row> rows_;
  Tiles model_, reference_;
  Tensor sums_, part_;
};

/// What the backward knows of each computed row, one array each for vector loads; padded to whole words.
struct Statistics {
  std::vector<float> upstream, peak, inverse, peak_ref, inverse_ref;
  std::vector<int64_t> label;

  Statistics(const Problem& p, const Tensor& up, const Tensor& norm, const Tensor& ref_norm) {
    const int64_t padded = ceil_div(p.count, word_bits) * word_bits;
    for (auto* array : {&upstream, &peak, &inverse, &peak_ref, &inverse_ref}) array->resize(padded);
    label.resize(padded, -1);
    for (int64_t r = 0; r < p.count; ++r) {
      const int64_t t = p.index[r];
      upstream[r] = data(up)[t] * p.scale;
      peak[r] = data(norm)[t];
      inverse[r] = 1 / data(norm)[p.tokens + t];
      peak_ref[r] = data(ref_norm)[t];
      inverse_ref[r] = 1 / data(ref_norm)[p.tokens + t];
      label[r] = p.kl ? -1 : p.labels[t];
    }
  }
};

/// Products w h^T of the entries [first, first + columns) of the vocabulary with `count` rows from `begin` on to the
/// gradient of the logits, in place; adds their sums to those of the bias.
MOE_UNLEARN_INLINE void logit_gradients(
    const Problem& p, const Statistics& s, float* z, float* z_ref, int64_t begin, int64_t count, int64_t first,
    int64_t columns, double* bias_sums) {
  for (int64_t v = 0; v < columns; ++v) {
    Word bias;
    load_bias(bias, p, first + v, 1);
    for (int64_t r = 0; r < count; r += word_bits) {
      float* const to = z + v * head_block + r;
      const int64_t row = begin + r, n = std::min<int64_t>(count - r, word_bits);
      Word dz;
      for (int j = 0; j < word_bits; ++j) {
        const float capped = logit(p, to[j], bias[0]);
        const float target = p.kl ? exp_float(logit(p, z_ref[v * head_block + r + j], bias[0]) - s.peak_ref[row + j]) *
                s.inverse_ref[row + j] : s.label[row + j] == first + v ? 1.0f : 0.0f;
        const float difference = exp_float(capped - s.peak[row + j]) * s.inverse[row + j] - target;
        dz[j] = difference * s.upstream[row + j] * (p.softcap > 0 ? slope(p, capped) : 1.0f);
      }
      double sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        to[j] = dz[j];
        sum += static_cast<double>(dz[j]);
      }
      bias_sums[v] += sum;
    }
  }
}

MOE_UNLEARN_INLINE void add_floats(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

MOE_UNLEARN_INLINE void narrow_to(const Rows& to, int64_t first, const float* from, int64_t count) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < to.width; c += word_bits) {
      const int64_t n = std::min<int64_t>(to.width - c, word_bits);
      Word value{};
      std::copy_n(from + r * to.width + c, n, value);
      store(value, to.dtype, to.row(first + r) + c * to.step, to.step, 0xFFFFFFFF, n);
    }
}

/// A thread's tiles of the backward: [part of the vocabulary, rows].
class Backward {
 public:
  Backward(const Problem& p, const Statistics& s, const Tensor& h, const Tensor& h_ref, const Rows& grad_head, const Rows& grad_bias)
      : p_(p), s_(s), h_(h), h_ref_(h_ref), grad_head_(grad_head), grad_bias_(grad_bias), z_(floats(h, head_width, head_block)), z_ref_(floats(h, p.kl ? head_width : 0, head_block)),
        w_(floats(h, head_width, p.hidden)), w_ref_(floats(h, head_width, p.hidden)), sum_(floats(h, head_width, p.hidden)),
        part_(floats(h, head_width, p.hidden)) {}

  /// The entries [first, first + columns) of the vocabulary.
  void run(int64_t first, int64_t columns) {
    Tensor w = head_tile(p_.model, w_, first, columns);
    Tensor w_ref = p_.kl ? head_tile(p_.reference, w_ref_, first, columns) : w;
    double bias_sums[head_width] = {};
    if (p_.count == 0) torch::stable::zero_(sum_);
    for (int64_t begin = 0; begin < p_.count; begin += head_block) {
      const int64_t count = std::min(head_block, p_.count - begin);
      Tensor h = torch::stable::narrow(h_, 0, begin, count);
      multiply(corner(z_, columns, count), w, torch::stable::transpose(h, 0, 1));
      if (p_.kl) {
        Tensor h_ref = torch::stable::narrow(h_ref_, 0, begin, count);
        multiply(corner(z_ref_, columns, count), w_ref, torch::stable::transpose(h_ref, 0, 1));
      }
      for_this_cpu<logit_gradients, const Problem&, const Statistics&, float*, float*, int64_t, int64_t, int64_t, int64_t, double*>(
          p_, s_, data(z_), data(z_ref_), begin, count, first, columns, bias_sums);
      if (!grad_head_) continue;
      multiply(first_rows(begin == 0 ? sum_ : part_, columns), corner(z_, columns, count), h);
      if (begin > 0) for_this_cpu<add_floats, float*, const float*, int64_t>(data(sum_), data(part_), columns * p_.hidden);
    }
    if (grad_head_)
      for_this_cpu<narrow_to, const Rows&, int64_t, const float*, int64_t>(grad_head_, first, data(sum_), columns);
    if (grad_bias_)
      for (int64_t v = 0; v < columns; ++v) {
        const Word value{static_cast<float>(bias_sums[v])};
        store(value, grad_bias_.dtype, grad_bias_.data + (first + v) * grad_bias_.step, grad_bias_.step, 1, 1);
      }
  }

 private:
  const Problem& p_;
  const Statistics& s_;
  Tensor h_, h_ref_;
  Rows grad_head_, grad_bias_;
  Tensor z_, z_ref_, w_, w_ref_, sum_, part_;
};

Problem problem(
    const Tensor& hidden, const Tensor& head, const Tensor& labels, const Tensor& index,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& ref_hidden, const std::optional<Tensor>& ref_head,
    const std::string& kind, double scale, double softcap) {
  STD_TORCH_CHECK(labels.is_contiguous() && index.is_contiguous(), "labels and index must be contiguous");
  return {Side(hidden, head), Side(ref_hidden.value_or(hidden), ref_head.value_or(head)), Rows(bias),
          labels.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>(), index.size(0), hidden.size(0),
          head.size(0), hidden.size(1), static_cast<float>(scale), static_cast<float>(softcap), kind == "kl",
          kind == "uce"};
}

/// (l, norm, ref_norm, dl/dh) as float32, 0 in the rows outside the index; dl/dh is empty unless asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss(
    const Tensor& hidden, const Tensor& head, const Tensor& labels, const Tensor& index,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& ref_hidden, const std::optional<Tensor>& ref_head,
    const std::string& kind, double scale, double softcap, bool direction) {
  const Problem p = problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap);
  auto value = torch::stable::new_zeros(hidden, {p.tokens}, ScalarType::Float);
  auto norm = torch::stable::new_zeros(hidden, {2, p.tokens}, ScalarType::Float);
  auto ref_norm = torch::stable::new_zeros(hidden, {2, p.tokens}, ScalarType::Float);
  auto directions = torch::stable::new_zeros(hidden, {direction ? p.tokens : 0, p.hidden}, ScalarType::Float);
  const Output out{data(value), data(norm), data(norm) + p.tokens, data(ref_norm), data(ref_norm) + p.tokens,
                   direction ? data(directions) : nullptr};
  parallel_products(ceil_div(p.count, row_block), [&](int64_t first, int64_t last) {
    Forward forward(p, out);
    for (int64_t begin = first * row_block; begin < std::min(last * row_block, p.count); begin += row_block)
      forward.run(begin, std::min(row_block, p.count - begin));
  });
  return {value, norm, ref_norm, directions};
}

/// Writes the gradients of head and bias for dloss/dl = upstream.
void token_loss_head(
    const std::optional<Tensor>& grad_head, const std::optional<Tensor>& grad_bias, const Tensor& upstream, const Tensor& norm, const Tensor& ref_norm,
    const Tensor& hidden, const Tensor& head, const Tensor& labels, const Tensor& index,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& ref_hidden, const std::optional<Tensor>& ref_head,
    const std::string& kind, double scale, double softcap) {
  const Problem p = problem(hidden, head, labels, index, bias, ref_hidden, ref_head, kind, scale, softcap);
  const Statistics statistics(p, upstream, norm, ref_norm);
  const Tensor h = floats(hidden, p.count, p.hidden), h_ref = floats(hidden, p.kl ? p.count : 0, p.hidden);
  gather(h, p.model.hidden_rows, p.index, 0, p.count);
  if (p.kl) gather(h_ref, p.reference.hidden_rows, p.index, 0, p.count);
  parallel_products(ceil_div(p.vocabulary, head_width), [&](int64_t first, int64_t last) {
    Backward backward(p, statistics, h, h_ref, Rows(grad_head), Rows(grad_bias));
    for (int64_t v = first * head_width; v < std::min(last * head_width, p.vocabulary); v += head_width)
      backward.run(v, std::min(head_width, p.vocabulary - v));
  });
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("token_loss", TORCH_BOX(&moe_unlearn::token_loss));
  m.impl("token_loss_head", TORCH_BOX(&moe_unlearn::token_loss_head));
}
