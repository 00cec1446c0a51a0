// expert_mlp: the expert layer and its dgrad, an expert's rows in chunks, each from gather to weighted sum.
//
// Products are torch's mm on the weights as they are stored. What lies between two products of a chunk is done in
// its buffers. Rows' results go to the slots of their (token, k), and a last pass adds a token's slots in the
// order of k in float32: no atomics. Chunks are the same for any number of threads.

#include "cpu/gate.h"
#include "cpu/widened_product.h"

#include <tuple>

namespace moe_unlearn {
namespace {

constexpr int64_t chunk_rows = 256;  // enough to reuse a weight from memory, few enough to stay in cache
constexpr int64_t chunk_cost = 16;   // of reading the weights once, counted in rows

struct Chunk {
  int64_t expert, first, count;  // sorted positions
};

/// What forward and backward have in common. Positions are those of sorted_rows, slots are t * K + k.
struct Layer {
  int64_t tokens, top_k, hidden, inner, wide;
  ScalarType dtype;
  Gate gate;
  Activation activation;
  bool transposed;
  Tensor gate_up_proj, down_proj;
  std::vector<int64_t> slot, token;  // of each position that belongs to an expert
  std::vector<float> weight;         // of each slot
  std::vector<char> here;            // whether a slot belongs to an expert
  std::vector<Chunk> chunks;
  int64_t most = 0;  // rows of a chunk, padded

  Layer(
      const Tensor& top_k_weights, const Tensor& sorted_rows, const Tensor& expert_offsets,
      const Tensor& gate_up_proj, const Tensor& down_proj, const std::string& activation, Gate gate, bool transposed)
      : tokens(top_k_weights.size(0)), top_k(top_k_weights.size(1)),
        hidden(down_proj.size(transposed ? 2 : 1)), inner(down_proj.size(transposed ? 1 : 2)),
        wide(gate_up_proj.size(transposed ? 2 : 1)), dtype(down_proj.scalar_type()), gate(gate),
        activation(activation_named(activation)), transposed(transposed), gate_up_proj(gate_up_proj),
        down_proj(down_proj), weight(slots()), here(slots(), 0) {
    STD_TORCH_CHECK(sorted_rows.is_contiguous() && expert_offsets.is_contiguous(), "indices must be contiguous");
    const int32_t* const rows = sorted_rows.const_data_ptr<int32_t>();
    const int32_t* const offsets = expert_offsets.const_data_ptr<int32_t>();
    const int64_t experts = gate_up_proj.size(0);
    for (int64_t i = 0; i < offsets[experts]; ++i) {
      slot.push_back(rows[i]);
      token.push_back(rows[i] / top_k);
      here[rows[i]] = 1;
    }
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t count = offsets[e + 1] - offsets[e];
      if (count <= 0) continue;
      // of even size: each costs a pass over the weights
      const int64_t size = ceil_div(ceil_div(count, ceil_div(count, chunk_rows)), row_step) * row_step;
      for (int64_t first = 0; first < count; first += size)
        chunks.push_back({e, offsets[e] + first, std::min(size, count - first)});
      most = std::max(most, padded(std::min(size, count), dtype));
    }
    const Rows w(top_k_weights);
    for (int64_t t = 0; t < tokens; ++t) {
      const Matrix row(reinterpret_cast<char*>(&weight[t * top_k]), ScalarType::Float, 1, top_k);
      copy_row(row.data, row.dtype, w, w.row(t));
    }
  }

  int64_t slots() const { return tokens * top_k; }
  int64_t row_bytes(int64_t width) const { return width * item_size(dtype); }
  /// [wide, hidden] and [hidden, inner]
  Matrix up(int64_t expert) const { return in_rows(gate_up_proj, expert); }
  Matrix down(int64_t expert) const { return in_rows(down_proj, expert); }

 private:
  Matrix in_rows(const Tensor& weight, int64_t expert) const {
    const Matrix m = matrix(weight, expert);
    return transposed ? m.transposed() : m;
  }
};

/// A thread's buffer of a chunk's rows.
struct ChunkRows {
  Buffer memory;
  Matrix all;

