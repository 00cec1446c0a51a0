// Tensors of any strides as rows along their last dimension, read and written in chunks of 8 elements: a quarter
// of a mask word, 16 bytes of a 2-byte dtype. No torch.

#pragma once

#include "cuda/group.cuh"

namespace moe_unlearn {

constexpr int chunk_size = 8;
constexpr int chunks_per_word = word_bits / chunk_size;

MOE_UNLEARN_HOST_DEVICE int64_t item_size(Dtype dtype) {
  return dtype == Dtype::bfloat16 || dtype == Dtype::float16 ? 2 : 4;
}

/// A tensor [..., width], absent if its dtype is `none`.
struct Rows {
  static constexpr int max_dims = 7;

  char* data = nullptr;
  int64_t width = 1, count = 1;
  int64_t stride = 0;  // bytes between the elements of a row
  Dtype dtype = Dtype::none;
  int dims = 0;         // leading dimensions, after those that form one stride have been merged
  bool vector = false;  // whole chunks can be moved 16 bytes at a time
  int64_t sizes[max_dims] = {}, strides[max_dims] = {};

  Rows() = default;

  /// From sizes and strides in elements; false if the leading dimensions are too many.
  bool set(void* pointer, Dtype of, int64_t num_dims, const int64_t* shape, const int64_t* tensor_strides) {
    const int64_t item = item_size(of), last = num_dims - 1;
    *this = Rows();
    data = static_cast<char*>(pointer), dtype = of;
    width = last >= 0 ? shape[last] : 1;
    stride = last >= 0 ? tensor_strides[last] * item : item;
    vector = (stride == item || width == 1) && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    for (int64_t d = 0; d < last; ++d) {
      count *= shape[d];
      if (shape[d] == 1) continue;
      vector &= tensor_strides[d] * item % 16 == 0;
      if (dims > 0 && strides[dims - 1] == shape[d] * tensor_strides[d] * item) {
        sizes[dims - 1] *= shape[d];
        strides[dims - 1] = tensor_strides[d] * item;
      } else if (dims == max_dims) {
        return false;
      } else {
        sizes[dims] = shape[d];
        strides[dims++] = tensor_strides[d] * item;
      }
    }
    return true;
  }

  MOE_UNLEARN_HOST_DEVICE explicit operator bool() const { return dtype != Dtype::none; }
  MOE_UNLEARN_HOST_DEVICE int64_t words() const { return ceil_div<int64_t>(width, word_bits); }

  MOE_UNLEARN_DEVICE char* row(int64_t index) const {
    int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      const int64_t above = divide(index, sizes[d]);
      offset += (index - above * sizes[d]) * strides[d];
      index = above;
    }
    return data + offset + index * strides[0];
  }
};

/// Where a chunk lies: row, first element, and how many of its 8 elements the row has (0 in its padding).
struct Place {
  int64_t row, first;
  int n;
};

MOE_UNLEARN_DEVICE Place place_of(int64_t chunk, int64_t words, int64_t width) {
  const int64_t per_row = words * chunks_per_word, row = divide(chunk, per_row);
  const int64_t first = (chunk - row * per_row) * chunk_size, left = width - first;
  return {row, first, static_cast<int>(left < 0 ? 0 : left > chunk_size ? chunk_size : left)};
}

/// The elements of a chunk as they lie in memory, packed: nothing computed on them, so that the loads of several
/// tensors are in flight together.
struct Raw {
  uint32_t word[chunk_size];

  template <int item>
  MOE_UNLEARN_DEVICE uint32_t get(int j) const {
    return item == 4 ? word[j] : word[j / 2] >> (j % 2 * 16) & 0xFFFF;
  }
  template <int item>
  MOE_UNLEARN_DEVICE void set(int j, uint32_t bits) {
    if (item == 4)
      word[j] = bits;
    else
      word[j / 2] = j % 2 ? (word[j / 2] & 0xFFFF) | bits << 16 : (word[j / 2] & 0xFFFF0000) | bits;
  }
};

template <class Bits>
MOE_UNLEARN_DEVICE void load_elements(Raw& raw, const char* from, int64_t stride, int n) {
  MOE_UNLEARN_UNROLL
  for (int j = 0; j < chunk_size; ++j)
    raw.set<sizeof(Bits)>(j, j < n ? *reinterpret_cast<const Bits*>(from + j * stride) : 0);
}

