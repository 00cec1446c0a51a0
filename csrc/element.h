// The arithmetic of single elements: float dtypes as float32, WAGLE's score, stochastic rounding, SGD and AdamW.
// No torch, no loops, no state; usable from CPU and CUDA code, and the same bits on both: a fused multiply-add is
// written out, and both compilers are told to make none of their own.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MOE_UNLEARN_ELEMENT __host__ __device__ __forceinline__
#else
#define MOE_UNLEARN_ELEMENT inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define MOE_UNLEARN_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // the host's pass over device code
#define MOE_UNLEARN_UNROLL
#else
#define MOE_UNLEARN_UNROLL _Pragma("GCC unroll 32")
#endif

namespace moe_unlearn {

/// What lies in memory. `word` is a packed mask word, `none` an absent tensor.
enum class Dtype : int { none, float32, bfloat16, float16, word };

MOE_UNLEARN_ELEMENT float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

MOE_UNLEARN_ELEMENT uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}

// ---- float32 from and to the bits of a dtype, to the nearest -----------------------------------------------

template <Dtype D>
MOE_UNLEARN_ELEMENT float widen(uint32_t bits) {
  if constexpr (D == Dtype::bfloat16) return float_of(bits << 16);
  if constexpr (D == Dtype::float16) {
    const uint32_t magnitude = bits & 0x7FFF, sign = (bits & 0x8000) << 16;
    const uint32_t denormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    const uint32_t finite = magnitude < 0x400 ? denormal : (magnitude << 13) + (112u << 23);
    return float_of(sign | (magnitude >= 0x7C00 ? magnitude << 13 | 0x7F800000 : finite));
  }
  return float_of(bits);
}

template <Dtype D>
MOE_UNLEARN_ELEMENT uint32_t narrow(float value) {
  const uint32_t bits = bits_of(value);
  if constexpr (D == Dtype::bfloat16)
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  if constexpr (D == Dtype::float16) {
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    // the last bit of 0.5f is half's smallest denormal: the sum is rounded where half rounds
    const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
    const uint32_t finite = magnitude < 0x38800000 ? denormal : normal;
    const uint32_t infinite = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
    return (bits >> 16 & 0x8000) | (magnitude >= 0x47800000 ? infinite : finite);
  }
  return bits;
}

template <Dtype D>
MOE_UNLEARN_ELEMENT float round_to(float value) {
  return widen<D>(narrow<D>(value));
}

