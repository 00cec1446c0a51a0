// What becomes of dW, chunk by chunk, in expert_wgrad. Row m * M + i is row i of the m-th listed expert. An epilogue
// is false where that expert does not exist; where the mask `kept` is 0 it may be given 0 for dW.

#pragma once

#include "cuda/masked_update.cuh"

namespace moe_unlearn {

/// out = dW, 0 where the mask bit is 0; or out += dW where it is 1, rounded once.
struct WgradStore {
  Rows out, mask;
  bool add;

  MOE_UNLEARN_DEVICE const Rows& kept() const { return mask; }

  MOE_UNLEARN_DEVICE bool operator()(const Place& place, int64_t, const float* gradient) const {
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

/// The masked update of weights with dW, which is float32 until the update rounds it.
template <class Rule, Dtype A>
struct WgradUpdate {
  Operands o;
  Rule rule;

  MOE_UNLEARN_DEVICE const Rows& kept() const { return o.mask; }

  MOE_UNLEARN_DEVICE bool operator()(const Place& place, int64_t width, const float* gradient) const {
    const uint32_t chosen = chosen_elements(o.mask, place);
    if (chosen == 0) return true;
    const auto get_gradient = [&](Chunk& g) {
      MOE_UNLEARN_UNROLL
      for (int j = 0; j < chunk_size; ++j) g[j] = gradient[j];
    };
    return update_chunk<A>(o, rule, place, chosen, width, get_gradient);
  }
};

}  // namespace moe_unlearn
