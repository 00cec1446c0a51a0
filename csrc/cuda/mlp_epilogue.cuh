// What becomes of the products of expert_mlp: SwiGLU, rows that are scattered with their weights, SwiGLU's gradient.
// Epilogues of grouped_product.cuh; all columns come in chunks of 8 at 16-byte addresses. `Gate` in ops/gate.py has the
// formulas. The activation is computed from z as it was rounded, so that forward and backward use one function.

#pragma once

#include "cuda/grouped_product.cuh"

namespace moe_unlearn {

/// min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up, -limit, limit) + shift)
struct SwiGlu {
  float alpha, limit, shift;

  struct Parts {
    float value, slope, factor;  // of the gate, and what stands for the up
  };

  MOE_UNLEARN_DEVICE Parts parts(float gate, float up) const {
    const float x = gate > limit ? limit : gate, bounded = up > limit ? limit : up < -limit ? -limit : up;
    const float s = hopper::sigmoid(alpha * x), value = x * s;
    return {value, s + alpha * value * (1 - s), bounded + shift};
  }

  /// The gradients of gate and up, 0 where a clamp is passed; without a clamp a NaN is kept.
  MOE_UNLEARN_DEVICE void backward(float gate, float up, float grad, const Parts& p, float& d_gate, float& d_up) const {
    const bool open = limit == INFINITY;
    d_gate = open || gate <= limit ? grad * p.slope * p.factor : 0;
    d_up = open || fabsf(up) <= limit ? grad * p.value : 0;
  }
};

/// Of the 8 numbers of a chunk, packed.
struct Packed {
  uint4 quad;

  MOE_UNLEARN_DEVICE explicit Packed(const Chunk& v)
      : quad{hopper::narrow_pair(v[0], v[1]), hopper::narrow_pair(v[2], v[3]), hopper::narrow_pair(v[4], v[5]),
             hopper::narrow_pair(v[6], v[7])} {}
  MOE_UNLEARN_DEVICE explicit Packed(const uint16_t* from) : quad(*reinterpret_cast<const uint4*>(from)) {}

  MOE_UNLEARN_DEVICE void store(uint16_t* to) const { *reinterpret_cast<uint4*>(to) = quad; }
  MOE_UNLEARN_DEVICE void widen(Chunk& out) const {
    widen_chunk<Dtype::bfloat16>(out, {{quad.x, quad.y, quad.z, quad.w, 0, 0, 0, 0}});
  }
};

/// chunk += the 8 numbers at `bias`
MOE_UNLEARN_DEVICE void add(Chunk& chunk, const uint16_t* bias) {
  Chunk other;
  Packed(bias).widen(other);
  MOE_UNLEARN_UNROLL
  for (int j = 0; j < chunk_size; ++j) chunk[j] += other[j];
}

/// What each slot counts, of any float dtype.
struct SlotWeights {
  const void* data;
  Dtype dtype;

  MOE_UNLEARN_DEVICE float operator[](int32_t slot) const {
    if (dtype == Dtype::float32) return static_cast<const float*>(data)[slot];
    const uint32_t bits = static_cast<const uint16_t*>(data)[slot];
    return dtype == Dtype::bfloat16 ? widen<Dtype::bfloat16>(bits) : widen<Dtype::float16>(bits);
  }
};

/// z = the product + bias, a = SwiGlu(z). Gate and up alternate in z and in the weights if `interleaved`, and a tile's
/// halves stand side by side; else the halves of a tile are columns of gate and the same columns of up.
template <bool interleaved>
struct GateUp {
  uint16_t *z, *a;
  const uint16_t* bias;  // [experts, 2 inner] or null
  int32_t inner;
  SwiGlu gate;

  struct Row {
    ProductRow of;
  };

  MOE_UNLEARN_DEVICE Row find(const ProductRow& row) const { return {row}; }

  /// Adds the bias, stores at z's column and returns what was stored.
  MOE_UNLEARN_DEVICE void store_z(const Row& row, int32_t column, Chunk& chunk) const {
    const int64_t wide = 2 * int64_t{inner};
    if (bias && row.of.used) add(chunk, bias + row.of.segment * wide + column);
    const Packed stored(chunk);
    stored.store(z + row.of.position * wide + column);
    stored.widen(chunk);
  }

  MOE_UNLEARN_DEVICE float activation(float g, float u) const {
    const auto p = gate.parts(g, u);
    return p.value * p.factor;
  }

  MOE_UNLEARN_DEVICE void store_pairs(const Row& row, int32_t column, Chunk& chunk) const {
    if (column >= 2 * inner) return;
    store_z(row, column, chunk);
    uint2 pairs{
        hopper::narrow_pair(activation(chunk[0], chunk[1]), activation(chunk[2], chunk[3])),
        hopper::narrow_pair(activation(chunk[4], chunk[5]), activation(chunk[6], chunk[7]))};
    *reinterpret_cast<uint2*>(a + row.of.position * int64_t{inner} + column / 2) = pairs;
  }

