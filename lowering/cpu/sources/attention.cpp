// Top-k attention: softmax over the k largest scores of each row, and the sum of their values.
//
//   for each tile of query rows that share a key head, for each block of keys:
//     ask the score function which blocks cannot hold a kept key: they are skipped
//     scores of a group of rows by the block of keys, in registers, then in a buffer of the first-level cache
//     the score function, on that buffer
//     candidates: the scores above a row's running threshold; when its buffer is full, the k largest stay
//   then, for each row: the k largest, their softmax, the sum of their values
//
// Products and sums are float32. Keys are packed once into panels, [depth][keys of a panel], that all tiles of a head
// share. Where only few rows share a key head (decoding), keys are read where they are instead, and the keys are split
// among the threads; each split selects its own candidates.
//
// The build defines QUERY and VALUE, the element types, and TOPK_AVX512_BF16 where pairs of bfloat16 are multiplied.
// Source: Gupta et al. 2021, arXiv:2106.06899.

#include <omp.h>

#include "filter.h"
#include "score.h"

namespace topk {
namespace {

using Value = VALUE;

constexpr int FEW_ROWS = 8;  // up to so many rows sharing a key head, the keys are not packed
constexpr int TILE_BYTES = 1 << 18;  // of the candidates of a tile: they stay in the second-level cache
constexpr int MAX_TILE_ROWS = 96;
constexpr int64_t MIN_SPLIT = 512;  // keys

}  // namespace

// The order is that of the structure which the caller fills.
struct ForwardArguments {
  Tensor query, key, value;
  void* output;  // [B, Hq, Lq, Dv]
  int32_t* indices;  // [B, Hq, Lq, kept]
  float* weights;  // [B, Hq, Lq, kept]
  const bool* dropout_keep;  // [B, Hq, Lq, kept] or null
  int64_t batch, heads, key_heads, value_heads, queries, keys, depth, value_size, kept;
  double scale, dropout_factor;
  int64_t zero_empty_rows, threads;
  Program before, after;
  const Operand* operands;
  int64_t operand_count, sink;  // which operand is the sink, or -1
};

namespace {

using Arguments = ForwardArguments;

// Hands out parts of a buffer.
class Arena {
 public:
  explicit Arena(std::byte* data) : data_(data) {}
  template <typename T>
  T* take(size_t count) {
    T* result = reinterpret_cast<T*>(data_ + used_);
    used_ += size_t(rounded_up(int64_t(count * sizeof(T)), 64));
    return result;
  }
  size_t used() const { return used_; }

