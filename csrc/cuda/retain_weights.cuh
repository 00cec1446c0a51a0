// retain_weights: the capped exponential weights of tokens from their packed memberships, and the sums that give
// gradient and Hessian of the dual, in one pass over the tokens.
//
// Inside, the constant 1 of a~ = (1, a) is member S, the bit behind the last one, so that a word of members is a word
// of a~. A block owns 32 x 32 pairs (two words) of a part of the tokens; its threads compute the weights of 256
// tokens at a time, once, and add them to 4 pairs each. The parts' sums go to the workspace, and a second launch adds
// them up in order. float64; parts depend on the shape alone, so every GPU gives the same bits.

#pragma once

#include "cuda/group.cuh"

namespace moe_unlearn {

struct Tokens {
  const uint32_t* words;  // [T, width] contiguous
  const double* tilt;     // [size] contiguous
  int64_t count, width, size;
  double bias, cap;
};

MOE_UNLEARN_DEVICE double uncapped_weight(const Tokens& tokens, int64_t t) {
  double tilted = 0;
  for (int64_t word = 0; word < tokens.width; ++word)
    for (uint32_t bits = tokens.words[t * tokens.width + word]; bits != 0; bits &= bits - 1)
      tilted += tokens.tilt[word * word_bits + count_bits((bits & -bits) - 1)];
  return exp(tokens.bias + tilted);
}

// a NaN stays one, as in torch.clamp_max
MOE_UNLEARN_DEVICE double capped(double weight, double cap) { return weight > cap ? cap : weight; }

struct Weights {
  static constexpr int threads = 256, resident = 2;
  struct Arguments {
    Tokens tokens;
    float* out;
  };

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char*) {
    const int64_t t = group.block() * threads + group.thread();
    if (t < a.tokens.count) a.out[t] = static_cast<float>(capped(uncapped_weight(a.tokens, t), a.tokens.cap));
  }
};

/// How the sums are cut: a function of the shape, never of the GPU.
struct MomentsPlan {
  static constexpr int threads = 256;
  static constexpr int64_t most_blocks = 1024;
  static constexpr int64_t tile_length = word_bits * word_bits + word_bits;  // second, then first

  int64_t words, tiles, tokens_per_part, parts, workspace;

  MomentsPlan(int64_t num_tokens, int64_t size) {
    words = size / word_bits + 1;
    tiles = words * (words + 1) / 2;
    const int64_t most_parts = std::max<int64_t>(most_blocks / tiles, 1);
    tokens_per_part = ceil_div<int64_t>(std::max<int64_t>(ceil_div(num_tokens, most_parts), 1), threads) * threads;
    parts = std::max<int64_t>(ceil_div(num_tokens, tokens_per_part), 1);
    workspace = parts * tiles * tile_length;
  }

  /// Tiles stand row by row of the upper triangle.
  static MOE_UNLEARN_HOST_DEVICE int64_t tile(int64_t row, int64_t column, int64_t words) {
    return row * words - row * (row - 1) / 2 + column - row;
  }
};

struct Moments {
  static constexpr int threads = MomentsPlan::threads, resident = 2;
  static constexpr int rows_per_thread = word_bits / (threads / warp_size);
  struct Arguments {
    Tokens tokens;
    int64_t words, tiles, tokens_per_part;
    double* partial;  // [parts, tiles, tile_length]
  };
  struct Stage {
    double weight[threads], free[threads];
    uint32_t row[threads], column[threads];
  };

  static MOE_UNLEARN_DEVICE uint32_t extended_word(const Tokens& tokens, int64_t t, int64_t word) {
    const uint32_t constant = tokens.size / word_bits == word ? 1u << tokens.size % word_bits : 0;
    return constant | (word < tokens.width ? tokens.words[t * tokens.width + word] : 0);
  }

