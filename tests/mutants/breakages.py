"""Named breakages of Hopper's kernels: rules of barriers, clusters, copies and tiles that the edits of tokens miss."""

from typing import NamedTuple


class Breakage(NamedTuple):
    """Names what is broken, and gives the text that stands once in the file with what replaces it."""

    kind: str
    text: str
    replacement: str


_NEXT = "      if (step > last - steps) barriers.ring.release_at_all(step - 1, lane, cluster);\n    }\n"
_READ = "    hopper::wait_for_products<0>();\n"
_LAST = "    if (steps > 0) barriers.ring.release_at_all(step - 1, lane, cluster);\n"
_EARLY = "      barriers.ring.release_at_all(step, lane, cluster);\n    }\n"
_ENDS = "for (int64_t done = step > lag ? step - lag : 0; done < step; ++done) barriers.ring.publish(done);"
# what both kernels do alike
_BOTH = (
    Breakage("stages are released before products have read them", _NEXT + _READ + _LAST, _EARLY + _READ),
    Breakage("the last stage of a tile is not released", _LAST, ""),
    Breakage(
        "a stage is released while its products may be pending",
        "hopper::wait_for_products<1>();",
        "hopper::wait_for_products<2>();",
    ),
    Breakage("the last stages are not published", _ENDS, ""),
    Breakage(
        "a stage is published while its copies may be on their way",
        "hopper::wait_for_copies<lag>();",
        "hopper::wait_for_copies<lag + 1>();",
    ),
    Breakage("a producer does not wait until a stage is empty", "barriers.ring.wait_until_empty(step);", ""),
    Breakage("a consumer does not wait until a stage is full", "      barriers.ring.wait_until_full(step);\n", ""),
    Breakage(
        "a consumer keeps the turn", "hopper::arrive(barriers.turn[self ^ 1]);", "hopper::arrive(barriers.turn[self]);"
    ),
    Breakage("nobody has the first turn", "if (self == 1) hopper::arrive(barriers.turn[0]);", ""),
)
_COUNT = "    count_tiles(group, a, ends, sums);\n"
_WITHOUT_ROWS = """          barriers.ring.wait_until_full(step + i);
          group.sync_warp();  // or a lane sees the phase after the next, and waits for ever
          barriers.ring.release_at_all(step + i, lane, cluster);
""".splitlines(keepends=True)

