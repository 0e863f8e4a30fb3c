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

#include "rows.h"
#include "score.h"
#include "selection.h"

namespace topk {
namespace {

using Query = QUERY;  // of queries and keys
using Value = VALUE;

constexpr int PANEL = 2 * LANES;  // keys of a panel
constexpr int BLOCK = 128;  // keys of a block
constexpr int FEW_ROWS = 8;  // up to so many rows sharing a key head, the keys are not packed
constexpr int TILE_BYTES = 1 << 18;  // of the candidates of a tile: they stay in the second-level cache
constexpr int MAX_TILE_ROWS = 96;
constexpr int64_t MIN_SPLIT = 512;  // keys

constexpr bool PAIRS = IN_PAIRS<Query>;

// What products are made of: a float, or two bfloat16 of neighbouring columns.
using Factor = std::conditional_t<PAIRS, uint32_t, float>;

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
  int64_t sink;  // its operand, or -1
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

// --- Candidates

// How many candidates a row keeps at least, and has room for.
struct Limits {
  int k, capacity;

  explicit Limits(const Arguments& a) : k(int(a.kept)) {
    const int64_t wanted = std::max(2 * a.kept, a.kept + 128) + BLOCK;
    // A vector more, which appending may write.
    capacity = int(rounded_up(std::min(wanted, a.keys + BLOCK), LANES) + LANES);
  }
};

// Leaves room for the scores of another block.
inline void make_room(Candidates& row, const Limits& limits) {
  if (row.count + BLOCK + LANES > limits.capacity) keep_largest(row, limits.k, limits.k / 4 + 8);
}

// Appends the scores of a block that are above the row's threshold.
void filter(Candidates& row, const float* scores, int64_t count, int64_t first_key, const Limits& limits) {
  const Vec threshold = broadcast(row.threshold);
  for (int64_t n = 0; n < count; n += LANES) {
    const Vec block = load(scores + n);
    uint32_t bits = not_less_equal(block, threshold);
    if (n + LANES > count) bits &= (1u << (count - n)) - 1;
    if (bits) append(row, block, bits, first_key + n);
  }
  make_room(row, limits);
}

// --- Products

int64_t factors_of(int64_t depth) {
  return PAIRS ? (depth + 1) / 2 : depth;
}

// Factor n of a row; of a row with an odd number of columns the last pair is filled up with 0.
template <typename T>
Factor factor_at(const T* row, int64_t n, int64_t depth) {
  if constexpr (PAIRS) {
    const uint32_t second = 2 * n + 1 < depth ? uint32_t(row[2 * n + 1].bits) << 16 : 0;
    return second | row[2 * n].bits;
  } else {
    return to_float(row[n]);
  }
}

inline Vec multiply_add(Factor a, const Factor* b, Vec c) {
#if defined(TOPK_AVX512_BF16)
  if constexpr (PAIRS)
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)_mm512_loadu_si512(b));
  else
#endif
    return fma(broadcast(bit_cast<float>(a)), load(reinterpret_cast<const float*>(b)), c);
}

// result[r] = scale * sum over n of query[n][r] * panel[n][..]
template <int ROWS>
inline __attribute__((always_inline)) void multiply_panel(const Factor* query, const Factor* panel, int64_t factors,
                                                          float scale, Vec (&result)[ROWS][2]) {
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) result[r][0] = result[r][1] = zero();
  for (int64_t n = 0; n < factors; n++) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      const Factor factor = query[n * GROUP_ROWS + r];
      result[r][0] = multiply_add(factor, panel + n * PANEL, result[r][0]);
      result[r][1] = multiply_add(factor, panel + n * PANEL + LANES, result[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    result[r][0] = mul(result[r][0], broadcast(scale));
    result[r][1] = mul(result[r][1], broadcast(scale));
  }
}

// Scores of a group of query rows by a panel of keys.
struct Panel {
  const Factor *query, *keys;
  int64_t factors;
  float scale;
  int rows;
};

