"""Mutants that compute the same: nothing can tell them from the kernel, for the reason given."""

# (file, kernel, line before, line after) -> reason
EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    (
        "masked_update.py",
        "_update_kernel",
        "words = tl.where(exists, -1, 0)",
        "words = tl.where(exists, 1, 0)",
    ): "without a mask no bit is looked at, only whether a word is zero; old values are loaded in vain",
    (
        "weight_score.py",
        "_mask_kernel",
        "if (total > 0) & (left > 0):",
        "if (total >= 0) & (left > 0):",
    ): "ranks of no elements are computed, which the branch only saves",
    (
        "expert_mlp_backward.py",
        "_store_gradient",
        "gate = tl.load(z + wide_row + column[None, :], mask=known, other=0.0)",
        "gate = tl.load(z + wide_row + column[None, :], mask=known, other=1)",
    ): "columns behind the last are not stored, and rows behind the used ones have weight 0, a factor of all",
    (
        "expert_mlp_backward.py",
        "_store_gradient",
        "up = tl.load(z + wide_row + INNER + column[None, :], mask=known, other=0.0)",
        "up = tl.load(z + wide_row + INNER + column[None, :], mask=known, other=1)",
    ): "columns behind the last are not stored, and rows behind the used ones have weight 0, a factor of all",
    (
        "expert_mlp_backward.py",
        "_store_gradient",
        "pairs = tl.load(z + wide_row + pair[None, :], mask=known_pairs, other=0.0)",
        "pairs = tl.load(z + wide_row + pair[None, :], mask=known_pairs, other=1)",
    ): "columns behind the last are not stored, and rows behind the used ones have weight 0, a factor of all",
    (
        "weight_score.py",
        "_score",
        "w = tl.load(word_elements(weight, weight_strides, index, row, at), mask=exists, other=0.0).to(tl.float32)",
        "w = tl.load(word_elements(weight, weight_strides, index, row, at), mask=exists, other=1).to(tl.float32)",
    ): "whoever asks for a score leaves out what does not exist",
    (
        "weight_score.py",
        "_score",
        "f = tl.load(word_elements(forget, forget_strides, index, row, at), mask=exists, other=0.0).to(tl.float32)",
        "f = tl.load(word_elements(forget, forget_strides, index, row, at), mask=exists, other=1).to(tl.float32)",
    ): "whoever asks for a score leaves out what does not exist",
    (
        "weight_score.py",
        "_score",
        "r = tl.load(word_elements(retain, retain_strides, index, row, at), mask=exists, other=0.0).to(tl.float32)",
        "r = tl.load(word_elements(retain, retain_strides, index, row, at), mask=exists, other=1).to(tl.float32)",
    ): "whoever asks for a score leaves out what does not exist",
    (
        "csrc/cpu/weight_score.cpp",
        "for_each_terms",
        "for (int64_t row = begin / words; row * words < end; ++row) {",
        "for (int64_t row = begin / words; row * words <= end; ++row) {",
    ): "no word of the row behind the last one is looked at; its address is computed in vain",
    (
        "csrc/cpu/widened_product.h",
        "multiply",
        "if (widens(b.dtype) && a.columns > 0)",
        "if (widens(b.dtype) && a.columns > 1)",
    ): "a sum of one term has the same bits by torch's mm",
    (
        "csrc/cpu/widened_tile.h",
        "next",
        "for (int64_t i = 0; i < share_ && rest_ > 0; ++i) {",
        "for (int64_t i = 0; i < share_ && rest_ >= 0; ++i) {",
    ): "what is asked for ahead, even from beyond a matrix, changes no result",
    (
        "csrc/cpu/widened_tile.h",
        "next",
        "for (int64_t i = 0; i < share_ && rest_ > 0; ++i) {",
        "for (int64_t i = 0; i < share_ ; ++i) {",
    ): "what is asked for ahead, even from beyond a matrix, changes no result",
    (
        "csrc/cuda/wgrad_factors.cuh",
        "can_be_boxed",
        "bool can_be_boxed() const { return !rows && height > 0 && columns > 0 && stride >= columns; }",
        "bool can_be_boxed() const { return !rows && height > 1 && columns > 0 && stride >= columns; }",
    ): "boxes are copied where a stage's 64 rows are all there, which one row never is",
    (
        "csrc/cuda/expert_mlp.cuh",
        "sum_slots",
        "const int64_t chunks = a.tokens * (a.columns / chunk_size);",
        "const int64_t chunks = a.tokens * (a.columns );",
    ): "blocks behind the last chunk end at once",
    (
        "csrc/cuda/expert_mlp.cu",
        "expert_mlp_backward",
        "const SwiGlu gate{static_cast<float>(alpha), static_cast<float>(limit), static_cast<float>(shift)};",
        "const SwiGlu gate{static_cast<float>(alpha), static_cast<float>(limit), (shift)};",
    ): "the constructor makes the same float of a double",
    (
        "csrc/cuda/group.cuh",
        "divide",
        "if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);",
        "if (((a | b) << 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);",
    ): "no divisor is a multiple of 2^32, so that every quotient is made of 64 bits, which is slower alone",
}
