// Hopper's instructions of csrc/cuda/hopper.cuh, in emulated threads, from what the PTX ISA says of them and not from
// what the kernels expect. Included by emulation.h, inside the namespace moe_unlearn.
//
// Asynchronous work is done at once or as late as it may, by chance: so a place that is written too early shows, and
// one that is read too early. What ordinary copies wrote is invisible to wgmma until it has been fenced. What reaches a
// block of a cluster after its end is an error.

namespace hopper {

using emulation::current;

/// Where shared memory begins: at 16 bytes, as a kernel may rely on, and at no more.
constexpr uint32_t shared_start = 1040;

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - current->block->shared.data();
  return shared_start + static_cast<uint32_t>(offset);
}

/// `size` bytes at an address as asynchronous units see them.
inline unsigned char* seen(emulation::Block& block, uint32_t address, uint32_t size) {
  static unsigned char nowhere[16];
  if (address % size == 0 && address >= shared_start && address + size <= shared_start + block.asynchronous.size())
    return &block.asynchronous[address - shared_start];
  emulation::failure = "an address beyond shared memory, or not aligned";
  return nowhere;
}

/// Swapping in 128 bytes: bits 4 to 6 of an address by bits 7 to 9.
inline uint32_t swapped(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline bool by_chance() { return emulation::random() % 2 == 0; }

inline void yield(std::function<bool()> ready) {
  current->ready = std::move(ready);
  swapcontext(&current->context, &emulation::scheduler);
}

// ---- Barriers ------------------------------------------------------------------------------------------------

struct Phase {
  uint8_t count, arrivals_left, parity, unused;
  int32_t bytes;
};

template <class Change>
void change(uint64_t& barrier, const Change& change) {
  auto phase = std::bit_cast<Phase>(barrier);
  change(phase);
  if (phase.arrivals_left == 0 && phase.bytes == 0) phase.parity ^= 1, phase.arrivals_left = phase.count;
  barrier = std::bit_cast<uint64_t>(phase);
}

inline void init_barrier(uint64_t& barrier, int count) {
  barrier = std::bit_cast<uint64_t>(Phase{static_cast<uint8_t>(count), static_cast<uint8_t>(count), 0, 0, 0});
}

inline void count_arrival(uint64_t& barrier) {
  change(barrier, [](Phase& phase) {
    if (phase.arrivals_left == 0) emulation::failure = "more arrivals than a phase has";
    --phase.arrivals_left;
  });
}

inline void arrive(uint64_t& barrier) {
  count_arrival(barrier);
  // what this thread should have done before may now be missed by others
  if (emulation::random() % 4 == 0) yield([] { return true; });
}

inline void expect_bytes(uint64_t& barrier, int bytes) {
  change(barrier, [&](Phase& phase) { phase.bytes += bytes; });
}

inline void wait(uint64_t& barrier, uint32_t parity) {
  const auto ended = [&barrier, parity] { return std::bit_cast<Phase>(barrier).parity != parity; };
  if (by_chance()) yield([] { return true; });
  while (!ended()) yield(ended);
}

inline void fence_barriers() {}

// ---- Clusters ------------------------------------------------------------------------------------------------

inline int cluster_rank() { return current->block->rank; }

inline void sync_cluster() { emulation::meet(current->block->cluster->barrier); }

/// The barrier at this one's offset in another block.
inline uint64_t& barrier_of(emulation::Block& block, uint64_t& barrier) {
  return *reinterpret_cast<uint64_t*>(block.shared.data() + (shared_address(&barrier) - shared_start));
}

inline void must_run(const emulation::Block& block) {
  if (block.running == 0) emulation::failure = "a block is reached after its end";
}

inline void arrive_at(uint64_t& barrier, int rank) {
  const auto& blocks = current->block->cluster->blocks;
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) {
    emulation::failure = "a rank that its cluster does not have";
    return;
  }
  must_run(*blocks[rank]);
  count_arrival(barrier_of(*blocks[rank], barrier));
  if (emulation::random() % 4 == 0) yield([] { return true; });
}