  template <class Group>
  MOE_UNLEARN_DEVICE void store(const Group&, Row& row, int32_t column, Chunk& first, Chunk& second) const {
    if (!row.of.exists) return;
    if constexpr (interleaved) {
      store_pairs(row, column, first);
      store_pairs(row, column + ProductPlan::half, second);
    } else if (column < inner) {
      store_z(row, column, first);
      store_z(row, inner + column, second);
      MOE_UNLEARN_UNROLL
      for (int j = 0; j < chunk_size; ++j) first[j] = activation(first[j], second[j]);
      Packed(first).store(a + row.of.position * int64_t{inner} + column);
    }
  }

  template <class Group>
  MOE_UNLEARN_DEVICE void finish(const Group&, Row&, int32_t) const {}
};

/// to[slot] = weights[slot] * (the product + bias), each slot once.
struct Scatter {
  uint16_t* to;           // [slots, columns]
  const uint16_t* bias;   // [experts, columns] or null
  const int32_t* slots;   // of each position
  SlotWeights weights;    // or null
  int32_t columns;

  struct Row {
    ProductRow of;
    int32_t slot;
    float weight;
  };

  MOE_UNLEARN_DEVICE Row find(const ProductRow& row) const {
    const int32_t slot = row.exists ? slots[row.position] : 0;
    return {row, slot, !weights.data ? 1 : row.used ? weights[slot] : 0};
  }

  template <class Group>
  MOE_UNLEARN_DEVICE void store(const Group&, Row& row, int32_t column, Chunk& first, Chunk& second) const {
    store(row, column, first);
    store(row, column + ProductPlan::half, second);
  }

  MOE_UNLEARN_DEVICE void store(const Row& row, int32_t column, Chunk& chunk) const {
    if (!row.of.exists || column >= columns) return;
    if (bias && row.of.used) add(chunk, bias + row.of.segment * int64_t{columns} + column);
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j) chunk[j] *= row.weight;
    Packed(chunk).store(to + row.slot * int64_t{columns} + column);
  }

  template <class Group>
  MOE_UNLEARN_DEVICE void finish(const Group&, Row&, int32_t) const {}
};

/// From the product da: dz, scaled = w a, and partial[column tile, position] = sum_i da[i] a[i]. Each may be null.
template <bool interleaved>
struct GateUpGradient {
  const uint16_t* z;
  uint16_t *dz, *scaled;
  float* partial;        // [column tiles, rows]
  const int32_t* slots;  // of each position
  SlotWeights weights;
  int32_t inner, rows;
  SwiGlu gate;

  struct Row {
    ProductRow of;
    float weight, total;
  };

  MOE_UNLEARN_DEVICE Row find(const ProductRow& row) const {
    return {row, row.used ? weights[slots[row.position]] : 0, 0};
  }

  template <class Group>
  MOE_UNLEARN_DEVICE void store(const Group&, Row& row, int32_t column, Chunk& first, Chunk& second) const {
    store(row, column, first);
    store(row, column + ProductPlan::half, second);
  }

  /// z's chunks of gate and up, or of pairs of both; 0 where no expert has the row, whatever lies there.
  MOE_UNLEARN_DEVICE void load(const Row& row, int32_t column, Chunk& low, Chunk& high) const {
    const uint16_t* const from = z + row.of.position * 2 * int64_t{inner} + (interleaved ? 2 * column : column);
    if (row.of.used) {
      Packed(from).widen(low);
      Packed(from + (interleaved ? chunk_size : inner)).widen(high);
    } else {
      MOE_UNLEARN_UNROLL
      for (int j = 0; j < chunk_size; ++j) low[j] = high[j] = 0;
    }
  }

  MOE_UNLEARN_DEVICE void store(Row& row, int32_t column, Chunk& da) const {
    if (!row.of.exists || column >= inner) return;
    Chunk low, high, a;
    load(row, column, low, high);
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j) {
      float& g = interleaved ? (j < 4 ? low : high)[j % 4 * 2] : low[j];
      float& u = interleaved ? (j < 4 ? low : high)[j % 4 * 2 + 1] : high[j];
      const auto p = gate.parts(g, u);
      a[j] = p.value * p.factor;
      row.total += da[j] * a[j];
      a[j] *= row.weight;
      float d_gate, d_up;
      gate.backward(g, u, da[j] * row.weight, p, d_gate, d_up);
      g = d_gate, u = d_up;
    }
    if (scaled) Packed(a).store(scaled + row.of.position * int64_t{inner} + column);
    if (!dz) return;
    uint16_t* const to = dz + row.of.position * 2 * int64_t{inner} + (interleaved ? 2 * column : column);
    Packed(low).store(to);
    Packed(high).store(to + (interleaved ? chunk_size : inner));
  }

  template <class Group>
  MOE_UNLEARN_DEVICE void finish(const Group& group, Row& row, int32_t column_tile) const {
    const int lane = group.thread() % warp_size;
    MOE_UNLEARN_UNROLL
    for (int distance = 1; distance < 4; distance *= 2) row.total += group.shuffle(row.total, lane ^ distance);
    if (partial && row.of.exists && lane % 4 == 0) partial[column_tile * int64_t{rows} + row.of.position] = row.total;
  }
};

}  // namespace moe_unlearn
