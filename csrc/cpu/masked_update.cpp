// masked_update: SGD and AdamW in place under packed masks, one mask word (32 weights of a row) at a time.
//
// A zero word is skipped with its 32 gradients, weights and moments unread. Arithmetic is in float32; where the
// state is in a narrow dtype every operation is rounded to it, as torch.optim does (A below). Each weight, and where
// the state is packed each block of 64, is computed by itself, so threads and order change no bit.

#include "cpu/masked_update.h"

namespace moe_unlearn {
namespace {

constexpr int64_t grain = 512;  // words (or blocks) per thread at least
constexpr int64_t ahead = 1024;  // bytes: the prefetch of the hardware stops at every page

/// The new weights w and momenta s[0]; g is scratch.
template <Dtype A>
MOE_UNLEARN_INLINE void apply(const Sgd& rule, Word& w, Word& g, Word (&s)[2]) {
  Word& b = s[0];
  if (rule.weight_decay != 0)
    for (int j = 0; j < word_bits; ++j) g[j] = rule.decayed<A>(w[j], g[j]);
  if (rule.has_state) {
    if (rule.first)
      for (int j = 0; j < word_bits; ++j) b[j] = g[j];
    else
      for (int j = 0; j < word_bits; ++j) b[j] = rule.moment<A>(g[j], b[j]);
    if (rule.nesterov)
      for (int j = 0; j < word_bits; ++j) g[j] = rule.ahead<A>(g[j], b[j]);
    else
      for (int j = 0; j < word_bits; ++j) g[j] = b[j];
  }
  for (int j = 0; j < word_bits; ++j) w[j] = rule.moved<A>(w[j], g[j]);
}

/// The new weights w and moments s.
template <Dtype A>
MOE_UNLEARN_INLINE void apply(const AdamW& rule, Word& w, const Word& g, Word (&s)[2]) {
  Word &m = s[0], &v = s[1];
  if (rule.decay != 1)
    for (int j = 0; j < word_bits; ++j) w[j] = rule.decayed<A>(w[j]);
  for (int j = 0; j < word_bits; ++j) m[j] = rule.first_moment<A>(g[j], m[j]);
  for (int j = 0; j < word_bits; ++j) v[j] = rule.second_moment<A>(g[j], v[j]);
  for (int j = 0; j < word_bits; ++j) w[j] = rule.moved<A>(w[j], m[j], v[j]);
}

/// A word of operands of dtype A, dense along their rows.
struct Dense {
  char *param, *grad, *state[2];
  uint32_t bits;
};

/// The new weights and moments of a word in one loop, with nothing in memory but the operands.
template <ScalarType A, int states, class Rule>
MOE_UNLEARN_INLINE void update_dense(const Rule& rule, const Dense& word) {
  using Bits = typename Format<A>::Bits;
  constexpr Dtype D = Format<A>::dtype;
  auto *const w = reinterpret_cast<Bits*>(word.param), *const g = reinterpret_cast<Bits*>(word.grad);
  auto *const m = reinterpret_cast<Bits*>(word.state[0]), *const v = reinterpret_cast<Bits*>(word.state[1]);
  // what a rule leaves is rounded
  const auto in_bits = [](float x) MOE_UNLEARN_INLINE_LAMBDA {
    return A == ScalarType::BFloat16 ? bits_of(x) >> 16 : narrow<D>(x);
  };
#pragma GCC ivdep
  for (int j = 0; j < word_bits; ++j) {
    const bool chosen = word.bits >> j & 1;
    float value = widen<D>(w[j]), s[] = {states > 0 ? widen<D>(m[j]) : 0.0f, states > 1 ? widen<D>(v[j]) : 0.0f};
    rule.template apply<D>(value, widen<D>(g[j]), s);
    w[j] = static_cast<Bits>(choose(chosen, in_bits(value), w[j]));
    if (states > 0) m[j] = static_cast<Bits>(choose(chosen, in_bits(s[0]), m[j]));
    if (states > 1) v[j] = static_cast<Bits>(choose(chosen, in_bits(s[1]), v[j]));
  }
}

// Whether the word was updated: a choice left to the loop would keep it from vector registers, so the usual ones are
// made before it, and the compiler finds them made.

template <ScalarType A>
MOE_UNLEARN_INLINE bool try_dense(const Sgd& rule, const Dense& word) {
  if (rule.weight_decay != 0 || rule.nesterov || rule.first) return false;
  if (rule.has_state)
    update_dense<A, 1>(rule, word);
  else
    update_dense<A, 0>(rule, word);
  return true;
}

template <ScalarType A>
MOE_UNLEARN_INLINE bool try_dense(const AdamW& rule, const Dense& word) {
  if (!(rule.lerp < 0.5f && rule.lerp > -0.5f)) return false;
  if (rule.decay != 1)
    update_dense<A, 2>(rule, word);
  else
    update_dense<A, 2>(rule, word);
  return true;
}

/// The random bits of the weights from flat element `index` of the whole parameter on.
MOE_UNLEARN_INLINE void draw(RandomWords (&random)[word_bits], int64_t index, const UpdateOperands& o) {
  for (int j = 0; j < word_bits; ++j)
    random[j] = philox<uint64_t>(
        static_cast<uint64_t>(index) + j, static_cast<uint64_t>(o.step), static_cast<uint32_t>(o.seed),
        static_cast<uint32_t>(o.parameter_id));
}

MOE_UNLEARN_INLINE void round_weights(Word& w, const RandomWords (&random)[word_bits]) {
  for (int j = 0; j < word_bits; ++j) w[j] = round_stochastic(w[j], random[j].weight);
}

template <int moment>
MOE_UNLEARN_INLINE void round_moments(Word& s, const RandomWords (&random)[word_bits]) {
  for (int j = 0; j < word_bits; ++j) s[j] = round_stochastic(s[j], random[j].half<moment>());
}

/// Where a row's operands lie; the mask, the master and the state may be absent.
struct Row {
  int64_t element;  // the first one's index in the whole parameter
  char *param, *grad, *mask, *master, *state[2];

