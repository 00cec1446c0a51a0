// What becomes of dW, chunk by chunk, in expert_wgrad. Row m * M + i is row i of the m-th listed expert. All lanes of a
// warp call an epilogue, for neighbouring chunks; one outside of dW has no elements. It is false where the expert does
// not exist; where the mask `kept` is 0 it may be given 0 for dW. `prefetch` asks for what it will read of a row of a
// tile.

#pragma once

#include "cuda/hopper.cuh"
#include "cuda/masked_update.cuh"

namespace moe_unlearn {

/// Asks L2 for `n` elements of a row from `first` on, where they can be moved 16 bytes at a time.
MOE_UNLEARN_DEVICE void prefetch(const Rows& rows, const char* row, int64_t first, int n) {
  if (rows.vector) hopper::prefetch(row + first * rows.stride, n * static_cast<int>(rows.stride));
}

/// Whether the mask has a bit among the elements of a place, which begins with a word.
MOE_UNLEARN_DEVICE bool has_chosen(const Rows& mask, const Place& place) {
  if (!mask) return true;
  const char* const from = mask.row(place.row) + place.first / word_bits * mask.stride;
  uint32_t bits = 0;
  for (int before = 0; before < place.n; before += word_bits) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(from + before / word_bits * mask.stride);
    bits |= place.n - before < word_bits ? word & ((1u << (place.n - before)) - 1) : word;
  }
  return bits != 0;
}

/// Asks L2 for the weights of a place if one of them trains, and for their state if it `has_state` that is not packed.
MOE_UNLEARN_DEVICE void prefetch(const Operands& o, bool has_state, const Place& place) {
  int64_t param_row;
  if (!has_chosen(o.mask, place) || !find_param_row(param_row, o, place.row)) return;
  prefetch(o.param, o.param.row(param_row), place.first, place.n);
  if (o.master) prefetch(o.master, o.master.row(place.row), place.first, place.n);
  MOE_UNLEARN_UNROLL
  for (const Rows& state : o.state)
    if (has_state && state && !o.packed()) prefetch(state, state.row(place.row), place.first, place.n);
}

/// out = dW, 0 where the mask bit is 0; or out += dW where it is 1, rounded once.
struct WgradStore {
  Rows out, mask;
  bool add;

  MOE_UNLEARN_DEVICE const Rows& kept() const { return mask; }
  MOE_UNLEARN_DEVICE void prefetch(const Place& place) const {
    if (add && has_chosen(mask, place)) moe_unlearn::prefetch(out, out.row(place.row), place.first, place.n);
  }

  template <class Group>
  MOE_UNLEARN_DEVICE bool operator()(const Group&, const Place& place, int64_t, const Chunk& gradient) const {
    const uint32_t chosen = chosen_elements(mask, place), written = add ? chosen : (1u << place.n) - 1;
    if (written == 0) return true;
    char* const to = out.row(place.row);
    Raw raw{};
    Chunk value = {};
    if (add) {
      raw = load(out, to, place);
      widen(value, raw, out.dtype);
    }
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j) value[j] = chosen >> j & 1 ? (add ? value[j] + gradient[j] : gradient[j]) : 0;
    narrow<false>(raw, value, out.dtype, written);
    store(out, to, place, raw, written);
    return true;
  }
};

MOE_UNLEARN_DEVICE void copy_gradient(Chunk& g, const Chunk& gradient) {
  MOE_UNLEARN_UNROLL
  for (int j = 0; j < chunk_size; ++j) g[j] = gradient[j];
}

/// The masked update of weights with dW, which is float32 until the update rounds it.
template <class Rule, Dtype A>
struct WgradUpdate {
  Operands o;
  Rule rule;

  MOE_UNLEARN_DEVICE const Rows& kept() const { return o.mask; }
  MOE_UNLEARN_DEVICE void prefetch(const Place& place) const { moe_unlearn::prefetch(o, rule.has_state, place); }

  template <class Group>
  MOE_UNLEARN_DEVICE bool operator()(
      const Group&, const Place& place, int64_t width, const Chunk& gradient) const {
    const uint32_t chosen = chosen_elements(o.mask, place);
    if (chosen == 0) return true;
    return update_chunk<A>(o, rule, place, chosen, width, [&](Chunk& g) { copy_gradient(g, gradient); });
  }
};

/// The same with packed state: a tile's columns begin and end between blocks of moments.
template <class Rule>
struct WgradPackedUpdate {
  Operands o;
  Rule rule;

  MOE_UNLEARN_DEVICE const Rows& kept() const { return o.mask; }
  MOE_UNLEARN_DEVICE void prefetch(const Place& place) const { moe_unlearn::prefetch(o, rule.has_state, place); }

  template <class Group>
  MOE_UNLEARN_DEVICE bool operator()(
      const Group& group, const Place& place, int64_t width, const Chunk& gradient) const {
    return update_coded_chunk(group, o, rule, place, width, [&](Chunk& g) { copy_gradient(g, gradient); });
  }
};

}  // namespace moe_unlearn