// ---- Copies --------------------------------------------------------------------------------------------------

inline void copy_or_zero(uint32_t to, const void* from, bool copied) {
  const auto copy = [block = current->block, to, from, copied] {
    unsigned char* const place = seen(*block, to, 16);
    if (copied)
      memcpy(place, from, 16);
    else
      memset(place, 0, 16);
  };
  if (by_chance())
    copy();
  else
    current->copies.open.emplace_back(copy);
}

inline void commit_copies() { current->copies.commit(); }

template <int pending>
void wait_for_copies() {
  for (auto& groups = current->copies.groups; groups.size() > pending; groups.pop_front())
    for (auto& copy : groups.front()) current->landed.push_back(std::move(copy));
}

inline void fence_writes() {
  for (const auto& copy : std::exchange(current->landed, {})) copy();
}

/// Notes what is asked for, and reads it, so that memory which is not there shows.
inline void prefetch(const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes <= 0 || bytes % 16 != 0)
    emulation::failure = "a prefetch that is not aligned";
  const auto* const data = static_cast<const volatile char*>(from);
  for (int i = 0; i < bytes; i += 16) static_cast<void>(data[i]);
  emulation::prefetched.insert(emulation::prefetched.end(), {reinterpret_cast<int64_t>(from), bytes});
}

struct Boxes {
  const uint16_t* data;
  int64_t rows, columns, stride, count, apart;
  int rows_of_a_box;
};

template <class Matrices>
cudaError_t make_boxes(Boxes& boxes, const Matrices& from, int rows_of_a_box) {
  boxes = {from.data, from.rows, from.columns, from.stride, from.count, from.apart, rows_of_a_box};
  const bool aligned = reinterpret_cast<uintptr_t>(from.data) % 16 == 0 && (from.stride | from.apart) % 8 == 0;
  const bool sized = from.rows > 0 && from.columns > 0 && from.stride >= from.columns;
  return aligned && sized && rows_of_a_box <= 256 ? cudaSuccess : cudaErrorInvalidValue;
}

/// The element of a matrix, 0 beyond it.
inline uint16_t element(const Boxes& from, int64_t matrix, int64_t row, int64_t column) {
  const bool there = matrix >= 0 && matrix < std::max<int64_t>(from.count, 1);
  const bool inside = row >= 0 && row < from.rows && column >= 0 && column < from.columns;
  return there && inside ? from.data[matrix * from.apart + row * from.stride + column] : 0;
}

/// Now or later: a box lands in a block, and its bytes count for a barrier of it.
inline void land_box(
    emulation::Block* block, uint32_t to, const Boxes& boxes, int column, int row, int matrix, uint64_t& barrier) {
  const auto copy = [block, to, boxes, column, row, matrix, &barrier] {
    must_run(*block);
    if (to % 128 != 0) emulation::failure = "a box that is not aligned";
    for (int i = 0; i < boxes.rows_of_a_box; ++i)
      for (int j = 0; j < 64; ++j) {
        const uint16_t value = element(boxes, matrix, row + i, column + j);
        memcpy(seen(*block, swapped(to + i * 128 + j * 2), 2), &value, 2);
      }
    change(barrier, [&](Phase& phase) { phase.bytes -= boxes.rows_of_a_box * 128; });
  };
  if (by_chance())
    copy();
  else
    emulation::in_flight.emplace_back(copy);
}

inline void need_third_coordinate(const Boxes& boxes, bool there) {
  if ((boxes.count > 0) != there) emulation::failure = "a third coordinate exactly where there are several matrices";
}

inline void load_box(uint32_t to, const Boxes& boxes, int column, int row, int matrix, uint64_t& barrier) {
  need_third_coordinate(boxes, true);
  land_box(current->block, to, boxes, column, row, matrix, barrier);
}

