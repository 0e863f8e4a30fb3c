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
//
// The program before the softmax is affine: what it makes of 0, its terms, is added to the bound of the product. Where it
// does more than mask, bounds stand for scores less an anchor, near which the largest terms of a group are. What is too far
// below it counts as masked, what is too far above as just in range. Under a soft cap bounds stand for what is capped.
#pragma once

#include "int8.h"
#include "tiles.h"

#if defined(TOPK_AVX512_VNNI)

namespace topk {
namespace {

constexpr int CHUNK = 256;  // keys: their panels stay in the first-level cache while all groups of a tile pass
constexpr int CHUNK_PANELS = CHUNK / PANEL;
constexpr float LARGEST_BOUND = 32000;  // none is larger, and without terms none is below -32001
// Where terms are added: the largest bound of a product, and where among the bounds the anchor stands. Those of scores
// whose terms are as large as the anchor reach from 12000 to 24000.
constexpr float LARGEST_PART = 6000;
constexpr float ANCHOR = 18000;
constexpr int16_t MASKED = std::numeric_limits<int16_t>::min();

inline __m512i load_bounds(const int16_t* x) { return _mm512_loadu_si512(x); }

// The keys of a head in int8, in panels, and their facts.
struct Int8Keys {
  const uint32_t* panels;
  const float *steps, *lost, *left;  // of the panels; readable for a vector more
  float most_lost, most_left;  // of all panels
  float mean_norm;

  float largest_norm() const { return most_lost + most_left + mean_norm; }
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

// Keys whose scores the program changes: some ranges of them, the last of which may hold others.
struct ChangedKeys {
  static constexpr int MOST = 4;
  struct {
    int32_t first, end;
  } ranges[MOST];
  int count;

  void add(int32_t first, int32_t end) {
    if (count && (count == MOST || ranges[count - 1].end == first)) {
      ranges[count - 1].end = end;
    } else {
      ranges[count++] = {first, end};
    }
  }
};

struct ScreenScratch {
  int64_t stride;  // of bounds
  int64_t max_panels;  // of maxima: the panels with numbers n, n + max_panels ... have the same
  int16_t *bounds, *maxima;  // [tile rows][stride], [tile rows][max_panels][PANEL]
  int32_t* chunks;  // [stride / CHUNK]: the first key of each chunk that has bounds
  Change* changes;  // [stride / CHUNK]: what the program may do to a chunk's scores
  BlockFacts* facts;  // [groups][stride / CHUNK], of the same
  ChangedKeys* changed;  // [groups]
  bool* is_left;  // to a scan of all scores
  float *scales, *lost_keys, *left_keys;  // of the rows, of a product of integers in units of a row, and of its margin
  float *units, *roundings;  // of the rows: a score, and the rounding of terms, in units of a row
  float* anchors;  // of the rows: scores
  uint32_t* queries;  // groups of [1 + quads][GROUP_ROWS]
  float* terms;  // [GROUP_ROWS][CHUNK]: what the program makes of 0
  uint32_t* bits;  // [stride / PANEL]
  int32_t* some;  // [2][stride / PANEL + LANES]: first keys and bits of the panels with survivors
  Candidates found;

