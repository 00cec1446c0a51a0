// exp and tanh in float32 for loops that the compiler vectorises: the same bits on every instruction set, error about
// one unit in the last place.

#pragma once

#include "cpu/common.h"

#include <limits>

namespace moe_unlearn {

/// e^x, 0 where that would be denormal: 2^n of the nearest n, times a Taylor polynomial on |r| <= ln(2) / 2.
MOE_UNLEARN_INLINE float exp_float(float x) {
  constexpr float round_to_integer = 0x1.8p23f, lowest = -87.0f, highest = 88.72f;
  // by choices that let NaN through
  const float bounded = x < lowest ? lowest : x > highest ? highest : x;
  const float shifted = __builtin_fmaf(bounded, 1.44269504f, round_to_integer);
  const float n = shifted - round_to_integer;
  // ln(2) in two parts, the first of so few bits that its product with n is exact
  const float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, bounded));
  float p = 1.0f / 5040;
  p = __builtin_fmaf(p, r, 1.0f / 720);
  p = __builtin_fmaf(p, r, 1.0f / 120);
  p = __builtin_fmaf(p, r, 1.0f / 24);
  p = __builtin_fmaf(p, r, 1.0f / 6);
  p = __builtin_fmaf(p, r, 0.5f);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  // half of 2^n, since 2^128 is infinite while e^88.72 is not
  const float power = float_of((bits_of(shifted) << 23) + 0x3F000000);
  const float result = p * power * 2;
  return x < lowest ? 0.0f : x > highest ? std::numeric_limits<float>::infinity() : result;
}

MOE_UNLEARN_INLINE float tanh_float(float x) {
  const float magnitude = float_of(bits_of(x) & 0x7FFFFFFF), y = x * x;
  // near 0 a polynomial fitted to (tanh(x) / x - 1) / x^2: the quotient would lose what 1 - e cancels
  float series = 0x1.2ceae2p-9f;
  series = __builtin_fmaf(series, y, -0x1.118358p-7f);
  series = __builtin_fmaf(series, y, 0x1.64adccp-6f);
  series = __builtin_fmaf(series, y, -0x1.ba0912p-5f);
  series = __builtin_fmaf(series, y, 0x1.1110eap-3f);
  series = __builtin_fmaf(series, y, -0x1.555556p-2f);
  const float near = __builtin_fmaf(series * y, magnitude, magnitude);
  const float e = exp_float(-2 * magnitude), far = (1 - e) / (1 + e);
  return float_of(bits_of(magnitude < 0.625f ? near : far) | (bits_of(x) & 0x80000000));
}

}  // namespace moe_unlearn