  ChunkRows(const Layer& layer, int64_t width)
      : memory(layer.most * layer.row_bytes(width)), all(memory.data(), layer.dtype, layer.most, width) {}
  Matrix operator()(const Chunk& chunk) const { return all.first_rows(padded(chunk.count, all.dtype)); }
  /// The place of a chunk's rows that are kept: already that in `kept`, unless a product would write more rows.
  Matrix or_in(const Matrix& kept, const Chunk& chunk) const {
    const bool there = kept.rows > 0 && padded(chunk.count, all.dtype) == chunk.count;
    return there ? kept.slice(chunk.first, chunk.count) : (*this)(chunk);
  }
};

/// Copies a chunk's rows to their place in `kept`, if they are not there.
void keep(const Matrix& kept, const Chunk& chunk, const Matrix& rows) {
  if (kept.row(chunk.first) != rows.data) std::memcpy(kept.row(chunk.first), rows.data, chunk.count * rows.row_bytes());
}

/// f(first, last) for each thread's chunks.
template <class F>
void for_chunks(const Layer& layer, const F& f) {
  std::vector<int64_t> cost;
  for (const Chunk& chunk : layer.chunks) cost.push_back(padded(chunk.count, layer.dtype) + chunk_cost);
  parallel_by_cost(cost, f);
}

/// Where the gate and the up of element `first` of a row of pre-activations are; elements are `stride` bytes apart.
struct Halves {
  char *gate, *up;
  int64_t stride;

