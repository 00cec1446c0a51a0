// weight_score: histograms of the bits of WAGLE's score |S|, S = (weight - grad_retain / gamma) * grad_forget, and
// the packed mask of the largest. A thread scores 8 elements at a time; no score is stored.
//
//     histogram    digit 0: 2^15 bins (the sign is gone) in 128 KB of shared memory, added to the result at the
//                  end; on a device with less, and for digit 1, few elements of which count, straight to the result.
//                  Zeros, the scores of untouched experts, are counted in a register: they would queue for one bin
//     mask         every block writes the words of its span as if all of its elements equal to the threshold were
//                  taken and counts these; a second launch sums the counts of earlier spans and walks the spans
//                  that took too many, rarely more than a few, once more
//
// Atomics are integer counts only; ranks of ties are prefix sums in flat order.

#pragma once

#include "cuda/rows.cuh"

namespace moe_unlearn {

struct ScoreTerms {
  Rows weight, grad_forget, grad_retain;
  float gamma;
  int64_t words, chunks;  // words of a row, chunks of all rows

  ScoreTerms(const Rows& weight, const Rows& grad_forget, const Rows& grad_retain, double gamma)
      : weight(weight), grad_forget(grad_forget), grad_retain(grad_retain), gamma(static_cast<float>(gamma)),
        words(weight.words()), chunks(weight.count * words * chunks_per_word) {}
};

/// The scores of a chunk; beyond its n elements they are 0.
MOE_UNLEARN_DEVICE void score_chunk(Chunk& score, const ScoreTerms& t, const Place& place) {
  const Raw weight = load(t.weight, t.weight.row(place.row), place);
  const Raw forget = load(t.grad_forget, t.grad_forget.row(place.row), place);
  const Raw retain = load(t.grad_retain, t.grad_retain.row(place.row), place);
  Chunk g_f, g_r;
  widen(score, weight, t.weight.dtype);
  widen(g_f, forget, t.grad_forget.dtype);
  widen(g_r, retain, t.grad_retain.dtype);
  MOE_UNLEARN_UNROLL
  for (int j = 0; j < chunk_size; ++j) score[j] = score_of(score[j], g_f[j], g_r[j], t.gamma);
}

// ---- Histogram ---------------------------------------------------------------------------------------------

struct HistogramArguments {
  ScoreTerms t;
  uint32_t prefix;
  unsigned long long* counts;  // [65536], zero before
};

/// Digit 0 with bins in shared memory, or digit 0 or 1 without.
template <int digit, bool shared_bins>
struct ScoreHistogram {
  static constexpr int threads = shared_bins ? 1024 : 256, resident = shared_bins ? 1 : 4;
  static constexpr int bins = 1 << 15;
  using Arguments = HistogramArguments;

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char* shared) {
    static_assert(digit == 0 || !shared_bins);
    auto* const own = reinterpret_cast<uint32_t*>(shared);
    if (shared_bins) {
      for (int bin = group.thread(); bin < bins; bin += threads) own[bin] = 0;
      group.sync();
    }
    uint32_t zeros = 0;
    for (int64_t base = group.block() * threads; base < a.t.chunks; base += group.blocks() * threads) {
      const int64_t chunk = base + group.thread();
      Place place{0, 0, 0};
      if (chunk < a.t.chunks) place = place_of(chunk, a.t.words, a.t.weight.width);
      Chunk score;
      score_chunk(score, a.t, place);
      MOE_UNLEARN_UNROLL
      for (int j = 0; j < chunk_size; ++j) {
        const uint32_t bits = magnitude_bits(score[j]), low = digit == 0 ? bits >> 16 : bits & 0xFFFF;
        const bool counted = j < place.n && (digit == 0 || bits >> 16 == a.prefix), zero = counted && low == 0;
        zeros += zero;
        const bool other = counted && !zero;
        if constexpr (shared_bins) {
          if (other) group.add(&own[low], 1u);
        } else if (group.any(other)) {
          // equal bins of a warp are one addition: a histogram of few values would queue for their addresses
          const uint32_t equal = group.match(other ? low : 1u << 16);
          const bool first = (equal & ((1u << group.thread() % warp_size) - 1)) == 0;
          if (other && first) group.add(&a.counts[low], static_cast<unsigned long long>(count_bits(equal)));
        }
      }
    }
    if constexpr (shared_bins) {
      if (zeros > 0) group.add(&own[0], zeros);
      group.sync();
      for (int bin = group.thread(); bin < bins; bin += threads)
        if (own[bin] != 0) group.add(&a.counts[bin], static_cast<unsigned long long>(own[bin]));
    } else if (zeros > 0) {
      group.add(&a.counts[0], static_cast<unsigned long long>(zeros));
    }
  }
};

