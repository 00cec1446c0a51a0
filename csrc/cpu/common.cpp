// The instruction set in use.

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

}  // namespace

InstructionSet instruction_set() { return in_use.load(std::memory_order_relaxed); }

}  // namespace moe_unlearn

// no tensor among the arguments, so no dispatch key: one kernel for all
STABLE_TORCH_LIBRARY_IMPL(moe_unlearn_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&moe_unlearn::instruction_set_op));
}