template <int ROWS>
void store_panel(const Panel& panel, float* scores) {
  Vec found[ROWS][2];
  multiply_panel(panel.query, panel.keys, panel.factors, panel.scale, found);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    store(scores + r * BLOCK, found[r][0]);
    store(scores + r * BLOCK + LANES, found[r][1]);
  }
}

// Candidates straight from the registers: most panels have none, and are never stored.
template <int ROWS>
void filter_panel(const Panel& panel, Candidates* rows, int64_t first_key, int64_t count, const Limits& limits) {
  Vec found[ROWS][2];
  multiply_panel(panel.query, panel.keys, panel.factors, panel.scale, found);
  const uint64_t inside = count >= PANEL ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    if (r >= panel.rows) break;
    const Vec threshold = broadcast(rows[r].threshold);
    const uint64_t low = not_less_equal(found[r][0], threshold), high = not_less_equal(found[r][1], threshold);
    const uint64_t bits = (low | high << LANES) & inside;
    if (bits) {
      append(rows[r], found[r][0], uint32_t(bits & ((1u << LANES) - 1)), first_key);
      append(rows[r], found[r][1], uint32_t(bits >> LANES), first_key + LANES);
      make_room(rows[r], limits);
    }
  }
}

// Calls with the smallest of three group sizes that holds the rows.
template <typename Function>
inline void for_rows(int rows, Function function) {
  if (rows > GROUP_ROWS * 2 / 3)
    function(std::integral_constant<int, GROUP_ROWS>());
  else if (rows > GROUP_ROWS / 3)
    function(std::integral_constant<int, GROUP_ROWS * 2 / 3>());
  else
    function(std::integral_constant<int, (GROUP_ROWS + 2) / 3>());
}

// Panels [depth][PANEL] of the keys of a block, zero beyond the last key; returns their largest squared norm.
float pack_keys(const Arguments& a, int64_t batch, int64_t head, int64_t first, int64_t count, Factor* panels) {
  const int64_t factors = factors_of(a.depth);
  float largest = 0;
  for (int64_t begin = 0; begin < count; begin += PANEL, panels += factors * PANEL) {
    for (int64_t j = 0; j < PANEL; j++) {
      if (begin + j >= count) {
        for (int64_t n = 0; n < factors; n++) panels[n * PANEL + j] = 0;
        continue;
      }
      const Query* row = row_of<Query>(a.key, batch, head, first + begin + j);
      for (int64_t n = 0; n < factors; n++) panels[n * PANEL + j] = factor_at(row, n, a.depth);
      if (a.before.bound) {
        float norm = 0;
        for (int64_t n = 0; n < a.depth; n++) norm += to_float(row[n]) * to_float(row[n]);
        largest = norm > largest || norm != norm ? norm : largest;
        if (norm != norm) largest = INF;
      }
    }
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
    s.candidates[r].count = 0;
    s.candidates[r].threshold = -INF;
  }
}

void pack_queries(const Arguments& a, const Tile& tile, Scratch& s) {
  const int64_t factors = factors_of(a.depth);
  for (int r = 0; r < int(rounded_up(tile.rows, GROUP_ROWS)); r++) {
    Factor* target = s.factors + (r / GROUP_ROWS) * factors * GROUP_ROWS + r % GROUP_ROWS;
    if (r >= tile.rows) {
      for (int64_t n = 0; n < factors; n++) target[n * GROUP_ROWS] = 0;
      continue;
    }
    const Query* row = row_of<Query>(a.query, tile.batch, s.positions[r].head, s.positions[r].query);
    for (int64_t n = 0; n < factors; n++) target[n * GROUP_ROWS] = factor_at(row, n, a.depth);
    float norm = 0;
    for (int64_t n = 0; n < a.depth; n++) norm += to_float(row[n]) * to_float(row[n]);
    s.norms[r] = norm;
  }
}

// What is known of a group of rows by a block of keys before its products are computed; whether it can be skipped.
bool can_skip(const Arguments& a, const Block& block, const Candidates* rows, float largest_product, BlockFacts& facts) {
  facts = {std::numeric_limits<double>::infinity(), Change::NONE};
  if (!a.before.bound) return false;
  a.before.bound(block, largest_product, facts);
  float lowest = INF;
  for (int64_t r = 0; r < block.row_count; r++) lowest = std::min(lowest, rows[r].threshold);
  return facts.upper <= lowest;
}

