// expert_mlp on Hopper, SwiGLU in bfloat16, as Triton has it: three launches forward, at most four backward.
//
//     GroupedProduct<GateUp>          z = x[token] gate_up_proj[e]^T + bias, a = act(z)
//     GroupedProduct<Scatter>         slots[n] = w[n] * (a down_proj[e]^T + bias), n = t * K + k
//     SumSlots                        out[t] = sum_k slots[t * K + k], added in float32 in this order
//
//     GroupedProduct<GateUpGradient>  da = d_out[token] down_proj[e]; from z: dz, w a, sum_i da a of each column tile
//     WeightsGradient                 d_w[n]: the sums of the column tiles, and <d_out[token], down_bias[e]>
//     GroupedProduct<Scatter>, SumSlots   slots[n] = dz gate_up_proj[e], d_x[t] = sum_k slots[t * K + k]
//
// Each output has one writer and sums have one order: the same bits for any grid.

#pragma once

#include "cuda/mlp_epilogue.cuh"

namespace moe_unlearn {

/// Weights of all experts, as a product takes them: [experts, columns, depth] if `by_row`, else with depth and columns
/// exchanged.
struct ExpertWeight {
  Matrices matrices;
  bool by_row;
};

/// A launch for each of the ways that weights lie.
template <class Epilogue>
cudaError_t grouped_product(
    const Left& left, const ExpertWeight& weight, const Segments& segments, int64_t width, bool halves,
    const Epilogue& epilogue, cudaStream_t stream) {
  if (weight.by_row)
    return grouped_product<true>(left, weight.matrices, segments, width, halves, epilogue, stream);
  return grouped_product<false>(left, weight.matrices, segments, width, halves, epilogue, stream);
}

/// out[t] = slots[t * K] + ... + slots[t * K + K - 1], 8 columns a thread.
struct SumSlots {
  static constexpr int threads = 256, resident = 4;

  struct Arguments {
    const uint16_t* slots;
    uint16_t* out;
    int64_t tokens;
    int32_t columns, top_k;
  };

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char*) {
    const int32_t per_row = a.columns / chunk_size;
    const int64_t chunk = group.block() * threads + group.thread(), token = divide(chunk, per_row);
    if (token >= a.tokens) return;
    const int64_t column = (chunk - token * per_row) * chunk_size;
    const uint16_t* const from = a.slots + token * a.top_k * a.columns + column;
    Chunk total = {};
    for (int32_t k = 0; k < a.top_k; ++k) add(total, from + k * int64_t{a.columns});
    Raw raw{};
    narrow_chunk<Dtype::bfloat16, false>(raw, total, 0xFF);
    *reinterpret_cast<uint4*>(a.out + token * a.columns + column) = {
        raw.word[0], raw.word[1], raw.word[2], raw.word[3]};
  }
};

inline cudaError_t sum_slots(const SumSlots::Arguments& a, cudaStream_t stream) {
  const int64_t chunks = a.tokens * (a.columns / chunk_size);
  return launch<SumSlots>(a, ceil_div<int64_t>(chunks, SumSlots::threads), 0, stream);
}

/// d_weights[slots[j]] = sum over the column tiles of partial[:, j] + <grad_out[token], bias[e]>, a warp for each j.
struct WeightsGradient {
  static constexpr int threads = 256, resident = 4;

  struct Arguments {
    const float* partial;  // [parts, rows]
    int32_t parts;
    Left grad_out;          // its slots are not null
    const uint16_t* bias;   // [experts, depth of grad_out] or null
    Segments segments;
    void* to;
    Dtype dtype;
  };

  static MOE_UNLEARN_DEVICE int32_t segment_of(const Segments& s, int32_t position) {
    int32_t low = 0, high = s.experts;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (s.offsets[middle + 1] > position)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char*) {
    const int lane = group.thread() % warp_size;
    const int64_t position = group.block() * (threads / warp_size) + group.thread() / warp_size;
    if (position >= a.segments.rows) return;
    const int32_t slot = a.grad_out.slots[position];
    float total = 0;
    for (int32_t part = lane; part < a.parts; part += warp_size)
      total += a.partial[part * int64_t{a.segments.rows} + position];
    const int32_t expert = a.bias ? segment_of(a.segments, static_cast<int32_t>(position)) : a.segments.experts;
    if (expert < a.segments.experts) {
      const uint16_t* const grad = a.grad_out.data + slot / a.grad_out.top_k * a.grad_out.stride;
      const uint16_t* const bias = a.bias + expert * a.grad_out.depth;
      for (int64_t column = lane * chunk_size; column < a.grad_out.depth; column += warp_size * chunk_size) {
        Chunk g, b;
        Packed(grad + column).widen(g);
        Packed(bias + column).widen(b);
        MOE_UNLEARN_UNROLL
        for (int j = 0; j < chunk_size; ++j) total += g[j] * b[j];
      }
    }
    MOE_UNLEARN_UNROLL
    for (int distance = 1; distance < warp_size; distance *= 2) total += group.shuffle(total, lane ^ distance);
    if (lane != 0) return;
    if (a.dtype == Dtype::float32)
      static_cast<float*>(a.to)[slot] = total;
    else
      static_cast<uint16_t*>(a.to)[slot] = static_cast<uint16_t>(
          a.dtype == Dtype::bfloat16 ? narrow<Dtype::bfloat16>(total) : narrow<Dtype::float16>(total));
  }
};

inline cudaError_t weights_gradient(const WeightsGradient::Arguments& a, cudaStream_t stream) {
  constexpr int64_t rows_per_block = WeightsGradient::threads / warp_size;
  return launch<WeightsGradient>(a, ceil_div<int64_t>(a.segments.rows, rows_per_block), 0, stream);
}

}  // namespace moe_unlearn