  MOE_UNLEARN_INLINE Row(const UpdateOperands& o, int64_t row) {
    const int64_t slice = o.slices ? row / o.rows_per_slice : 0;
    const int64_t param_row = o.slices ? o.slices[slice] * o.rows_per_slice + row % o.rows_per_slice : row;
    element = o.first_element + param_row * o.param.width;
    param = o.param.row(param_row), grad = o.grad.row(row - o.grad_start);
    mask = o.mask ? o.mask.row(row) : nullptr, master = o.master ? o.master.row(row) : nullptr;
    for (int i = 0; i < 2; ++i) state[i] = o.state[i] ? o.state[i].row(row) : nullptr;
  }
};

/// The words [begin, end) by `rule` in arithmetic of dtype A. `uniform`: every operand has dtype A and
/// lies contiguous along its rows, with neither master nor stochastic rounding; then the compiler knows it all.
template <class Rule, ScalarType A, bool uniform>
MOE_UNLEARN_INLINE void update_in(const UpdateOperands& o, const Rule& given, int64_t begin, int64_t end) {
  const Rule rule = given;  // which no store can touch
  const auto dtype = [&](const Rows& rows) MOE_UNLEARN_INLINE_LAMBDA { return uniform ? A : rows.dtype; };
  const auto stride = [&](const Rows& rows) MOE_UNLEARN_INLINE_LAMBDA {
    return uniform ? static_cast<int64_t>(sizeof(typename Format<A>::Bits)) : rows.stride;
  };
  const int64_t words = o.words(), width = o.param.width;
  const int states = rule.has_state ? Rule::states : 0;
  const bool narrow = !uniform && A == ScalarType::Float && states > 0 && o.state[0].dtype == ScalarType::BFloat16;
  for (int64_t row = begin / words; row * words < end; ++row) {
    const Row of(o, row);
    char *const param = of.param, *const grad = of.grad, *const mask = of.mask, *const* const state = of.state;
    char* const master = uniform ? nullptr : of.master;
    const int64_t last = std::min(end - row * words, words);
    for (int64_t word = std::max<int64_t>(begin - row * words, 0); word < last; ++word) {
      uint32_t bits = 0xFFFFFFFF;
      if (mask) std::memcpy(&bits, mask + word * o.mask.stride, sizeof(bits));
      if (bits == 0) continue;
      const int64_t first = word * word_bits, n = std::min<int64_t>(width - first, word_bits);
      const auto at = [&](const Rows& rows, char* row) MOE_UNLEARN_INLINE_LAMBDA { return row + first * stride(rows); };

      if (uniform && n == word_bits) {
        const Dense dense{
            at(o.param, param), at(o.grad, grad), {at(o.state[0], state[0]), at(o.state[1], state[1])}, bits};
        if (A != ScalarType::Float) {
          __builtin_prefetch(dense.param + ahead);
          __builtin_prefetch(dense.grad + ahead);
          for (int i = 0; i < states; ++i) __builtin_prefetch(dense.state[i] + ahead);
        }
        if (try_dense<A>(rule, dense)) continue;
      }

      Word w, g, s[2];
      load(g, dtype(o.grad), at(o.grad, grad), stride(o.grad), n);
      if (A != ScalarType::Float && dtype(o.grad) != A)
        for (int j = 0; j < word_bits; ++j) g[j] = round_to<Format<A>::dtype>(g[j]);
      if (master)
        load(w, ScalarType::Float, at(o.master, master), o.master.stride, n);
      else
        load(w, dtype(o.param), at(o.param, param), stride(o.param), n);
      for (int i = 0; i < states; ++i) load(s[i], dtype(o.state[i]), at(o.state[i], state[i]), stride(o.state[i]), n);

      apply<Format<A>::dtype>(rule, w, g, s);

      constexpr bool is_rounded = A != ScalarType::Float;  // then all that is written has dtype A
      RandomWords random[word_bits];
      if (!uniform && (o.stochastic || narrow)) draw(random, of.element + first, o);
      if (narrow) {
        round_moments<0>(s[0], random);
        if (states > 1) round_moments<1>(s[1], random);
      }
      for (int i = 0; i < states; ++i)
        store<is_rounded>(s[i], dtype(o.state[i]), at(o.state[i], state[i]), stride(o.state[i]), bits, n);
      if (master) store(w, ScalarType::Float, at(o.master, master), o.master.stride, bits, n);
      if (!uniform && o.stochastic) round_weights(w, random);
      store<is_rounded>(w, dtype(o.param), at(o.param, param), stride(o.param), bits, n);
    }
  }
}

// ---- Packed state --------------------------------------------------------------------------------------------

constexpr int block_words = moment_block / word_bits;

/// A block of one moment. Codes are computed as 32 bits each: bytes may alias whatever a loop reads.
struct MomentBlock {
  uint8_t bytes[moment_block];
  uint32_t codes[moment_block];
  char *to_codes, *to_scale;