BREAKAGES: dict[str, tuple[Breakage, ...]] = {
    "hopper.cuh": (
        Breakage("copies are published without a proxy fence", "    fence_writes();\n", ""),
        Breakage(
            "a stage is released to the own block alone",
            "if (lane < cluster) arrive_at(empty[stage(step)], lane);",
            "if (lane == cluster_rank()) arrive(empty[stage(step)]);",
        ),
        Breakage(
            "the own block is told twice, the other never",
            "arrive_at(empty[stage(step)], lane);",
            "arrive_at(empty[stage(step)], cluster_rank());",
        ),
        Breakage("a whole warp releases", "if (lane < cluster) arrive_at", "if (lane < 32) arrive_at"),
        Breakage("producers wait for the phase under way", "parity(step) ^ 1", "parity(step)"),
        Breakage("the parity stays", "static_cast<uint32_t>(step / stages & 1)", "0"),
        Breakage("the parity flips one step early", "(step / stages & 1)", "((step + 1) / stages & 1)"),
        Breakage(
            "a phase ends an arrival early",
            "init_barrier(barrier, producers);",
            "init_barrier(barrier, producers - 1);",
        ),
        Breakage(
            "an empty stage counts a consumer too few",
            "init_barrier(barrier, consumers);",
            "init_barrier(barrier, consumers - 1);",
        ),
        Breakage("pieces are not swapped", "(piece % 8 ^ row % 8) << 4", "piece % 8 << 4"),
        Breakage("pieces are swapped by groups of rows", "piece % 8 ^ row % 8", "piece % 8 ^ row / 8 % 8"),
        Breakage("blocks of columns overlap", "piece / 8 * depth * row_bytes", "piece / 8 * row_bytes"),
        Breakage("blocks and groups change places", "blocks << 16 | groups << 32", "groups << 16 | blocks << 32"),
        Breakage("groups of 4 rows", "uint64_t{8 * row_bytes >> 4} << 32", "uint64_t{4 * row_bytes >> 4} << 32"),
    ),
    "grouped_product.cuh": (
        *_BOTH,
        Breakage("a box for both goes to one", "hopper::load_box_for_both(box...);", "hopper::load_box(box...);"),
        Breakage("both load every box for both", "else if (own == rank)", "else"),
        Breakage("halves of the columns change places", "i * a.plan.distance", "(1 - i) * a.plan.distance"),
        Breakage("halves of the rows change places", "tile.first + i * Plan", "tile.first + (1 - i) * Plan"),
        Breakage("bytes of one half are expected", "(full, Plan::right_bytes + left", "(full, half_bytes + left"),
        Breakage("bytes of both halves of the rows are expected", "left_boxes * product_bytes", "2 * product_bytes"),
        Breakage(
            "one block's releases are counted", "cluster * Plan::warpgroup / warp_size", "Plan::warpgroup / warp_size"
        ),
        Breakage("blocks begin alone", _COUNT + "    hopper::sync_cluster();", _COUNT + "    group.sync();"),
        Breakage("blocks end alone", "    }\n    hopper::sync_cluster();\n#endif", "    }\n#endif"),
        Breakage("a turn's parity stays", "item / 2 & 1", "0"),
        Breakage("turns are not waited for", "      hopper::wait(barriers.turn[self], item / 2 & 1);\n", ""),
        Breakage("a block without rows does not wait", _WITHOUT_ROWS[0], ""),
        Breakage("lanes without rows do not wait for one another", _WITHOUT_ROWS[1], ""),
        Breakage("a block without rows does not release", _WITHOUT_ROWS[2], ""),
        Breakage(
            "a block without rows publishes nothing",
            "if (step >= lag) barriers.ring.publish",
            "if (step >= lag && tile.rows() > 0) barriers.ring.publish",
        ),
        Breakage("the lower half is not multiplied", "multiply<2>(sum", "multiply<1>(sum"),
        Breakage(
            "the lower half has the upper one's rows", "left + part * (Plan::left_bytes / 2) + k * 2", "left + k * 2"
        ),
        Breakage(
            "steps are counted by turns of both", "int64_t{item} * a.plan.steps", "int64_t{item / 2 * 2} * a.plan.steps"
        ),
        Breakage("rows of the next segment are stored", "exists = at < tile.stop;", "exists = at < a.segments.rows;"),
        Breakage("gathered rows are those of the tile before", "      if (a.left.slots) gather.take(a.left);\n", ""),
    ),
    "product_plan.cuh": (
        Breakage("odd row tiles are forgotten", " + row_tiles % 2 * ceil_div(column_tiles, 2)", ""),
        Breakage(
            "both blocks have the first row tile",
            "(2 * (group + within % here) + rank)",
            "(2 * (group + within % here))",
        ),
        Breakage("both blocks have the first columns", "tile.column_tile = left + rank;", "tile.column_tile = left;"),
        Breakage(
            "the last group of pairs is as high as the others",
            "pairs - group < height ? pairs - group : int32_t{height}",
            "int32_t{height}",
        ),
        Breakage(
            "rows are shared with a block that has none",
            "left + 1 < column_tiles ? Shared::rows : Shared::nothing",
            "Shared::rows",
        ),
        Breakage(
            "split columns are said to be shared",
            "tile.shared = left + 1 < column_tiles ? Shared::rows : Shared::nothing;",
            "tile.shared = Shared::columns;",
        ),
    ),
    "expert_wgrad.cuh": (
        *_BOTH,
        Breakage(
            "blocks begin alone", "    hopper::sync_cluster();\n    if (group", "    group.sync();\n    if (group"
        ),
        Breakage("blocks end alone", "    hopper::sync_cluster();  // nobody is reached after its end\n", ""),
        Breakage(
            "one block's releases are counted",
            "cluster * WgradPlan::warpgroup / warp_size",
            "WgradPlan::warpgroup / warp_size",
        ),
        Breakage("one half is never copied", "if (shared && i == rank)", "if (shared && i == 0)"),
        Breakage("both copy all for both", "if (shared && i == rank)", "if (shared)"),
        Breakage("what is shared is copied to oneself", "hopper::load_box_for_both(there", "hopper::load_box(there"),
        Breakage(
            "a half lies where the other should",
            "load_box_for_both(there,",
            "load_box_for_both(to + (1 - i) * block_bytes,",
        ),
        Breakage(
            "bytes of one half are expected",
            "hopper::expect_bytes(full, WgradPlan::factor_bytes);",
            "hopper::expect_bytes(full, WgradPlan::factor_bytes / (shared ? 2 : 1));",
        ),
        Breakage("the last rows of an expert come in boxes", "if (f.boxed && whole)", "if (f.boxed)"),
        Breakage(
            "the wrong factor is shared",
            "tile.row, tile.shared == Shared::grad",
            "tile.row, tile.shared == Shared::input",
        ),
        Breakage("along and across change places", "beyond < 0 ? along : across", "beyond < 0 ? across : along"),
        Breakage("the tile left over is the one before", "place = line_tiles - 1", "place = line_tiles - 2"),
        Breakage(
            "gathered rows are said to be shared",
            "across = along_columns ? input : grad",
            "across = along_columns ? Shared::input : Shared::grad",
        ),
        Breakage("one block for one multiprocessor", "blocks = 2 * std::min(pairs,", "blocks = std::min(pairs,"),
        Breakage("the mask of one tile decides for both", "rank < cluster; ++rank", "rank < 1; ++rank"),
        Breakage(
            "the mask of the other tile decides for both",
            "int rank = 0; rank < cluster",
            "int rank = 1; rank < cluster",
        ),
        Breakage(
            "each block asks its own mask",
            "const auto tile = plan.tile(pair, rank);\n      for",
            "const auto tile = plan.tile(pair, hopper::cluster_rank());\n      for",
        ),
        Breakage(
            "blocks store each other's tiles",
            "tile(pair, hopper::cluster_rank());\n      const int64_t steps",
            "tile(pair, 1 - hopper::cluster_rank());\n      const int64_t steps",
        ),
        Breakage("turns are not waited for", "      hopper::wait(barriers.turn[self], turn++ & 1);\n", ""),
        Breakage(
            "rows that waited are written too early",
            "        group.sync_warp();\n        if (first > 0) break;",
            "        if (first > 0) break;",
        ),
        Breakage(
            "rows are read before all are written",
            "        group.sync_warp();\n        finish_rows",
            "        finish_rows",
        ),
        Breakage("rows that waited are forgotten", "int row = held; row < Exchange", "int row = 32; row < Exchange"),
        Breakage(
            "rows that waited lie behind one another",
            "exchange.write(sum, row, row - held, lane)",
            "exchange.write(sum, row, 8, lane)",
        ),
        Breakage("rows are finished twice", "first == 0 ? held : Exchange::warp_rows - held", "held"),
        Breakage("the second fragment's rows are the first's", "local / 16 * 64", "local / 16 * 16"),
        Breakage(
            "L2 is asked for the row below", "tile.row + group.thread(), left", "tile.row + group.thread() + 1, left"
        ),
        Breakage("L2 is asked for short tiles", "    if (steps < stages) return;\n", ""),
        Breakage("L2 is asked for columns beyond the tile", "left < length ? left : length", "left"),
        Breakage("both consumers share an exchange", "warp_size - 4) * (Ex", "warp_size % 4) * (Ex"),
    ),
    "wgrad_epilogue.cuh": (
        Breakage(
            "L2 is asked for the weights of another expert",
            "o.param.row(param_row), place",
            "o.param.row(place.row), place",
        ),
        Breakage(
            "L2 is asked for packed state as if it were not", "has_state && state && !o.packed()", "has_state && state"
        ),
        Breakage("L2 is asked for state that a rule leaves alone", "if (has_state && state &&", "if (state &&"),
        Breakage("L2 is asked for rows without a bit", "if (!has_chosen(o.mask, place) || !find", "if (!find"),
        Breakage("L2 is asked for what is written alone", "if (add && has_chosen", "if (has_chosen"),
        Breakage("bits beyond a row count", "word & ((1u << (place.n - before)) - 1) : word", "word : word"),
    ),
    "wgrad_inner.cuh": (
        Breakage(
            "a tile is read before it is given", "        hopper::wait(barriers.given, turn & 1);\n", "        ;\n"
        ),
        Breakage(
            "a tile is given before the one before is taken",
            "        hopper::wait(barriers.taken, (turn & 1) ^ 1);\n",
            "        ;\n",
        ),
        Breakage("the first tile waits to be taken", "(turn & 1) ^ 1", "turn & 1"),
        Breakage(
            "both consumers arrive where a tile is given",
            "self == 0 ? barriers.given : barriers.taken",
            "barriers.given",
        ),
        Breakage("tiles of one gradient are multiplied", "a.f[self], a.plan", "a.f[0], a.plan"),
        Breakage("what lies beyond dW counts", "left > 0 ? (1u << left) - 1 : 0", "left > 0 ? 0xFFFFFFFF : 0"),
        Breakage(
            "rows beyond dW read the mask of the next expert", "row < rows ? columns - first : 0", "columns - first"
        ),
        Breakage("the mask is left out", "if (a.mask && bits != 0)", "if (false)"),
        Breakage("both blocks write the same parts", "(pair * cluster + rank) * warps", "pair * cluster * warps"),
        Breakage("the last gradient's square is the first's", "which = last ? 2 : i < j", "which = i < j"),
        Breakage(
            "threads exchange their quads",
            "quad_at(given, part, quad, thread)",
            "quad_at(given, part, quad, thread ^ self)",
        ),
    ),
    "exchange.cuh": (
        Breakage("lanes meet in a bank", "(piece ^ piece / 8 % 2 ^ row % 4 * 2) * 4", "piece * 4"),
        Breakage("rows of a fragment change places", "from % 16 / 8 * 2", "(1 - from % 16 / 8) * 2"),
    ),
}
