// exp and tanh in float32 for loops that the compiler vectorises: the same bits on every instruction set, error about
// one unit in the last place.

#pragma once

#include "cpu/common.h"

namespace moe_unlearn {

/// exp(x) for x up to 88; 0 below -87, where it would be denormal.
MOE_UNLEARN_INLINE float exp_float(float x) {
  constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, held in the low bits
  const float shifted = __builtin_fmaf(x, 0x1.715476p0f, magic), n = shifted - magic;
  // ln 2 in two parts
  const float r = __builtin_fmaf(n, 0x1.05c61p-29f, __builtin_fmaf(n, -0x1.62e43p-1f, x));
  float series = 1.0f / 5040;
  series = __builtin_fmaf(series, r, 1.0f / 720);
  series = __builtin_fmaf(series, r, 1.0f / 120);
  series = __builtin_fmaf(series, r, 1.0f / 24);
  series = __builtin_fmaf(series, r, 1.0f / 6);
  series = __builtin_fmaf(series, r, 0.5f);
  series = __builtin_fmaf(series * r, r, r) + 1.0f;
  const float power = bits_to_float((float_to_bits(shifted) + 127) << 23);
  return x < -87.0f ? 0.0f : series * power;
}

MOE_UNLEARN_INLINE float tanh_float(float x) {
  const float magnitude = bits_to_float(float_to_bits(x) & 0x7FFFFFFF), y = x * x;
  // near 0 a polynomial fitted to (tanh(x) / x - 1) / x^2: the quotient would lose what 1 - e cancels
  float series = 0x1.2ceae2p-9f;
  series = __builtin_fmaf(series, y, -0x1.118358p-7f);
  series = __builtin_fmaf(series, y, 0x1.64adccp-6f);
  series = __builtin_fmaf(series, y, -0x1.ba0912p-5f);
  series = __builtin_fmaf(series, y, 0x1.1110eap-3f);
  series = __builtin_fmaf(series, y, -0x1.555556p-2f);
  const float near = __builtin_fmaf(series * y, magnitude, magnitude);
  const float e = exp_float(-2 * magnitude), far = (1 - e) / (1 + e);
  return bits_to_float(float_to_bits(magnitude < 0.625f ? near : far) | (float_to_bits(x) & 0x80000000));
}

}  // namespace moe_unlearn
