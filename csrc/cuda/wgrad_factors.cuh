// The factors of weight gradients as Hopper's kernels read them.

#pragma once

#include "cuda/hopper.cuh"

namespace moe_unlearn {

/// A bfloat16 matrix [height, columns]: columns of stride 1, a multiple of 8; rows at 16-byte addresses.
struct Factor {
  const uint16_t* data;
  int64_t height, columns, stride;  // stride of rows, in elements
  const int64_t* rows;              // which row stands at each position; null: the position itself
  bool boxed = false;               // copied in boxes
  hopper::Boxes boxes{};

  bool fits() const {
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (stride | columns) % 8 == 0;
    return aligned && height <= INT32_MAX && columns <= INT32_MAX;
  }
  bool can_be_boxed() const { return !rows && height > 0 && columns > 0 && stride >= columns; }

  /// Has it copied in boxes of so many rows, if it can be.
  cudaError_t make_boxes(int rows_of_a_box) {
    if (!can_be_boxed()) return cudaSuccess;
    const cudaError_t error = hopper::make_boxes(boxes, Matrices{data, height, columns, stride}, rows_of_a_box);
    boxed = error == cudaSuccess;
    return error;
  }
};

/// What a gradient [experts, grad.columns, input.columns] is made of.
struct Factors {
  Factor grad, input;
  const int64_t* bounds;  // [experts, 2] positions
  int64_t experts;

  bool fit() const { return grad.fits() && input.fits(); }
  cudaError_t make_boxes(int rows_of_a_box) {
    const cudaError_t error = grad.make_boxes(rows_of_a_box);
    return error == cudaSuccess ? input.make_boxes(rows_of_a_box) : error;
  }
  MOE_UNLEARN_DEVICE int64_t start(int64_t expert) const { return bounds[2 * expert]; }
  MOE_UNLEARN_DEVICE int64_t stop(int64_t expert) const { return bounds[2 * expert + 1]; }
};

}  // namespace moe_unlearn