void take_candidates(const Arguments& a, const Block& block, const BlockFacts& facts, Candidates* rows, float* scores,
                     const Limits& limits) {
  if (facts.change != Change::NONE) a.before.apply(block, scores, BLOCK, facts.change);
  for (int64_t r = 0; r < block.row_count; r++)
    filter(rows[r], scores + r * BLOCK, block.key_count, block.first_key, limits);
}

// An upper bound of |scale * q.k|, rounding included.
float product_bound(const Arguments& a, float query_norm, float key_norm) {
  const float bound = std::fabs(float(a.scale)) * std::sqrt(query_norm) * std::sqrt(key_norm) * 1.01f;
  return bound < INF ? bound : INF;
}

void scan_panels(const Arguments& a, const Tile& tile, Scratch& s, const Factor* panels, const float* key_norms,
                 const Limits& limits) {
  const int64_t factors = factors_of(a.depth);
  for (int64_t first = 0; first < a.keys; first += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, a.keys - first);
    for (int group = 0; group < tile.rows; group += GROUP_ROWS) {
      const int rows = std::min(GROUP_ROWS, tile.rows - group);
      const Block block{a.operands, tile.batch, s.positions + group, rows, first, count};
      float largest = INF;
      if (a.before.bound) {
        float norm = 0;
        for (int r = 0; r < rows; r++) norm = s.norms[group + r] <= norm ? norm : s.norms[group + r];
        largest = product_bound(a, norm, key_norms[first / BLOCK]);
      }
      BlockFacts facts;
      if (can_skip(a, block, s.candidates + group, largest, facts)) continue;
      const Factor* query = s.factors + group * factors;
      for_rows(rows, [&](auto group_rows) {
        for (int64_t begin = 0; begin < count; begin += PANEL) {
          const Panel panel{query, panels + (first + begin) * factors, factors, float(a.scale), rows};
          if (facts.change == Change::NONE)
            filter_panel<group_rows>(panel, s.candidates + group, first + begin, count - begin, limits);
          else
            store_panel<group_rows>(panel, s.scores + begin);
        }
      });
      if (facts.change != Change::NONE) take_candidates(a, block, facts, s.candidates + group, s.scores, limits);
    }
  }
}

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
  float largest = sink ? *sink : -INF;
  for (int n = 0; n < row.count; n++) {
    const float score = unordered(row.scores[n]);
    probabilities[n] = score;
    largest = score > largest || score != score ? score : largest;
    if (score != score) break;
  }
  if (largest != largest) {
    std::fill(probabilities, probabilities + row.count, largest);
    return;
  }
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
  keep_largest(row, int(a.kept), 0);
  float sink = 0;
  if (a.sink >= 0) sink = element<float>(a.operands[a.sink], tile.batch, position);
  if (row.count == 0 && a.sink < 0 && !a.zero_empty_rows) {
    // A row of NaN weights keeps the lowest keys, so that its gradient is NaN where that of the definition is.
    row.count = int(a.kept);
    for (int n = 0; n < row.count; n++) {
      row.indices[n] = n;
      row.scores[n] = ORDERED_NAN;
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
  const Limits limits(a);
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
        scan_panels(a, tile, scratch, panels + local * blocks * BLOCK * factors, key_norms + local * blocks, limits);
        for (int r = 0; r < tile.rows; r++)
          finish(a, tile, scratch.positions[r], scratch.candidates[r], scratch);
      }
    }
  }
}

// Few rows to a key head: the keys are split, each split leaves up to k candidates of a row, and these are joined.
void decode(const Arguments& a) {
  const Limits limits(a);
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
        keep_largest(row, int(a.kept), 0);
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
      Candidates row{lists, lists + joined, 0, -INF};
      for (int64_t split = 0; split < splits; split++) {
        const int32_t* source = found_of(head, split, r);
        std::copy(source + 1, source + 1 + source[0], row.scores + row.count);
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