inline void load_box(uint32_t to, const Boxes& boxes, int column, int row, uint64_t& barrier) {
  need_third_coordinate(boxes, false);
  land_box(current->block, to, boxes, column, row, 0, barrier);
}

inline void land_box_in_both(
    uint32_t to, const Boxes& boxes, int column, int row, int matrix, uint64_t& barrier) {
  const auto& blocks = current->block->cluster->blocks;
  if (blocks.size() != 2) emulation::failure = "a copy for both blocks of a cluster that has not two";
  for (emulation::Block* const block : blocks)
    land_box(block, to, boxes, column, row, matrix, barrier_of(*block, barrier));
}

inline void load_box_for_both(
    uint32_t to, const Boxes& boxes, int column, int row, int matrix, uint64_t& barrier) {
  need_third_coordinate(boxes, true);
  land_box_in_both(to, boxes, column, row, matrix, barrier);
}

inline void load_box_for_both(uint32_t to, const Boxes& boxes, int column, int row, uint64_t& barrier) {
  need_third_coordinate(boxes, false);
  land_box_in_both(to, boxes, column, row, 0, barrier);
}

// ---- Products ------------------------------------------------------------------------------------------------

/// An operand's element, by its descriptor. Depth along the rows of a swapped tile is "MN-major": M (or N) in blocks of
/// 64, K in groups of 8. Depth along 16 of its columns is "K-major": M (or N) in groups of 8.
template <bool by_row>
float element(emulation::Block& block, uint64_t descriptor, int mn, int k) {
  const auto bytes = [&](int from) { return static_cast<uint32_t>(descriptor >> from & 0x3FFF) << 4; };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) emulation::failure = "another kind of descriptor";
  const uint32_t leading = bytes(16), stride = bytes(32);
  const uint32_t place = by_row ? mn / 8 * stride + mn % 8 * 128 + k * 2
                                : mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2;
  uint16_t value;
  memcpy(&value, seen(block, swapped(bytes(0) + place), 2), 2);
  return widen<Dtype::bfloat16>(value);
}

/// This thread's part of wgmma's d [64, 128] += a [64, 16] b [16, 128].
template <bool left_by_row = false, bool right_by_row = false>
void multiply(float (&d)[64], uint64_t a, uint64_t b) {
  const auto product = [block = current->block, thread = current->thread % 128, d = &d[0], a, b] {
    const int lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
    for (int k = 0; k < 16; ++k) {
      const float left[] = {element<left_by_row>(*block, a, row, k), element<left_by_row>(*block, a, row + 8, k)};
      for (int j = 0; j < 32; ++j) {
        const float right = element<right_by_row>(*block, b, j / 2 * 8 + column + j % 2, k);
        for (int half = 0; half < 2; ++half) d[j / 2 * 4 + half * 2 + j % 2] += left[half] * right;
      }
    }
  };
  current->products.open.emplace_back(product);
}

inline uint32_t narrow_pair(float first, float second) {
  return narrow<Dtype::bfloat16>(first) | narrow<Dtype::bfloat16>(second) << 16;
}

inline float sigmoid(float v) { return 1 / (1 + std::exp(-v)); }

inline void begin_products() {}

inline void commit_products() {
  current->products.commit();
  if (by_chance())
    for (auto& group : current->products.groups)
      for (const auto& product : std::exchange(group, {})) product();
}

template <int pending>
void wait_for_products() {
  for (auto& groups = current->products.groups; groups.size() > pending; groups.pop_front())
    for (const auto& product : groups.front()) product();
  emulation::meet(current->block->warps[current->thread / 32].barrier);
}

template <int size>
void fence_uses(float (&)[size]) {}

template <int>
void increase_registers() {}
template <int>
void decrease_registers() {}

template <class Kernel>
cudaError_t is_compiled(bool& compiled, int) {
  compiled = true;
  return cudaSuccess;
}

}  // namespace hopper
