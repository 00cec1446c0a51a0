// The host's half of a launch: grids, spans and shared memory, as functions of shape and GPU; and that a launch writes
// nothing behind its output. Prints what is wrong.

#include <cstdio>
#include <vector>

#include "cuda/expert_mlp.cuh"
#include "cuda/expert_wgrad.cuh"
#include "cuda/masked_update.cuh"
#include "cuda/retain_weights.cuh"
#include "cuda/route.cuh"
#include "cuda/weight_score.cuh"
#include "cuda/wgrad_inner.cuh"

using namespace moe_unlearn;

int failures = 0;

#define CHECK(condition)                                          \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("line %d: not true: %s\n", __LINE__, #condition); \
      ++failures;                                                 \
    }                                                             \
  } while (false)

void check_route() {
  const int32_t any = 0;
  for (const int64_t tokens : {0, 1, 100, 8192, 1 << 20})
    for (const int64_t top_k : {1, 8, 16})
      for (const int64_t experts : {1, 128, 512, 1024})
        for (const int64_t groups : {1, 3, 64})
          for (const int64_t resident : {0, 1, 132 * 4}) {
            Routing r{};
            r.num_tokens = tokens, r.top_k = top_k, r.num_experts = experts, r.num_groups = groups;
            r.group = &any;
            RoutePlan plan(r);
            plan.spread(r, resident);
            CHECK(plan.shared_bytes <= 48 * 1024);
            CHECK(plan.cells == 0 || plan.cells == groups * experts);
            CHECK(plan.blocks >= 1 && plan.blocks <= std::max<int64_t>(resident, 1));
            // every row has a warp, and no warp but the last ones is idle
            CHECK(plan.blocks * RoutePlan::warps * plan.rows_per_warp >= r.rows());
            CHECK(plan.rows_per_warp % warp_size == 0);
            CHECK(plan.workspace == (experts + 1) * (plan.blocks + 1));
          }
  Routing r{};
  r.num_tokens = 8192, r.top_k = 8, r.num_experts = 128, r.num_groups = 1;
  RoutePlan plan(r);
  plan.spread(r, 132 * 4);
  CHECK(plan.blocks == 128 && plan.rows_per_warp == 64 && plan.cells == 0);
}

void check_mask() {
  for (const int64_t chunks : {0LL, 1LL, 256LL, 257LL, 1LL << 20, (1LL << 33) + 5}) {
    const MaskPlan plan(chunks, 132);
    CHECK(plan.spans >= 1 && plan.spans <= 132 * MaskPlan::spans_per_multiprocessor);
    CHECK(plan.chunks_per_span % MaskPlan::threads == 0);
    CHECK(plan.spans * plan.chunks_per_span >= chunks);
    CHECK(chunks == 0 || (plan.spans - 1) * plan.chunks_per_span < chunks);
  }
}

void check_moments() {
  for (const int64_t tokens : {0, 1, 255, 257, 8192, 1 << 20})
    for (const int64_t size : {0, 1, 31, 32, 64, 512}) {
      const MomentsPlan plan(tokens, size);
      CHECK(plan.words * 32 > size && (plan.words - 1) * 32 <= size);
      CHECK(plan.parts >= 1 && plan.parts * plan.tokens_per_part >= tokens);
      CHECK(tokens == 0 || (plan.parts - 1) * plan.tokens_per_part < tokens);
      CHECK(plan.parts * plan.tiles <= std::max(MomentsPlan::most_blocks, plan.tiles));
      int64_t next = 0;
      for (int64_t row = 0; row < plan.words; ++row)
        for (int64_t column = row; column < plan.words; ++column)
          CHECK(MomentsPlan::tile(row, column, plan.words) == next++);
      CHECK(next == plan.tiles);
    }
}

/// The last block has more threads than there are tokens left.
void check_end_of_weights() {
  constexpr int64_t count = Weights::threads + 44;
  const std::vector<uint32_t> words(count + 1, 1);
  const double tilt = 0;
  std::vector<float> out(count + 1, -1.0f);
  CHECK(retain_weights({words.data(), &tilt, count, 1, 1, 0.0, 2.0}, out.data(), nullptr) == cudaSuccess);
  CHECK(out[count - 1] == 1.0f && out[count] == -1.0f);
}

