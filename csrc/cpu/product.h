// Matrix products by torch's own mm (MKL, oneDNN).

#pragma once

#include "cpu/common.h"

namespace moe_unlearn {

/// out = a b, of any strides. None may require a gradient: torch's threads do not inherit that it is off.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // the result's handle is ours to close
}

inline Tensor first_rows(Tensor& tensor, int64_t count) { return torch::stable::narrow(tensor, 0, 0, count); }
inline Tensor first_columns(Tensor& tensor, int64_t count) { return torch::stable::narrow(tensor, 1, 0, count); }

inline Tensor corner(Tensor& tensor, int64_t rows, int64_t columns) {
  Tensor top = first_rows(tensor, rows);
  return first_columns(top, columns);
}

inline Tensor transposed(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

/// f(first, last) for each thread's part of the tasks, each of which holds products. As many parts as threads even
/// where there are fewer tasks: only inside a region that threads share does a product run in one thread, so that the
/// work is shared out alike for any number of them. What bits a product has is the library's affair.
template <class F>
void parallel_products(int64_t tasks, const F& f) {
  parallel(std::max<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t first, int64_t last) {
    if (first < std::min(last, tasks)) f(first, std::min(last, tasks));
  });
}

}  // namespace moe_unlearn
