// What every CPU kernel needs: the instruction set chosen at run time, parallel loops, tensors seen as rows of
// words, and the float dtypes as float32.
//
// The libraries are built for the smallest CPU of the architecture. A hot loop is written once, in plain C++
// marked MOE_UNLEARN_INLINE, and compiled three times by `for_this_cpu`; the compiler vectorises it. With
// contraction off and every fused multiply-add written out, the three give the same bits.

#pragma once

#include "element.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>

/// A function, or (after the parameter list) a lambda, that has to be compiled into its caller.
#define MOE_UNLEARN_INLINE inline __attribute__((always_inline))
#define MOE_UNLEARN_INLINE_LAMBDA __attribute__((always_inline))

namespace moe_unlearn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- The instruction set ------------------------------------------------------------------------------------

enum class InstructionSet : int { baseline, avx2, avx512 };

/// The best one this CPU has, or a lower one asked for through the op `instruction_set`.
InstructionSet instruction_set();

/// Whether bfloat16 matrices are multiplied as float32 ones (widened_product.h): where this CPU has no instruction that
/// is faster, or as asked for through the op `narrow_products`.
bool widens_products();

/// Whether the instruction for pairs of bfloat16 numbers is the faster one, or asked for through that op.
bool prefers_pairs();

#if defined(__x86_64__)
#if defined(__clang__)
#define MOE_UNLEARN_AVX512 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#else
#define MOE_UNLEARN_AVX512 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif

template <auto body, class... Arguments>
__attribute__((target(MOE_UNLEARN_AVX512))) void for_avx512(Arguments... arguments) {
  body(arguments...);
}

template <auto body, class... Arguments>
__attribute__((target("avx2,fma"))) void for_avx2(Arguments... arguments) {
  body(arguments...);
}
#endif

/// body(arguments...) in the version compiled for the instruction set in use. `body` is MOE_UNLEARN_INLINE
/// and everything it calls in its loops too: a function left outside would be compiled for the baseline.
template <auto body, class... Arguments>
void for_this_cpu(Arguments... arguments) {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return for_avx512<body, Arguments...>(arguments...);
    case InstructionSet::avx2:
      return for_avx2<body, Arguments...>(arguments...);
    default:
      break;
  }
#endif
  body(arguments...);
}

// ---- Threads ------------------------------------------------------------------------------------------------

/// f(begin, end) on parts of [0, count) in torch's threads, each of at least `grain`. Where the parts begin
/// depends on the number of threads: for element-wise work and integers only.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, f);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// f(block, begin, end) for the blocks of `size` of [0, count): the same blocks for any number of threads, so
/// that sums taken per block and added in the order of blocks are deterministic.
template <class F>
void parallel_blocks(int64_t count, int64_t size, const F& f) {
  parallel(ceil_div(count, size), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      f(block, block * size, std::min(count, (block + 1) * size));
  });
}

// ---- Tensors as rows ----------------------------------------------------------------------------------------

inline int64_t item_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Char:
    case ScalarType::Byte:
    case ScalarType::Bool:
      return 1;
    default:
      STD_TORCH_CHECK(false, "no kernel for this dtype");
  }
}

/// A tensor [..., width] of any strides, seen as `count` rows along its last dimension.
struct Rows {
  static constexpr int64_t max_dims = 16;

  char* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int64_t width = 1, count = 1;
  int64_t stride = 0;  // bytes between the elements of a row
  int64_t item = 0;  // bytes of an element
  int64_t dims = 0;  // leading dimensions, after those that form one stride have been merged
  int64_t sizes[max_dims], strides[max_dims];

  Rows() = default;

  explicit Rows(const Tensor& tensor) {
    const auto shape = tensor.sizes(), tensor_strides = tensor.strides();
    const int64_t last = tensor.dim() - 1;
    STD_TORCH_CHECK(last < max_dims, "at most ", max_dims, " dimensions");
    data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
    dtype = tensor.scalar_type();
    item = item_size(dtype);
    if (last >= 0) width = shape[last];
    stride = last >= 0 ? tensor_strides[last] * item : item;
    for (int64_t d = 0; d < last; ++d) {
      count *= shape[d];
      if (dims > 0 && strides[dims - 1] == shape[d] * tensor_strides[d] * item) {
        sizes[dims - 1] *= shape[d];
        strides[dims - 1] = tensor_strides[d] * item;
      } else {
        sizes[dims] = shape[d];
        strides[dims++] = tensor_strides[d] * item;
      }
    }
  }

  explicit Rows(const std::optional<Tensor>& tensor) {
    if (tensor.has_value()) *this = Rows(*tensor);
  }