  MOE_UNLEARN_INLINE Halves(const Layer& layer, char* row, int64_t first)
      : gate(row), up(row), stride(item_size(layer.dtype)) {
    if (layer.gate.gated) up += layer.gate.interleaved ? stride : layer.inner * stride;
    if (layer.gate.gated && layer.gate.interleaved) stride *= 2;
    gate += first * stride, up += first * stride;
  }
};

/// row += bias, in the dtype of row
MOE_UNLEARN_INLINE void add_bias(char* row, const Matrix& like, const Rows& bias, int64_t expert) {
  const int64_t item = item_size(like.dtype);
  const char* const from = bias.row(expert);
  for (int64_t first = 0; first < like.columns; first += word_bits) {
    const int64_t n = std::min<int64_t>(like.columns - first, word_bits);
    Word value, b;
    load(value, like.dtype, row + first * item, item, n);
    load(b, bias.dtype, from + first * bias.stride, bias.stride, n);
    for (int j = 0; j < word_bits; ++j) value[j] += b[j];
    store(value, like.dtype, row + first * item, item, 0xFFFFFFFF, n);
  }
}

/// Finishes the pre-activations z of a chunk and writes the activations a.
template <Activation activation>
MOE_UNLEARN_INLINE void activate_chunk(
    const Layer& layer, const Chunk& chunk, const Matrix& z, const Rows& bias, const Matrix& a) {
  const int64_t item = item_size(layer.dtype);
  for (int64_t j = 0; j < chunk.count; ++j) {
    if (bias) add_bias(z.row(j), z, bias, chunk.expert);
    for (int64_t first = 0; first < layer.inner; first += word_bits) {
      const int64_t n = std::min<int64_t>(layer.inner - first, word_bits);
      const Halves at(layer, z.row(j), first);
      Word g, u = {}, out;
      load(g, layer.dtype, at.gate, at.stride, n);
      if (layer.gate.gated) load(u, layer.dtype, at.up, at.stride, n);
      apply_gate<activation>(layer.gate, g, u, out);
      store(out, layer.dtype, a.row(j) + first * item, item, 0xFFFFFFFF, n);
    }
  }
}

/// What the backward of a chunk's activations writes beside dz; scaled without rows is not wanted.
struct Gradients {
  Matrix dz, scaled;
  float* d_weight;  // of each slot
};

MOE_UNLEARN_INLINE float total(const Word& lanes) {
  double sum = 0;
  for (const float lane : lanes) sum += lane;
  return static_cast<float>(sum);
}

/// dz of a chunk from its z and da; and of each row w * a and <da, a>.
template <Activation activation>
MOE_UNLEARN_INLINE void activate_chunk_backward(
    const Layer& layer, const Chunk& chunk, const Rows& z, const Matrix& da, const Gradients& to) {
  const int64_t item = item_size(layer.dtype);
  for (int64_t j = 0; j < chunk.count; ++j) {
    const int64_t slot = layer.slot[chunk.first + j];
    const float weight = layer.weight[slot];
    Word sums = {};
    for (int64_t first = 0; first < layer.inner; first += word_bits) {
      const int64_t n = std::min<int64_t>(layer.inner - first, word_bits);
      const Halves from(layer, z.row(chunk.first + j), first), at(layer, to.dz.row(j), first);
      Word g, u = {}, out, d, weighted;
      load(g, layer.dtype, from.gate, from.stride, n);
      if (layer.gate.gated) load(u, layer.dtype, from.up, from.stride, n);
      load(d, layer.dtype, da.row(j) + first * item, item, n);
      for (int k = 0; k < word_bits; ++k) weighted[k] = d[k] * weight;
      apply_gate_backward<activation>(layer.gate, g, u, weighted, out);
      store(g, layer.dtype, at.gate, at.stride, 0xFFFFFFFF, n);
      if (layer.gate.gated) store(u, layer.dtype, at.up, at.stride, 0xFFFFFFFF, n);
      for (int k = 0; k < word_bits; ++k) sums[k] = k < n ? __builtin_fmaf(d[k], out[k], sums[k]) : sums[k];
      if (to.scaled.rows == 0) continue;
      for (int k = 0; k < word_bits; ++k) out[k] *= weight;
      store(out, layer.dtype, to.scaled.row(chunk.first + j) + first * item, item, 0xFFFFFFFF, n);
    }
    to.d_weight[slot] = total(sums);
  }
}

template <Activation activation>
void run_forward(const Layer& l, const Chunk& c, const Matrix& z, const Rows& bias, const Matrix& a) {
  for_this_cpu<activate_chunk<activation>, const Layer&, const Chunk&, const Matrix&, const Rows&, const Matrix&>(
      l, c, z, bias, a);
}

template <Activation activation>
void run_backward(const Layer& l, const Chunk& c, const Rows& z, const Matrix& da, const Gradients& to) {
  for_this_cpu<
      activate_chunk_backward<activation>, const Layer&, const Chunk&, const Rows&, const Matrix&, const Gradients&>(
      l, c, z, da, to);
}

constexpr decltype(&run_forward<Activation::silu>) forwards[] = {
    run_forward<Activation::silu>, run_forward<Activation::gelu>, run_forward<Activation::gelu_tanh>,
    run_forward<Activation::relu>, run_forward<Activation::relu2>};
constexpr decltype(&run_backward<Activation::silu>) backwards[] = {
    run_backward<Activation::silu>, run_backward<Activation::gelu>, run_backward<Activation::gelu_tanh>,
    run_backward<Activation::relu>, run_backward<Activation::relu2>};

/// d_weight[slot] += <grad row, bias of the expert>
MOE_UNLEARN_INLINE void add_bias_products(
    const Layer& layer, const Chunk& chunk, const Matrix& grad, const Rows& bias, float* d_weight) {
  const int64_t item = item_size(grad.dtype);
  const char* const from = bias.row(chunk.expert);
  for (int64_t j = 0; j < chunk.count; ++j) {
    Word sums = {};
    for (int64_t first = 0; first < grad.columns; first += word_bits) {
      const int64_t n = std::min<int64_t>(grad.columns - first, word_bits);
      Word g, b;
      load(g, grad.dtype, grad.row(j) + first * item, item, n);
      load(b, bias.dtype, from + first * bias.stride, bias.stride, n);
      for (int k = 0; k < word_bits; ++k) sums[k] = k < n ? __builtin_fmaf(g[k], b[k], sums[k]) : sums[k];
    }
    d_weight[layer.slot[chunk.first + j]] += total(sums);
  }
}

/// out[t] = sum over k of weight (1 if not `weighted`) times row t * K + k of `values`, for the tokens [begin, end).
MOE_UNLEARN_INLINE void add_slots(
    const Layer& layer, const Matrix& values, bool weighted, const Matrix& out, int64_t begin, int64_t end) {
  const int64_t item = item_size(layer.dtype);
  for (int64_t t = begin; t < end; ++t)
    for (int64_t first = 0; first < layer.hidden; first += word_bits) {
      const int64_t n = std::min<int64_t>(layer.hidden - first, word_bits);
      Word sum = {}, value;
      for (int64_t slot = t * layer.top_k; slot < (t + 1) * layer.top_k; ++slot) {
        if (!layer.here[slot]) continue;
        const float weight = weighted ? layer.weight[slot] : 1.0f;
        load(value, layer.dtype, values.row(slot) + first * item, item, n);
        for (int j = 0; j < word_bits; ++j) sum[j] = __builtin_fmaf(weight, value[j], sum[j]);
      }
      store(sum, layer.dtype, out.row(t) + first * item, item, 0xFFFFFFFF, n);
    }
}

void sum_slots(const Layer& layer, const Matrix& values, bool weighted, const Matrix& out) {
  parallel(layer.tokens, 8, [&](int64_t begin, int64_t end) {
    for_this_cpu<add_slots, const Layer&, const Matrix&, bool, const Matrix&>(
        layer, values, weighted, out, begin, end);
  });
}

Matrix dense(const Tensor& tensor) {
  char* const data = static_cast<char*>(tensor.mutable_data_ptr());
  return {data, tensor.scalar_type(), tensor.size(0), tensor.size(1)};
}

void zero_rows(const Matrix& m, int64_t first) {
  if (m.rows > first) std::memset(m.row(first), 0, (m.rows - first) * m.row_bytes());
}

std::tuple<Tensor, Tensor> expert_mlp(
    const Tensor& hidden_states, const Tensor& top_k_weights, const Tensor& sorted_rows,
    const Tensor& expert_offsets, const Tensor& gate_up_proj, const Tensor& down_proj,
    const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias, std::string activation,
    double alpha, double limit, double shift, bool transposed, bool interleaved, bool gated) {
  const Gate gate{static_cast<float>(alpha), static_cast<float>(limit), static_cast<float>(shift), interleaved, gated};
  const Layer layer(
      top_k_weights, sorted_rows, expert_offsets, gate_up_proj, down_proj, activation, gate, transposed);
  const auto made = [&](int64_t rows, int64_t width) {
    return torch::stable::new_empty(hidden_states, {rows, width});
  };
  const Tensor out = made(layer.tokens, layer.hidden), z = made(layer.slots(), layer.wide);
  const Tensor slots = made(layer.slots(), layer.hidden);
  const Matrix kept = dense(z), y = dense(slots);
  const Rows x(hidden_states), bias_up(gate_up_bias), bias_down(down_bias);
  for_chunks(layer, [&](int64_t first, int64_t last) {
    const ChunkRows rows(layer, layer.hidden), wide(layer, layer.wide), inner(layer, layer.inner);
    WidenedProducts own;
    for (int64_t i = first; i < last; ++i) {
      const Chunk& c = layer.chunks[i];
      gather(rows.all, x, layer.token.data(), c.first, c.count);
      const Matrix pre = wide.or_in(kept, c);
      multiply(pre, rows(c), layer.up(c.expert).transposed(), own);
      forwards[static_cast<int>(layer.activation)](layer, c, pre, bias_up, inner.all);
      keep(kept, c, pre);
      multiply(rows(c), inner(c), layer.down(c.expert).transposed(), own);
      for (int64_t j = 0; j < c.count; ++j) {
        if (bias_down) add_bias(rows.all.row(j), rows.all, bias_down, c.expert);
        std::memcpy(y.row(layer.slot[c.first + j]), rows.all.row(j), y.row_bytes());
      }
    }
  });
  zero_rows(kept, static_cast<int64_t>(layer.slot.size()));
  sum_slots(layer, y, true, dense(out));
  return {out, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& grad_out, const Tensor& hidden_states, const Tensor& top_k_weights, const Tensor& sorted_rows,
    const Tensor& expert_offsets, const Tensor& gate_up_proj, const Tensor& down_proj,
    const std::optional<Tensor>& down_bias, const Tensor& z, std::string activation, double alpha, double limit,
    double shift, bool transposed, bool interleaved, bool gated, bool need_x, bool need_weights, bool need_z,
    bool need_scaled) {
  const Gate gate{static_cast<float>(alpha), static_cast<float>(limit), static_cast<float>(shift), interleaved, gated};
  const Layer layer(
      top_k_weights, sorted_rows, expert_offsets, gate_up_proj, down_proj, activation, gate, transposed);
  const auto made = [&](const Tensor& like, bool wanted, int64_t rows, int64_t width) {
    return torch::stable::new_empty(like, {wanted ? rows : 0, width});
  };
  const Tensor d_x = made(hidden_states, need_x, layer.tokens, layer.hidden);
  const Tensor d_weights = made(top_k_weights, need_weights, layer.tokens, layer.top_k);
  const Tensor dz = made(z, need_z, layer.slots(), layer.wide);
  const Tensor scaled = made(z, need_scaled, layer.slots(), layer.inner);
  const Tensor slots = made(hidden_states, need_x, layer.slots(), layer.hidden);
  const Matrix dz_out = dense(dz), scaled_out = dense(scaled), d_rows = dense(slots);
  const bool need_da = need_x || need_weights || need_z;
  std::vector<float> d_weight(layer.slots(), 0.0f);
  const Rows g(grad_out), pre(z), bias(down_bias);
  for_chunks(layer, [&](int64_t first, int64_t last) {
    const ChunkRows rows(layer, layer.hidden), wide(layer, layer.wide), inner(layer, layer.inner);
    WidenedProducts own;
    for (int64_t i = first; i < last; ++i) {
      const Chunk& c = layer.chunks[i];
      if (need_da) {
        gather(rows.all, g, layer.token.data(), c.first, c.count);
        multiply(inner(c), rows(c), layer.down(c.expert), own);
      }
      const Gradients to{wide.or_in(dz_out, c), scaled_out, d_weight.data()};
      backwards[static_cast<int>(layer.activation)](layer, c, pre, inner.all, to);
      if (bias && need_weights)
        for_this_cpu<add_bias_products, const Layer&, const Chunk&, const Matrix&, const Rows&, float*>(
            layer, c, rows.all, bias, d_weight.data());
      if (need_z) keep(dz_out, c, to.dz);
      if (!need_x) continue;
      multiply(rows(c), to.dz, layer.up(c.expert), own);
      for (int64_t j = 0; j < c.count; ++j)
        std::memcpy(d_rows.row(layer.slot[c.first + j]), rows.all.row(j), d_rows.row_bytes());
    }
  });
  const int64_t here = static_cast<int64_t>(layer.slot.size());
  zero_rows(dz_out, here);
  zero_rows(scaled_out, here);
  if (need_x) sum_slots(layer, d_rows, false, dense(d_x));
  if (need_weights) {
    const Rows sums(reinterpret_cast<char*>(d_weight.data()), ScalarType::Float, layer.tokens, layer.top_k);
    const Matrix to = dense(d_weights);
    for (int64_t t = 0; t < layer.tokens; ++t) copy_row(to.row(t), to.dtype, sums, sums.row(t));
  }
  return {d_x, d_weights, dz, scaled};
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("expert_mlp", TORCH_BOX(&moe_unlearn::expert_mlp));
  m.impl("expert_mlp_backward", TORCH_BOX(&moe_unlearn::expert_mlp_backward));
}
