// The emulation of Hopper itself: a product through copies, a box, barriers and wgmma is right, and each way to get it
// wrong shows. Prints what does not.

#include <cstdio>
#include <string>

#include "cuda/hopper.cuh"

using namespace moe_unlearn;

enum class Flaw {
  none, fence, wait_for_copies, wait_for_products, wait_for_barrier, bytes, parity, early_overwrite, arrival, arrivals,
  alignment
};

constexpr int depth = 16, rows = 64, columns = 128;  // of a product

struct Data {
  alignas(16) uint16_t a[depth * rows], b[depth * columns];
  float product[rows * columns];
};

/// One warpgroup copies a by pieces and b in boxes, multiplies, and then clears a.
template <Flaw flaw>
struct Product {
  static constexpr int threads = 128, resident = 1;
  static constexpr size_t shared_bytes = 1024 + depth * (rows + columns) * 2 + 16;

  struct Arguments {
    Data* m;
    hopper::Boxes boxes;
  };

  static void run(const Group& group, const Arguments& arguments, unsigned char* shared) {
    const uint32_t start = hopper::shared_address(shared), a = (start + 1023) / 1024 * 1024, b = a + depth * rows * 2;
    auto& full = *reinterpret_cast<uint64_t*>(shared + (b - start) + depth * columns * 2);
    const int thread = group.thread(), row = thread / 8, piece = thread % 8;
    if (thread == 0) hopper::init_barrier(full, flaw == Flaw::arrivals ? threads - 1 : threads);
    group.sync();
    if (thread == 0) {
      if (flaw != Flaw::bytes) hopper::expect_bytes(full, depth * columns * 2);
      for (int block = 0; block < 2; ++block) {
        const uint32_t to = b + block * depth * SwappedTile::row_bytes + (flaw == Flaw::alignment ? 64 : 0);
        hopper::load_box(to, arguments.boxes, block * 64, 0, full);
      }
    }
    const uint32_t to = a + SwappedTile::offset(row, piece, depth);
    hopper::copy_or_zero(to, arguments.m->a + row * rows + piece * 8, true);
    hopper::commit_copies();
    if (flaw != Flaw::wait_for_copies) hopper::wait_for_copies<0>();
    if (flaw != Flaw::fence) hopper::fence_writes();
    if (flaw != Flaw::arrival || thread != 0) hopper::arrive(full);
    if (flaw != Flaw::wait_for_barrier) hopper::wait(full, flaw == Flaw::parity ? 1 : 0);

    float sum[64] = {};
    hopper::begin_products();
    hopper::multiply(sum, SwappedTile::operand(a, depth), SwappedTile::operand(b, depth));
    hopper::commit_products();
    if (flaw == Flaw::early_overwrite) clear(to);
    if (flaw != Flaw::wait_for_products) hopper::wait_for_products<0>();
    const int warp = thread / 32, lane = thread % 32;
    for (int i = 0; i < 64; ++i) {
      const int m = warp * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      arguments.m->product[m * columns + n] = sum[i];
    }
    group.sync();
    clear(to);
  }

  static void clear(uint32_t to) {
    hopper::copy_or_zero(to, nullptr, false);
    hopper::commit_copies();
    hopper::wait_for_copies<0>();
    hopper::fence_writes();
  }
};

/// "" if all of many orders of threads give the right product.
template <Flaw flaw>
std::string run() {
  static Data m;
  for (int i = 0; i < depth * rows; ++i) m.a[i] = narrow<Dtype::bfloat16>(static_cast<float>(i * 7 % 13 - 6));
  for (int i = 0; i < depth * columns; ++i) m.b[i] = narrow<Dtype::bfloat16>(static_cast<float>(i * 5 % 11 - 5));
  typename Product<flaw>::Arguments arguments{&m, {}};
  const Matrices b{m.b, depth, columns, columns};
  if (hopper::make_boxes(arguments.boxes, b, depth) != cudaSuccess) return "no boxes";
  for (uint32_t seed = 0; seed < 10; ++seed) {
    emulation::seed = seed;
    std::fill_n(m.product, rows * columns, -1.0f);
    try {
      launch<Product<flaw>>(arguments, 1, Product<flaw>::shared_bytes, nullptr);
    } catch (const std::runtime_error& error) {
      emulation::failure = nullptr;
      return error.what();
    }
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        float expected = 0;
        for (int k = 0; k < depth; ++k)
          expected += widen<Dtype::bfloat16>(m.a[k * rows + i]) * widen<Dtype::bfloat16>(m.b[k * columns + j]);
        if (!(m.product[i * columns + j] == expected)) return "wrong";
      }
  }
  return "";
}

