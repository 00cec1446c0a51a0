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

enum class WideFlaw { none, row_for_column, third_coordinate, stage_of_depth };

/// [64, 256] = a [64, 64] b, by one warpgroup: b is the second of two matrices, [256, 64] if `by_row`, else [64, 256].
template <bool by_row, WideFlaw flaw>
struct WideProduct {
  static constexpr int threads = 128, resident = 1, depth = 64, columns = 256;
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
      const int second = flaw == WideFlaw::third_coordinate ? 0 : 1;
      for (int block = 0; block < (by_row ? 1 : 4); ++block)
        hopper::load_box(b + block * depth * 128, arguments.b, block * 64, 0, second, full);
      hopper::arrive(full);
    }
    group.sync();
    hopper::wait(full, 0);
    float sum[128] = {};
    hopper::begin_products();
    for (int k = 0; k < depth; k += 16) {
      const int at = flaw == WideFlaw::stage_of_depth ? 0 : k;
      const bool rows_first = by_row != (flaw == WideFlaw::row_for_column);
      const uint64_t right =
          rows_first ? SwappedTile::operand_by_row(b + at * 2) : SwappedTile::operand(b + at * 128, depth);
      hopper::multiply_wide<by_row>(sum, SwappedTile::operand_by_row(a + k * 2), right);
    }
    hopper::commit_products();
    hopper::wait_for_products<0>();
    const int warp = group.thread() / 32, lane = group.thread() % 32;
    for (int i = 0; i < 128; ++i) {
      const int m = warp * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      arguments.product[m * columns + n] = sum[i];
    }
  }
};

template <bool by_row, WideFlaw flaw>
std::string run_wide() {
  using Wide = WideProduct<by_row, flaw>;
  constexpr int depth = Wide::depth, columns = Wide::columns;
  alignas(16) static uint16_t a[rows * depth], b[2 * depth * columns];
  static float product[rows * columns];
  for (int i = 0; i < rows * depth; ++i) a[i] = narrow<Dtype::bfloat16>(static_cast<float>(i * 7 % 13 - 6));
  for (int i = 0; i < 2 * depth * columns; ++i) b[i] = narrow<Dtype::bfloat16>(static_cast<float>(i * 5 % 11 - 5));
  const Matrices both = by_row ? Matrices{b, columns, depth, depth, 2, depth * columns}
                               : Matrices{b, depth, columns, columns, 2, depth * columns};
  typename Wide::Arguments arguments{{}, {}, product};
  hopper::make_boxes(arguments.a, Matrices{a, rows, depth, depth}, rows);
  hopper::make_boxes(arguments.b, both, by_row ? columns : depth);
  std::fill_n(product, rows * columns, -1.0f);
  try {
    launch<Wide>(arguments, 1, Wide::shared_bytes, nullptr);
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
  check("wide, by row", run_wide<true, WideFlaw::none>(), false);
  check("wide", run_wide<false, WideFlaw::none>(), false);
  check("wide, by row: row_for_column", run_wide<true, WideFlaw::row_for_column>());
  check("wide: row_for_column", run_wide<false, WideFlaw::row_for_column>());
  check("wide, by row: third_coordinate", run_wide<true, WideFlaw::third_coordinate>());
  check("wide: stage_of_depth", run_wide<false, WideFlaw::stage_of_depth>());
  return failures != 0;
}
