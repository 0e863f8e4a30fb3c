// Tiles of query rows, and the scan of a tile over packed keys.
#pragma once

#include "arguments.h"
#include "filter.h"

namespace topk {
namespace {

constexpr int MAX_TILE_ROWS = 96;
constexpr int FEW_ROWS = 16;  // up to so many rows sharing a key head, the keys are not packed: that takes more time then

// The panels of a block of keys, zero beyond the last key; returns their largest squared norm where bounds need it.
float pack_keys(const Arguments& a, int64_t batch, int64_t head, int64_t first, int64_t count, Factor* panels) {
  float largest = 0;
  for (int64_t j = 0; j < rounded_up(count, PANEL); j++) {
    const Query* row = j < count ? row_of<Query>(a.key, batch, head, first + j) : nullptr;
    pack_row(row, a.depth, panels + j / PANEL * factors_of(a.depth) * PANEL, PANEL, j % PANEL);
    if (!row || !a.before.bound) continue;
    const float norm = squared_norm(row, a.depth);
    largest = std::max(largest, norm == norm ? norm : INF);
  }
  return largest;
}

// Query rows that share a key head: row r is query r % Lq of the r / Lq-th head of the group.
struct Tile {
  int64_t batch, key_head, first_row;
  int rows;
};

bool reads_matrix(const Arguments& a) {
  return std::any_of(a.operands, a.operands + a.operand_count, is_matrix);
}

struct Scratch {
  RowPosition* positions;
  Candidates* candidates;
  float* norms;  // of the queries
  Factor* factors;  // groups of [depth][GROUP_ROWS]
  Query* queries;  // [FEW_ROWS][depth], where keys are not packed
  float* scores;  // [GROUP_ROWS][BLOCK]
  float* probabilities;  // [kept]
  int64_t* offsets;  // [kept], of the rows of kept values

  Scratch(const Arguments& a, Arena& arena, int64_t tile_rows) {
    positions = arena.take<RowPosition>(tile_rows);
    candidates = arena.take<Candidates>(tile_rows);
    norms = arena.take<float>(tile_rows);
    factors = arena.take<Factor>(tile_rows * factors_of(a.depth));
    queries = arena.take<Query>(FEW_ROWS * a.depth);
    scores = arena.take<float>(std::max(GROUP_ROWS, FEW_ROWS) * BLOCK);
    probabilities = arena.take<float>(a.kept);
    offsets = arena.take<int64_t>(a.kept);
  }
};

void start(const Arguments& a, const Tile& tile, Scratch& s) {
  for (int r = 0; r < tile.rows; r++) {
    const int64_t row = tile.first_row + r;
    const int64_t group = a.heads / a.key_heads;
    s.positions[r] = {tile.key_head * group + row / a.queries, row % a.queries};
    s.candidates[r].clear();
  }
}

void pack_queries(const Arguments& a, const Tile& tile, Scratch& s) {
  for (int r = 0; r < int(rounded_up(tile.rows, GROUP_ROWS)); r++) {
    const Query* row =
        r < tile.rows ? row_of<Query>(a.query, tile.batch, s.positions[r].head, s.positions[r].query) : nullptr;
    pack_row(row, a.depth, s.factors + r / GROUP_ROWS * factors_of(a.depth) * GROUP_ROWS, GROUP_ROWS, r % GROUP_ROWS);
    if (row && a.before.bound) s.norms[r] = squared_norm(row, a.depth);
  }
}

// Whether none of a block's scores can become a candidate.
bool is_below(const BlockFacts& facts, const Candidates* rows, int64_t row_count) {
  float lowest = INF;
  for (int64_t r = 0; r < row_count; r++) lowest = std::min(lowest, rows[r].threshold);
  return facts.upper <= lowest;
}

// What is known of some rows by a block of keys before its products are computed; whether it can be skipped.
bool can_skip(const Arguments& a, const Block& block, const Candidates* rows, float largest_product, BlockFacts& facts) {
  facts = {std::numeric_limits<double>::infinity(), Change::NONE};
  if (!a.before.bound) return false;
  a.before.bound(block, largest_product, facts);
  return is_below(facts, rows, block.row_count);
}

// An upper bound of |scale * q.k| of some rows, rounding included.
float product_bound(const Arguments& a, const float* query_norms, int rows, float key_norm) {
  float norm = 0;
  for (int r = 0; r < rows; r++) norm = query_norms[r] <= norm ? norm : query_norms[r];
  const float bound = std::fabs(float(a.scale)) * std::sqrt(norm) * std::sqrt(key_norm) * 1.01f;
  return bound < INF ? bound : INF;
}

void take_candidates(const Arguments& a, const Block& block, const BlockFacts& facts, Candidates* rows, float* scores,
                     const Limits& limits) {
  if (facts.change != Change::NONE) a.before.apply(block, scores, BLOCK, facts.change);
  for (int64_t r = 0; r < block.row_count; r++)
    filter_block(rows[r], scores + r * BLOCK, block.key_count, block.first_key, limits);
}

// The panels of a head's keys, and the largest squared norm of each block: of all keys, or of one block at a time, which
// is packed when it is asked for.
struct PackedKeys {
  const Factor* panels;  // null if they are packed when they are asked for
  const float* norms;
  Factor* block;  // room for the panels of a block, and its squared norm is unknown