/// round_to<A> inside a rule. Operands of dtype A have no low bits, so nor have the NaNs that come of them, and
/// the carry of rounding cannot run through one: bfloat16 needs no case for NaN.
template <Dtype A>
MOE_UNLEARN_ELEMENT float rounded(float value) {
  if constexpr (A == Dtype::bfloat16) {
    const uint32_t bits = bits_of(value);
    return float_of((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
  }
  return round_to<A>(value);
}

// ---- WAGLE's score ------------------------------------------------------------------------------------------

MOE_UNLEARN_ELEMENT float score_of(float weight, float grad_forget, float grad_retain, float gamma) {
  return (weight - grad_retain / gamma) * grad_forget;
}

/// |score| as bits: they order as the magnitudes do.
MOE_UNLEARN_ELEMENT uint32_t magnitude_bits(float score) { return bits_of(score) & 0x7FFFFFFF; }

// ---- Stochastic rounding -----------------------------------------------------------------------------------

/// The random bits of a weight, and of its moments: the high half those of the first one, the low half of the second.
struct RandomWords {
  uint32_t weight, moments;

  template <int moment>
  MOE_UNLEARN_ELEMENT uint32_t half() const {
    return moment == 0 ? moments >> 16 : moments & 0xFFFF;
  }
};

/// Words 0 and 1 of Philox4x32-10 (Salmon et al., SC 2011) at counter (index, step) and key (seed, parameter id), of
/// which the low words count. Lane holds the counter's words: uint32_t, or uint64_t where that vectorises better.
template <class Lane = uint32_t>
MOE_UNLEARN_ELEMENT RandomWords philox(uint64_t index, uint64_t step, uint32_t seed, uint32_t parameter_id) {
  constexpr uint64_t low = 0xFFFFFFFF;
  auto c0 = static_cast<Lane>(index & low), c1 = static_cast<Lane>(index >> 32);
  auto c2 = static_cast<Lane>(step & low), c3 = static_cast<Lane>(step >> 32);
  MOE_UNLEARN_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53, p1 = uint64_t{c2} * 0xCD9E8D57;
    c0 = static_cast<Lane>(p1 >> 32) ^ c1 ^ seed;
    c1 = static_cast<Lane>(p1 & low);
    c2 = static_cast<Lane>(p0 >> 32) ^ c3 ^ parameter_id;
    c3 = static_cast<Lane>(p0 & low);
    seed += 0x9E3779B9;
    parameter_id += 0xBB67AE85;
  }
  return {static_cast<uint32_t>(c0), static_cast<uint32_t>(c1)};
}

/// `value` cut to bfloat16 after adding 16 random bits below it; NaN and infinity as they are.
MOE_UNLEARN_ELEMENT float round_stochastic(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  return finite ? float_of((bits + (random & 0xFFFF)) & 0xFFFF0000) : value;
}

// ---- Packed moments: blocks of 8-bit codes with one scale, as ops/moments.py specifies ----------------------

constexpr int moment_block = 64;

template <class Integer>
MOE_UNLEARN_ELEMENT Integer code_bytes(Integer width) {  // of a row, before its scales
  return (width + 3) / 4 * 4;
}

/// How a block's moments of one kind, 0 (momentum and the first) or 1 (the second), are coded with its scale.
template <int moment>
struct Codes {
  static constexpr float limit = moment == 0 ? 127.0f : 255.0f;
  static constexpr uint32_t infinite = 0x7F800000;
  float scale;
  bool usable;  // whether numbers can be divided by it

  MOE_UNLEARN_ELEMENT explicit Codes(float scale) : scale(scale), usable(bits_of(scale) - 1 < infinite - 1) {}

  /// For numbers whose largest magnitude has these bits.
  MOE_UNLEARN_ELEMENT explicit Codes(uint32_t most)
      : Codes(most < infinite ? float_of(most) / limit : float_of(infinite)) {}

  /// The number that stands for a moment.
  static MOE_UNLEARN_ELEMENT float number(float value) { return moment == 0 ? value : sqrtf(value); }

  MOE_UNLEARN_ELEMENT float widen(uint32_t code) const {
    const auto integer = moment == 0 ? static_cast<int32_t>(code << 24) >> 24 : static_cast<int32_t>(code);
    const float number = static_cast<float>(integer) * scale;
    return moment == 0 ? number : number * number;
  }

  MOE_UNLEARN_ELEMENT uint32_t code(float number, uint32_t random) const {
    float place = number / scale + static_cast<float>(static_cast<int32_t>(random)) * 0x1p-16f;
    place = usable ? place : 0.0f;
    place = place > limit ? limit : place < -limit ? -limit : place;
    auto floor = static_cast<int32_t>(place);
    floor -= static_cast<float>(floor) > place;
    if (moment == 1) floor += usable & (floor == 0) & (number > 0);  // without a branch, which keeps loops scalar
    return static_cast<uint32_t>(floor) & 0xFF;
  }
};

// ---- Update rules --------------------------------------------------------------------------------------------

/// Which update of which parameter this is, and how its result is rounded: `Update` of masked_update.py.
struct Update {
  int64_t step;
  bool stochastic;
  int64_t seed, parameter_id, first_row;
};

// Every operation of a rule is rounded to dtype A (float32: not at all). A rule comes in parts, so that a CPU kernel
// can run each part over many elements; `apply` is one element's whole update.

struct Sgd {
  static constexpr int states = 1;
  float negative_lr, momentum, grad_scale, weight_decay;
  bool nesterov, first, has_state;  // without momentum a buffer is neither read nor written

  Sgd(double lr, double momentum, double grad_scale, double weight_decay, bool nesterov, int64_t step)
      : negative_lr(static_cast<float>(-lr)),
        momentum(static_cast<float>(momentum)),
        grad_scale(static_cast<float>(grad_scale)),
        weight_decay(static_cast<float>(weight_decay)),
        nesterov(nesterov),
        first(step == 1),
        has_state(momentum != 0) {}

  template <Dtype A>
  MOE_UNLEARN_ELEMENT float decayed(float w, float g) const {
    return rounded<A>(fmaf(weight_decay, w, g));
  }
  template <Dtype A>
  MOE_UNLEARN_ELEMENT float moment(float g, float b) const {
    return rounded<A>(fmaf(grad_scale, g, rounded<A>(b * momentum)));
  }
  template <Dtype A>
  MOE_UNLEARN_ELEMENT float ahead(float g, float b) const {
    return rounded<A>(fmaf(momentum, b, g));
  }
  template <Dtype A>
  MOE_UNLEARN_ELEMENT float moved(float w, float g) const {
    return rounded<A>(fmaf(negative_lr, g, w));
  }

  /// The new weight w and momentum s[0].
  template <Dtype A>
  MOE_UNLEARN_ELEMENT void apply(float& w, float g, float (&s)[2]) const {
    if (weight_decay != 0) g = decayed<A>(w, g);
    if (has_state) {
      s[0] = first ? g : moment<A>(g, s[0]);
      g = nesterov ? ahead<A>(g, s[0]) : s[0];
    }
    w = moved<A>(w, g);
  }
};

struct AdamW {
  static constexpr int states = 2;
  static constexpr bool has_state = true;
  float decay, lerp, beta2, one_minus_beta2, root_correction, eps, step_size;

  AdamW(double decay, double beta1, double beta2, double root_correction, double eps, double step_size)
      : decay(static_cast<float>(decay)),
        lerp(static_cast<float>(1 - beta1)),
        beta2(static_cast<float>(beta2)),
        one_minus_beta2(static_cast<float>(1 - beta2)),
        root_correction(static_cast<float>(root_correction)),
        eps(static_cast<float>(eps)),
        step_size(static_cast<float>(step_size)) {}

  template <Dtype A>
  MOE_UNLEARN_ELEMENT float decayed(float w) const {
    return rounded<A>(w * decay);
  }
  template <Dtype A>
  MOE_UNLEARN_ELEMENT float first_moment(float g, float m) const {
    // torch.lerp starts from the nearer end
    const bool near = lerp < 0.5f && lerp > -0.5f;
    return rounded<A>(fmaf(near ? lerp : lerp - 1, g - m, near ? m : g));
  }
  template <Dtype A>
  MOE_UNLEARN_ELEMENT float second_moment(float g, float v) const {
    return rounded<A>(fmaf(one_minus_beta2 * g, g, rounded<A>(v * beta2)));
  }
  template <Dtype A>
  MOE_UNLEARN_ELEMENT float moved(float w, float m, float v) const {
    const float root = rounded<A>(rounded<A>(sqrtf(v)) / root_correction);
    // torch rounds a number that it adds, but none by which it multiplies or divides
    return rounded<A>(w + step_size * m / rounded<A>(root + rounded<A>(eps)));
  }

  /// The new weight w and moments s.
  template <Dtype A>
  MOE_UNLEARN_ELEMENT void apply(float& w, float g, float (&s)[2]) const {
    if (decay != 1) w = decayed<A>(w);
    s[0] = first_moment<A>(g, s[0]);
    s[1] = second_moment<A>(g, s[1]);
    w = moved<A>(w, s[0], s[1]);
  }
};

}  // namespace moe_unlearn
