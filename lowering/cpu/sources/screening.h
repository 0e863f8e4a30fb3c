// Screening: which keys of a row can be among its k largest scores, by products in int8 and their proven bounds.
//
//   for each tile of query rows, for each chunk of keys:
//     products of a group of rows by the chunk, in int8
//     survivors: the keys whose upper bound is not below the row's threshold
//     when a row's buffer is full, the k-th largest lower bound becomes its threshold
//   then, for each row: the scores of the survivors, by the same operations as without screening
//
// k scores are no smaller than the threshold, so a key whose upper bound is below it is not among the k largest, ties
// included: the selection, and each bit of the weights, are those of a scan over all scores. Rows that cannot be bounded, or
// of which too many keys survive, are left to that scan. Bounds are in units of the query's step and without q.m.
#pragma once

#include <atomic>

#include "int8.h"
#include "rescoring.h"
#include "tiles.h"

#if defined(TOPK_AVX512_VNNI)

namespace topk {
namespace {

constexpr int CHUNK = 256;  // keys: the sums of a group stay in the first-level cache
constexpr int CHUNK_PANELS = CHUNK / PANEL;
constexpr int SCREENED_TILE_BYTES = 3 << 17;  // of the survivors of a tile: they stay in the second-level cache
constexpr int MOST_SCREENED_ROWS = 48;

// A scale whose product with a sum rounds as one of ordinary size does.
inline bool can_screen(const Arguments& a) {
  const double scale = std::fabs(a.scale);
  return a.depth <= MAX_INT8_DEPTH && scale >= 0x1p-20 && scale <= 0x1p20;
}

// The keys of a head in int8.
struct Int8Keys {
  const uint32_t* panels;
  const PanelFacts* facts;
};

// How many survivors a row has room for, and how many may be left when there was no room.
struct SurvivorLimits {
  int k, capacity, most_left;

  SurvivorLimits(int64_t kept, int64_t keys, const Limits& plain) : k(int(kept)) {
    const int64_t wanted = std::min(3 * kept + 512, keys + CHUNK);
    capacity = int(std::max<int64_t>(rounded_up(wanted, LANES) + LANES, plain.capacity));
    most_left = capacity - CHUNK - LANES - (capacity - CHUNK) / 8;
  }
};

// Survivors of a row: as candidates by their lower bounds, with upper bounds beside.
struct Survivors {
  Candidates lower;
  float* upper;
  bool is_left;  // to a scan of all scores
};

// Raises the threshold to the k-th largest lower bound, or with up to `slack` more above it, and keeps what it can.
inline __attribute__((noinline)) void raise_threshold(Survivors& row, int k, int slack) {
  Candidates lower = row.lower;  // with its members in registers: the compiler cannot know that stores leave them alone
  float* const upper = row.upper;
  put_in_order(lower);
  int32_t low = lower.low;
  int left = lower.count;
  if (lower.threshold > -INF) {
    pad(lower, std::numeric_limits<int32_t>::min());
    low = ordered(lower.threshold);
    left = count_from(lower, low);
  }
  if (left > k) {
    lower.threshold = unordered(find_cut(lower, k, slack, low, left).least);
    const Vec threshold = broadcast(lower.threshold);
    int kept = 0;
    for (int n = 0; n < lower.count; n += LANES) {
      const Vec bounds = load(upper + n);
      uint32_t stays = _mm512_cmp_ps_mask(bounds, threshold, _CMP_GE_OQ);
      if (n + LANES > lower.count) stays &= (1u << (lower.count - n)) - 1;
      const __m512i scores = _mm512_loadu_si512(lower.scores + n), indices = _mm512_loadu_si512(lower.indices + n);
      _mm512_storeu_ps(upper + kept, _mm512_maskz_compress_ps(__mmask16(stays), bounds));
      _mm512_storeu_si512(lower.scores + kept, _mm512_maskz_compress_epi32(__mmask16(stays), scores));
      _mm512_storeu_si512(lower.indices + kept, _mm512_maskz_compress_epi32(__mmask16(stays), indices));
      kept += __builtin_popcount(stays);
    }
    lower.count = lower.ordered = kept;
  }
  row.lower = lower;
}

struct ScreenScratch {
  Survivors* rows;
  float *thresholds, *lost_keys, *left_keys;  // of the rows, with a vector more
  int32_t* corrections;
  uint32_t* queries;  // groups of [quad][GROUP_ROWS]
  int32_t* sums;  // [GROUP_ROWS][CHUNK]
  float* masks;  // [GROUP_ROWS][CHUNK]
  Factor* query;  // [factor] of one row
  Factor* block;  // panels of a block, for rows that are left

