// What the expert layer's kernels share: matrix products by torch's own mm (oneDNN, MKL) on memory as it lies,
// rows gathered into small buffers, and work shared out by cost.
//
// A product runs in one thread, inside a region that torch's threads share: the work is shared out alike for any number
// of them, and what is between the products is parallel too. The bits of a product are the library's all the same: they
// may change with the number of threads, the processor and where the operands lie in memory.

#pragma once

#include "cpu/product.h"

#include <cstdlib>
#include <memory>
#include <vector>

namespace moe_unlearn {

/// Whether products of a dtype are ours, of widened_product.h, on this CPU.
inline bool widens(ScalarType dtype) { return dtype == ScalarType::BFloat16 && widens_products(); }

/// oneDNN, which multiplies narrow dtypes, makes one primitive per shape: rows are counted in steps, of a few per
/// cent, so that there are few shapes. float32 is the BLAS's.
constexpr int64_t row_step = 8;
inline int64_t padded(int64_t rows, ScalarType dtype) {
  if (dtype == ScalarType::Float || widens(dtype)) return rows;
  const int64_t step = rows <= 32 * row_step ? row_step : 4 * row_step;
  return ceil_div(rows, step) * step;
}

/// Zeroed bytes on a cache line.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : data_(std::aligned_alloc(64, ceil_div(bytes + 1, 64) * 64), &std::free) {
    STD_TORCH_CHECK(data_, "no memory for ", bytes, " bytes");
    std::memset(data_.get(), 0, bytes);
  }
  char* data() const { return static_cast<char*>(data_.get()); }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_{nullptr, &std::free};
};

/// Elements in memory that others own; strides are counted in elements.
struct Matrix {
  char* data;
  ScalarType dtype;
  int64_t rows, columns, row_stride, column_stride;

  Matrix(char* data, ScalarType dtype, int64_t rows, int64_t columns)
      : Matrix(data, dtype, rows, columns, columns, 1) {}
  Matrix(char* data, ScalarType dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
      : data(data), dtype(dtype), rows(rows), columns(columns), row_stride(row_stride), column_stride(column_stride) {}

  Matrix transposed() const { return {data, dtype, columns, rows, column_stride, row_stride}; }
  Matrix slice(int64_t first, int64_t count) const {
    return {data + first * row_stride * item_size(dtype), dtype, count, columns, row_stride, column_stride};
  }
  Matrix first_rows(int64_t count) const { return slice(0, count); }
  Matrix block(int64_t first_row, int64_t row_count, int64_t first_column, int64_t column_count) const {
    return slice(first_row, row_count).transposed().slice(first_column, column_count).transposed();
  }
  char* row(int64_t index) const { return data + index * row_stride * item_size(dtype); }
  int64_t row_bytes() const { return columns * item_size(dtype); }
};

/// tensor[index] of a tensor with three dimensions.
inline Matrix matrix(const Tensor& tensor, int64_t index) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  const ScalarType dtype = tensor.scalar_type();
  char* const data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data + index * stride[0] * item_size(dtype), dtype, size[1], size[2], stride[1], stride[2]};
}

/// out = a b
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b) {
  const auto view = [](const Matrix& m) {
    const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2}, cpu, m.dtype);
  };
  multiply(view(out), view(a), view(b));
}

/// Copies the row `from` to dense memory `to` in dtype `to_dtype`.
MOE_UNLEARN_INLINE void copy_row(char* to, ScalarType to_dtype, const Rows& source, const char* from) {
  const int64_t item = item_size(to_dtype);
  if (source.dtype == to_dtype && source.stride == item) {
    std::memcpy(to, from, source.width * item);
    return;
  }
  for (int64_t first = 0; first < source.width; first += word_bits) {
    const int64_t n = std::min<int64_t>(source.width - first, word_bits);
    Word value;
    load(value, source.dtype, from + first * source.stride, source.stride, n);
    store(value, to_dtype, to + first * item, item, 0xFFFFFFFF, n);
  }
}

MOE_UNLEARN_INLINE void gather_rows(
    const Matrix& to, const Rows& source, const int64_t* rows, int64_t first, int64_t count) {
  for (int64_t j = 0; j < count; ++j)
    copy_row(to.row(j), to.dtype, source, source.row(rows ? rows[first + j] : first + j));
}

/// The first `count` rows of `to`: row rows[first + j] of source, or first + j without `rows`; then zeros up to
/// padded(count, dtype of to).
inline void gather(const Matrix& to, const Rows& source, const int64_t* rows, int64_t first, int64_t count) {
  for_this_cpu<gather_rows, const Matrix&, const Rows&, const int64_t*, int64_t, int64_t>(
      to, source, rows, first, count);
  std::memset(to.row(count), 0, (padded(count, to.dtype) - count) * to.row_bytes());
}

/// f(first, last) for each thread's part of the tasks, all of about equal cost; `cost` is that of each task.
template <class F>
void parallel_by_cost(const std::vector<int64_t>& cost, const F& f) {
  const int64_t tasks = static_cast<int64_t>(cost.size());
  const int64_t parts = torch::stable::get_num_threads();
  int64_t total = 0, done = 0;
  for (const int64_t c : cost) total += c;
  std::vector<int64_t> first(parts + 1, tasks);
  first[0] = 0;
  for (int64_t task = 0, part = 1; task < tasks; done += cost[task++])
    for (; part < parts && done * parts >= total * part; ++part) first[part] = task;
  // as many parts as threads, even if some are empty: a single one would leave the threads to its products
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    if (first[begin] < first[end]) f(first[begin], first[end]);
  });
}

}  // namespace moe_unlearn