  // a product with 0 or 1, not a choice: an infinite weight makes NaN of the sums it is not in
  static MOE_UNLEARN_DEVICE double as_double(uint32_t bit) { return bit ? 1.0 : 0.0; }

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char* shared) {
    auto& stage = *reinterpret_cast<Stage*>(shared);
    const int thread = group.thread(), warp = thread / warp_size, lane = thread % warp_size;
    const int64_t part = divide(group.block(), a.tiles), tile = group.block() - part * a.tiles;
    int64_t row = 0, column = tile;
    for (; column >= a.words - row; ++row) column -= a.words - row;
    column += row;
    const bool first = row == column && warp == 0;

    double second_sum[rows_per_thread] = {}, first_sum = 0;
    const int64_t begin = part * a.tokens_per_part, past = begin + a.tokens_per_part;
    const int64_t end = past < a.tokens.count ? past : a.tokens.count;
    for (int64_t base = begin; base < end; base += threads) {
      const int64_t t = base + thread;
      if (t < end) {
        const double raw = uncapped_weight(a.tokens, t);
        stage.weight[thread] = capped(raw, a.tokens.cap);
        stage.free[thread] = raw < a.tokens.cap ? raw : 0.0;
        stage.row[thread] = extended_word(a.tokens, t, row);
        stage.column[thread] = extended_word(a.tokens, t, column);
      }
      group.sync();
      const int tokens = static_cast<int>(end - base < threads ? end - base : threads);
      for (int i = 0; i < tokens; ++i) {
        const double member = as_double(stage.column[i] >> lane & 1), product = member * stage.free[i];
        const uint32_t bits = stage.row[i] >> (warp * rows_per_thread);
        MOE_UNLEARN_UNROLL
        for (int r = 0; r < rows_per_thread; ++r)
          second_sum[r] = fma(as_double(bits >> r & 1), product, second_sum[r]);
        if (first) first_sum = fma(member, stage.weight[i], first_sum);
      }
      group.sync();
    }

    double* const out = a.partial + group.block() * MomentsPlan::tile_length;
    MOE_UNLEARN_UNROLL
    for (int r = 0; r < rows_per_thread; ++r) out[(warp * rows_per_thread + r) * word_bits + lane] = second_sum[r];
    if (first) out[word_bits * word_bits + lane] = first_sum;
  }
};

/// Adds up the parts in order, a thread for each element of first and second, and puts the constant in front.
struct MomentsSum {
  static constexpr int threads = 256, resident = 2;
  struct Arguments {
    const double* partial;
    int64_t words, tiles, parts, size;  // size: S + 1
    double *first, *second;             // [size], [size, size]
  };

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char*) {
    const int64_t element = group.block() * threads + group.thread();
    if (element >= a.size + a.size * a.size) return;
    const bool in_first = element < a.size;
    const int64_t in_second = element - a.size;
    const int64_t i = in_first ? element : divide(in_second, a.size), j = in_first ? i : in_second - i * a.size;
    // the constant is the last member; of the two halves only the upper one was summed
    const int64_t s = i == 0 ? a.size - 1 : i - 1, t = j == 0 ? a.size - 1 : j - 1;
    const int64_t low = s < t ? s : t, high = s < t ? t : s;
    const int64_t tile = MomentsPlan::tile(low / word_bits, high / word_bits, a.words);
    const int64_t inside = in_first ? word_bits * word_bits + low % word_bits
                                    : low % word_bits * word_bits + high % word_bits;
    const double* from = a.partial + tile * MomentsPlan::tile_length + inside;
    double sum = 0;
    for (int64_t part = 0; part < a.parts; ++part) sum += from[part * a.tiles * MomentsPlan::tile_length];
    (in_first ? a.first[i] : a.second[in_second]) = sum;
  }
};

inline cudaError_t retain_weights(const Tokens& tokens, float* out, cudaStream_t stream) {
  return launch<Weights>({tokens, out}, ceil_div<int64_t>(tokens.count, Weights::threads), 0, stream);
}

inline cudaError_t retain_weights_moments(
    const Tokens& tokens, const MomentsPlan& plan, double* workspace, double* first, double* second,
    cudaStream_t stream) {
  const cudaError_t error = launch<Moments>(
      {tokens, plan.words, plan.tiles, plan.tokens_per_part, workspace}, plan.parts * plan.tiles,
      sizeof(Moments::Stage), stream);
  if (error != cudaSuccess) return error;
  const int64_t size = tokens.size + 1;
  return launch<MomentsSum>(
      {workspace, plan.words, plan.tiles, plan.parts, size, first, second},
      ceil_div<int64_t>(size + size * size, MomentsSum::threads), 0, stream);
}

}  // namespace moe_unlearn