enum class RowFlaw { none, row_for_column, third_coordinate, stage_of_depth };

/// [64, 128] = a [64, 64] b, by one warpgroup: b is the second of two matrices, [128, 64] if `by_row`, else [64, 128].
template <bool by_row, RowFlaw flaw>
struct RowProduct {
  static constexpr int threads = 128, resident = 1, depth = 64;
  static constexpr size_t shared_bytes = 1024 + depth * (rows + columns) * 2 + 8;

  struct Arguments {
    hopper::Boxes a, b;
    float* product;
  };

  static void run(const Group& group, const Arguments& arguments, unsigned char* shared) {
    const uint32_t start = hopper::shared_address(shared), a = (start + 1023) / 1024 * 1024, b = a + rows * depth * 2;
    auto& full = *reinterpret_cast<uint64_t*>(shared + (b - start) + depth * columns * 2);
    if (group.thread() == 0) {
      hopper::init_barrier(full, 1);
      hopper::expect_bytes(full, (rows + columns) * depth * 2);
      hopper::load_box(a, arguments.a, 0, 0, full);
      const int second = flaw == RowFlaw::third_coordinate ? 0 : 1;
      for (int block = 0; block < (by_row ? 1 : 2); ++block)
        hopper::load_box(b + block * depth * 128, arguments.b, block * 64, 0, second, full);
      hopper::arrive(full);
    }
    group.sync();
    hopper::wait(full, 0);
    float sum[64] = {};
    hopper::begin_products();
    for (int k = 0; k < depth; k += 16) {
      const int at = flaw == RowFlaw::stage_of_depth ? 0 : k;
      const bool rows_first = by_row != (flaw == RowFlaw::row_for_column);
      const uint64_t right =
          rows_first ? SwappedTile::operand_by_row(b + at * 2) : SwappedTile::operand(b + at * 128, depth);
      hopper::multiply<true, by_row>(sum, SwappedTile::operand_by_row(a + k * 2), right);
    }
    hopper::commit_products();
    hopper::wait_for_products<0>();
    const int warp = group.thread() / 32, lane = group.thread() % 32;
    for (int i = 0; i < 64; ++i) {
      const int m = warp * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      arguments.product[m * columns + n] = sum[i];
    }
  }
};

template <bool by_row, RowFlaw flaw>
std::string run_rows() {
  using Kernel = RowProduct<by_row, flaw>;
  constexpr int depth = Kernel::depth;
  alignas(16) static uint16_t a[rows * depth], b[2 * depth * columns];
  static float product[rows * columns];
  for (int i = 0; i < rows * depth; ++i) a[i] = narrow<Dtype::bfloat16>(static_cast<float>(i * 7 % 13 - 6));
  for (int i = 0; i < 2 * depth * columns; ++i) b[i] = narrow<Dtype::bfloat16>(static_cast<float>(i * 5 % 11 - 5));
  const Matrices both = by_row ? Matrices{b, columns, depth, depth, 2, depth * columns}
                               : Matrices{b, depth, columns, columns, 2, depth * columns};
  typename Kernel::Arguments arguments{{}, {}, product};
  hopper::make_boxes(arguments.a, Matrices{a, rows, depth, depth}, rows);
  hopper::make_boxes(arguments.b, both, by_row ? columns : depth);
  std::fill_n(product, rows * columns, -1.0f);
  try {
    launch<Kernel>(arguments, 1, Kernel::shared_bytes, nullptr);
  } catch (const std::runtime_error& error) {
    emulation::failure = nullptr;
    return error.what();
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) {
      float expected = 0;
      for (int k = 0; k < depth; ++k) {
        const int at = depth * columns + (by_row ? j * depth + k : k * columns + j);
        expected += widen<Dtype::bfloat16>(a[i * depth + k]) * widen<Dtype::bfloat16>(b[at]);
      }
      if (!(product[i * columns + j] == expected)) return "wrong";
    }
  return "";
}

