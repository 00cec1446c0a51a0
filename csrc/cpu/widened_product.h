// Products of bfloat16 matrices by float32's multiply-add: two bfloat16 numbers multiply exactly in float32, and where
// a processor has no faster instruction for them torch's mm, which goes through a slow one, is half as fast or less.
//
// A result is the sum of its terms in their order, each added by a fused multiply-add, and rounded once: the same bits
// for any number of threads, on every instruction set, wherever the operands lie in memory.

#pragma once

#include "cpu/matmul.h"

namespace moe_unlearn {

/// Floats on a cache line, as many as were asked for at most.
class Floats {
 public:
  /// Room for `count` floats; what was there is lost where that is more than before.
  float* room_for(int64_t count);
  float* data() const { return reinterpret_cast<float*>(memory_.data()); }

 private:
  Buffer memory_;
  int64_t count_ = 0;
};

/// A matrix as the right side of products, widened: panels of 32 columns, in which a row is 32 floats. Some of the last
/// one's may be of no column: what becomes of them goes nowhere.
class Panels {
 public:
  /// Takes b [depth, columns].
  void pack(const Matrix& b);
  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }
  const float* at(int64_t panel, int64_t k) const { return floats_.data() + (panel * depth_ + k) * word_bits; }

 private:
  Floats floats_;
  int64_t depth_ = 0, columns_ = 0;
};

/// A matrix as the left side of products, widened: strips of rows, of some of their elements at a time.
class Strips {
 public:
  /// Takes a [rows, depth].
  void pack(const Matrix& a);
  const float* at(int64_t row, int64_t k) const;

 private:
  Floats floats_;
  int64_t rows_ = 0;
};

/// The products of one thread, of matrices of any float dtype up to float32 and any strides.
class WidenedProducts {
 public:
  /// out = a b, b being the larger one: it is read once, a part at a time.
  void multiply(const Matrix& out, const Matrix& a, const Matrix& b);
  /// out = a b; `streams`: out is more than a cache holds and goes past it where it can.
  void multiply(const Matrix& out, const Matrix& a, const Panels& b, bool streams);

 private:
  void multiply_rows(const Matrix& out, const Matrix& a);
  void multiply_columns(const Matrix& out, const Matrix& b);

  Panels panels_;
  Strips strips_;
  Floats part_, sums_, rounded_;
};

/// out = a b, b being the larger one, by `own` where this processor widens.
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b, WidenedProducts& own) {
  if (widens(b.dtype) && a.columns > 0)
    own.multiply(out, a, b);
  else
    multiply(out, a, b);
}

}  // namespace moe_unlearn