  ScreenScratch(const Arguments& a, Arena& arena, int64_t tile_rows) {
    rows = arena.take<Survivors>(tile_rows);
    for (float** x : {&thresholds, &lost_keys, &left_keys}) *x = arena.take<float>(tile_rows + LANES);
    corrections = arena.take<int32_t>(tile_rows + LANES);
    queries = arena.take<uint32_t>(tile_rows * quads_of(a.depth));
    sums = arena.take<int32_t>(GROUP_ROWS * CHUNK);
    masks = arena.take<float>(GROUP_ROWS * CHUNK);
    query = arena.take<Factor>(factors_of(a.depth));
    block = arena.take<Factor>(BLOCK * factors_of(a.depth));
  }
};

// One tile and the chunks of keys, one after the other.
class ScreenScan {
 public:
  ScreenScan(const Arguments& a, const Tile& tile, Scratch& scratch, ScreenScratch& screen, const Int8Keys& keys,
             const SurvivorLimits& limits)
      : a_(a), tile_(tile), scratch_(scratch), s_(screen), keys_(keys), limits_(limits), quads_(quads_of(a.depth)) {}

  void run() {
    round_queries();
    const bool asks_for_tile = a_.before.bound && !reads_matrix(a_);
    for (int64_t first = 0; first < a_.keys && alive_ > 0; first += CHUNK) {
      BlockFacts facts{0, a_.before.bound ? Change::ANY : Change::NONE};
      if (asks_for_tile && is_masked(first, 0, tile_.rows, facts)) continue;
      for (int row = 0; row < tile_.rows; row += GROUP_ROWS) screen_group(first, row, facts.change);
    }
  }

  // The scores of a row's survivors, as candidates.
  __attribute__((noinline)) Candidates score(int row) {
    Survivors& survivors = s_.rows[row];
    Candidates& found = survivors.lower;
    if (found.count > limits_.k) raise_threshold(survivors, limits_.k, limits_.k / 8);
    pack_row(query_of(row), a_.depth, s_.query, 1, 0);
    const Query* rows = row_of<Query>(a_.key, tile_.batch, tile_.key_head, 0);
    const auto row_at = [&](int n) { return rows + found.indices[std::min(n, found.count - 1)] * a_.key.strides[2]; };
    for (int n = 0; n < found.count; n += LANES) {
      const Query* keys[LANES];
      for (int lane = 0; lane < LANES; lane++) {
        keys[lane] = row_at(n + lane);
        const char* next = reinterpret_cast<const char*>(row_at(n + lane + LANES));
        for (size_t byte = 0; byte < a_.depth * sizeof(Query); byte += 64) prefetch(next + byte);
      }
      store(reinterpret_cast<float*>(found.scores + n), scores_of(s_.query, keys, a_.depth, float(a_.scale)));
    }
    const int count = found.count;
    found.clear();
    found.count = count;
    return found;
  }

 private:
  const Query* query_of(int row) const {
    return row_of<Query>(a_.query, tile_.batch, scratch_.positions[row].head, scratch_.positions[row].query);
  }

  void round_queries() {
    alive_ = 0;
    for (int r = 0; r < int(rounded_up(tile_.rows, GROUP_ROWS)); r++) {
      RoundedQuery query{0, 0, 0};
      bool is_alive = false;
      if (r < tile_.rows) {
        Survivors& row = s_.rows[r];
        row.lower.clear();
        is_alive = round_query(query_of(r), a_.depth, a_.scale < 0 ? -1 : 1,
                               s_.queries + r / GROUP_ROWS * quads_ * GROUP_ROWS, r % GROUP_ROWS, query);
        row.is_left = !is_alive;
        alive_ += is_alive;
      }
      s_.thresholds[r] = is_alive ? -INF : INF;
      s_.lost_keys[r] = query.lost_keys;
      s_.left_keys[r] = query.left_keys;
      s_.corrections[r] = query.correction;
    }
  }

  Block block_of(int64_t first, int row, int rows) const {
    return {a_.operands, tile_.batch, scratch_.positions + row, rows, first, std::min<int64_t>(CHUNK, a_.keys - first)};
  }

  bool is_masked(int64_t first, int row, int rows, BlockFacts& facts) const {
    a_.before.bound(block_of(first, row, rows), INF, facts);
    return facts.upper == -INF;
  }

  void screen_group(int64_t first, int row, Change change) {
    const int rows = std::min(GROUP_ROWS, tile_.rows - row);
    if (std::all_of(s_.rows + row, s_.rows + row + rows, [](const Survivors& x) { return x.is_left; })) return;
    BlockFacts facts{0, change};
    if (change != Change::NONE && is_masked(first, row, rows, facts)) return;
    const int64_t count = std::min<int64_t>(CHUNK, a_.keys - first);
    alignas(32) uint32_t bits[GROUP_ROWS][CHUNK_PANELS] = {};
    for (int64_t n = 0; n * PANEL < count; n++)
      compare_panel(first / PANEL + n, row, count - n * PANEL, s_.sums + n * PANEL, &bits[0][n]);
    if (facts.change != Change::NONE) mask(first, row, rows, bits);
    for (int r = 0; r < rows; r++) append(row + r, first, s_.sums + r * CHUNK, bits[r]);
  }