  ScreenScratch(const Arguments& a, Arena& arena, int64_t tile_rows) {
    stride = rounded_up(a.keys, CHUNK);
    max_panels = std::min(rounded_up(8 * a.kept, PANEL), rounded_up(a.keys, PANEL)) / PANEL;
    bounds = arena.take<int16_t>(tile_rows * stride);
    maxima = arena.take<int16_t>(tile_rows * max_panels * PANEL);
    chunks = arena.take<int32_t>(stride / CHUNK);
    changes = arena.take<Change>(stride / CHUNK);
    facts = arena.take<BlockFacts>(stride / CHUNK * (tile_rows / GROUP_ROWS));
    changed = arena.take<ChangedKeys>(tile_rows / GROUP_ROWS);
    is_left = arena.take<bool>(tile_rows);
    for (float** x : {&scales, &lost_keys, &left_keys, &units, &roundings, &anchors})
      *x = arena.take<float>(tile_rows + LANES);
    queries = arena.take<uint32_t>(tile_rows * (1 + quads_of(a.depth)));
    terms = arena.take<float>(GROUP_ROWS * CHUNK);
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
      : a_(a), tile_(tile), scratch_(scratch), s_(screen), keys_(keys), quads_(quads_of(a.depth)),
        base_(a.affine.only_masks ? 0 : ANCHOR) {}

  // Bounds of all scores.
  void run() {
    round_queries();
    std::fill_n(s_.maxima, rounded_up(tile_.rows, GROUP_ROWS) * s_.max_panels * PANEL, MASKED);
    const bool asks_for_tile = a_.before.bound && !reads_matrix(a_);
    for (int64_t first = 0; first < a_.keys; first += CHUNK) {
      BlockFacts facts{0, a_.before.bound ? Change::ANY : Change::NONE, 0};
      if (asks_for_tile) a_.before.bound(block_of(first, 0, tile_.rows), 0, facts);
      if (facts.upper == -INF) continue;
      s_.chunks[chunk_count_] = int32_t(first);
      s_.changes[chunk_count_++] = facts.change;
    }
    for (int row = 0; row < tile_.rows; row += GROUP_ROWS) {
      if (a_.affine.only_masks) {
        find_facts(row, 0);
        continue;
      }
      anchor_group(row);
      find_changed(row);
    }
    for (int n = 0; n < chunk_count_; n++)
      for (int row = 0; row < tile_.rows; row += GROUP_ROWS) bound_group(n, row);
  }

  // The survivors of a row and their scores, or null if the row is left.
  Candidates* find(int row) {
    if (s_.is_left[row]) return nullptr;
    s_.found.clear();
    const int16_t* maxima = s_.maxima + row * s_.max_panels * PANEL;
    const int threshold = find_threshold(maxima, s_.max_panels * PANEL, int(a_.kept));
    // What counts as masked may be one that is only low, and must be too low to be kept.
    if (!a_.affine.only_masks && !(lowest_cut(row, threshold) > MASKED)) return nullptr;
    compare(row, threshold);
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
      RoundedQuery query{0, 0, 0, 0};
      uint32_t* group = queries_of(r);
      const bool is_bounded = r < tile_.rows && round_query(query_of(r), a_.depth, a_.scale < 0 ? -1 : 1, group + GROUP_ROWS,
                                                            r % GROUP_ROWS, query);
      group[r % GROUP_ROWS] = uint32_t(-query.correction);
      // |q^| is at most |q| + |q' - q^|, and no product is larger than |q^| |k^|.
      const float largest = (query.lost_keys + query.left_keys) * keys_.most_left + query.lost_keys * keys_.most_lost +
                            query.left_keys * keys_.most_left;
      const float scale = is_bounded ? (a_.affine.only_masks ? LARGEST_BOUND : LARGEST_PART) / largest : 0;
      s_.is_left[r] = !is_bounded;
      s_.scales[r] = scale;
      s_.lost_keys[r] = query.lost_keys * scale;
      s_.left_keys[r] = query.left_keys * scale;
      s_.units[r] = is_bounded ? scale / (query.step * std::fabs(float(a_.scale))) : 0;
      s_.roundings[r] = s_.anchors[r] = 0;
    }
  }

  // The rows of a group that has one of them, and are not left.
  template <typename Function>
  void for_bounded_rows(int row, const Function& function) const {
    for (int r = row; r < std::min(row + GROUP_ROWS, tile_.rows); r++)
      if (!s_.is_left[r]) function(r);
  }

  // In units of a row: a product with the mean key, and the product with any key.
  float mean_product(int row) const { return s_.lost_keys[row] * keys_.mean_norm; }
  float largest_product(int row) const { return s_.lost_keys[row] * keys_.largest_norm(); }

  Block block_of(int64_t first, int row, int rows) const {
    return {a_.operands, tile_.batch, scratch_.positions + row, rows, first, std::min<int64_t>(CHUNK, a_.keys - first)};
  }

  BlockFacts* facts_of(int row) const { return s_.facts + row / GROUP_ROWS * (s_.stride / CHUNK); }

