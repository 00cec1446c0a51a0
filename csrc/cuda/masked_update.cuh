// masked_update: SGD and AdamW in place under packed masks, a thread for each 8 elements of a row (16 bytes of a
// 2-byte dtype), four threads for a mask word.
//
// A thread whose 8 bits are zero reads nothing else: a zero word costs its own 4 bytes. Arithmetic is in float32;
// where the state is in a narrow dtype every operation is rounded to it, as torch.optim does (A below). Each
// weight is computed by itself: no shared memory, no atomics, the same bits for any grid.

#pragma once

#include "cuda/rows.cuh"

namespace moe_unlearn {

struct Operands {
  Rows param, grad, mask, master;
  Rows state[2];
  const int64_t* slices = nullptr;  // slice of param each slice of grad stands for, or null
  int64_t num_slices = 0;           // of param
  int64_t rows_per_slice = 1;
  int64_t step = 1, seed = 0, parameter_id = 0;
  int64_t first_element = 0;        // of param, in the parameter that it is a shard of
  bool stochastic = false;
};

/// The elements of a chunk that train: those of `place`, without those whose mask bit is 0.
MOE_UNLEARN_DEVICE uint32_t chosen_elements(const Rows& mask, const Place& place) {
  const uint32_t chosen = (1u << place.n) - 1;
  if (!mask || chosen == 0) return chosen;
  const int64_t word = place.first / word_bits;
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(mask.row(place.row) + word * mask.stride);
  return chosen & bits >> (place.first - word * word_bits);
}

/// Updates the chosen elements of a chunk. `get_gradient(g)` sets their float32 gradients; it is called between the
/// loads of the operands and their use. False if the chunk's slice does not exist.
template <Dtype A, class Rule, class GetGradient>
MOE_UNLEARN_DEVICE bool update_chunk(
    const Operands& o, const Rule& rule, const Place& place, uint32_t chosen, int64_t width,
    const GetGradient& get_gradient) {
  int64_t param_row = place.row;
  if (o.slices) {
    const int64_t local = divide(place.row, o.rows_per_slice), slice = o.slices[local];
    if (slice < 0 || slice >= o.num_slices) return false;
    param_row += (slice - local) * o.rows_per_slice;
  }
  const int states = rule.has_state ? Rule::states : 0;
  char *const to_param = o.param.row(param_row), *const to_master = o.master ? o.master.row(place.row) : nullptr;
  char* to_state[2] = {};
  Raw param = load(o.param, to_param, place), master{}, state[2];
  if (o.master) master = load(o.master, to_master, place);
  MOE_UNLEARN_UNROLL
  for (int i = 0; i < Rule::states; ++i) {
    if (i >= states) continue;
    to_state[i] = o.state[i].row(place.row);
    state[i] = load(o.state[i], to_state[i], place);
  }

  Chunk w, g, s[2] = {};
  get_gradient(g);
  if (o.master)
    widen(w, master, Dtype::float32);
  else
    widen(w, param, o.param.dtype);
  MOE_UNLEARN_UNROLL
  for (int i = 0; i < Rule::states; ++i)
    if (i < states) widen(s[i], state[i], o.state[i].dtype);

  MOE_UNLEARN_UNROLL
  for (int j = 0; j < chunk_size; ++j) {
    float of_state[2] = {s[0][j], s[1][j]};
    rule.template apply<A>(w[j], A == Dtype::float32 ? g[j] : round_to<A>(g[j]), of_state);
    s[0][j] = of_state[0], s[1][j] = of_state[1];
  }

  constexpr bool exact = A != Dtype::float32;  // then all that is written has dtype A
  MOE_UNLEARN_UNROLL
  for (int i = 0; i < Rule::states; ++i) {
    if (i >= states) continue;
    narrow<exact>(state[i], s[i], o.state[i].dtype, chosen);
    store(o.state[i], to_state[i], place, state[i], chosen);
  }
  if (o.master) {
    narrow<false>(master, w, Dtype::float32, chosen);
    store(o.master, to_master, place, master, chosen);
  }
  if (o.stochastic) {
    const auto index = static_cast<uint64_t>(o.first_element + param_row * width + place.first);
    const auto seed = static_cast<uint32_t>(o.seed), id = static_cast<uint32_t>(o.parameter_id);
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j)
      w[j] = round_stochastic(w[j], philox(index + j, static_cast<uint64_t>(o.step), seed, id));
  }
  narrow<exact>(param, w, o.param.dtype, chosen);
  store(o.param, to_param, place, param, chosen);
  return true;
}

template <class Rule, Dtype A>
struct MaskedUpdate {
  static constexpr int threads = 256, resident = 2;

  struct Arguments {
    Operands o;
    Rule rule;
    int64_t words, chunks;  // words of a row, chunks of all rows
  };

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char*) {
    const int64_t chunk = group.block() * threads + group.thread();
    if (chunk >= a.chunks) return;
    const Rows& grad = a.o.grad;
    const Place place = place_of(chunk, a.words, grad.width);
    const uint32_t chosen = chosen_elements(a.o.mask, place);
    if (chosen == 0) return;
    const Raw raw = load(grad, grad.row(place.row), place);
    const auto widen_gradient = [&](Chunk& g) { widen(g, raw, grad.dtype); };
    if (!update_chunk<A>(a.o, a.rule, place, chosen, grad.width, widen_gradient)) group.fail();
  }
};

/// The dtype each operation is rounded to: the state's where all of it is as narrow as the parameter.
inline Dtype arithmetic_dtype(const Operands& o) {
  bool narrow = !o.master && !o.stochastic;
  for (const Rows& state : o.state) narrow &= !state || state.dtype == o.param.dtype;
  return narrow ? o.param.dtype : Dtype::float32;
}

template <class Rule, Dtype A>
cudaError_t launch_masked_update(const Operands& o, const Rule& rule, cudaStream_t stream) {
  using Kernel = MaskedUpdate<Rule, A>;
  const int64_t words = o.grad.words(), chunks = o.grad.count * words * chunks_per_word;
  return launch<Kernel>({o, rule, words, chunks}, ceil_div<int64_t>(chunks, Kernel::threads), 0, stream);
}

/// One step of Sgd or AdamW; `o.stochastic` only for a bfloat16 parameter without master.
template <class Rule>
cudaError_t masked_update(const Operands& o, const Rule& rule, cudaStream_t stream) {
  switch (arithmetic_dtype(o)) {
    case Dtype::bfloat16:
      return launch_masked_update<Rule, Dtype::bfloat16>(o, rule, stream);
    case Dtype::float16:
      return launch_masked_update<Rule, Dtype::float16>(o, rule, stream);
    default:
      return launch_masked_update<Rule, Dtype::float32>(o, rule, stream);
  }
}

}  // namespace moe_unlearn
