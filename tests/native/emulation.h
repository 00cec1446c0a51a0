// A launch on the CPU: every thread of a cluster (of the grid, if it is cooperative) is a fiber that runs until its
// next barrier. The order of threads is shuffled and warps drift apart, so that a missing barrier shows. Included by
// csrc/cuda/group.cuh in place of the real thing, inside the namespace moe_unlearn.
//
// A barrier that not all of its threads reach is an error: kernels are held to converged barriers. Shared memory
// starts as garbage.

}  // namespace moe_unlearn

#include <ucontext.h>

#include <bit>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace moe_unlearn {
namespace emulation {

/// The GPU that is emulated; set by tests.
inline Device device{3, 227 * 1024, 90};
inline uint32_t seed = 0;
inline std::mt19937 random;

struct Barrier {
  int members = 0, arrived = 0;
  int64_t generation = 0;
};

/// What a thread has started and not yet waited for, in groups.
struct Pending {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;

  void commit() { groups.push_back(std::exchange(open, {})); }
};

struct Block;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  int thread = 0;
  Barrier* waits_for = nullptr;
  int64_t generation = 0;
  std::function<bool()> ready;  // where it waits for something else than a barrier
  Pending copies, products;
  std::vector<std::function<void()>> landed;  // copies that are there, but not yet fenced
  bool done = false;
};

struct Warp {
  Barrier barrier;
  uint64_t value[32];
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
};

struct Block {
  Barrier barrier;
  Cluster* cluster = nullptr;
  int rank = 0;     // in its cluster
  int running = 0;  // threads that have not ended
  std::vector<Warp> warps;
  std::vector<unsigned char> shared, asynchronous;  // the latter as Hopper's asynchronous units see it
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline Barrier grid_barrier;
inline int64_t grid_size = 0;
inline const char* failure = nullptr;
inline std::vector<std::function<void()>> in_flight;  // done by nobody's thread, at any time
inline std::vector<int64_t> prefetched;               // an address and bytes each, until it is cleared

inline void meet(Barrier& barrier) {
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_for = &barrier;
  current->generation = barrier.generation;
  swapcontext(&current->context, &scheduler);
}

}  // namespace emulation

struct Group {
  int thread_index;
  int64_t block_index;
  emulation::Block* own;

  int thread() const { return thread_index; }
  int64_t block() const { return block_index; }
  int64_t blocks() const { return emulation::grid_size; }
  void sync() const { emulation::meet(own->barrier); }
  void sync_warp() const { emulation::meet(warp().barrier); }
  void sync_grid() const { emulation::meet(emulation::grid_barrier); }

  template <class T>
  T shuffle(T value, int lane) const {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    exchange(bits);
    memcpy(&value, &warp().value[lane], sizeof(T));
    sync_warp();
    return value;
  }
  template <class T>
  T shuffle_up(T value, int distance) const {
    return shuffle(value, lane() >= distance ? lane() - distance : lane());
  }
  uint32_t match(uint32_t key) const {
    exchange(key);
    uint32_t equal = 0;
    for (int i = 0; i < 32; ++i) equal |= static_cast<uint32_t>(warp().value[i] == key) << i;
    sync_warp();
    return equal;
  }
  bool any(bool condition) const {
    exchange(condition);
    uint64_t found = 0;
    for (uint64_t value : warp().value) found |= value;
    sync_warp();
    return found != 0;
  }

  template <class T>
  void add(T* to, T value) const {
    *to += value;
  }
  void fail() const { emulation::failure = "trap"; }

 private:
  int lane() const { return thread_index % 32; }
  emulation::Warp& warp() const { return own->warps[thread_index / 32]; }
  void exchange(uint64_t value) const {
    warp().value[lane()] = value;
    sync_warp();
  }
};

namespace emulation {

/// The fiber will call enter(argument), which makecontext can only pass as two ints.
[[gnu::noinline]] inline void prepare(Fiber& fiber, void (*enter)(unsigned, unsigned), uint64_t argument) {
  constexpr size_t stack = 32 * 1024;
  if (!fiber.stack) fiber.stack = std::make_unique_for_overwrite<char[]>(stack);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = stack;
  fiber.context.uc_link = nullptr;
  const auto entry = reinterpret_cast<void (*)()>(enter);
  makecontext(&fiber.context, entry, 2, static_cast<unsigned>(argument >> 32), static_cast<unsigned>(argument));
}

template <class Kernel>
struct Launch {
  const typename Kernel::Arguments* arguments;
  Group group;
  Fiber* fiber;