  // What is known of a group and each chunk.
  void find_facts(int row, float largest) const {
    BlockFacts* facts = facts_of(row);
    for (int n = 0; n < chunk_count_; n++) {
      facts[n] = {largest, s_.changes[n], 0};
      if (s_.changes[n] == Change::NONE) continue;
      a_.before.bound(block_of(s_.chunks[n], row, std::min(GROUP_ROWS, tile_.rows - row)), largest, facts[n]);
      if (a_.affine.cap && facts[n].change == Change::WITHOUT_MASKS) facts[n].change = Change::NONE;  // of the terms
    }
  }

  void find_changed(int row) {
    const BlockFacts* facts = facts_of(row);
    ChangedKeys& changed = s_.changed[row / GROUP_ROWS];
    changed.count = 0;
    for (int n = 0; n < chunk_count_; n++)
      if (a_.affine.cap || (facts[n].upper > -INF && facts[n].change != Change::NONE))
        changed.add(s_.chunks[n], s_.chunks[n] + CHUNK);
  }

  // Units of scores, anchors and roundings of a group's rows, and which chunks are too low for all of them.
  void anchor_group(int row) {
    const double inf = INF;
    double largest = 0, least_unit = inf, most_above = 0;
    for_bounded_rows(row, [&](int r) {
      largest = std::max(largest, 1.001 * largest_product(r) / s_.units[r]);
      if (!a_.affine.cap) s_.units[r] /= float(a_.affine.factor);
      least_unit = std::min(least_unit, double(s_.units[r]));
      most_above = std::max(most_above, above_filled(r));
    });
    find_facts(row, float(largest));
    BlockFacts* facts = facts_of(row);
    double upper = -inf, terms = 0;
    int highest = 0;  // of the chunks
    for (int n = 0; n < chunk_count_; n++) {
      if (facts[n].upper > upper) {
        upper = facts[n].upper;
        highest = n;
      }
    }
    const double anchor = upper < inf ? largest_term(highest, row, facts[highest].change) : inf;
    for (int n = 0; n < chunk_count_; n++) {
      BlockFacts& chunk = facts[n];
      if ((chunk.upper - anchor) * least_unit + most_above < lowest_sum()) chunk.upper = -inf;
      if (chunk.upper > -inf) terms = std::max(terms, chunk.terms);
    }
    // A step rounds a score, and what it makes of 0, which are no larger than this or further below the anchor; a bound that
    // is larger has no integer. A score that is filled must count as masked, as it is no sum of the product and terms.
    const double steps = 2.0 * double(std::max<int64_t>(a_.affine.operations, 1));
    for_bounded_rows(row, [&](int r) {
      const double unit = s_.units[r];
      const double sizes = (std::fabs(anchor) + terms) * unit + largest_product(r) + 0x1p16;
      const double fill = (a_.affine.highest_fill + terms - anchor) * unit + above_filled(r) + LARGEST_PART;
      const double rounding = steps * (steps + 2) * 0x1p-23 * sizes + (a_.affine.cap ? rounding_of_cap(r) : 0);
      s_.anchors[r] = float(anchor);
      s_.roundings[r] = float(rounding);
      s_.is_left[r] = !(sizes < 0x1p30 && rounding < LARGEST_BOUND && fill < lowest_sum());
    });
  }

  // How far a score that is a number may stand above its place among bounds: the mean key's product is not subtracted from
  // it; and caps of the products next to it may be low, but no steeper than at 0.
  double above_filled(int row) const {
    const double slope = std::max(1.0, a_.affine.cap * a_.affine.factor);
    return a_.affine.cap ? 2 * slope * largest_product(row) : mean_product(row);
  }

  // Products that are further apart are so after tanh, which is accurate to 2^-23, where it is flattest.
  double rounding_of_cap(int row) const {
    const double unit = s_.units[row], most = std::cosh(1.01 * largest_product(row) / unit * a_.affine.factor);
    return 0x1p-20 * most * most * unit / a_.affine.factor;
  }

