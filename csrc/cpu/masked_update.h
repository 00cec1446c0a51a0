// masked_update's rules and operands, for the ops that update weights: masked_update itself and expert_wgrad.

#pragma once

#include "cpu/common.h"

namespace moe_unlearn {

/// Rows of words counted through grad, state, master and mask; those of grad begin at `grad_start`, so that it may
/// be a block of the whole.
struct UpdateOperands {
  Rows param, grad, mask, master;
  Rows state[2];
  const int64_t* slices;       // slice of param each slice of the state stands for, or null
  int64_t rows_per_slice;
  int64_t grad_start;
  int64_t step, seed, parameter_id;
  int64_t first_element;       // of param, in the parameter that it is a shard of
  bool stochastic;

  UpdateOperands(
      const Tensor& param, const Rows& grad, int64_t rows, const std::optional<Tensor>& mask,
      const std::optional<Tensor>& master, const std::optional<Tensor>& slices, const Update& update);

  int64_t words() const { return ceil_div(param.width, word_bits); }

  /// The dtype whose rounding each operation has (the module docstring of masked_update.py).
  ScalarType arithmetic() const;

  /// Whether the state is blocks of codes.
  bool packed() const { return state[0].dtype == ScalarType::Byte; }
};

/// The rows [begin, end) by a rule, in the calling thread.
void update_rows(const UpdateOperands& operands, const Sgd& rule, int64_t begin, int64_t end);
void update_rows(const UpdateOperands& operands, const AdamW& rule, int64_t begin, int64_t end);

}  // namespace moe_unlearn