 private:
  std::byte* data_;
  size_t used_ = 0;
};

// --- Keys

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

// Scores of up to FEW_ROWS rows by the keys of a block, where the keys lie. queries [rows][depth].
void multiply_few(const Arguments& a, int64_t batch, int64_t head, int64_t first, int64_t count, const Query* queries,
                  int64_t query_stride, int rows, float* scores) {
  const Vec scale = broadcast(float(a.scale));
  for (int64_t begin = 0; begin < count; begin += LANES) {
    const Query* keys[LANES];
    for (int j = 0; j < LANES; j++)
      keys[j] = row_of<Query>(a.key, batch, head, first + std::min(begin + j, count - 1));
    for (int r = 0; r < rows; r++)
      store(scores + r * BLOCK + begin, mul(dots(queries + r * query_stride, keys, a.depth), scale));
  }
}

// --- Tiles

// Query rows that share a key head: row r is query r % Lq of the r / Lq-th head of the group.
struct Tile {
  int64_t batch, key_head, first_row;
  int rows;
};

// Whether an operand has an element for each query and key.
bool reads_matrix(const Arguments& a) {
  for (int64_t n = 0; n < a.operand_count; n++)
    if (a.operands[n].query_stride && a.operands[n].key_stride) return true;
  return false;
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

// What is known of some rows by a block of keys before its products are computed; whether it can be skipped.
bool can_skip(const Arguments& a, const Block& block, const Candidates* rows, float largest_product, BlockFacts& facts) {
  facts = {std::numeric_limits<double>::infinity(), Change::NONE};
  if (!a.before.bound) return false;
  a.before.bound(block, largest_product, facts);
  float lowest = INF;
  for (int64_t r = 0; r < block.row_count; r++) lowest = std::min(lowest, rows[r].threshold);
  return facts.upper <= lowest;
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

// The keys of a head as `prefill` packed them.
struct PackedKeys {
  const Factor* panels;
  const float* norms;  // the largest of each block
};

// One tile and the blocks of keys, one after the other.
class TileScan {
 public:
  TileScan(const Arguments& a, const Tile& tile, Scratch& scratch, const PackedKeys& keys, const Limits& limits)
      : a_(a), tile_(tile), s_(scratch), keys_(keys), limits_(limits), factors_(factors_of(a.depth)) {}

  void run() {
    // Where reading the operands takes time, they are read once, for the groups.
    const bool asks_for_tile = a_.before.bound && !reads_matrix(a_);
    for (int64_t first = 0; first < a_.keys; first += BLOCK) {
      BlockFacts facts{0, a_.before.bound ? Change::ANY : Change::NONE};
      if (asks_for_tile && skips(first, 0, tile_.rows, facts)) continue;
      facts.change == Change::NONE ? filter_tile(first) : scan_groups(first);
    }
  }

 private:
  int64_t count_of(int64_t first) const { return std::min<int64_t>(BLOCK, a_.keys - first); }

  Block block_of(int64_t first, int row, int rows) const {
    return {a_.operands, tile_.batch, s_.positions + row, rows, first, count_of(first)};
  }

  bool skips(int64_t first, int row, int rows, BlockFacts& facts) const {
    const float largest = product_bound(a_, s_.norms + row, rows, keys_.norms[first / BLOCK]);
    return can_skip(a_, block_of(first, row, rows), s_.candidates + row, largest, facts);
  }

  // The group of rows from `row` on with the panel that begins at a key.
  Pairing pair_of(int row, int64_t key) const {
    return {s_.factors + row * factors_, keys_.panels + key * factors_, factors_, float(a_.scale),
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
  void scan_groups(int64_t first) {
    const int64_t end = first + count_of(first);
    for (int row = 0; row < tile_.rows; row += GROUP_ROWS) {
      const int rows = std::min(GROUP_ROWS, tile_.rows - row);
      BlockFacts facts;
      if (skips(first, row, rows, facts)) continue;
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
};

void scan_few(const Arguments& a, const Tile& tile, Scratch& s, int64_t begin, int64_t end, const Limits& limits) {
  for (int r = 0; r < tile.rows; r++) {
    const Query* row = row_of<Query>(a.query, tile.batch, s.positions[r].head, s.positions[r].query);
    std::copy(row, row + a.depth, s.queries + r * a.depth);
  }
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, end - first);
    const Block block{a.operands, tile.batch, s.positions, tile.rows, first, count};
    BlockFacts facts;
    if (can_skip(a, block, s.candidates, INF, facts)) continue;
    multiply_few(a, tile.batch, tile.key_head, first, count, s.queries, a.depth, tile.rows, s.scores);
    take_candidates(a, block, facts, s.candidates, s.scores, limits);
  }
}

// --- The kept keys of a row

template <typename T>
T element(const Operand& x, int64_t batch, const RowPosition& row) {
  return static_cast<const T*>(x.data)[batch * x.batch_stride + row.head * x.head_stride + row.query * x.query_stride];
}

// Probabilities of the kept scores; the sink is a score more, of no key.
void softmax(const Candidates& row, const float* sink, float* probabilities) {
  const int32_t most = std::max(ordered(sink ? *sink : -INF), row.high);
  if (most == ORDERED_NAN) {
    std::fill(probabilities, probabilities + row.count, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const float largest = unordered(most);
  for (int n = 0; n < row.count; n++) probabilities[n] = unordered(row.scores[n]);
  for (int n = 0; n < row.count; n++) probabilities[n] = exp_nonpositive(probabilities[n] - largest);
  Vec totals = zero();
  int n = 0;
  for (; n + LANES <= row.count; n += LANES) totals = add(totals, load(probabilities + n));
  float total = sum(totals) + (sink ? exp_nonpositive(*sink - largest) : 0.0f);
  for (; n < row.count; n++) total += probabilities[n];
  const float factor = 1 / total;
  for (int n = 0; n < row.count; n++) probabilities[n] *= factor;
}

void finish(const Arguments& a, const Tile& tile, const RowPosition& position, Candidates& row, const Scratch& s) {
  float* probabilities = s.probabilities;
  const int64_t number = (tile.batch * a.heads + position.head) * a.queries + position.query;
  int32_t* indices = a.indices + number * a.kept;
  float* weights = a.weights + number * a.kept;
  keep_exactly(row, int(a.kept));
  float sink = 0;
  if (a.sink >= 0) sink = element<float>(a.operands[a.sink], tile.batch, position);
  if (row.count == 0 && a.sink < 0 && !a.zero_empty_rows) {
    // A row of NaN weights keeps the lowest keys, so that its gradient is NaN where that of the definition is.
    row.count = int(a.kept);
    for (int n = 0; n < row.count; n++) {
      row.indices[n] = n;
      row.scores[n] = row.high = ORDERED_NAN;
    }
  }
  softmax(row, a.sink >= 0 ? &sink : nullptr, probabilities);
  std::copy(row.indices, row.indices + row.count, indices);
  std::fill(indices + row.count, indices + a.kept, -1);
  std::copy(probabilities, probabilities + row.count, weights);
  std::fill(weights + row.count, weights + a.kept, 0.0f);
  if (a.after.apply_kept) {
    const Block block{a.operands, tile.batch, &position, 1, 0, row.count};
    a.after.apply_kept(block, row.indices, probabilities);
  }
  if (a.dropout_keep) {
    const bool* keep = a.dropout_keep + number * a.kept;
    for (int n = 0; n < row.count; n++) {
      probabilities[n] *= keep[n] ? float(a.dropout_factor) : 0.0f;
      if (!keep[n]) weights[n] = -weights[n];
    }
  }
  const Value* values = row_of<Value>(a.value, tile.batch, position.head / (a.heads / a.value_heads), 0);
  for (int n = 0; n < row.count; n++) s.offsets[n] = row.indices[n] * a.value.strides[2];
  weigh(values, s.offsets, probabilities, row.count, a.value_size, static_cast<Value*>(a.output) + number * a.value_size);
}

// --- The whole

// Tiles of query rows over packed keys, some key heads at a time so that their panels need little memory.
void prefill(const Arguments& a) {
  const Limits limits(a.kept, a.keys);
  const int64_t capacity = limits.capacity, factors = factors_of(a.depth);
  const int64_t rows = a.heads / a.key_heads * a.queries;
  const int64_t row_bytes = capacity * 2 * int64_t(sizeof(int32_t));
  const int64_t tile_rows = rounded_up(
      std::clamp<int64_t>(std::min(TILE_BYTES / row_bytes, rows), 1, MAX_TILE_ROWS - GROUP_ROWS + 1), GROUP_ROWS);
  const int64_t tiles = rounded_up(rows, tile_rows) / tile_rows;
  const int64_t blocks = rounded_up(a.keys, BLOCK) / BLOCK;
  const int64_t all_heads = a.batch * a.key_heads;
  const int64_t heads_at_once = std::min(all_heads, rounded_up(4 * a.threads, tiles) / tiles);

  const Buffer packed(heads_at_once * blocks * BLOCK * factors * sizeof(Factor));
  const Buffer packed_norms(heads_at_once * blocks * sizeof(float));
  Factor* panels = packed.as<Factor>();
  float* key_norms = packed_norms.as<float>();
  Arena counter(nullptr);
  Scratch(a, counter, tile_rows);
  const int64_t scratch_bytes = int64_t(counter.used());
  const int64_t thread_bytes = rounded_up(scratch_bytes + tile_rows * row_bytes, 4096) + 64;
  const Buffer memory(a.threads * thread_bytes);

#pragma omp parallel num_threads(int(a.threads))
  {
    Arena arena(memory.as<std::byte>(omp_get_thread_num() * thread_bytes));
    Scratch scratch(a, arena, tile_rows);
    int32_t* lists = arena.take<int32_t>(0);
    for (int64_t r = 0; r < tile_rows; r++) {
      scratch.candidates[r].scores = lists + 2 * r * capacity;
      scratch.candidates[r].indices = lists + (2 * r + 1) * capacity;
    }
    for (int64_t head = 0; head < all_heads; head += heads_at_once) {
      const int64_t heads = std::min(heads_at_once, all_heads - head);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < heads * blocks; n++) {
        const int64_t which = head + n / blocks, first = n % blocks * BLOCK;
        key_norms[n] = pack_keys(a, which / a.key_heads, which % a.key_heads, first,
                                 std::min<int64_t>(BLOCK, a.keys - first), panels + n * BLOCK * factors);
      }
      // The last tiles first: under a causal mask they are the longest.
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < heads * tiles; n++) {
        const int64_t local = n % heads, which = head + local, first_row = (tiles - 1 - n / heads) * tile_rows;
        const Tile tile{which / a.key_heads, which % a.key_heads, first_row, int(std::min(tile_rows, rows - first_row))};
        start(a, tile, scratch);
        pack_queries(a, tile, scratch);
        const PackedKeys keys{panels + local * blocks * BLOCK * factors, key_norms + local * blocks};
        TileScan(a, tile, scratch, keys, limits).run();
        for (int r = 0; r < tile.rows; r++)
          finish(a, tile, scratch.positions[r], scratch.candidates[r], scratch);
      }
    }
  }
}

// Few rows to a key head: the keys are split, each split leaves up to k candidates of a row, and these are joined.
void decode(const Arguments& a) {
  const Limits limits(a.kept, a.keys);
  const int64_t capacity = limits.capacity, rows = a.heads / a.key_heads * a.queries;
  const int64_t all_heads = a.batch * a.key_heads;
  const int64_t most = std::max<int64_t>(1, a.keys / std::max(MIN_SPLIT, 4 * a.kept));
  const int64_t wanted = all_heads >= 4 * a.threads ? 1 : rounded_up(4 * a.threads, all_heads) / all_heads;
  const int64_t split_keys = rounded_up(rounded_up(a.keys, std::min(most, wanted)) / std::min(most, wanted), BLOCK);
  const int64_t splits = rounded_up(a.keys, split_keys) / split_keys;
  const int64_t kept_of_split = std::min(a.kept, split_keys) + LANES;

  Arena counter(nullptr);
  Scratch(a, counter, FEW_ROWS);
  const int64_t joined = std::max(capacity, splits * kept_of_split);
  const int64_t list_bytes = std::max(rows * capacity, joined) * 2 * int64_t(sizeof(int32_t));
  const int64_t thread_bytes = rounded_up(int64_t(counter.used()) + list_bytes, 4096) + 64;
  const Buffer memory(a.threads * thread_bytes);
  const Buffer found_memory(all_heads * splits * rows * (2 * kept_of_split + 1) * sizeof(int32_t));
  int32_t* found = found_memory.as<int32_t>();
  const auto found_of = [&](int64_t head, int64_t split, int64_t row) {
    return found + ((head * splits + split) * rows + row) * (2 * kept_of_split + 1);
  };

#pragma omp parallel num_threads(int(a.threads))
  {
    Arena arena(memory.as<std::byte>(omp_get_thread_num() * thread_bytes));
    Scratch scratch(a, arena, FEW_ROWS);
    int32_t* lists = arena.take<int32_t>(0);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < all_heads * splits; n++) {
      const int64_t head = n / splits, split = n % splits, begin = split * split_keys;
      const Tile tile{head / a.key_heads, head % a.key_heads, 0, int(rows)};
      start(a, tile, scratch);
      for (int64_t r = 0; r < rows; r++) {
        scratch.candidates[r].scores = lists + 2 * r * capacity;
        scratch.candidates[r].indices = lists + (2 * r + 1) * capacity;
      }
      scan_few(a, tile, scratch, begin, std::min(begin + split_keys, a.keys), limits);
      for (int64_t r = 0; r < rows; r++) {
        Candidates& row = scratch.candidates[r];
        keep_exactly(row, int(a.kept));
        int32_t* target = found_of(head, split, r);
        target[0] = row.count;
        std::copy(row.scores, row.scores + row.count, target + 1);
        std::copy(row.indices, row.indices + row.count, target + 1 + kept_of_split);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < all_heads * rows; n++) {
      const int64_t head = n / rows, r = n % rows;
      const Tile tile{head / a.key_heads, head % a.key_heads, r, 1};
      start(a, tile, scratch);
      Candidates row{lists, lists + joined};
      row.clear();
      for (int64_t split = 0; split < splits; split++) {
        const int32_t* source = found_of(head, split, r);
        for (int n = 0; n < source[0]; n++) row.scores[row.count + n] = bit_cast<int32_t>(unordered(source[1 + n]));
        std::copy(source + 1 + kept_of_split, source + 1 + kept_of_split + source[0], row.indices + row.count);
        row.count += source[0];
      }
      finish(a, tile, scratch.positions[0], row, scratch);
    }
  }
}

}  // namespace
}  // namespace topk

// 0, or 1 if there is not enough memory.
extern "C" int64_t attention_forward(const topk::ForwardArguments* arguments) {
  try {
    const bool is_few = arguments->heads / arguments->key_heads * arguments->queries <= topk::FEW_ROWS;
    is_few ? topk::decode(*arguments) : topk::prefill(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