// ---- Mask --------------------------------------------------------------------------------------------------

struct MaskPlan {
  static constexpr int threads = 256;
  static constexpr int64_t spans_per_multiprocessor = 32;

  int64_t chunks_per_span, spans;  // at least one span, whole steps of a block

  MaskPlan(int64_t chunks, int64_t multiprocessors) {
    const int64_t evenly = std::max<int64_t>(ceil_div(chunks, spans_per_multiprocessor * multiprocessors), 1);
    chunks_per_span = ceil_div<int64_t>(evenly, threads) * threads;
    spans = std::max<int64_t>(ceil_div(chunks, chunks_per_span), 1);
  }
};

struct MaskArguments {
  ScoreTerms t;
  uint32_t threshold;
  int64_t ties, chunks_per_span;
  uint8_t* mask;                     // a byte per chunk: little-endian words
  unsigned long long* ties_in_span;  // [spans]
  int64_t* taken;
};

/// The bits of a chunk above the threshold and equal to it.
MOE_UNLEARN_DEVICE void compare_chunk(
    uint32_t& above, uint32_t& equal, const MaskArguments& a, int64_t chunk, int64_t end) {
  above = equal = 0;
  if (chunk >= end) return;
  const Place place = place_of(chunk, a.t.words, a.t.weight.width);
  if (place.n == 0) return;
  Chunk score;
  score_chunk(score, a.t, place);
  MOE_UNLEARN_UNROLL
  for (int j = 0; j < chunk_size; ++j) {
    const uint32_t bits = magnitude_bits(score[j]);
    above |= static_cast<uint32_t>(bits > a.threshold) << j;
    equal |= static_cast<uint32_t>(bits == a.threshold) << j;
  }
  const uint32_t exists = (1u << place.n) - 1;  // the padding beyond a row has score 0
  above &= exists, equal &= exists;
}

/// The words of a span with all of its ties, and their number.
struct MaskAll {
  static constexpr int threads = MaskPlan::threads, resident = 4;
  static constexpr size_t shared_bytes = threads / warp_size * sizeof(int64_t);
  using Arguments = MaskArguments;

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char* shared) {
    const int64_t begin = group.block() * a.chunks_per_span, past = begin + a.chunks_per_span;
    const int64_t end = past < a.t.chunks ? past : a.t.chunks;
    int64_t count = 0, total;
    for (int64_t chunk = begin + group.thread(); chunk < end; chunk += threads) {
      uint32_t above, equal;
      compare_chunk(above, equal, a, chunk, end);
      count += count_bits(equal);
      a.mask[chunk] = static_cast<uint8_t>(above | equal);
    }
    block_scan<threads>(group, count, reinterpret_cast<int64_t*>(shared), total);
    if (group.thread() == 0) a.ties_in_span[group.block()] = static_cast<unsigned long long>(total);
  }
};

/// Leaves only the first `ties` of all ties in the mask, and says how many there were.
struct MaskTies {
  static constexpr int threads = MaskPlan::threads, resident = 4;
  static constexpr size_t shared_bytes = MaskAll::shared_bytes;
  using Arguments = MaskArguments;