enum class PairFlaw {
  none, bytes_before_expect, own_box_only, same_half, own_release_only, release_twice, no_first_sync, no_last_sync,
  no_last_wait, rank, odd_grid
};

/// product[block] = the sum over steps of a[block][step]^T b[step] by two blocks that share b: each loads half of its
/// columns for both, in a ring of two stages that both release.
template <PairFlaw flaw>
struct PairProduct {
  static constexpr int consumers = 128, threads = consumers + 32, resident = 1, cluster = 2, stages = 2, steps = 5;
  static constexpr int left_bytes = depth * rows * 2, right_bytes = depth * columns * 2;
  static constexpr int stage_bytes = left_bytes + right_bytes;
  static constexpr size_t shared_bytes = 1024 + stages * stage_bytes + sizeof(hopper::Ring<stages>);

  struct Arguments {
    hopper::Boxes a, b;  // [2, steps * depth, rows], [steps * depth, columns]
    float* product;
  };

  static void produce(const Arguments& arguments, uint32_t memory, hopper::Ring<stages>& ring) {
    const int rank = hopper::cluster_rank(), half = flaw == PairFlaw::same_half ? 0 : rank;
    for (int step = 0; step < steps + (flaw == PairFlaw::no_last_wait); ++step) {
      uint64_t& full = ring.full[ring.stage(step)];
      const uint32_t to = memory + ring.stage(step) * stage_bytes, right = to + left_bytes + half * right_bytes / 2;
      ring.wait_until_empty(step);
      if (flaw != PairFlaw::bytes_before_expect) hopper::expect_bytes(full, stage_bytes);
      hopper::load_box(to, arguments.a, 0, step * depth, rank, full);
      if (flaw == PairFlaw::own_box_only)
        hopper::load_box(right, arguments.b, half * 64, step * depth, full);
      else
        hopper::load_box_for_both(right, arguments.b, half * 64, step * depth, full);
      if (flaw == PairFlaw::bytes_before_expect) hopper::expect_bytes(full, stage_bytes);
      ring.publish(step);
    }
  }

  static void consume(const Group& group, const Arguments& arguments, uint32_t memory, hopper::Ring<stages>& ring) {
    const int warp = group.thread() / 32, lane = group.thread() % 32, rank = hopper::cluster_rank();
    float sum[64] = {};
    for (int step = 0; step < steps; ++step) {
      ring.wait_until_full(step);
      const uint32_t a = memory + ring.stage(step) * stage_bytes;
      hopper::begin_products();
      hopper::multiply(sum, SwappedTile::operand(a, depth), SwappedTile::operand(a + left_bytes, depth));
      hopper::commit_products();
      hopper::wait_for_products<0>();
      if (flaw != PairFlaw::own_release_only && flaw != PairFlaw::rank)
        ring.release_at_all(step, lane, cluster);
      else if (lane < cluster && (flaw == PairFlaw::rank || lane == rank))
        hopper::arrive_at(ring.empty[ring.stage(step)], flaw == PairFlaw::rank ? 2 * lane : lane);
      if (flaw == PairFlaw::release_twice && warp == 0 && lane == 0) ring.release(step);
    }
    for (int i = 0; i < 64; ++i) {
      const int m = warp * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      arguments.product[(group.block() * rows + m) * columns + n] = sum[i];
    }
  }

  static void run(const Group& group, const Arguments& arguments, unsigned char* shared) {
    const uint32_t start = hopper::shared_address(shared), memory = (start + 1023) / 1024 * 1024;
    auto& ring = *reinterpret_cast<hopper::Ring<stages>*>(shared + (memory - start) + stages * stage_bytes);
    if (group.thread() == 0) {
      ring.init(1, (flaw == PairFlaw::own_release_only ? 1 : 2) * consumers / 32);
      hopper::fence_barriers();
    }
    if (flaw == PairFlaw::no_first_sync)
      group.sync();
    else
      hopper::sync_cluster();
    if (group.thread() == consumers) produce(arguments, memory, ring);
    if (group.thread() < consumers) consume(group, arguments, memory, ring);
    if (flaw != PairFlaw::no_last_sync) hopper::sync_cluster();
  }
};