  float norm_of(int64_t first) const { return panels ? norms[first / BLOCK] : INF; }

  const Factor* panels_of(const Arguments& a, int64_t batch, int64_t head, int64_t first) const {
    if (panels) return panels + first * factors_of(a.depth);
    pack_keys(a, batch, head, first, std::min<int64_t>(BLOCK, a.keys - first), block);
    return block;
  }
};

// One tile and the blocks of keys, one after the other.
class TileScan {
 public:
  TileScan(const Arguments& a, const Tile& tile, Scratch& scratch, const PackedKeys& keys, const Limits& limits)
      : a_(a), tile_(tile), s_(scratch), keys_(keys), limits_(limits), factors_(factors_of(a.depth)) {}

  void run() {
    const bool reads = a_.before.bound && reads_matrix(a_), asks_for_tile = a_.before.bound && !reads;
    for (int64_t first = 0; first < a_.keys; first += BLOCK) {
      BlockFacts facts{0, a_.before.bound ? Change::ANY : Change::NONE};
      if (asks_for_tile && skips(first, 0, tile_.rows, facts)) continue;
      if (reads && first % (AHEAD * BLOCK) == 0) look_ahead(first);
      panels_ = keys_.panels_of(a_, tile_.batch, tile_.key_head, first);
      facts.change == Change::NONE ? filter_tile(first) : scan_groups(first, reads);
    }
  }

 private:
  static constexpr int AHEAD = 8;  // blocks

  int64_t count_of(int64_t first) const { return std::min<int64_t>(BLOCK, a_.keys - first); }

  Block block_of(int64_t first, int row, int rows) const {
    return {a_.operands, tile_.batch, s_.positions + row, rows, first, count_of(first)};
  }

  bool skips(int64_t first, int row, int rows, BlockFacts& facts) const {
    const float largest = product_bound(a_, s_.norms + row, rows, keys_.norm_of(first));
    return can_skip(a_, block_of(first, row, rows), s_.candidates + row, largest, facts);
  }

  // What is known of each group and the next blocks, where it is read: many keys of a row, before those of other rows.
  void look_ahead(int64_t first) {
    for (int row = 0; row < tile_.rows; row += GROUP_ROWS) {
      const int rows = std::min(GROUP_ROWS, tile_.rows - row);
      for (int64_t n = 0; n < AHEAD && first + n * BLOCK < a_.keys; n++) {
        const float largest = product_bound(a_, s_.norms + row, rows, keys_.norm_of(first + n * BLOCK));
        a_.before.bound(block_of(first + n * BLOCK, row, rows), largest, ahead_[row / GROUP_ROWS][n]);
      }
    }
  }

  // The group of rows from `row` on with the panel that begins at a key.
  Pairing pair_of(int row, int64_t key) const {
    return {s_.factors + row * factors_, panels_ + key % BLOCK * factors_, factors_, float(a_.scale),
            std::min(GROUP_ROWS, tile_.rows - row), key, a_.keys - key};
  }

  void filter_pair(int row, int64_t key) {
    const Pairing pair = pair_of(row, key);
    for_rows(pair.rows, [&](auto rows) { filter_panel<rows>(pair, s_.candidates + row, limits_); });
  }

  // A block whose scores are its products: each panel stays in the first-level cache while all groups pass.
  void filter_tile(int64_t first) {
    for (int64_t key = first; key < first + count_of(first); key += PANEL)
      for (int row = 0; row < tile_.rows; row += GROUP_ROWS) filter_pair(row, key);
  }

  // A block of which more may be known for some rows than for others.
  void scan_groups(int64_t first, bool is_known) {
    const int64_t end = first + count_of(first);
    for (int row = 0; row < tile_.rows; row += GROUP_ROWS) {
      const int rows = std::min(GROUP_ROWS, tile_.rows - row);
      BlockFacts facts;
      if (is_known) facts = ahead_[row / GROUP_ROWS][first / BLOCK % AHEAD];
      if (is_known ? is_below(facts, s_.candidates + row, rows) : skips(first, row, rows, facts)) continue;
      if (facts.change == Change::NONE) {
        for (int64_t key = first; key < end; key += PANEL) filter_pair(row, key);
        continue;
      }
      for_rows(rows, [&](auto group_rows) {
        for (int64_t key = first; key < end; key += PANEL)
          store_scores<group_rows>(pair_of(row, key), s_.scores + (key - first));
      });
      take_candidates(a_, block_of(first, row, rows), facts, s_.candidates + row, s_.scores, limits_);
    }
  }

  const Arguments& a_;
  const Tile& tile_;
  Scratch& s_;
  const PackedKeys& keys_;
  const Limits& limits_;
  const int64_t factors_;
  const Factor* panels_ = nullptr;  // of the block at hand
  BlockFacts ahead_[MAX_TILE_ROWS / GROUP_ROWS][AHEAD];
};

}  // namespace
}  // namespace topk
