// masked_update: SGD and AdamW in place under packed masks, a thread for each 8 elements of a row (16 bytes of a
// 2-byte dtype), four threads for a mask word.
//
// A thread whose 8 bits are zero reads nothing else: a zero word costs its own 4 bytes. Arithmetic is in float32;
// where the state is in a narrow dtype every operation is rounded to it, as torch.optim does (A below). Each
// weight, and where the state is packed each block of 64, is computed by itself: no shared memory, no atomics, the same
// bits for any grid.

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

  /// Whether the state is rows of codes and scales, seen as words.
  MOE_UNLEARN_HOST_DEVICE bool packed() const { return state[0].dtype == Dtype::word; }
};

constexpr int threads_per_block = moment_block / chunk_size;

/// `value` of the threads of a block of moments, joined by `join`; all lanes of a warp call.
template <class Group, class Join>
MOE_UNLEARN_DEVICE uint32_t reduce_block(const Group& group, uint32_t value, const Join& join) {
  MOE_UNLEARN_UNROLL
  for (int distance = 1; distance < threads_per_block; distance *= 2)
    value = join(value, group.shuffle(value, group.thread() % warp_size ^ distance));
  return value;
}

/// The elements of a chunk that train: those of `place`, without those whose mask bit is 0.
MOE_UNLEARN_DEVICE uint32_t chosen_elements(const Rows& mask, const Place& place) {
  const uint32_t chosen = (1u << place.n) - 1;
  if (!mask || chosen == 0) return chosen;
  const int64_t word = place.first / word_bits;
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(mask.row(place.row) + word * mask.stride);
  return chosen & bits >> (place.first - word * word_bits);
}

/// The random bits of element j of a chunk whose row of the parameter is `param_row`.
MOE_UNLEARN_DEVICE RandomWords draw(const Operands& o, const Place& place, int64_t param_row, int64_t width, int j) {
  const auto index = static_cast<uint64_t>(o.first_element + param_row * width + place.first);
  const auto seed = static_cast<uint32_t>(o.seed), id = static_cast<uint32_t>(o.parameter_id);
  return philox(index + j, static_cast<uint64_t>(o.step), seed, id);
}

/// The row of param for a row of the gradient; false if its slice does not exist.
MOE_UNLEARN_DEVICE bool find_param_row(int64_t& param_row, const Operands& o, int64_t row) {
  param_row = row;
  if (!o.slices) return true;
  const int64_t local = divide(row, o.rows_per_slice), slice = o.slices[local];
  if (slice < 0 || slice >= o.num_slices) return false;
  param_row += (slice - local) * o.rows_per_slice;
  return true;
}

/// The weights of a chunk, and their masters if there are any, as they lie in memory.
struct WeightChunk {
  char *to_param, *to_master;
  Raw param, master;

  MOE_UNLEARN_DEVICE WeightChunk(const Operands& o, const Place& place, int64_t param_row)
      : to_param(o.param.row(param_row)), to_master(o.master ? o.master.row(place.row) : nullptr),
        param(load(o.param, to_param, place)), master{} {
    if (o.master) master = load(o.master, to_master, place);
  }

  MOE_UNLEARN_DEVICE void widen_to(Chunk& w, const Operands& o) const {
    if (o.master)
      widen(w, master, Dtype::float32);
    else
      widen(w, param, o.param.dtype);
  }

  /// `exact`: w has the parameter's dtype. `random(j)`: the random bits of element j.
  template <bool exact, class Random>
  MOE_UNLEARN_DEVICE void replace(
      Chunk& w, const Random& random, const Operands& o, const Place& place, uint32_t chosen) {
    if (o.master) {
      narrow<false>(master, w, Dtype::float32, chosen);
      store(o.master, to_master, place, master, chosen);
    }
    if (o.stochastic) {
      MOE_UNLEARN_UNROLL
      for (int j = 0; j < chunk_size; ++j) w[j] = round_stochastic(w[j], random(j).weight);
    }
    narrow<exact>(param, w, o.param.dtype, chosen);
    store(o.param, to_param, place, param, chosen);
  }
};

/// Updates the chosen elements of a chunk. `get_gradient(g)` sets their float32 gradients; it is called between the
/// loads of the operands and their use. False if the chunk's slice does not exist.
template <Dtype A, class Rule, class GetGradient>
MOE_UNLEARN_DEVICE bool update_chunk(
    const Operands& o, const Rule& rule, const Place& place, uint32_t chosen, int64_t width,
    const GetGradient& get_gradient) {
  int64_t param_row;
  if (!find_param_row(param_row, o, place.row)) return false;
  const int states = rule.has_state ? Rule::states : 0;
  char* to_state[2] = {};
  WeightChunk weights(o, place, param_row);
  Raw state[2];
  MOE_UNLEARN_UNROLL
  for (int i = 0; i < Rule::states; ++i) {
    if (i >= states) continue;
    to_state[i] = o.state[i].row(place.row);
    state[i] = load(o.state[i], to_state[i], place);
  }

  Chunk w, g, s[2] = {};
  get_gradient(g);
  weights.widen_to(w, o);
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
  // drawn again for each use: to keep the bits would take the registers of 16 words
  const auto random = [&](int j) { return draw(o, place, param_row, width, j); };
  if (!exact && states > 0 && o.state[0].dtype == Dtype::bfloat16) {
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j) {
      const RandomWords words = random(j);
      s[0][j] = round_stochastic(s[0][j], words.half<0>());
      s[1][j] = round_stochastic(s[1][j], words.half<1>());
    }
  }
  MOE_UNLEARN_UNROLL
  for (int i = 0; i < Rule::states; ++i) {
    if (i >= states) continue;
    narrow<exact>(state[i], s[i], o.state[i].dtype, chosen);
    store(o.state[i], to_state[i], place, state[i], chosen);
  }
  weights.replace<exact>(w, random, o, place, chosen);
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

