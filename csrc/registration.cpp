// Every native schema, in one place. The public ops `moe_unlearn::<op>` are defined in Python, and theirs is
// the checking of arguments; these are the raw kernels behind them, and Python's glue is their only caller.
//
// A kernel file registers its functions for these names (STABLE_TORCH_LIBRARY_IMPL); nothing but this file
// defines a name. `(a!)` marks what an op writes.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moe_unlearn_native, m) {
  // The instruction set in use. A name ("baseline", "avx2", "avx512") lowers it, "" takes the CPU's best.
  m.def("instruction_set(str? limit) -> str");
  // How bfloat16 matrices are multiplied: by "torch" or, as float32 ones, "widened". "" takes what suits the CPU.
  m.def("narrow_products(str? way) -> str");

  m.def(
      "route(Tensor top_k_index, int num_experts, Tensor? group, int num_groups, Tensor? log_tilt, "
      "Tensor(a!)? log_weight) -> (Tensor, Tensor, Tensor)");

  m.def("retain_weights(Tensor words, Tensor tilt, float bias, float cap) -> Tensor");
  m.def("retain_weights_moments(Tensor words, Tensor tilt, float bias, float cap) -> (Tensor, Tensor)");

  m.def(
      "weight_score_histogram(Tensor weight, Tensor grad_forget, Tensor grad_retain, float gamma, int digit, "
      "int prefix) -> Tensor");
  m.def(
      "weight_score_mask(Tensor weight, Tensor grad_forget, Tensor grad_retain, float gamma, "
      "int threshold_bits, int ties) -> (Tensor, Tensor)");
  m.def(
      "weight_score_between(Tensor weight, Tensor grad_forget, Tensor grad_retain, float gamma, int low, int high, "
      "int most) -> (Tensor, Tensor, Tensor, int)");
  m.def("weight_score_magnitudes(Tensor weight, Tensor grad_forget, Tensor grad_retain) -> Tensor");

  m.def(
      "masked_sgd_(Tensor(a!) param, Tensor grad, Tensor(b!)? momentum_buffer, Tensor? mask, "
      "Tensor(c!)? master, Tensor? slices, float lr, float momentum, float grad_scale, float weight_decay, "
      "bool nesterov, int step, bool stochastic, int seed, int parameter_id, int first_row) -> ()");
  m.def(
      "masked_adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? mask, "
      "Tensor(d!)? master, Tensor? slices, float decay, float beta1, float beta2, float root_correction, "
      "float eps, float step_size, int step, bool stochastic, int seed, int parameter_id, int first_row) -> ()");

  m.def(
      "expert_wgrad_(Tensor(a!) out, Tensor grad, Tensor input, Tensor bounds, Tensor? grad_rows, "
      "Tensor? input_rows, Tensor? mask, bool accumulate) -> ()");
  m.def(
      "expert_wgrad_sgd_(Tensor(a!) weight, Tensor(b!)? momentum_buffer, Tensor(c!)? master, Tensor grad, "
      "Tensor input, Tensor bounds, Tensor? grad_rows, Tensor? input_rows, Tensor experts, Tensor? mask, float lr, "
      "float momentum, float grad_scale, float weight_decay, bool nesterov, int step, bool stochastic, int seed, "
      "int parameter_id, int first_row) -> ()");
  m.def(
      "expert_wgrad_adamw_(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? master, "
      "Tensor grad, Tensor input, Tensor bounds, Tensor? grad_rows, Tensor? input_rows, Tensor experts, "
      "Tensor? mask, float decay, float beta1, float beta2, float root_correction, float eps, float step_size, "
      "int step, bool stochastic, int seed, int parameter_id, int first_row) -> ()");
  m.def(
      "expert_wgrad_inner_(Tensor(a!) out, Tensor[] grads, Tensor[] inputs, Tensor[] bounds, Tensor[] grad_rows, "
      "Tensor[] input_rows, Tensor? mask) -> ()");

  m.def(
      "expert_mlp(Tensor hidden_states, Tensor top_k_weights, Tensor sorted_rows, Tensor expert_offsets, "
      "Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, str activation, float alpha, "
      "float limit, float shift, bool transposed, bool interleaved, bool gated) -> (Tensor, Tensor)");
  m.def(
      "expert_mlp_backward(Tensor grad_out, Tensor hidden_states, Tensor top_k_weights, Tensor sorted_rows, "
      "Tensor expert_offsets, Tensor gate_up_proj, Tensor down_proj, Tensor? down_bias, Tensor z, str activation, "
      "float alpha, float limit, float shift, bool transposed, bool interleaved, bool gated, bool need_x, "
      "bool need_weights, bool need_z, bool need_scaled) -> (Tensor, Tensor, Tensor, Tensor)");

  m.def("gram(Tensor[] gradients, Tensor? mask) -> Tensor");
  m.def("gram_factors(Tensor[] row_gradients, Tensor inputs, int[] expert_offsets) -> Tensor");

  m.def(
      "token_loss(Tensor hidden, Tensor head, Tensor labels, Tensor index, Tensor? bias, Tensor? ref_hidden, "
      "Tensor? ref_head, str kind, float scale, float softcap, bool direction, Tensor(a!)? kept, Tensor(b!)? peaks, "
      "Tensor(c!)? spare) -> (Tensor, Tensor, Tensor, Tensor)");
  // Tokens and vocabulary entries of the forward's and of the backward's tiles; whether products take bfloat16 pairs.
  m.def("token_loss_tiles() -> (int, int, int, int)");
  m.def("has_pair_products() -> bool");
  m.def(
      "token_loss_head(Tensor(a!)? grad_head, Tensor(b!)? grad_bias, Tensor upstream, Tensor norm, Tensor ref_norm, "
      "Tensor hidden, Tensor head, Tensor labels, Tensor index, Tensor? bias, Tensor? ref_hidden, Tensor? ref_head, "
      "str kind, float scale, float softcap, Tensor? kept, Tensor? peaks, Tensor? spare) -> ()");
}
