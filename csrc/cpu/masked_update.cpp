// masked_update: SGD and AdamW in place under packed masks, one mask word (32 weights of a row) at a time.
//
// A zero word is skipped with its 32 gradients, weights and moments unread. Arithmetic is in float32; where the
// state is in a narrow dtype every operation is rounded to it, as torch.optim does (A below). Each weight is
// computed by itself, so threads and order change no bit.

#include "cpu/common.h"

namespace moe_unlearn {
namespace {

constexpr int64_t grain = 512;  // words per thread at least

struct Operands {
  Rows param, grad, mask, master;
  Rows state[2];
  const int64_t* slices;       // slice of param each slice of grad stands for, or null
  int64_t rows_per_slice;
  int64_t step, seed, parameter_id;
  bool stochastic;
};

/// round_to<A> inside a rule. Operands of dtype A have no low bits, so nor have the NaNs that come of them, and
/// the carry of rounding cannot run through one: bfloat16 needs no case for NaN.
template <ScalarType A>
MOE_UNLEARN_INLINE float rounded(float value) {
  if (A != ScalarType::BFloat16) return round_to<A>(value);
  const uint32_t bits = float_to_bits(value);
  return bits_to_float((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
}

struct Sgd {
  static constexpr int states = 1;
  float negative_lr, momentum, grad_scale, weight_decay;
  bool nesterov, first, has_state;  // without momentum a buffer is neither read nor written

  /// The new weights w and momenta s[0]; g is scratch.
  template <ScalarType A>
  MOE_UNLEARN_INLINE void apply(Word& w, Word& g, Word (&s)[2]) const {
    Word& b = s[0];
    if (weight_decay != 0)
      for (int j = 0; j < word_bits; ++j) g[j] = rounded<A>(__builtin_fmaf(weight_decay, w[j], g[j]));
    if (momentum != 0) {
      if (first)
        for (int j = 0; j < word_bits; ++j) b[j] = g[j];
      else
        for (int j = 0; j < word_bits; ++j)
          b[j] = rounded<A>(__builtin_fmaf(grad_scale, g[j], rounded<A>(b[j] * momentum)));
      if (nesterov)
        for (int j = 0; j < word_bits; ++j) g[j] = rounded<A>(__builtin_fmaf(momentum, b[j], g[j]));
      else
        for (int j = 0; j < word_bits; ++j) g[j] = b[j];
    }
    for (int j = 0; j < word_bits; ++j) w[j] = rounded<A>(__builtin_fmaf(negative_lr, g[j], w[j]));
  }
};

struct AdamW {
  static constexpr int states = 2;
  static constexpr bool has_state = true;
  float decay, lerp, beta2, one_minus_beta2, root_correction, eps, step_size;

  template <ScalarType A>
  MOE_UNLEARN_INLINE void apply(Word& w, Word& g, Word (&s)[2]) const {
    Word &m = s[0], &v = s[1];
    // torch.lerp starts from the nearer end
    const bool near = lerp < 0.5f && lerp > -0.5f;
    const float weight = near ? lerp : lerp - 1;
    if (decay != 1)
      for (int j = 0; j < word_bits; ++j) w[j] = rounded<A>(w[j] * decay);
    for (int j = 0; j < word_bits; ++j)
      m[j] = rounded<A>(__builtin_fmaf(weight, g[j] - m[j], near ? m[j] : g[j]));
    for (int j = 0; j < word_bits; ++j) {
      const float old = rounded<A>(v[j] * beta2);
      v[j] = rounded<A>(__builtin_fmaf(one_minus_beta2 * g[j], g[j], old));
    }
    for (int j = 0; j < word_bits; ++j) {
      const float root = rounded<A>(rounded<A>(__builtin_sqrtf(v[j])) / root_correction);
      w[j] = rounded<A>(w[j] + step_size * m[j] / rounded<A>(root + eps));
    }
  }
};

/// Cuts w to bfloat16 after adding 16 random bits below it: word 0 of Philox4x32-10 (Salmon et al., SC 2011) at
/// counter (flat index, step) and key (seed, parameter id).
MOE_UNLEARN_INLINE void round_stochastic(Word& w, int64_t index, const Operands& o) {
  constexpr uint64_t low_half = 0xFFFFFFFF;
  const auto step = static_cast<uint64_t>(o.step);
  uint32_t random[word_bits];
  for (int j = 0; j < word_bits; ++j) {
    const uint64_t counter = static_cast<uint64_t>(index) + static_cast<uint64_t>(j);
    // 32-bit words in lanes of 64: one product gives both of its halves
    uint64_t c0 = counter & low_half, c1 = counter >> 32, c2 = step & low_half, c3 = step >> 32;
    uint32_t k0 = static_cast<uint32_t>(o.seed), k1 = static_cast<uint32_t>(o.parameter_id);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = c0 * 0xD2511F53, p1 = c2 * 0xCD9E8D57;
      c0 = p1 >> 32 ^ c1 ^ k0;
      c1 = p1 & low_half;
      c2 = p0 >> 32 ^ c3 ^ k1;
      c3 = p0 & low_half;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    random[j] = static_cast<uint32_t>(c0) & 0xFFFF;
  }
  for (int j = 0; j < word_bits; ++j) {
    const uint32_t bits = float_to_bits(w[j]);
    const bool finite = (bits & 0x7F800000) != 0x7F800000;
    w[j] = bits_to_float(choose(finite, (bits + random[j]) & 0xFFFF0000, bits));
  }
}

/// The words [begin, end) of grad by `rule` in arithmetic of dtype A. `uniform`: every operand has dtype A and
/// lies contiguous along its rows, with neither master nor stochastic rounding; then the compiler knows it all.
template <class Rule, ScalarType A, bool uniform>
MOE_UNLEARN_INLINE void update_words(const Operands& o, const Rule& rule, int64_t begin, int64_t end) {
  const auto dtype = [&](const Rows& rows) MOE_UNLEARN_INLINE_LAMBDA { return uniform ? A : rows.dtype; };
  const auto step = [&](const Rows& rows) MOE_UNLEARN_INLINE_LAMBDA {
    return uniform ? static_cast<int64_t>(sizeof(typename Format<A>::Bits)) : rows.step;
  };
  const int64_t words = o.grad.words(), width = o.grad.width;
  const int states = rule.has_state ? Rule::states : 0;
  for (int64_t row = begin / words; row * words < end; ++row) {
    const int64_t slice = o.slices ? row / o.rows_per_slice : 0;
    const int64_t param_row = o.slices ? o.slices[slice] * o.rows_per_slice + row % o.rows_per_slice : row;
    char *const param = o.param.row(param_row), *const grad = o.grad.row(row);
    char* const mask = o.mask ? o.mask.row(row) : nullptr;
    char* const master = !uniform && o.master ? o.master.row(row) : nullptr;
    char* const state[2] = {o.state[0] ? o.state[0].row(row) : nullptr, o.state[1] ? o.state[1].row(row) : nullptr};

    const int64_t last = std::min(end - row * words, words);
    for (int64_t word = std::max<int64_t>(begin - row * words, 0); word < last; ++word) {
      uint32_t bits = 0xFFFFFFFF;
      if (mask) std::memcpy(&bits, mask + word * o.mask.step, sizeof(bits));
      if (bits == 0) continue;
      const int64_t first = word * word_bits, n = std::min<int64_t>(width - first, word_bits);
      const auto at = [&](const Rows& rows, char* row) MOE_UNLEARN_INLINE_LAMBDA { return row + first * step(rows); };

      Word w, g, s[2];
      load(g, dtype(o.grad), at(o.grad, grad), step(o.grad), n);
      if (A != ScalarType::Float && dtype(o.grad) != A)
        for (int j = 0; j < word_bits; ++j) g[j] = round_to<A>(g[j]);
      if (master)
        load(w, ScalarType::Float, at(o.master, master), o.master.step, n);
      else
        load(w, dtype(o.param), at(o.param, param), step(o.param), n);
      for (int i = 0; i < states; ++i) load(s[i], dtype(o.state[i]), at(o.state[i], state[i]), step(o.state[i]), n);

      rule.template apply<A>(w, g, s);

      constexpr bool is_rounded = A != ScalarType::Float;  // then all that is written has dtype A
      for (int i = 0; i < states; ++i)
        store<is_rounded>(s[i], dtype(o.state[i]), at(o.state[i], state[i]), step(o.state[i]), bits, n);
      if (master) store(w, ScalarType::Float, at(o.master, master), o.master.step, bits, n);
      if (!uniform && o.stochastic) round_stochastic(w, param_row * width + first, o);
      store<is_rounded>(w, dtype(o.param), at(o.param, param), step(o.param), bits, n);
    }
  }
}

template <class Rule, ScalarType A>
void run(const Operands& o, const Rule& rule) {
  bool uniform = !o.master && !o.stochastic;
  for (const Rows* rows : {&o.param, &o.grad, &o.state[0], &o.state[1]})
    uniform &= !*rows || (rows->dtype == A && rows->step == rows->item);
  parallel(o.grad.count * o.grad.words(), grain, [&](int64_t begin, int64_t end) {
    if (uniform)
      for_this_cpu<update_words<Rule, A, true>, const Operands&, const Rule&>(o, rule, begin, end);
    else
      for_this_cpu<update_words<Rule, A, false>, const Operands&, const Rule&>(o, rule, begin, end);
  });
}

/// Runs `rule` in the arithmetic that the dtypes ask for (the module docstring of masked_update.py).
template <class Rule>
void update(const Operands& o, const Rule& rule) {
  bool narrow = !o.master && !o.stochastic;
  for (const Rows& state : o.state) narrow &= !state || state.dtype == o.param.dtype;
  if (narrow && o.param.dtype == ScalarType::BFloat16)
    run<Rule, ScalarType::BFloat16>(o, rule);
  else if (narrow && o.param.dtype == ScalarType::Half)
    run<Rule, ScalarType::Half>(o, rule);
  else
    run<Rule, ScalarType::Float>(o, rule);
}

Operands operands(
    const Tensor& param, const Tensor& grad, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& master, const std::optional<Tensor>& slices, bool stochastic, int64_t step,
    int64_t seed, int64_t parameter_id) {
  Operands o{};
  param.mutable_data_ptr();  // a lazily copied tensor becomes its own before it is written
  o.param = Rows(param), o.grad = Rows(grad), o.mask = Rows(mask), o.master = Rows(master);
  o.step = step, o.seed = seed, o.parameter_id = parameter_id;
  o.stochastic = stochastic && param.scalar_type() == ScalarType::BFloat16;
  if (slices.has_value()) {
    STD_TORCH_CHECK(slices->is_contiguous() && param.dim() > 1, "slices must be contiguous, rows at least 1-d");
    o.slices = slices->const_data_ptr<int64_t>();
    o.rows_per_slice = std::max<int64_t>(o.grad.count / std::max<int64_t>(slices->numel(), 1), 1);
    for (int64_t i = 0; i < slices->numel(); ++i)
      STD_TORCH_CHECK(
          o.slices[i] >= 0 && o.slices[i] < param.size(0), "slice ", o.slices[i], " of ", param.size(0));
  }
  return o;
}

void masked_sgd_(
    const Tensor& param, const Tensor& grad, const std::optional<Tensor>& momentum_buffer,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& master, const std::optional<Tensor>& slices,
    double lr, double momentum, double grad_scale, double weight_decay, bool nesterov, int64_t step,
    bool stochastic, int64_t seed, int64_t parameter_id) {
  Operands o = operands(param, grad, mask, master, slices, stochastic, step, seed, parameter_id);
  o.state[0] = Rows(momentum_buffer);
  const Sgd rule{
      .negative_lr = static_cast<float>(-lr),
      .momentum = static_cast<float>(momentum),
      .grad_scale = static_cast<float>(grad_scale),
      .weight_decay = static_cast<float>(weight_decay),
      .nesterov = nesterov,
      .first = step == 1,
      .has_state = momentum != 0,
  };
  update(o, rule);
}

void masked_adamw_(
    const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& master, const std::optional<Tensor>& slices,
    double decay, double beta1, double beta2, double root_correction, double eps, double step_size, int64_t step,
    bool stochastic, int64_t seed, int64_t parameter_id) {
  Operands o = operands(param, grad, mask, master, slices, stochastic, step, seed, parameter_id);
  o.state[0] = Rows(exp_avg), o.state[1] = Rows(exp_avg_sq);
  const AdamW rule{
      .decay = static_cast<float>(decay),
      .lerp = static_cast<float>(1 - beta1),
      .beta2 = static_cast<float>(beta2),
      .one_minus_beta2 = static_cast<float>(1 - beta2),
      .root_correction = static_cast<float>(root_correction),
      .eps = static_cast<float>(eps),
      .step_size = static_cast<float>(step_size),
  };
  update(o, rule);
}

}  // namespace
}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("masked_sgd_", TORCH_BOX(&moe_unlearn::masked_sgd_));
  m.impl("masked_adamw_", TORCH_BOX(&moe_unlearn::masked_adamw_));
}
