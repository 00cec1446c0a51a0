// The instruction set in use, and the way of bfloat16 products.

#include "cpu/common.h"

#include <atomic>
#include <string>

namespace moe_unlearn {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512"};

InstructionSet best() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? InstructionSet::avx512 : avx2 ? InstructionSet::avx2 : InstructionSet::baseline;
#else
  return InstructionSet::baseline;
#endif
}

std::atomic<InstructionSet> in_use{best()};

std::string instruction_set_op(const std::optional<std::string>& limit) {
  if (limit.has_value()) {
    const auto* found = std::find(std::begin(names), std::end(names), *limit);
    STD_TORCH_CHECK(limit->empty() || found != std::end(names), "no instruction set is called ", *limit);
    const auto wanted = limit->empty() ? best() : static_cast<InstructionSet>(found - names);
    in_use = std::min(wanted, best());
  }
  return names[static_cast<int>(in_use.load())];
}

/// What this CPU has for bfloat16 that is faster than float32's multiply-add: AMD's instruction for pairs makes two
/// terms in its time, Intel's takes four times as long; Intel's matrix unit (AMX) makes many.
struct NarrowInstructions {
  bool fast_pairs = false, matrix_unit = false;

  NarrowInstructions() {
#if defined(__x86_64__)
    fast_pairs = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16");
    matrix_unit = __builtin_cpu_supports("amx-bf16");
#endif
  }
};

const NarrowInstructions& narrow_instructions() {
  static const NarrowInstructions found;
  return found;
}

enum class NarrowProducts : int { torch, widened, by_cpu };
constexpr const char* ways[] = {"torch", "widened", ""};
std::atomic<NarrowProducts> asked{NarrowProducts::by_cpu};

std::string narrow_products_op(const std::optional<std::string>& way) {
  if (way.has_value()) {
    const auto* found = std::find(std::begin(ways), std::end(ways), *way);
    STD_TORCH_CHECK(found != std::end(ways), "no way of products is called ", *way);
    asked = static_cast<NarrowProducts>(found - ways);
  }
  return ways[widens_products()];
}

}  // namespace

bool widens_products() {
  if (instruction_set() == InstructionSet::baseline) return false;
  const NarrowProducts way = asked.load(std::memory_order_relaxed);
  if (way != NarrowProducts::by_cpu) return way == NarrowProducts::widened;
  return !narrow_instructions().fast_pairs && !narrow_instructions().matrix_unit;
}

bool prefers_pairs() {
  const NarrowProducts way = asked.load(std::memory_order_relaxed);
  return way == NarrowProducts::by_cpu ? narrow_instructions().fast_pairs : way == NarrowProducts::torch;
}

InstructionSet instruction_set() { return in_use.load(std::memory_order_relaxed); }

}  // namespace moe_unlearn

// no tensor among the arguments, so no dispatch key: one kernel for all
STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&moe_unlearn::instruction_set_op));
  m.impl("narrow_products", TORCH_BOX(&moe_unlearn::narrow_products_op));
}