/// A chunk's part of a block of one packed moment: 8 codes, and the scale that its 8 threads share.
template <int moment>
struct CodedChunk {
  uint32_t *to_codes, *to_scale;
  int words;  // of four codes

  MOE_UNLEARN_DEVICE CodedChunk(const Rows& state, const Place& place, int64_t width) {
    auto* const row = reinterpret_cast<uint32_t*>(state.row(place.row));
    to_codes = row + place.first / 4;
    to_scale = row + code_bytes(width) / 4 + place.first / moment_block;
    words = (place.n + 3) / 4;
  }

  MOE_UNLEARN_DEVICE void load_to(Chunk& s) const {
    const Codes<moment> from(float_of(*to_scale));
    const uint32_t word[] = {words > 0 ? to_codes[0] : 0, words > 1 ? to_codes[1] : 0};
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j) s[j] = from.widen(word[j / 4] >> j % 4 * 8 & 0xFF);
  }

  /// All lanes of a warp call; `touched`: whether the block is written.
  template <class Group>
  MOE_UNLEARN_DEVICE void store(
      const Group& group, const Chunk& s, const RandomWords (&random)[chunk_size], bool touched) const {
    Chunk number;
    uint32_t most = 0;
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j) {
      number[j] = Codes<moment>::number(s[j]);
      most = magnitude_bits(number[j]) > most ? magnitude_bits(number[j]) : most;
    }
    const Codes<moment> to(reduce_block(group, most, [](uint32_t a, uint32_t b) { return a > b ? a : b; }));
    if (!touched) return;
    uint32_t word[2] = {};
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j)
      word[j / 4] |= to.code(number[j], random[j].template half<moment>()) << j % 4 * 8;
    if (words > 0) to_codes[0] = word[0];
    if (words > 1) to_codes[1] = word[1];
    if (group.thread() % threads_per_block == 0) *to_scale = bits_of(to.scale);
  }
};

/// Updates the chosen elements of a chunk and the codes of its block, which 8 neighbouring threads have; all lanes of a
/// warp call. False if the chunk's slice does not exist.
template <class Group, class Rule, class GetGradient>
MOE_UNLEARN_DEVICE bool update_coded_chunk(
    const Group& group, const Operands& o, const Rule& rule, const Place& place, int64_t width,
    const GetGradient& get_gradient) {
  const uint32_t chosen = chosen_elements(o.mask, place);
  bool touched = reduce_block(group, chosen, [](uint32_t x, uint32_t y) { return x | y; }) != 0;
  int64_t param_row = 0;
  const bool exists = !touched || find_param_row(param_row, o, place.row);
  touched &= exists;
  Chunk s[2] = {};
  RandomWords random[chunk_size] = {};
  const CodedChunk<0> first(o.state[0], place, width);
  const CodedChunk<1> second(o.state[Rule::states - 1], place, width);
  if (touched) {
    first.load_to(s[0]);
    if (Rule::states > 1) second.load_to(s[1]);
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j) random[j] = draw(o, place, param_row, width, j);
  }
  if (touched && chosen) {
    WeightChunk weights(o, place, param_row);
    Chunk w, g;
    get_gradient(g);
    weights.widen_to(w, o);
    MOE_UNLEARN_UNROLL
    for (int j = 0; j < chunk_size; ++j) {
      float of_state[2] = {s[0][j], s[1][j]};
      rule.template apply<Dtype::float32>(w[j], g[j], of_state);
      if (chosen >> j & 1) s[0][j] = of_state[0], s[1][j] = of_state[1];
    }
    weights.template replace<false>(w, [&](int j) { return random[j]; }, o, place, chosen);
  }
  first.store(group, s[0], random, touched);
  if (Rule::states > 1) second.store(group, s[1], random, touched);
  return exists;
}

/// The update with packed state: 8 threads for each block of 64 elements, all of them in one warp.
template <class Rule>
struct PackedUpdate {
  static constexpr int threads = 256, resident = 2;

  struct Arguments {
    Operands o;
    Rule rule;
    int64_t words, chunks;  // words of a row, filled up to blocks, chunks of all rows
  };

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char*) {
    const Rows& grad = a.o.grad;
    const int64_t chunk = group.block() * threads + group.thread();
    Place place = place_of(chunk < a.chunks ? chunk : 0, a.words, grad.width);
    if (chunk >= a.chunks) place.n = 0;
    const auto get_gradient = [&](Chunk& g) { widen(g, load(grad, grad.row(place.row), place), grad.dtype); };
    if (!update_coded_chunk(group, a.o, a.rule, place, grad.width, get_gradient)) group.fail();
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
  if (rule.has_state && o.packed()) {
    using Kernel = PackedUpdate<Rule>;
    const int64_t blocks = ceil_div<int64_t>(o.grad.width, moment_block), words = blocks * moment_block / word_bits;
    const int64_t chunks = o.grad.count * words * chunks_per_word;
    return launch<Kernel>({o, rule, words, chunks}, ceil_div<int64_t>(chunks, Kernel::threads), 0, stream);
  }
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