  // The largest number that the program makes of 0 for a group's rows and a chunk that is not masked for all of them.
  float largest_term(int chunk, int row, Change change) const {
    if (chunk_count_ == 0 || change == Change::NONE) return 0;
    const int rows = std::min(GROUP_ROWS, tile_.rows - row);
    find_terms(s_.chunks[chunk], row, rows, change);
    Vec most = load(s_.terms);
    for (int n = LANES; n < rows * CHUNK; n += LANES) most = _mm512_max_ps(most, load(s_.terms + n));
    const float largest = _mm512_reduce_max_ps(most);
    return largest > -INF ? largest : 0;
  }

  // What is less, before it is moved to its range, is rounded to MASKED.
  static float lowest_sum() { return MASKED - ANCHOR - 2; }

  void bound_group(int chunk, int row) {
    const int rows = std::min(GROUP_ROWS, tile_.rows - row);
    const int64_t first = s_.chunks[chunk], count = std::min<int64_t>(CHUNK, a_.keys - first);
    int16_t* bounds = s_.bounds + row * s_.stride + chunk * CHUNK;
    const bool only_masks = a_.affine.only_masks;
    const BlockFacts& facts = facts_of(row)[chunk];
    if (facts.upper == -INF) {
      for (int r = 0; r < rows; r++) std::fill_n(bounds + r * s_.stride, CHUNK, MASKED);
      return;
    }
    if (facts.change == Change::NONE && count == CHUNK) {
      for (int64_t n = 0; n < CHUNK_PANELS; n++)
        bound_panel<Terms::NONE>(first / PANEL + n, row, bounds + n * PANEL, nullptr, nullptr);
      return;
    }
    find_terms(first, row, rows, facts.change);
    if (!only_masks) {
      for (int64_t n = 0; n * PANEL < count; n++)
        bound_panel<Terms::ANY>(first / PANEL + n, row, bounds + n * PANEL, nullptr, s_.terms + n * PANEL);
      return;
    }
    alignas(64) uint32_t visible[CHUNK_PANELS][GROUP_ROWS];
    find_visible(visible);
    for (int64_t n = 0; n * PANEL < count; n++)
      bound_panel<Terms::MASKS>(first / PANEL + n, row, bounds + n * PANEL, visible[n], nullptr);
  }

  // What the program makes of scores of 0; -inf beyond the last key.
  void find_terms(int64_t first, int row, int rows, Change change) const {
    const Block block = block_of(first, row, rows);
    if (change == Change::NONE) std::fill_n(s_.terms, rows * CHUNK, 0.0f);
    if (change != Change::NONE) a_.before.apply_terms(block, s_.terms, CHUNK, change);
    for (int r = 0; r < rows; r++) std::fill(s_.terms + r * CHUNK + block.key_count, s_.terms + (r + 1) * CHUNK, -INF);
    std::fill(s_.terms + rows * CHUNK, s_.terms + GROUP_ROWS * CHUNK, 0.0f);
  }

  // Bits of the keys that are not masked.
  void find_visible(uint32_t (&visible)[CHUNK_PANELS][GROUP_ROWS]) const {
    for (int n = 0; n < CHUNK_PANELS; n++) {
      for (int r = 0; r < GROUP_ROWS; r++) {
        const float* terms = s_.terms + r * CHUNK + n * PANEL;
        const uint32_t low = not_less_equal(load(terms), broadcast(-INF));
        visible[n][r] = low | not_less_equal(load(terms + LANES), broadcast(-INF)) << LANES;
      }
    }
  }

  enum class Terms { NONE, MASKS, ANY };

