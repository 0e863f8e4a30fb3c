// Screening: which keys of a row can be among its k largest scores, by products in int8 and their proven bounds.
//
//   for each tile of query rows, for each chunk of keys, for each group of rows:
//     lower bounds of the scores, from products in int8
//     their maxima over groups of keys, of which there are some 8 k
//   then, for each row:
//     the k-th largest of the maxima is the threshold: k keys, one of each group, have scores that are no smaller
//     survivors: the keys whose upper bound is not below the threshold, 1.5 to 3 k on random data
//     their scores in float32
//
// A key whose upper bound is below the threshold is not among the k largest, ties included: the selection is that of a
// scan over all scores, whose sums are rounded in another order. Rows that cannot be bounded, or of which too many keys
// survive, are left to that scan. Bounds are int16 in units of a row, and of q.k - q.m (int8.h).
#pragma once

#include "int8.h"
#include "tiles.h"

#if defined(TOPK_AVX512_VNNI)

namespace topk {
namespace {

constexpr int CHUNK = 256;  // keys: their panels stay in the first-level cache while all groups of a tile pass
constexpr int CHUNK_PANELS = CHUNK / PANEL;
constexpr float LARGEST_BOUND = 32000;  // none is larger, and none is below -32001
constexpr int16_t MASKED = std::numeric_limits<int16_t>::min();

inline __m512i load_bounds(const int16_t* x) { return _mm512_loadu_si512(x); }

// The keys of a head in int8, in panels, and their facts.
struct Int8Keys {
  const uint32_t* panels;
  const float *steps, *lost, *left;  // of the panels; readable for a vector more
  float most_lost, most_left;  // of all panels
};

// How many survivors of a row are worth it.
inline int most_survivors(const Arguments& a) { return int(std::min(3 * a.kept + 512, a.keys)); }

// The largest number that `k` of `maxima` are no smaller than, or one that up to k / 8 + 1 more are. `count` is a multiple
// of PANEL, and at least k.
inline __attribute__((noinline)) int find_threshold(const int16_t* maxima, int64_t count, int k) {
  __m512i least = load_bounds(maxima), most = least;
  for (int64_t n = PANEL; n < count; n += PANEL) {
    least = _mm512_min_epi16(least, load_bounds(maxima + n));
    most = _mm512_max_epi16(most, load_bounds(maxima + n));
  }
  alignas(64) int16_t ends[2][PANEL];
  _mm512_store_si512(ends[0], least);
  _mm512_store_si512(ends[1], most);
  int low = *std::min_element(ends[0], ends[0] + PANEL), high = *std::max_element(ends[1], ends[1] + PANEL);
  int64_t left = count;
  while (left > k + k / 8 + 1 && low < high) {
    const int middle = low + (high - low + 1) / 2;
    const __m512i bound = _mm512_set1_epi16(int16_t(middle));
    int64_t found = 0;
    for (int64_t n = 0; n < count; n += PANEL)
      found += __builtin_popcount(_mm512_cmpge_epi16_mask(load_bounds(maxima + n), bound));
    if (found >= k) {
      low = middle;
      left = found;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

struct ScreenScratch {
  int64_t stride;  // of bounds
  int64_t max_panels;  // of maxima: the panels with numbers n, n + max_panels ... have the same
  int16_t *bounds, *maxima;  // [tile rows][stride], [tile rows][max_panels][PANEL]
  int32_t* chunks;  // [stride / CHUNK]: the first key of each chunk that has bounds
  bool* is_left;  // to a scan of all scores
  float *scales, *lost_keys, *left_keys;  // of the rows, of a product of integers in units of a row, and of its margin
  uint32_t* queries;  // groups of [1 + quads][GROUP_ROWS]
  float* masks;  // [GROUP_ROWS][CHUNK]
  uint32_t* bits;  // [stride / PANEL]
  int32_t* some;  // [2][stride / PANEL + LANES]: first keys and bits of the panels with survivors
  Candidates found;

  ScreenScratch(const Arguments& a, Arena& arena, int64_t tile_rows) {
    stride = rounded_up(a.keys, CHUNK);
    max_panels = std::min(rounded_up(8 * a.kept, PANEL), rounded_up(a.keys, PANEL)) / PANEL;
    bounds = arena.take<int16_t>(tile_rows * stride);
    maxima = arena.take<int16_t>(tile_rows * max_panels * PANEL);
    chunks = arena.take<int32_t>(stride / CHUNK);
    is_left = arena.take<bool>(tile_rows);
    for (float** x : {&scales, &lost_keys, &left_keys}) *x = arena.take<float>(tile_rows + LANES);
    queries = arena.take<uint32_t>(tile_rows * (1 + quads_of(a.depth)));
    masks = arena.take<float>(GROUP_ROWS * CHUNK);
    bits = arena.take<uint32_t>(stride / PANEL);
    some = arena.take<int32_t>(2 * (stride / PANEL + LANES));
    const int64_t capacity = rounded_up(most_survivors(a) + PANEL, LANES) + LANES;
    found.scores = arena.take<int32_t>(capacity);
    found.indices = arena.take<int32_t>(capacity);
  }
};

// The rows of a tile and all keys.
class ScreenScan {
 public:
  ScreenScan(const Arguments& a, const Tile& tile, Scratch& scratch, ScreenScratch& screen, const Int8Keys& keys)
      : a_(a), tile_(tile), scratch_(scratch), s_(screen), keys_(keys), quads_(quads_of(a.depth)) {}

  // Bounds of all scores.
  void run() {
    round_queries();
    std::fill_n(s_.maxima, rounded_up(tile_.rows, GROUP_ROWS) * s_.max_panels * PANEL, MASKED);
    const bool asks_for_tile = a_.before.bound && !reads_matrix(a_);
    for (int64_t first = 0; first < a_.keys; first += CHUNK) {
      BlockFacts facts{0, a_.before.bound ? Change::ANY : Change::NONE};
      if (asks_for_tile && is_masked(first, 0, tile_.rows, facts)) continue;
      for (int row = 0; row < tile_.rows; row += GROUP_ROWS) bound_group(first, row, facts.change);
      s_.chunks[chunk_count_++] = int32_t(first);
    }
  }

  // The survivors of a row and their scores, or null if the row is left.
  Candidates* find(int row) {
    if (s_.is_left[row]) return nullptr;
    s_.found.clear();
    const int16_t* maxima = s_.maxima + row * s_.max_panels * PANEL;
    compare(row, find_threshold(maxima, s_.max_panels * PANEL, int(a_.kept)));
    if (!list()) return nullptr;
    score(row);
    return &s_.found;
  }

 private:
  const Query* query_of(int row) const {
    return row_of<Query>(a_.query, tile_.batch, scratch_.positions[row].head, scratch_.positions[row].query);
  }

  uint32_t* queries_of(int row) const { return s_.queries + row / GROUP_ROWS * GROUP_ROWS * (1 + quads_); }

  void round_queries() {
    for (int r = 0; r < int(rounded_up(tile_.rows, GROUP_ROWS)); r++) {
      RoundedQuery query{0, 0, 0};
      uint32_t* group = queries_of(r);
      const bool is_bounded = r < tile_.rows && round_query(query_of(r), a_.depth, a_.scale < 0 ? -1 : 1, group + GROUP_ROWS,
                                                            r % GROUP_ROWS, query);
      group[r % GROUP_ROWS] = uint32_t(-query.correction);
      // |q^| is at most |q| + |q' - q^|, and no product is larger than |q^| |k^|.
      const float largest = (query.lost_keys + query.left_keys) * keys_.most_left + query.lost_keys * keys_.most_lost +
                            query.left_keys * keys_.most_left;
      const float scale = is_bounded ? LARGEST_BOUND / largest : 0;
      s_.is_left[r] = !is_bounded;
      s_.scales[r] = scale;
      s_.lost_keys[r] = query.lost_keys * scale;
      s_.left_keys[r] = query.left_keys * scale;
    }
  }

  Block block_of(int64_t first, int row, int rows) const {
    return {a_.operands, tile_.batch, scratch_.positions + row, rows, first, std::min<int64_t>(CHUNK, a_.keys - first)};
  }

  bool is_masked(int64_t first, int row, int rows, BlockFacts& facts) const {
    a_.before.bound(block_of(first, row, rows), INF, facts);
    return facts.upper == -INF;
  }

  void bound_group(int64_t first, int row, Change change) {
    const int rows = std::min(GROUP_ROWS, tile_.rows - row);
    const int64_t count = std::min<int64_t>(CHUNK, a_.keys - first);
    int16_t* bounds = s_.bounds + row * s_.stride + chunk_count_ * CHUNK;
    BlockFacts facts{0, change};
    if (change != Change::NONE && is_masked(first, row, rows, facts)) {
      for (int r = 0; r < rows; r++) std::fill_n(bounds + r * s_.stride, CHUNK, MASKED);
      return;
    }
    if (facts.change == Change::NONE && count == CHUNK) {
      for (int64_t n = 0; n < CHUNK_PANELS; n++) bound_panel<false>(first / PANEL + n, row, bounds + n * PANEL, nullptr);
      return;
    }
    alignas(64) uint32_t visible[CHUNK_PANELS][GROUP_ROWS];
    find_visible(first, row, rows, facts.change, visible);
    for (int64_t n = 0; n * PANEL < count; n++)
      bound_panel<true>(first / PANEL + n, row, bounds + n * PANEL, visible[n]);
  }

  // Bits of the keys that the program does not mask: it leaves a score of 0 or makes it -inf.
  void find_visible(int64_t first, int row, int rows, Change change, uint32_t (&visible)[CHUNK_PANELS][GROUP_ROWS]) const {
    const Block block = block_of(first, row, rows);
    std::fill_n(s_.masks, GROUP_ROWS * CHUNK, 0.0f);
    if (change != Change::NONE) a_.before.apply(block, s_.masks, CHUNK, Change::ANY);
    for (int n = 0; n < CHUNK_PANELS; n++) {
      const int64_t count = block.key_count - n * PANEL;
      const uint32_t inside = count >= PANEL ? ~0u : count > 0 ? (1u << count) - 1 : 0;
      for (int r = 0; r < GROUP_ROWS; r++) {
        const float* scores = s_.masks + r * CHUNK + n * PANEL;
        const uint32_t low = not_less_equal(load(scores), broadcast(-INF));
        visible[n][r] = (low | not_less_equal(load(scores + LANES), broadcast(-INF)) << LANES) & inside;
      }
    }
  }

  // The bounds of a group by a panel. They are rounded to the nearest integer, of a number that is 1 too small.
  template <bool IS_MASKED>
  __attribute__((noinline)) void bound_panel(int64_t panel, int row, int16_t* bounds, const uint32_t* visible) const {
    alignas(64) float scales[LANES], margins[LANES];
    store(scales, mul(load(s_.scales + row), broadcast(keys_.steps[panel])));
    store(margins, add(margins_of(load(s_.lost_keys + row), load(s_.left_keys + row), broadcast(keys_.lost[panel]),
                                  broadcast(keys_.left[panel])), broadcast(1)));
    int16_t* maxima = s_.maxima + (row * s_.max_panels + panel % s_.max_panels) * PANEL;
    __m512i sums[GROUP_ROWS][2];
    multiply_int8(queries_of(row), keys_.panels + panel * quads_ * PANEL, quads_, sums);
#pragma GCC unroll 12
    for (int r = 0; r < GROUP_ROWS; r++) {
      const Vec scale = broadcast(scales[r]), margin = broadcast(margins[r]);
      const __m512i low = _mm512_cvtps_epi32(_mm512_fmsub_ps(_mm512_cvtepi32_ps(sums[r][0]), scale, margin));
      const __m512i high = _mm512_cvtps_epi32(_mm512_fmsub_ps(_mm512_cvtepi32_ps(sums[r][1]), scale, margin));
      __m512i found = _mm512_packs_epi32(low, high);
      if constexpr (IS_MASKED) found = _mm512_mask_blend_epi16(visible[r], _mm512_set1_epi16(MASKED), found);
      int16_t* largest = maxima + r * s_.max_panels * PANEL;
      _mm512_storeu_si512(bounds + r * s_.stride, found);
      _mm512_storeu_si512(largest, _mm512_max_epi16(load_bounds(largest), found));
    }
  }

  static Vec margins_of(Vec lost_keys, Vec left_keys, Vec lost, Vec left) {
    return fma(lost_keys, lost, mul(left_keys, left));
  }

  // Bits of the keys whose upper bounds are not below the threshold. An upper bound is twice the margin above the lower
  // one, and as that is rounded, less than 2 more.
  __attribute__((noinline)) void compare(int row, int threshold) {
    const Vec lost_keys = broadcast(s_.lost_keys[row]), left_keys = broadcast(s_.left_keys[row]);
    const Vec most = broadcast(float(threshold) - 2), least = broadcast(MASKED + 1);
    for (int n = 0; n < chunk_count_; n++) {
      const int64_t panel = s_.chunks[n] / PANEL;
      const Vec margins = margins_of(lost_keys, left_keys, load(keys_.lost + panel), load(keys_.left + panel));
      const Vec cuts = _mm512_max_ps(_mm512_fnmadd_ps(broadcast(2), margins, most), least);
      alignas(64) int32_t cut_of[LANES];
      _mm512_store_si512(cut_of, _mm512_cvt_roundps_epi32(cuts, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
      const int16_t* bounds = s_.bounds + row * s_.stride + n * CHUNK;
#pragma GCC unroll 8
      for (int i = 0; i < CHUNK_PANELS; i++) {
        const __m512i cut = _mm512_set1_epi16(int16_t(cut_of[i]));
        s_.bits[n * CHUNK_PANELS + i] = _mm512_cmpge_epi16_mask(load_bounds(bounds + i * PANEL), cut);
      }
    }
    // The last chunk has no bounds beyond the last key's panel.
    const int64_t rest = a_.keys % CHUNK;
    if (chunk_count_ && rest && s_.chunks[chunk_count_ - 1] + rest == a_.keys)
      for (int64_t n = rounded_up(rest, PANEL) / PANEL; n < CHUNK_PANELS; n++)
        s_.bits[(chunk_count_ - 1) * CHUNK_PANELS + n] = 0;
  }

  // The keys whose bits are set, as candidates; whether they are not too many.
  __attribute__((noinline)) bool list() {
    // First the panels that have any: a loop over them has no branch that is hard to predict.
    const __m256i offsets = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(PANEL));
    int32_t *firsts = s_.some, *bits = s_.some + s_.stride / PANEL + LANES;
    int panels = 0;
    for (int n = 0; n < chunk_count_; n++) {
      const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s_.bits + n * CHUNK_PANELS));
      const __mmask8 some = _mm256_test_epi32_mask(all, all);
      const __m256i keys = _mm256_add_epi32(_mm256_set1_epi32(s_.chunks[n]), offsets);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(firsts + panels), _mm256_maskz_compress_epi32(some, keys));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits + panels), _mm256_maskz_compress_epi32(some, all));
      panels += __builtin_popcount(some);
    }
    const int most = most_survivors(a_);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int32_t* indices = s_.found.indices;
    int count = 0;
    for (int n = 0; n < panels; n++) {
      const uint32_t low = uint32_t(bits[n]) & 0xffff, high = uint32_t(bits[n]) >> LANES;
      const __m512i keys = _mm512_add_epi32(lanes, _mm512_set1_epi32(firsts[n]));
      _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(__mmask16(low), keys));
      count += __builtin_popcount(low);
      const __m512i later = _mm512_add_epi32(keys, _mm512_set1_epi32(LANES));
      _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(__mmask16(high), later));
      count += __builtin_popcount(high);
      if (count > most) return false;
    }
    s_.found.count = count;
    return true;
  }

  __attribute__((noinline)) void score(int row) {
    Candidates& found = s_.found;
    const Query *query = query_of(row), *rows = row_of<Query>(a_.key, tile_.batch, tile_.key_head, 0);
    const auto row_at = [&](int n) { return rows + found.indices[std::min(n, found.count - 1)] * a_.key.strides[2]; };
    for (int n = 0; n < found.count; n += LANES) {
      const Query* keys[LANES];
      for (int lane = 0; lane < LANES; lane++) {
        keys[lane] = row_at(n + lane);
        prefetch_row(row_at(n + lane + LANES), a_.depth);
      }
      store(reinterpret_cast<float*>(found.scores + n), mul(dots(query, keys, a_.depth), broadcast(float(a_.scale))));
    }
  }

  const Arguments& a_;
  const Tile& tile_;
  Scratch& scratch_;
  ScreenScratch& s_;
  const Int8Keys& keys_;
  const int64_t quads_;
  int chunk_count_ = 0;
};

}  // namespace
}  // namespace topk

#endif
