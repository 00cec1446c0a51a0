// What becomes of dW, chunk by chunk, in expert_wgrad. Row m * M + i is row i of the m-th listed expert. All lanes of a
// warp call an epilogue, for neighbouring chunks; one outside of dW has no elements. It is false where the expert does
// not exist; where the mask `kept` is 0 it may be given 0 for dW.

#pragma once

#include "cuda/masked_update.cuh"

namespace moe_unlearn {

/// out = dW, 0 where the mask bit is 0; or out += dW where it is 1, rounded once.
struct WgradStore {
  Rows out, mask;
  bool add;

  MOE_UNLEARN_DEVICE const Rows& kept() const { return mask; }

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

  template <class Group>
  MOE_UNLEARN_DEVICE bool operator()(
      const Group& group, const Place& place, int64_t width, const Chunk& gradient) const {
    return update_coded_chunk(group, o, rule, place, width, [&](Chunk& g) { copy_gradient(g, gradient); });
  }
};

}  // namespace moe_unlearn