  // The bounds of a group by a panel. They are rounded to the nearest integer, of a number that is 1 too small.
  template <Terms TERMS>
  __attribute__((noinline)) void bound_panel(int64_t panel, int row, int16_t* bounds, const uint32_t* visible,
                                             const float* terms) const {
    alignas(64) float scales[LANES], margins[LANES];
    store(scales, mul(load(s_.scales + row), broadcast(keys_.steps[panel])));
    Vec most = margins_of(load(s_.lost_keys + row), load(s_.left_keys + row), broadcast(keys_.lost[panel]),
                          broadcast(keys_.left[panel]));
    most = add(add(most, load(s_.roundings + row)), broadcast(1 - base_));
    if constexpr (TERMS == Terms::NONE) most = fma(load(s_.anchors + row), load(s_.units + row), most);
    store(margins, most);
    int16_t* maxima = s_.maxima + (row * s_.max_panels + panel % s_.max_panels) * PANEL;
    __m512i sums[GROUP_ROWS][2];
    multiply_int8(queries_of(row), keys_.panels + panel * quads_ * PANEL, quads_, sums);
#pragma GCC unroll 12
    for (int r = 0; r < GROUP_ROWS; r++) {
      const Vec scale = broadcast(scales[r]), margin = broadcast(margins[r]);
      Vec low = _mm512_fmsub_ps(_mm512_cvtepi32_ps(sums[r][0]), scale, margin);
      Vec high = _mm512_fmsub_ps(_mm512_cvtepi32_ps(sums[r][1]), scale, margin);
      if constexpr (TERMS == Terms::ANY) {
        const Vec unit = broadcast(s_.units[row + r]), anchor = broadcast(s_.anchors[row + r]);
        const Vec first = _mm512_sub_ps(load(terms + r * CHUNK), anchor);
        const Vec second = _mm512_sub_ps(load(terms + r * CHUNK + LANES), anchor);
        // In the order of `packed_lane`.
        low = fma(_mm512_shuffle_f32x4(first, second, 0x88), unit, low);
        high = fma(_mm512_shuffle_f32x4(first, second, 0xdd), unit, high);
      }
      __m512i found = _mm512_packs_epi32(_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high));
      if constexpr (TERMS == Terms::MASKS) found = _mm512_mask_blend_epi16(visible[r], _mm512_set1_epi16(MASKED), found);
      int16_t* largest = maxima + r * s_.max_panels * PANEL;
      _mm512_storeu_si512(bounds + r * s_.stride, found);
      _mm512_storeu_si512(largest, _mm512_max_epi16(load_bounds(largest), found));
    }
  }

  static Vec margins_of(Vec lost_keys, Vec left_keys, Vec lost, Vec left) {
    return fma(lost_keys, lost, mul(left_keys, left));
  }

  // The lowest bound of a key of any panel that survives.
  float lowest_cut(int row, int threshold) const {
    const float margin = s_.lost_keys[row] * keys_.most_lost + s_.left_keys[row] * keys_.most_left;
    return float(threshold) - 3 - 2.001f * (margin + s_.roundings[row]);
  }

  // Bits of the keys whose upper bounds are not below the threshold. An upper bound is twice the margin above the lower
  // one, and as that is rounded, less than 2 more.
  __attribute__((noinline)) void compare(int row, int threshold) {
    const Vec lost_keys = broadcast(s_.lost_keys[row]), left_keys = broadcast(s_.left_keys[row]);
    const Vec most = broadcast(float(threshold) - 2 - 2 * s_.roundings[row]), least = broadcast(MASKED + 1);
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
      const auto key_at = [&](int lane) { return row_at(n + lane); };
      store(reinterpret_cast<float*>(found.scores + n), mul(dots(query, key_at, a_.depth), broadcast(float(a_.scale))));
    }
    if (!a_.affine.only_masks) apply(row, found);
  }

  // The program on the scores that it changes: what it reads for others may be far away.
  void apply(int row, Candidates& found) const {
    const ChangedKeys& changed = s_.changed[row / GROUP_ROWS];
    int32_t *keys = found.indices, *last = found.indices + found.count;
    for (int n = 0; n < changed.count; n++) {
      keys = std::lower_bound(keys, last, changed.ranges[n].first);
      int32_t* end = std::lower_bound(keys, last, changed.ranges[n].end);
      const Block block{a_.operands, tile_.batch, scratch_.positions + row, 1, 0, end - keys};
      a_.before.apply_listed(block, keys, reinterpret_cast<float*>(found.scores + (keys - found.indices)));
      keys = end;
    }
  }

  const Arguments& a_;
  const Tile& tile_;
  Scratch& scratch_;
  ScreenScratch& s_;
  const Int8Keys& keys_;
  const int64_t quads_;
  const float base_;  // what is added to all bounds
  int chunk_count_ = 0;
};

}  // namespace
}  // namespace topk

#endif
