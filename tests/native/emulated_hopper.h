// Hopper's instructions of csrc/cuda/hopper.cuh, in emulated threads, from what the PTX ISA says of them and not from
// what the kernels expect. Included by emulation.h, inside the namespace moe_unlearn.
//
// Asynchronous work is done at once or as late as it may, by chance: so a place that is written too early shows, and
// one that is read too early. What ordinary copies wrote is invisible to wgmma until it has been fenced.

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

inline void arrive(uint64_t& barrier) {
  change(barrier, [](Phase& phase) {
    if (phase.arrivals_left == 0) emulation::failure = "more arrivals than a phase has";
    --phase.arrivals_left;
  });
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

struct Boxes {
  const uint16_t* data;
  int64_t rows, columns, stride;
  int rows_of_a_box;
};

inline cudaError_t make_boxes(
    Boxes& boxes, const uint16_t* data, int64_t rows, int64_t columns, int64_t stride, int rows_of_a_box) {
  boxes = {data, rows, columns, stride, rows_of_a_box};
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
  const bool right = aligned && rows > 0 && columns > 0 && stride >= columns && rows_of_a_box <= 256;
  return right ? cudaSuccess : cudaErrorInvalidValue;
}

inline void load_box(uint32_t to, const Boxes& boxes, int column, int row, uint64_t& barrier) {
  const auto copy = [block = current->block, to, boxes, column, row, &barrier] {
    if (to % 128 != 0) emulation::failure = "a box that is not aligned";
    for (int i = 0; i < boxes.rows_of_a_box; ++i)
      for (int j = 0; j < 64; ++j) {
        const bool inside = row + i < boxes.rows && column + j < boxes.columns;
        const uint16_t value = inside ? boxes.data[(row + i) * boxes.stride + column + j] : 0;
        memcpy(seen(*block, swapped(to + i * 128 + j * 2), 2), &value, 2);
      }
    change(barrier, [&](Phase& phase) { phase.bytes -= boxes.rows_of_a_box * 128; });
  };
  if (by_chance())
    copy();
  else
    emulation::in_flight.emplace_back(copy);
}

// ---- Products ------------------------------------------------------------------------------------------------

/// An operand's element, by its descriptor: rows of M (or N) in blocks of 64 that lie along it ("MN-major"), columns
/// of K in groups of 8.
inline float element(emulation::Block& block, uint64_t descriptor, int mn, int k) {
  const auto bytes = [&](int from) { return static_cast<uint32_t>(descriptor >> from & 0x3FFF) << 4; };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) emulation::failure = "another kind of descriptor";
  const uint32_t leading = bytes(16), stride = bytes(32);
  const uint32_t address = bytes(0) + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2;
  uint16_t value;
  memcpy(&value, seen(block, swapped(address), 2), 2);
  return widen<Dtype::bfloat16>(value);
}

/// wgmma.m64n128k16: this thread's part of d += a^T b.
inline void multiply(float (&d)[64], uint64_t a, uint64_t b) {
  const auto product = [block = current->block, thread = current->thread % 128, d = &d[0], a, b] {
    const int lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
    for (int k = 0; k < 16; ++k) {
      const float left[] = {element(*block, a, row, k), element(*block, a, row + 8, k)};
      for (int j = 0; j < 32; ++j) {
        const float right = element(*block, b, j / 2 * 8 + column + j % 2, k);
        for (int half = 0; half < 2; ++half) d[j / 2 * 4 + half * 2 + j % 2] += left[half] * right;
      }
    }
  };
  current->products.open.emplace_back(product);
}

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

inline void fence_uses(float (&)[64]) {}

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