  template <int moment>
  MOE_UNLEARN_INLINE void load(Word (&s)[block_words][2], char* row, int64_t block, int64_t width, int64_t n) {
    to_codes = row + block * moment_block;
    to_scale = row + code_bytes(width) + block * sizeof(float);
    float scale;
    std::memcpy(&scale, to_scale, sizeof(scale));
    if (n < moment_block) std::memset(bytes, 0, sizeof(bytes));
    std::memcpy(bytes, to_codes, std::min<int64_t>(n, moment_block));
    for (int j = 0; j < moment_block; ++j) codes[j] = bytes[j];
    const Codes<moment> from(scale);
    for (int half = 0; half < block_words; ++half)
      for (int j = 0; j < word_bits; ++j) s[half][moment][j] = from.widen(codes[half * word_bits + j]);
  }

  template <int moment>
  MOE_UNLEARN_INLINE void store(
      Word (&s)[block_words][2], const RandomWords (&random)[block_words][word_bits], int64_t n) {
    uint32_t most = 0;
    for (int half = 0; half < block_words; ++half) {
      Word& numbers = s[half][moment];
      for (int j = 0; j < word_bits; ++j) numbers[j] = Codes<moment>::number(numbers[j]);
      for (int j = 0; j < word_bits; ++j) most = std::max(most, magnitude_bits(numbers[j]));
    }
    const Codes<moment> to(most);
    for (int half = 0; half < block_words; ++half)
      for (int j = 0; j < word_bits; ++j)
        codes[half * word_bits + j] = to.code(s[half][moment][j], random[half][j].template half<moment>());
    for (int j = 0; j < moment_block; ++j) bytes[j] = static_cast<uint8_t>(codes[j]);
    std::memcpy(to_codes, bytes, code_bytes(n));
    std::memcpy(to_scale, &to.scale, sizeof(to.scale));
  }
};

/// The blocks [begin, end) by `rule`, whose state is packed.
template <class Rule>
MOE_UNLEARN_INLINE void update_packed(const UpdateOperands& o, const Rule& given, int64_t begin, int64_t end) {
  const Rule rule = given;  // which no store can touch
  const int64_t width = o.param.width, blocks = ceil_div(width, moment_block), words = o.words();
  for (int64_t row = begin / blocks; row * blocks < end; ++row) {
    const Row of(o, row);
    const int64_t last = std::min(end - row * blocks, blocks);
    for (int64_t block = std::max<int64_t>(begin - row * blocks, 0); block < last; ++block) {
      uint32_t bits[block_words], any = 0;
      for (int half = 0; half < block_words; ++half) {
        const int64_t word = block * block_words + half;
        bits[half] = word < words ? 0xFFFFFFFF : 0;
        if (of.mask && word < words) std::memcpy(&bits[half], of.mask + word * o.mask.stride, sizeof(uint32_t));
        any |= bits[half];
      }
      if (any == 0) continue;
      const int64_t start = block * moment_block, n = std::min<int64_t>(width - start, moment_block);
      Word s[block_words][2];
      MomentBlock moments[2];
      RandomWords random[block_words][word_bits];
      moments[0].template load<0>(s, of.state[0], block, width, n);
      if (Rule::states > 1) moments[1].template load<1>(s, of.state[1], block, width, n);

      for (int half = 0; half < block_words; ++half) {
        const int64_t first = start + half * word_bits, left = std::clamp<int64_t>(width - first, 0, word_bits);
        draw(random[half], of.element + first, o);
        if (bits[half] == 0) continue;
        const auto at = [first](const Rows& rows, char* row)
                            MOE_UNLEARN_INLINE_LAMBDA { return row + first * rows.stride; };
        Word w, g, old[2];
        load(g, o.grad.dtype, at(o.grad, of.grad), o.grad.stride, left);
        if (of.master)
          load(w, ScalarType::Float, at(o.master, of.master), o.master.stride, left);
        else
          load(w, o.param.dtype, at(o.param, of.param), o.param.stride, left);
        std::memcpy(old, s[half], sizeof(old));
        apply<Dtype::float32>(rule, w, g, s[half]);
        for (int i = 0; i < Rule::states && bits[half] != 0xFFFFFFFF; ++i)
          for (int j = 0; j < word_bits; ++j) s[half][i][j] = bits[half] >> j & 1 ? s[half][i][j] : old[i][j];
        if (of.master) store(w, ScalarType::Float, at(o.master, of.master), o.master.stride, bits[half], left);
        if (o.stochastic) round_weights(w, random[half]);
        store(w, o.param.dtype, at(o.param, of.param), o.param.stride, bits[half], left);
      }
      moments[0].template store<0>(s, random, n);
      if (Rule::states > 1) moments[1].template store<1>(s, random, n);
    }
  }
}

// ---- By dtype ------------------------------------------------------------------------------------------------

template <class Rule, ScalarType A>
void run(const UpdateOperands& o, const Rule& rule, int64_t begin, int64_t end) {
  bool uniform = !o.master && !o.stochastic;
  for (const Rows* rows : {&o.param, &o.grad, &o.state[0], &o.state[1]})
    uniform &= !*rows || (rows->dtype == A && rows->stride == rows->item);
  if (uniform)
    for_this_cpu<update_in<Rule, A, true>, const UpdateOperands&, const Rule&>(o, rule, begin, end);
  else
    for_this_cpu<update_in<Rule, A, false>, const UpdateOperands&, const Rule&>(o, rule, begin, end);
}

/// What a row is cut into: words, or blocks where the state that the rule has is packed.
template <class Rule>
int64_t units(const UpdateOperands& o, const Rule& rule) {
  return rule.has_state && o.packed() ? ceil_div(o.param.width, moment_block) : o.words();
}

template <class Rule>
void run(const UpdateOperands& o, const Rule& rule, int64_t begin, int64_t end) {
  if (rule.has_state && o.packed())
    return for_this_cpu<update_packed<Rule>, const UpdateOperands&, const Rule&>(o, rule, begin, end);
  switch (o.arithmetic()) {
    case ScalarType::BFloat16:
      return run<Rule, ScalarType::BFloat16>(o, rule, begin, end);
    case ScalarType::Half:
      return run<Rule, ScalarType::Half>(o, rule, begin, end);
    default:
      return run<Rule, ScalarType::Float>(o, rule, begin, end);
  }
}

template <class Rule>
void update(const UpdateOperands& o, const Rule& rule) {
  parallel(o.grad.count * units(o, rule), grain, [&](int64_t begin, int64_t end) { run(o, rule, begin, end); });
}

template <class Rule>
void update_rows_by(const UpdateOperands& o, const Rule& rule, int64_t begin, int64_t end) {
  const int64_t each = units(o, rule);
  run(o, rule, begin * each, end * each);
}

void masked_sgd_(
    const Tensor& param, const Tensor& grad, const std::optional<Tensor>& momentum_buffer,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& master, const std::optional<Tensor>& slices,
    double lr, double momentum, double grad_scale, double weight_decay, bool nesterov, int64_t step,
    bool stochastic, int64_t seed, int64_t parameter_id, int64_t first_row) {
  const Rows g(grad);
  UpdateOperands o(param, g, g.count, mask, master, slices, {step, stochastic, seed, parameter_id, first_row});
  o.state[0] = Rows(momentum_buffer);
  update(o, Sgd(lr, momentum, grad_scale, weight_decay, nesterov, step));
}

void masked_adamw_(
    const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& master, const std::optional<Tensor>& slices,
    double decay, double beta1, double beta2, double root_correction, double eps, double step_size, int64_t step,
    bool stochastic, int64_t seed, int64_t parameter_id, int64_t first_row) {
  const Rows g(grad);
  UpdateOperands o(param, g, g.count, mask, master, slices, {step, stochastic, seed, parameter_id, first_row});
  o.state[0] = Rows(exp_avg), o.state[1] = Rows(exp_avg_sq);
  update(o, AdamW(decay, beta1, beta2, root_correction, eps, step_size));
}

}  // namespace

UpdateOperands::UpdateOperands(
    const Tensor& param, const Rows& grad, int64_t rows, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& master, const std::optional<Tensor>& slices, const Update& update)
    : grad(grad), mask(mask), master(master), slices(nullptr), rows_per_slice(1), grad_start(0), step(update.step),
      seed(update.seed), parameter_id(update.parameter_id),
      first_element(update.first_row * (param.numel() / std::max<int64_t>(param.size(0), 1))),
      stochastic(update.stochastic && param.scalar_type() == ScalarType::BFloat16) {
  param.mutable_data_ptr();  // a lazily copied tensor becomes its own before it is written
  this->param = Rows(param);
  if (slices.has_value()) {
    STD_TORCH_CHECK(slices->is_contiguous() && param.dim() > 1, "slices must be contiguous, rows at least 1-d");
    this->slices = slices->const_data_ptr<int64_t>();
    rows_per_slice = std::max<int64_t>(rows / std::max<int64_t>(slices->numel(), 1), 1);
    for (int64_t i = 0; i < slices->numel(); ++i)
      STD_TORCH_CHECK(
          this->slices[i] >= 0 && this->slices[i] < param.size(0), "slice ", this->slices[i], " of ", param.size(0));
  }
}

ScalarType UpdateOperands::arithmetic() const {
  bool narrow = !master && !stochastic;
  for (const Rows& s : state) narrow &= !s || s.dtype == param.dtype;
  return narrow ? param.dtype : ScalarType::Float;
}

void update_rows(const UpdateOperands& o, const Sgd& rule, int64_t begin, int64_t end) {
  update_rows_by(o, rule, begin, end);
}
void update_rows(const UpdateOperands& o, const AdamW& rule, int64_t begin, int64_t end) {
  update_rows_by(o, rule, begin, end);
}

}  // namespace moe_unlearn

STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CPU, m) {
  m.impl("masked_sgd_", TORCH_BOX(&moe_unlearn::masked_sgd_));
  m.impl("masked_adamw_", TORCH_BOX(&moe_unlearn::masked_adamw_));
}
