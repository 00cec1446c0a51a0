// The activations between an expert's projections, of 32 elements at a time in float32, and their gradients:
// `Gate` of expert_mlp.py. silu and gelu_tanh are both x * sigmoid(v(x)).

#pragma once

#include "cpu/vector_math.h"

#include <cmath>
#include <string>

namespace moe_unlearn {

enum class Activation { silu, gelu, gelu_tanh, relu, relu2 };

inline Activation activation_named(const std::string& name) {
  constexpr const char* names[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2"};
  const auto* found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "no activation is called ", name);
  return static_cast<Activation>(found - names);
}

struct Gate {
  float alpha, limit, shift;
  bool interleaved, gated;
};

struct ValueAndSlope {
  float value, slope;
};

/// x * sigmoid(v), v' being the slope of v at x.
MOE_UNLEARN_INLINE ValueAndSlope sigmoid_gated(float x, float v, float v_slope) {
  const float e = exp_float(-v), s = 1 / (1 + e);
  const float rest = s < 0.5f ? 1 - s : e * s;  // 1 - s without cancellation
  return {x * s, s + x * v_slope * s * rest};
}

template <Activation activation>
MOE_UNLEARN_INLINE ValueAndSlope activate(float x, float alpha) {
  switch (activation) {
    case Activation::silu:
      return sigmoid_gated(x, alpha * x, alpha);
    case Activation::gelu: {
      const float cdf = 0.5f * (1 + __builtin_erff(x * 0.707106781f));
      return {x * cdf, cdf + x * exp_float(-0.5f * x * x) * 0.398942280f};
    }
    case Activation::gelu_tanh: {
      // (1 + tanh(u)) / 2 is sigmoid(2 u)
      constexpr float scale = 1.59576912f, cubic = 0.044715f;
      return sigmoid_gated(x, scale * (x + cubic * x * x * x), scale * (1 + 3 * cubic * x * x));
    }
    case Activation::relu:
      return {x < 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f};
    case Activation::relu2: {
      const float positive = x < 0 ? 0.0f : x;
      return {positive * positive, 2 * positive};
    }
  }
  __builtin_unreachable();
}

MOE_UNLEARN_INLINE float clamp_above(float x, float limit) { return x > limit ? limit : x; }
MOE_UNLEARN_INLINE float clamp_both(float x, float limit) { return x < -limit ? -limit : clamp_above(x, limit); }

/// out = the activations of the pre-activations gate (and up).
template <Activation activation>
MOE_UNLEARN_INLINE void apply_gate(const Gate& how, const Word& gate, const Word& up, Word& out) {
  for (int j = 0; j < word_bits; ++j)
    out[j] = activate<activation>(clamp_above(gate[j], how.limit), how.alpha).value;
  if (!how.gated) return;
  for (int j = 0; j < word_bits; ++j) out[j] *= clamp_both(up[j], how.limit) + how.shift;
}

/// The gradients of gate and up, in their places, from that of the activations; `out` as in apply_gate.
template <Activation activation>
MOE_UNLEARN_INLINE void apply_gate_backward(const Gate& how, Word& gate, Word& up, const Word& grad, Word& out) {
  Word slope;
  for (int j = 0; j < word_bits; ++j) {
    const auto both = activate<activation>(clamp_above(gate[j], how.limit), how.alpha);
    out[j] = both.value;
    slope[j] = both.slope;
  }
  // where a clamp is passed the gradient is 0, for NaN too; without a clamp a NaN is kept
  const bool open = how.limit == std::numeric_limits<float>::infinity();
  const auto cut = [&](float x, float d) MOE_UNLEARN_INLINE_LAMBDA { return open || x <= how.limit ? d : 0.0f; };
  if (!how.gated) {
    for (int j = 0; j < word_bits; ++j) gate[j] = cut(gate[j], grad[j] * slope[j]);
    return;
  }
  for (int j = 0; j < word_bits; ++j) {
    const float factor = clamp_both(up[j], how.limit) + how.shift;
    gate[j] = cut(gate[j], grad[j] * factor * slope[j]);
    up[j] = cut(std::fabs(up[j]), grad[j] * out[j]);
    out[j] *= factor;
  }
}

}  // namespace moe_unlearn