/// Every tile once, an expert's together; both of a pair are neighbours, share what they say, and stay where they do.
void check_pairs(int64_t experts, int64_t rows, int64_t columns, bool grad_boxed, bool input_boxed) {
  constexpr int64_t length = WgradPlan::length;
  const int64_t row_tiles = (rows + length - 1) / length, column_tiles = (columns + length - 1) / length;
  const WgradPlan plan(experts, rows, columns, grad_boxed, input_boxed, 133);
  CHECK(plan.pairs == experts * ((row_tiles * column_tiles + 1) / 2));
  CHECK(WgradInner::parts_of_expert(rows, columns) == plan.pairs_of_expert * 2 * 4);  // blocks of a pair, warps
  CHECK(plan.blocks == 2 * std::min<int64_t>(plan.pairs, 66));
  std::vector<int> seen(static_cast<size_t>(experts * row_tiles * column_tiles));
  int64_t sharing = 0;
  for (int64_t pair = 0, expert = 0; pair < plan.pairs; ++pair) {
    const WgradPlan::Tile first = plan.tile(pair, 0), second = plan.tile(pair, 1);
    for (const WgradPlan::Tile& tile : {first, second}) {
      CHECK(tile.expert == expert && tile.row % length == 0 && tile.column % length == 0);
      const int64_t row = tile.row / length, column = tile.column / length;
      if (row < row_tiles && column < column_tiles) ++seen[(expert * row_tiles + row) * column_tiles + column];
    }
    CHECK(first.row < rows && first.column < columns && first.shared == second.shared);
    const int64_t down = second.row - first.row, right = second.column - first.column;
    CHECK(down + right == length && down * right == 0);
    CHECK(first.shared == (down == 0 ? grad_boxed ? Shared::grad : Shared::none
                                     : input_boxed ? Shared::input : Shared::none));
    sharing += first.shared != Shared::none;
    expert = (pair + 1) / plan.pairs_of_expert;
  }
  for (const int times : seen) CHECK(times == 1);
  if (grad_boxed && input_boxed) CHECK(sharing == plan.pairs);
  if (grad_boxed && !input_boxed) CHECK(sharing == experts * row_tiles * (column_tiles / 2));
  if (!grad_boxed && input_boxed) CHECK(sharing == experts * column_tiles * (row_tiles / 2));
  if (!grad_boxed && !input_boxed) CHECK(sharing == 0);
}

/// An exchange holds its rows, and lanes meet in no bank: 16 that write pairs, 8 that read pieces of 4 columns.
void check_exchange() {
  std::vector<int> seen(Exchange::rows * Exchange::columns);
  for (int row = 0; row < Exchange::rows; ++row)
    for (int column = 0; column < Exchange::columns; ++column) ++seen[Exchange::offset(row, column)];
  for (const int times : seen) CHECK(times == 1);
  for (int row = 0; row < Exchange::rows; row += 4)
    for (int column = 0; column < Exchange::columns; column += 8) {
      uint32_t banks = 0;
      for (int lane = 0; lane < 16; ++lane)
        banks |= 3u << Exchange::offset(row + lane / 4, column + lane % 4 * 2) % 32;
      CHECK(banks == 0xFFFFFFFF);
    }
  for (int row = 0; row < Exchange::rows; ++row)
    for (int column = 0; column < Exchange::columns; column += 64)
      for (const int second : {0, 4}) {
        uint32_t banks = 0;
        for (int lane = 0; lane < 8; ++lane) banks |= 15u << Exchange::offset(row, column + lane * 8 + second) % 32;
        CHECK(banks == 0xFFFFFFFF);
      }
}