  template <class Group>
  static MOE_UNLEARN_DEVICE void run(const Group& group, const Arguments& a, unsigned char* shared) {
    auto* const sums = reinterpret_cast<int64_t*>(shared);
    const int64_t span = group.block(), count = static_cast<int64_t>(a.ties_in_span[span]);
    const bool last = span == group.blocks() - 1;
    if (count == 0 && !last) return;
    int64_t before = 0, earlier;
    for (int64_t other = group.thread(); other < span; other += threads)
      before += static_cast<int64_t>(a.ties_in_span[other]);
    block_scan<threads>(group, before, sums, earlier);
    if (last && group.thread() == 0) *a.taken = earlier + count < a.ties ? earlier + count : a.ties;
    if (earlier + count <= a.ties) return;

    const int64_t begin = span * a.chunks_per_span, past = begin + a.chunks_per_span;
    const int64_t end = past < a.t.chunks ? past : a.t.chunks;
    int64_t left = a.ties - earlier;
    for (int64_t base = begin; base < end; base += threads) {
      uint32_t above, equal;
      compare_chunk(above, equal, a, base + group.thread(), end);
      int64_t in_step;
      const int64_t rank = block_scan<threads>(group, static_cast<int64_t>(count_bits(equal)), sums, in_step);
      if (equal != 0) {
        uint32_t dropped = equal;
        for (int64_t room = left - rank; room > 0 && dropped != 0; --room) dropped &= dropped - 1;
        a.mask[base + group.thread()] = static_cast<uint8_t>(above | (equal & ~dropped));
      }
      left -= in_step;
    }
  }
};

// ---- Launchers ---------------------------------------------------------------------------------------------

template <class Kernel>
cudaError_t launch_histogram(const HistogramArguments& a, int64_t multiprocessors, cudaStream_t stream) {
  const bool shared_bins = Kernel::threads == 1024;
  const int64_t wanted = ceil_div<int64_t>(a.t.chunks, Kernel::threads);
  const int64_t blocks = std::min<int64_t>(wanted, multiprocessors * (shared_bins ? 1 : 8));
  return launch<Kernel>(a, blocks, shared_bins ? Kernel::bins * sizeof(uint32_t) : 0, stream);
}

inline cudaError_t weight_score_histogram(
    const ScoreTerms& t, int64_t digit, int64_t prefix, int64_t* counts, cudaStream_t stream) {
  const HistogramArguments a{t, static_cast<uint32_t>(prefix), reinterpret_cast<unsigned long long*>(counts)};
  Device device{};
  const cudaError_t error = get_device(device);
  if (error != cudaSuccess) return error;
  if (digit == 1) return launch_histogram<ScoreHistogram<1, false>>(a, device.multiprocessors, stream);
  if (device.shared_limit < int64_t{ScoreHistogram<0, true>::bins} * 4)
    return launch_histogram<ScoreHistogram<0, false>>(a, device.multiprocessors, stream);
  return launch_histogram<ScoreHistogram<0, true>>(a, device.multiprocessors, stream);
}

/// `ties_in_span`: workspace for MaskPlan::spans counts.
inline cudaError_t weight_score_mask(
    const ScoreTerms& t, const MaskPlan& plan, int64_t threshold_bits, int64_t ties, int32_t* mask,
    int64_t* ties_in_span, int64_t* taken, cudaStream_t stream) {
  const MaskArguments a{
      t, static_cast<uint32_t>(threshold_bits), ties, plan.chunks_per_span, reinterpret_cast<uint8_t*>(mask),
      reinterpret_cast<unsigned long long*>(ties_in_span), taken};
  const cudaError_t error = launch<MaskAll>(a, plan.spans, MaskAll::shared_bytes, stream);
  return error != cudaSuccess ? error : launch<MaskTies>(a, plan.spans, MaskTies::shared_bytes, stream);
}

}  // namespace moe_unlearn