template <class Bits>
MOE_UNLEARN_DEVICE void store_elements(const Raw& raw, char* to, int64_t stride, uint32_t chosen) {
  MOE_UNLEARN_UNROLL
  for (int j = 0; j < chunk_size; ++j)
    if (chosen >> j & 1) *reinterpret_cast<Bits*>(to + j * stride) = static_cast<Bits>(raw.get<sizeof(Bits)>(j));
}

/// The n elements from `first` on; the others are 0.
MOE_UNLEARN_DEVICE Raw load(const Rows& rows, const char* row, const Place& place) {
  const char* const from = row + place.first * rows.stride;
  const bool narrow = item_size(rows.dtype) == 2;
  Raw raw;
  if (rows.vector && place.n == chunk_size) {
    const auto* const quads = reinterpret_cast<const uint4*>(from);
    const uint4 low = quads[0], high = narrow ? uint4{} : quads[1];
    raw = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  } else if (narrow) {
    raw = {};
    load_elements<uint16_t>(raw, from, rows.stride, place.n);
  } else {
    load_elements<uint32_t>(raw, from, rows.stride, place.n);
  }
  return raw;
}

/// Writes the elements whose bit in `chosen` is set; `raw` holds what was there for the others.
MOE_UNLEARN_DEVICE void store(const Rows& rows, char* row, const Place& place, const Raw& raw, uint32_t chosen) {
  char* const to = row + place.first * rows.stride;
  const bool narrow = item_size(rows.dtype) == 2;
  if (rows.vector && place.n == chunk_size) {
    auto* const quads = reinterpret_cast<uint4*>(to);
    quads[0] = {raw.word[0], raw.word[1], raw.word[2], raw.word[3]};
    if (!narrow) quads[1] = {raw.word[4], raw.word[5], raw.word[6], raw.word[7]};
  } else if (narrow) {
    store_elements<uint16_t>(raw, to, rows.stride, chosen);
  } else {
    store_elements<uint32_t>(raw, to, rows.stride, chosen);
  }
}

/// What a chunk's elements are as float32.
using Chunk = float[chunk_size];

template <Dtype D>
MOE_UNLEARN_DEVICE void widen_chunk(Chunk& out, const Raw& raw) {
  MOE_UNLEARN_UNROLL
  for (int j = 0; j < chunk_size; ++j) out[j] = widen<D>(raw.get<D == Dtype::float32 ? 4 : 2>(j));
}

MOE_UNLEARN_DEVICE void widen(Chunk& out, const Raw& raw, Dtype dtype) {
  if (dtype == Dtype::float32)
    widen_chunk<Dtype::float32>(out, raw);
  else if (dtype == Dtype::bfloat16)
    widen_chunk<Dtype::bfloat16>(out, raw);
  else
    widen_chunk<Dtype::float16>(out, raw);
}

template <Dtype D, bool exact>
MOE_UNLEARN_DEVICE void narrow_chunk(Raw& raw, const Chunk& value, uint32_t chosen) {
  MOE_UNLEARN_UNROLL
  for (int j = 0; j < chunk_size; ++j) {
    const uint32_t bits = exact && D == Dtype::bfloat16 ? bits_of(value[j]) >> 16 : narrow<D>(value[j]);
    if (chosen >> j & 1) raw.set<D == Dtype::float32 ? 4 : 2>(j, bits);
  }
}

/// Replaces the chosen elements by `value` rounded to `dtype` (`exact`: it is); the others keep their bits.
template <bool exact>
MOE_UNLEARN_DEVICE void narrow(Raw& raw, const Chunk& value, Dtype dtype, uint32_t chosen) {
  if (dtype == Dtype::float32)
    narrow_chunk<Dtype::float32, exact>(raw, value, chosen);
  else if (dtype == Dtype::bfloat16)
    narrow_chunk<Dtype::bfloat16, exact>(raw, value, chosen);
  else
    narrow_chunk<Dtype::float16, exact>(raw, value, chosen);
}

}  // namespace moe_unlearn