void check_wgrad() {
  for (const int64_t experts : {0, 1, 5})
    for (const int64_t rows : {8, 128, 136, 776, 1024})
      for (const int64_t columns : {8, 256, 264, 640, 2048})
        for (const int boxed : {0, 1, 2, 3}) check_pairs(experts, rows, columns, boxed & 1, boxed & 2);
  // where both could be shared, the factor of which fewer tiles are left over
  CHECK(WgradPlan(1, 256, 384, true, true, 4).tile(0, 0).shared == Shared::input);
  CHECK(WgradPlan(1, 384, 256, true, true, 4).tile(0, 0).shared == Shared::grad);
  CHECK(WgradPlan(1, 256, 256, true, true, 1).blocks == 2 && WgradPlan(1, 256, 256, true, true, 3).blocks == 2);
  CHECK(WgradPlan::shared_bytes <= 227 * 1024);
  const size_t before_barriers = WgradPlan::alignment + WgradPlan::stages * WgradPlan::stage_bytes;
  CHECK(WgradPlan::shared_bytes == before_barriers + WgradPlan::exchange_bytes + sizeof(WgradLoop::Barriers));
  CHECK(WgradInner::shared_bytes == before_barriers + WgradInner::exchange_bytes + sizeof(WgradInner::Barriers));
  CHECK(WgradPlan::steps(0) == 0 && WgradPlan::steps(-100) == 0 && WgradPlan::steps(WgradPlan::depth + 1) == 2);
  // a box of the producer's is one block of a stage's tile, and 16 rows of it begin where swapping does
  CHECK(SwappedTile::row_bytes * 8 == WgradPlan::alignment && WgradPlan::depth % 16 == 0);
  CHECK(WgradPlan::stage_bytes % WgradPlan::alignment == 0 && Exchange::bytes % 16 == 0);
  CHECK(WgradPlan::producer_registers + 2 * WgradPlan::consumer_registers == 3 * 168);  // what a launch gives out
  alignas(16) static uint16_t memory[16];
  const int64_t row = 0;
  const Factor whole{memory, 100, 40, 48, nullptr}, gathered{memory, 100, 40, 48, &row};
  CHECK(whole.fits() && whole.can_be_boxed() && gathered.fits() && !gathered.can_be_boxed());
  CHECK(!Factor(memory, 0, 40, 48, nullptr).can_be_boxed() && !Factor(memory, 100, 40, 0, nullptr).can_be_boxed());
  CHECK(!Factor(memory + 1, 100, 40, 48, nullptr).fits() && !Factor(memory, 100, 40, 44, nullptr).fits());
  CHECK(!Factor(memory, 100, 36, 48, nullptr).fits() && !Factor(memory, int64_t{1} << 31, 40, 48, nullptr).fits());
  check_exchange();
  // a stage's pieces fill it, and the 8 rows of a group use different banks
  bool used[WgradPlan::factor_bytes / 16] = {};
  for (int row = 0; row < WgradPlan::depth; ++row)
    for (int piece = 0; piece < WgradPlan::length / 8; ++piece) {
      const int at = SwappedTile::offset(row, piece, WgradPlan::depth) / 16;
      CHECK(at * 16 < WgradPlan::factor_bytes && !used[at]);
      used[at] = true;
      CHECK(row % 8 == 0 || at % 8 != SwappedTile::offset(row - 1, piece, WgradPlan::depth) / 16 % 8);
    }
}

void check_rows() {
  Rows rows;
  const int64_t shape[] = {4, 3, 64}, contiguous[] = {192, 64, 1};
  const int64_t padded[] = {210, 70, 1}, turned[] = {1, 4, 12};
  alignas(16) static char memory[64];
  CHECK(rows.set(memory, Dtype::bfloat16, 3, shape, contiguous));
  CHECK(rows.vector && rows.dims == 1 && rows.count == 12 && rows.strides[0] == 128 && rows.words() == 2);
  CHECK(rows.set(memory, Dtype::bfloat16, 3, shape, padded));
  CHECK(!rows.vector && rows.dims == 1 && rows.strides[0] == 140);
  CHECK(rows.set(memory, Dtype::float32, 3, shape, turned));
  CHECK(!rows.vector && rows.dims == 2 && rows.stride == 48);
  CHECK(rows.set(memory + 2, Dtype::bfloat16, 3, shape, contiguous) && !rows.vector);
  const int64_t many[] = {2, 2, 2, 2, 2, 2, 2, 2, 2}, apart[] = {1, 4, 16, 64, 256, 1024, 4096, 16384, 65536};
  CHECK(rows.set(memory, Dtype::float32, 8, many, apart));
  CHECK(!rows.set(memory, Dtype::float32, 9, many, apart));
}

void check_arithmetic_dtype() {
  Operands o;
  o.param.dtype = o.grad.dtype = Dtype::bfloat16;
  CHECK(arithmetic_dtype(o) == Dtype::bfloat16);
  o.state[0].dtype = Dtype::float32;
  CHECK(arithmetic_dtype(o) == Dtype::float32);
  o.state[0].dtype = Dtype::bfloat16;
  CHECK(arithmetic_dtype(o) == Dtype::bfloat16);
  o.master.dtype = Dtype::float32;
  CHECK(arithmetic_dtype(o) == Dtype::float32);
}