  static void enter(unsigned high, unsigned low) {
    auto* self = std::bit_cast<Launch*>(uint64_t{high} << 32 | low);
    Kernel::run(self->group, *self->arguments, self->group.own->shared.data());
    self->fiber->done = true;
    --self->group.own->running;
    swapcontext(&self->fiber->context, &scheduler);
  }
};

/// Runs the blocks [first, last) at once.
template <class Kernel>
void run(const typename Kernel::Arguments& arguments, int64_t first, int64_t last, size_t shared_bytes) {
  constexpr int threads = Kernel::threads;
  static std::vector<Fiber> fibers;  // stacks are used again
  const size_t count = static_cast<size_t>(last - first) * threads;
  if (fibers.size() < count) fibers.resize(count);
  constexpr size_t cluster = cluster_of<Kernel>();
  std::vector<Block> blocks(static_cast<size_t>(last - first));
  std::vector<Cluster> clusters(blocks.size() / cluster);
  std::vector<Launch<Kernel>> launches(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t b = i / threads;
    Block& block = blocks[b];
    if (i % threads == 0) {
      block.barrier.members = block.running = threads;
      block.cluster = &clusters[b / cluster], block.rank = static_cast<int>(b % cluster);
      block.cluster->blocks.push_back(&block);
      block.cluster->barrier.members += threads;
      block.warps.resize(threads / 32);
      for (Warp& warp : block.warps) warp.barrier.members = 32;
      block.shared.assign(shared_bytes, 0xA5);
      block.asynchronous.assign(shared_bytes, 0xFF);  // NaN
    }
    Fiber& fiber = fibers[i];
    fiber.done = false, fiber.waits_for = nullptr, fiber.ready = nullptr;
    fiber.copies = fiber.products = {}, fiber.landed.clear();
    fiber.block = &block, fiber.thread = static_cast<int>(i % threads);
    launches[i] = {&arguments, {static_cast<int>(i % threads), first + static_cast<int64_t>(b), &block}, &fiber};
    prepare(fiber, &Launch<Kernel>::enter, std::bit_cast<uint64_t>(&launches[i]));
  }
  grid_barrier = {static_cast<int>(count), 0, 0};
  std::vector<size_t> warps(count / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  std::vector<bool> asleep(count / 32);
  random.seed(seed);
  std::vector<int64_t> starts(blocks.size());  // the round in which a block begins: those of a cluster not at once
  if (cluster > 1)
    for (int64_t& start : starts) start = random() % 2 * (random() % 512);
  in_flight.clear();
  const auto can_run = [](const Fiber& fiber) {
    if (fiber.done || (fiber.ready && !fiber.ready())) return false;
    return !(fiber.waits_for && fiber.waits_for->generation == fiber.generation);
  };
  bool runnable = true;
  for (int64_t round = 0; runnable; ++round) {
    runnable = false;
    std::shuffle(warps.begin(), warps.end(), random);
    std::shuffle(lanes.begin(), lanes.end(), random);
    for (const size_t warp : warps) {
      // half of them sleep for a while, so that warps drift apart as far as their barriers let them
      if (random() % 8 == 0) asleep[warp] = !asleep[warp];
      const bool begun = round >= starts[warp * 32 / threads];
      for (const size_t lane : lanes) {
        Fiber& fiber = fibers[warp * 32 + lane];
        if (!can_run(fiber)) continue;
        runnable = true;
        if (asleep[warp] || !begun) continue;
        fiber.waits_for = nullptr, fiber.ready = nullptr;
        current = &fiber;
        swapcontext(&scheduler, &fiber.context);
      }
    }
    std::shuffle(in_flight.begin(), in_flight.end(), random);
    while (!in_flight.empty() && (!runnable || random() % 4 == 0)) {
      in_flight.back()();
      in_flight.pop_back();
      runnable = true;
    }
  }
  if (const char* const what = std::exchange(failure, nullptr)) throw std::runtime_error(what);
  for (size_t i = 0; i < count; ++i) {
    if (!fibers[i].done) throw std::runtime_error("a barrier that not all of its threads reach");
    for (const Pending& pending : {fibers[i].copies, fibers[i].products})
      if (!pending.open.empty() || !pending.groups.empty()) throw std::runtime_error("nobody waited for the last work");
  }
}

}  // namespace emulation

template <class Kernel>
cudaError_t launch(
    const typename Kernel::Arguments& arguments, int64_t blocks, size_t shared_bytes, cudaStream_t,
    bool cooperative = false) {
  constexpr int cluster = cluster_of<Kernel>();
  if (shared_bytes > static_cast<size_t>(emulation::device.shared_limit)) return cudaErrorInvalidValue;
  if (blocks % cluster != 0) return cudaErrorInvalidConfiguration;
  emulation::grid_size = blocks;
  if (cooperative && blocks > 0)
    emulation::run<Kernel>(arguments, 0, blocks, shared_bytes);
  else
    for (int64_t block = 0; block < blocks; block += cluster)
      emulation::run<Kernel>(arguments, block, block + cluster, shared_bytes);
  return cudaSuccess;
}

inline cudaError_t get_device(Device& device) {
  device = emulation::device;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t get_resident_blocks(int& blocks, size_t) {
  blocks = 1;
  return cudaSuccess;
}

#include "emulated_hopper.h"