  // The sums of a group by a panel, and bits of those that can be above their row's threshold.
  __attribute__((noinline)) void compare_panel(int64_t panel, int row, int64_t count, int32_t* target, uint32_t* bits) const {
    const PanelFacts& facts = keys_.facts[panel];
    // A sum passes if its upper bound is the threshold: sum >= (threshold - margin) / step, less 2 for the rounding of
    // numbers below 2^23. What adding 128 to the keys added stays in the sum.
    const Vec margin = fma(load(s_.lost_keys + row), broadcast(facts.lost), mul(load(s_.left_keys + row), broadcast(facts.left)));
    Vec least = mul(_mm512_sub_ps(load(s_.thresholds + row), margin), broadcast(facts.inverse_step));
    least = _mm512_min_ps(_mm512_max_ps(least, broadcast(-0x1p30f)), broadcast(0x1p30f));
    const __m512i floors = _mm512_cvt_roundps_epi32(least, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512i corrections = _mm512_loadu_si512(s_.corrections + row);
    alignas(64) int32_t bounds[LANES];
    _mm512_store_si512(bounds, _mm512_add_epi32(_mm512_sub_epi32(floors, _mm512_set1_epi32(2)), corrections));
    __m512i sums[GROUP_ROWS][2];
    multiply_int8(s_.queries + row * quads_, keys_.panels + panel * quads_ * PANEL, quads_, sums);
    const uint32_t inside = count >= PANEL ? ~0u : (1u << count) - 1;
#pragma GCC unroll 12
    for (int r = 0; r < GROUP_ROWS; r++) {
      const __m512i bound = _mm512_set1_epi32(bounds[r]);
      _mm512_storeu_si512(target + r * CHUNK, sums[r][0]);
      _mm512_storeu_si512(target + r * CHUNK + LANES, sums[r][1]);
      const uint32_t low = _mm512_cmpge_epi32_mask(sums[r][0], bound), high = _mm512_cmpge_epi32_mask(sums[r][1], bound);
      bits[r * CHUNK_PANELS] = (low | high << LANES) & inside;
    }
  }

  // Clears the bits of the keys that the program masks: it leaves a score of 0 or makes it -inf.
  void mask(int64_t first, int row, int rows, uint32_t (&bits)[GROUP_ROWS][CHUNK_PANELS]) const {
    const Block block = block_of(first, row, rows);
    std::fill(s_.masks, s_.masks + rows * CHUNK, 0.0f);
    a_.before.apply(block, s_.masks, CHUNK, Change::ANY);
    for (int r = 0; r < rows; r++)
      for (int n = 0; n < CHUNK_PANELS; n++) {
        const float* scores = s_.masks + r * CHUNK + n * PANEL;
        const uint32_t low = not_less_equal(load(scores), broadcast(-INF));
        bits[r][n] &= low | not_less_equal(load(scores + LANES), broadcast(-INF)) << LANES;
      }
  }

  void append(int r, int64_t first, const int32_t* sums, const uint32_t* bits) {
    Survivors& row = s_.rows[r];
    const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(bits));
    uint32_t panels = _mm256_test_epi32_mask(all, all);
    if (!panels) return;
    int count = row.lower.count;
    const __m512i correction = _mm512_set1_epi32(s_.corrections[r]);
    const float lost = s_.lost_keys[r], left = s_.left_keys[r];
    float* lower = reinterpret_cast<float*>(row.lower.scores);
    int32_t* indices = row.lower.indices;
    for (; panels; panels &= panels - 1) {
      const int n = __builtin_ctz(panels);
      const PanelFacts& facts = keys_.facts[first / PANEL + n];
      const Vec margin = broadcast(lost * facts.lost + left * facts.left), step = broadcast(facts.step);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __mmask16 mask = __mmask16(bits[n] >> (half * LANES));
        const int64_t key = n * PANEL + half * LANES;
        const Vec sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums + key), correction));
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i keys = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(first + key)));
        _mm512_storeu_ps(lower + count, _mm512_maskz_compress_ps(mask, _mm512_fmsub_ps(sum, step, margin)));
        _mm512_storeu_ps(row.upper + count, _mm512_maskz_compress_ps(mask, _mm512_fmadd_ps(sum, step, margin)));
        _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(mask, keys));
        count += __builtin_popcount(mask);
      }
    }
    row.lower.count = count;
    if (count + CHUNK + LANES > limits_.capacity) make_room(r);
  }

  void make_room(int r) {
    Survivors& row = s_.rows[r];
    raise_threshold(row, limits_.k, std::max(LANES, limits_.k / 4));
    row.is_left = row.lower.count > limits_.most_left;
    alive_ -= row.is_left;
    if (row.is_left) row.lower.count = 0;
    s_.thresholds[r] = row.is_left ? INF : row.lower.threshold;
  }

  const Arguments& a_;
  const Tile& tile_;
  Scratch& scratch_;
  ScreenScratch& s_;
  const Int8Keys& keys_;
  const SurvivorLimits& limits_;
  const int64_t quads_;
  int alive_ = 0;
};

}  // namespace
}  // namespace topk

#endif