/// Every tile of every segment is found once; a pair's blocks share weights or rows, and items that follow one another
/// share weights, then rows.
void check_product() {
  const Device h200{132, 227 * 1024, 90};
  const std::vector<int32_t> offsets{0, 0, 1, 129, 129, 2500, 2500};  // 2 rows behind the last expert
  const Segments segments{offsets.data(), static_cast<int32_t>(offsets.size()) - 1, 2502};
  CHECK(segments.stop(6) == 2502 && segments.stop(5) == 2500);
  for (const bool halves : {false, true})
    for (const int64_t width : {8, 64, 72, 128, 136, 520}) {
      const ProductPlan plan(segments, width, halves, 72, h200);
      CHECK(plan.segments == 7 && plan.steps == 2 && plan.shared_bytes() <= 227 * 1024);
      CHECK(plan.column_tiles == (width + plan.step - 1) / plan.step && plan.distance == (halves ? width : 64));
      CHECK(plan.blocks == 2 * std::min(66, (20 + 7) * ((plan.column_tiles + 1) / 2)));
      std::vector<int32_t> ends, seen;
      for (int32_t s = 0, sum = 0; s < plan.segments; ++s)
        ends.push_back(sum += plan.items(segments.stop(s) - segments.start(s)));
      using Shared = ProductPlan::Shared;
      ProductPlan::Tile tile[2], before{-1, 0, 0, 0, Shared::nothing};
      int32_t index = 0, turns = 0;
      for (; plan.find(tile[0], index, 0, ends.data(), segments); ++index) {
        CHECK(plan.find(tile[1], index, 1, ends.data(), segments));
        const int32_t apart = tile[1].column_tile - tile[0].column_tile;
        const bool own_columns = tile[1].column_tile < plan.column_tiles;
        CHECK(tile[0].segment == tile[1].segment && tile[0].shared == tile[1].shared && tile[0].rows() > 0);
        if (tile[0].shared == Shared::columns)
          CHECK(apart == 0 && tile[1].first == tile[0].first + 128 && tile[1].rows() > 0);
        else
          CHECK(apart == 1 && tile[0].rows() <= 128 && tile[1].rows() == (own_columns ? tile[0].rows() : 0));
        CHECK((tile[0].shared == Shared::nothing) == !own_columns);
        for (const auto& own : tile) {
          if (own.rows() == 0) continue;
          CHECK(own.stop == segments.stop(own.segment) && own.column_tile < plan.column_tiles);
          CHECK((own.first - segments.start(own.segment)) % 128 == 0);
          seen.push_back(own.first * plan.column_tiles + own.column_tile);
        }
        if (tile[0].shared != Shared::columns) continue;
        const bool same = tile[0].segment == before.segment && tile[0].column_tile == before.column_tile;
        CHECK(same || tile[0].column_tile == 0 || tile[0].column_tile == before.column_tile + 1);
        CHECK(!same || tile[0].first == before.first + 256);
        turns += !same;
        before = tile[0];
      }
      CHECK(index == ends.back());
      CHECK(turns == 2 * plan.column_tiles || plan.column_tiles == 1);  // 9 pairs of row tiles
      std::sort(seen.begin(), seen.end());
      CHECK(std::unique(seen.begin(), seen.end()) == seen.end());
      CHECK(static_cast<int32_t>(seen.size()) == (1 + 1 + 19 + 1) * plan.column_tiles);
    }
  for (const int multiprocessors : {1, 2, 3})  // pairs, if need be on one multiprocessor
    CHECK(ProductPlan(segments, 520, false, 72, {multiprocessors, 227 * 1024, 90}).blocks == 2);
  CHECK(ProductPlan(segments, 8, false, 0, h200).steps == 0);
  CHECK(ProductPlan::producer_registers + 2 * ProductPlan::consumer_registers == 3 * 168);  // what a launch gives out
  const int64_t million = 1 << 20;
  CHECK(ProductPlan::fits(4095, 128 * million, 4096, 4096) && !ProductPlan::fits(4096, 1, 8, 8));
  CHECK(!ProductPlan::fits(1, 1, 12, 8) && !ProductPlan::fits(1, 1, 8, 12));
  CHECK(!ProductPlan::fits(1, 4096 * million, 8, 8) && !ProductPlan::fits(1, 2000 * million, 16384, 8));
  CHECK(ProductPlan(Segments{nullptr, 4094, 8}, 8, false, 8, h200).shared_bytes() <= 227 * 1024);
}

int main() {
  check_route();
  check_mask();
  check_moments();
  check_end_of_weights();
  check_wgrad();
  check_product();
  check_rows();
  check_arithmetic_dtype();
  return failures != 0;
}