template <PairFlaw flaw>
std::string run_pair() {
  using Pair = PairProduct<flaw>;
  constexpr int all = Pair::steps * depth;
  alignas(16) static uint16_t a[2][all * rows], b[all * columns];
  static float product[2][rows * columns];
  for (int i = 0; i < 2 * all * rows; ++i)
    a[i / (all * rows)][i % (all * rows)] = narrow<Dtype::bfloat16>(static_cast<float>(i * 7 % 13 - 6));
  for (int i = 0; i < all * columns; ++i) b[i] = narrow<Dtype::bfloat16>(static_cast<float>(i * 5 % 11 - 5));
  typename Pair::Arguments arguments{{}, {}, product[0]};
  hopper::make_boxes(arguments.a, Matrices{a[0], all, rows, rows, 2, all * rows}, depth);
  hopper::make_boxes(arguments.b, Matrices{b, all, columns, columns}, depth);
  for (uint32_t seed = 0; seed < 40; ++seed) {
    emulation::seed = seed;
    std::fill_n(product[0], 2 * rows * columns, -1.0f);
    try {
      const int blocks = flaw == PairFlaw::odd_grid ? 3 : 2;
      if (launch<Pair>(arguments, blocks, Pair::shared_bytes, nullptr) != cudaSuccess) return "refused";
    } catch (const std::runtime_error& error) {
      emulation::failure = nullptr;
      return error.what();
    }
    for (int i = 0; i < 2 * rows * columns; ++i) {
      const int block = i / (rows * columns), row = i / columns % rows, column = i % columns;
      float expected = 0;
      for (int k = 0; k < all; ++k)
        expected += widen<Dtype::bfloat16>(a[block][k * rows + row]) * widen<Dtype::bfloat16>(b[k * columns + column]);
      if (!(product[block][row * columns + column] == expected)) return "wrong";
    }
  }
  return "";
}

int failures = 0;

/// How a flaw shows depends on the order of threads.
void check(const char* flaw, const std::string& found, bool shows = true) {
  if (found.empty() != shows) return;
  std::printf("%s: '%s'\n", flaw, found.c_str());
  ++failures;
}

int main() {
  check("none", run<Flaw::none>(), false);
  check("fence", run<Flaw::fence>());
  check("wait_for_copies", run<Flaw::wait_for_copies>());
  check("wait_for_products", run<Flaw::wait_for_products>());
  check("wait_for_barrier", run<Flaw::wait_for_barrier>());
  check("bytes", run<Flaw::bytes>());
  check("parity", run<Flaw::parity>());
  check("early_overwrite", run<Flaw::early_overwrite>());
  check("arrival", run<Flaw::arrival>());
  check("arrivals", run<Flaw::arrivals>());
  check("alignment", run<Flaw::alignment>());
  check("rows, right by row", run_rows<true, RowFlaw::none>(), false);
  check("rows", run_rows<false, RowFlaw::none>(), false);
  check("rows, right by row: row_for_column", run_rows<true, RowFlaw::row_for_column>());
  check("rows: row_for_column", run_rows<false, RowFlaw::row_for_column>());
  check("rows, right by row: third_coordinate", run_rows<true, RowFlaw::third_coordinate>());
  check("rows: stage_of_depth", run_rows<false, RowFlaw::stage_of_depth>());
  check("pair", run_pair<PairFlaw::none>(), false);
  check("pair: bytes_before_expect", run_pair<PairFlaw::bytes_before_expect>(), false);
  check("pair: own_box_only", run_pair<PairFlaw::own_box_only>());
  check("pair: same_half", run_pair<PairFlaw::same_half>());
  check("pair: own_release_only", run_pair<PairFlaw::own_release_only>());
  check("pair: release_twice", run_pair<PairFlaw::release_twice>());
  check("pair: no_first_sync", run_pair<PairFlaw::no_first_sync>());
  check("pair: no_last_sync", run_pair<PairFlaw::no_last_sync>());
  check("pair: no_last_wait", run_pair<PairFlaw::no_last_wait>());
  check("pair: rank", run_pair<PairFlaw::rank>());
  check("pair: odd_grid", run_pair<PairFlaw::odd_grid>());
  return failures != 0;
}