  /// Dense rows.
  Rows(char* data, ScalarType dtype, int64_t count, int64_t width)
      : data(data), dtype(dtype), width(width), count(count), stride(item_size(dtype)), item(stride), dims(1) {
    sizes[0] = count;
    strides[0] = width * item;
  }

  explicit operator bool() const { return dtype != ScalarType::Undefined; }

  char* row(int64_t index) const {
    int64_t offset = 0;
    for (int64_t d = dims - 1; d > 0; --d) {
      offset += index % sizes[d] * strides[d];
      index /= sizes[d];
    }
    return data + offset + (dims > 0 ? index * strides[0] : 0);
  }

  int64_t words() const { return ceil_div(width, 32); }
};

// ---- Float dtypes as float32, 32 elements (one mask word) at a time -----------------------------------------

constexpr int word_bits = 32;
using Word [[gnu::aligned(64)]] = float[word_bits];

// tensors' elements are read and written where they lie, whatever type torch thinks of them by: copying them
// to a local array first costs more than the arithmetic (vector loads of freshly stored halves)
using Bits32 [[gnu::may_alias]] = uint32_t;
using Bits16 [[gnu::may_alias]] = uint16_t;

MOE_UNLEARN_INLINE uint32_t choose(bool condition, uint32_t yes, uint32_t no) { return condition ? yes : no; }

/// A dtype of torch's as one of element.h's.
template <ScalarType>
struct Format;

template <>
struct Format<ScalarType::Float> {
  using Bits = Bits32;
  static constexpr Dtype dtype = Dtype::float32;
};

template <>
struct Format<ScalarType::BFloat16> {
  using Bits = Bits16;
  static constexpr Dtype dtype = Dtype::bfloat16;
};

template <>
struct Format<ScalarType::Half> {
  using Bits = Bits16;
  static constexpr Dtype dtype = Dtype::float16;
};

template <ScalarType D>
MOE_UNLEARN_INLINE void load_as(Word& out, const char* from, int64_t stride, int64_t n) {
  using Bits = typename Format<D>::Bits;
  if (n == word_bits && stride == sizeof(Bits)) {
    const auto* raw = reinterpret_cast<const Bits*>(from);
    for (int j = 0; j < word_bits; ++j) out[j] = widen<Format<D>::dtype>(raw[j]);
    return;
  }
  for (int j = 0; j < word_bits; ++j) {
    Bits raw = 0;
    if (j < n) std::memcpy(&raw, from + j * stride, sizeof(raw));
    out[j] = widen<Format<D>::dtype>(raw);
  }
}

/// The first n elements, `stride` bytes apart, as float32; the others are 0.
MOE_UNLEARN_INLINE void load(Word& out, ScalarType dtype, const char* from, int64_t stride, int64_t n) {
  switch (dtype) {
    case ScalarType::Float:
      return load_as<ScalarType::Float>(out, from, stride, n);
    case ScalarType::BFloat16:
      return load_as<ScalarType::BFloat16>(out, from, stride, n);
    default:
      return load_as<ScalarType::Half>(out, from, stride, n);
  }
}

template <ScalarType D, bool rounded>
MOE_UNLEARN_INLINE void store_as(const Word& value, char* to, int64_t stride, uint32_t chosen, int64_t n) {
  using Bits = typename Format<D>::Bits;
  const auto in_bits = [](float x) MOE_UNLEARN_INLINE_LAMBDA {
    return rounded && D == ScalarType::BFloat16 ? bits_of(x) >> 16 : narrow<Format<D>::dtype>(x);
  };
  if (n == word_bits && stride == sizeof(Bits)) {
    auto* raw = reinterpret_cast<Bits*>(to);
    // an element that is not chosen keeps its very bits, a NaN's payload too
    for (int j = 0; j < word_bits; ++j)
      raw[j] = static_cast<Bits>(choose(chosen >> j & 1, in_bits(value[j]), raw[j]));
    return;
  }
  for (int j = 0; j < n; ++j) {
    const Bits raw = static_cast<Bits>(in_bits(value[j]));
    if (chosen >> j & 1) std::memcpy(to + j * stride, &raw, sizeof(raw));
  }
}

/// Write the elements whose bit in `chosen` is set, among the first n, rounded to `dtype` (`rounded`: they are).
template <bool rounded = false>
MOE_UNLEARN_INLINE void store(
    const Word& value, ScalarType dtype, char* to, int64_t stride, uint32_t chosen, int64_t n) {
  switch (dtype) {
    case ScalarType::Float:
      return store_as<ScalarType::Float, rounded>(value, to, stride, chosen, n);
    case ScalarType::BFloat16:
      return store_as<ScalarType::BFloat16, rounded>(value, to, stride, chosen, n);
    default:
      return store_as<ScalarType::Half, rounded>(value, to, stride, chosen, n);
  }
}

}  // namespace moe_unlearn
