// A copy of the keys in int8 that is kept beside them, and the scan of few query rows over it.
//
// A decoding step reads each key once. Of the copy it reads one byte a column and three floats a key, and then the few keys
// whose bounds say that they can be among the k largest. The bounds are those of int8.h, with a step for each key.
#pragma once

#include <optional>

#include "int8.h"
#include "survivors.h"
#include "tiles.h"

namespace topk {

// The order is that of the structure which the caller fills.
struct CopyArguments {
  Tensor rows;  // [B, Hk, count, depth]: keys number first, first + 1 ...
  KeyCopy copy;
  int64_t batch, key_heads, count, first, depth, threads;
};

#if defined(TOPK_AVX512_VNNI)

namespace {

constexpr int KEY_FACTS = 3;
constexpr int ROWS_AT_ONCE = 8;  // queries that a panel is multiplied with
static_assert(ROWS_AT_ONCE <= GROUP_ROWS);

// The mean as rows are rounded with it, and an upper bound of its norm.
inline float widen_mean(const float* mean, int64_t depth, float* wide) {
  widen(mean, depth, wide);
  return norm_bound(squared_norm_of(wide, padded(depth)), depth);
}

// One key. Of one that cannot be bounded, with a NaN or a number that is too large, the upper bound is infinite.
inline void round_key(const Query* row, int64_t depth, const float* mean, float mean_norm, uint32_t* panel, float* facts,
                      int64_t lane) {
  alignas(64) float x[MAX_INT8_DEPTH];
  alignas(64) int8_t integers[MAX_INT8_DEPTH] = {};
  float step = SMALLEST_STEP;
  Rounded rounded{INF, 0, 0};
  widen(row, depth, x);
  const float norm = norm_bound(squared_norm_of(x, padded(depth)), depth);
  if (norm + mean_norm <= MAX_INT8_NORM) {
    for (int64_t c = 0; c < padded(depth); c += LANES) store(x + c, _mm512_sub_ps(load(x + c), load(mean + c)));
    rotate(x, depth);
    step = step_of(x, padded(depth));
    rounded = round_row(x, depth, step, integers);
    rounded.lost += roundings(depth) * (norm + mean_norm);
  }
  for (int64_t n = 0; n < quads_of(depth); n++) {
    uint32_t quad;
    std::memcpy(&quad, integers + 4 * n, sizeof(quad));
    panel[n * PANEL + lane] = quad ^ 0x80808080;
  }
  facts[lane] = step;
  facts[PANEL + lane] = rounded.lost;
  facts[2 * PANEL + lane] = rounded.left;
}

void copy_keys(const CopyArguments& a) {
  const int64_t quads = quads_of(a.depth), heads = a.batch * a.key_heads;
  const int64_t first_panel = a.first / PANEL, panels = rounded_up(a.first + a.count, PANEL) / PANEL - first_panel;
#pragma omp parallel for num_threads(int(a.threads)) schedule(static)
  for (int64_t n = 0; n < heads * panels; n++) {
    const int64_t head = n / panels, panel = first_panel + n % panels, number = head * a.copy.capacity + panel;
    alignas(64) float mean[MAX_INT8_DEPTH];
    const float mean_norm = widen_mean(a.copy.means + head * a.depth, a.depth, mean);
    const int64_t end = std::min((panel + 1) * PANEL, a.first + a.count);
    for (int64_t key = std::max(panel * PANEL, a.first); key < end; key++)
      round_key(row_of<Query>(a.rows, head / a.key_heads, head % a.key_heads, key - a.first), a.depth, mean, mean_norm,
                a.copy.panels + number * quads * PANEL, a.copy.facts + number * KEY_FACTS * PANEL, key % PANEL);
  }
}

// What a thread works with.
struct FewScratch {
  Survivors* rows;
  RoundedQuery* bounds;
  uint32_t* queries;  // groups of [quads][GROUP_ROWS], of ROWS_AT_ONCE rows each
  float* masks;  // [FEW_ROWS][BLOCK]
  int32_t* lists;  // [FEW_ROWS][3][capacity]

  FewScratch(const Arguments& a, Arena& arena, const SurvivorLimits& limits) {
    rows = arena.take<Survivors>(FEW_ROWS);
    bounds = arena.take<RoundedQuery>(FEW_ROWS);
    queries = arena.take<uint32_t>(rounded_up(FEW_ROWS, ROWS_AT_ONCE) / ROWS_AT_ONCE * GROUP_ROWS * quads_of(a.depth));
    masks = arena.take<float>(FEW_ROWS * BLOCK);
    lists = arena.take<int32_t>(FEW_ROWS * 3 * limits.capacity);
  }
};

// The rows of a tile and a range of keys.
class FewScan {
 public:
  FewScan(const Arguments& a, const Tile& tile, Scratch& scratch, FewScratch& few, const SurvivorLimits& limits)
      : a_(a), tile_(tile), scratch_(scratch), s_(few), limits_(limits), quads_(quads_of(a.depth)) {
    const int64_t head = (tile.batch * a.key_heads + tile.key_head) * a.copy.capacity;
    panels_ = a.copy.panels + head * quads_ * PANEL;
    facts_ = a.copy.facts + head * KEY_FACTS * PANEL;
  }

  // Whether the candidates of all rows were found; where one cannot be bounded, or too many keys survive, none are.
  bool run(int64_t begin, int64_t end) {
    if (!round_queries()) return false;
    for (int64_t first = begin; first < end; first += BLOCK) {
      const int64_t count = std::min<int64_t>(BLOCK, end - first);
      const Block block{a_.operands, tile_.batch, scratch_.positions, tile_.rows, first, count};
      BlockFacts facts{0, Change::NONE};
      if (a_.before.bound) {
        a_.before.bound(block, INF, facts);
        if (facts.upper == -INF) continue;
      }
      const bool is_masked = facts.change != Change::NONE;
      if (is_masked) a_.before.apply_terms(block, s_.masks, BLOCK, Change::ANY);
      for (int64_t n = 0; n < count; n += PANEL)
        for (int row = 0; row < tile_.rows; row += ROWS_AT_ONCE)
          for_few(tile_.rows - row, [&](auto rows) {
            screen_panel<rows>(row, first + n, count - n, is_masked ? s_.masks + row * BLOCK + n : nullptr);
          });
      for (int r = 0; r < tile_.rows; r++)
        if (s_.rows[r].lower.count + BLOCK + LANES > limits_.capacity && !make_room(s_.rows[r])) return false;
    }
    for (int r = 0; r < tile_.rows; r++) score(r);
    return true;
  }

 private:
  bool round_queries() {
    std::fill(s_.queries, s_.queries + rounded_up(tile_.rows, ROWS_AT_ONCE) / ROWS_AT_ONCE * GROUP_ROWS * quads_, 0u);
    for (int r = 0; r < FEW_ROWS; r++) s_.bounds[r] = {0, 0, 0, 0};
    for (int r = 0; r < tile_.rows; r++) {
      int32_t* list = s_.lists + r * 3 * limits_.capacity;
      s_.rows[r] = {{list, list + limits_.capacity}, reinterpret_cast<float*>(list + 2 * limits_.capacity)};
      s_.rows[r].lower.clear();
      const Query* row = row_of<Query>(a_.query, tile_.batch, scratch_.positions[r].head, scratch_.positions[r].query);
      if (!round_query(row, a_.depth, a_.scale < 0 ? -1 : 1, queries_of(r), r % ROWS_AT_ONCE, s_.bounds[r])) return false;
      std::copy(row, row + a_.depth, scratch_.queries + r * a_.depth);
    }
    return true;
  }

  uint32_t* queries_of(int row) const { return s_.queries + row / ROWS_AT_ONCE * GROUP_ROWS * quads_; }

  template <typename Function>
  static void for_few(int rows, const Function& function) {
    if (rows == 1)
      function(std::integral_constant<int, 1>());
    else if (rows == 2)
      function(std::integral_constant<int, 2>());
    else if (rows <= 4)
      function(std::integral_constant<int, 4>());
    else
      function(std::integral_constant<int, ROWS_AT_ONCE>());
  }

  // The rows from `row` on, with a panel of which `count` keys are looked at.
  template <int ROWS>
  __attribute__((noinline)) void screen_panel(int row, int64_t first, int64_t count, const float* masks) {
    const uint32_t *panel = panels_ + first * quads_, *queries = queries_of(row);
    __m512i sums[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t n = 0; n < quads_; n++) {
      const __m512i low = _mm512_loadu_si512(panel + n * PANEL), high = _mm512_loadu_si512(panel + n * PANEL + LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const __m512i query = _mm512_set1_epi32(int(queries[n * GROUP_ROWS + r]));
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low, query);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], high, query);
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const float* facts = facts_ + first * KEY_FACTS + half * LANES;
      const Vec step = load(facts), lost = load(facts + PANEL), left = load(facts + 2 * PANEL);
      const int64_t inside = count - half * LANES;
      if (inside <= 0) break;
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        if (row + r >= tile_.rows) break;
        const RoundedQuery& query = s_.bounds[row + r];
        const Vec margin = fma(broadcast(query.lost_keys), lost, mul(broadcast(query.left_keys), left));
        const Vec sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][half], _mm512_set1_epi32(query.correction)));
        const Vec upper = fma(sum, step, margin);
        Survivors& found = s_.rows[row + r];
        uint32_t bits = _mm512_cmp_ps_mask(upper, broadcast(found.lower.threshold), _CMP_GE_OQ);
        if (inside < LANES) bits &= (1u << inside) - 1;
        if (masks) bits &= not_less_equal(load(masks + r * BLOCK + half * LANES), broadcast(-INF));
        if (!bits) continue;
        _mm512_storeu_ps(found.upper + found.lower.count, _mm512_maskz_compress_ps(__mmask16(bits), upper));
        topk::append(found.lower, _mm512_fmsub_ps(sum, step, margin), bits, first + half * LANES);
      }
    }
  }

  bool make_room(Survivors& row) const {
    raise_threshold(row, limits_.k, std::max(LANES, limits_.k / 4));
    return row.lower.count <= limits_.most_left;
  }

  // The scores of a row's survivors, by the operations of `multiply_few`.
  void score(int r) {
    if (s_.rows[r].lower.count > limits_.k) raise_threshold(s_.rows[r], limits_.k, limits_.k / 8);
    Candidates found = s_.rows[r].lower;
    const Query* rows = row_of<Query>(a_.key, tile_.batch, tile_.key_head, 0);
    const auto row_at = [&](int n) { return rows + found.indices[std::min(n, found.count - 1)] * a_.key.strides[2]; };
    // All of them first: they lie far apart, and none waits for another.
    for (int n = 0; n < found.count; n++) prefetch_row(row_at(n), a_.depth);
    for (int n = 0; n < found.count; n += LANES) {
      const auto key_at = [&](int lane) { return row_at(n + lane); };
      const Vec scores = mul(dots(scratch_.queries + r * a_.depth, key_at, a_.depth), broadcast(float(a_.scale)));
      store(reinterpret_cast<float*>(found.scores + n), scores);
    }
    const int count = found.count;
    found.clear();
    found.count = count;
    scratch_.candidates[r] = found;
  }

  const Arguments& a_;
  const Tile& tile_;
  Scratch& scratch_;
  FewScratch& s_;
  const SurvivorLimits& limits_;
  const int64_t quads_;
  const uint32_t* panels_;
  const float* facts_;
};

// The copy's part in a decoding step, if there is a copy and it can serve.
class ScreenedFew {
 public:
  ScreenedFew(const Arguments& a, Arena& arena)
      : a_(a), limits_(a.kept, a.keys), is_used_(a.copy.panels && can_screen(a.depth, a.scale)) {
    if (is_used_) few_.emplace(a, arena, limits_);
  }

  // As `scan_few`, but false if it found nothing.
  bool run(const Tile& tile, Scratch& scratch, int64_t begin, int64_t end) {
    if (!is_used_) return false;
    const bool is_found = FewScan(a_, tile, scratch, *few_, limits_).run(begin, end);
    if (a_.screening_counts) {
      int64_t survivors = 0;
      for (int r = 0; is_found && r < tile.rows; r++) survivors += scratch.candidates[r].count;
      a_.screening_counts->add(is_found ? tile.rows : 0, is_found ? 0 : tile.rows, survivors);
    }
    return is_found;
  }

 private:
  const Arguments& a_;
  const SurvivorLimits limits_;
  const bool is_used_;
  std::optional<FewScratch> few_;
};

}  // namespace

#else

namespace {

class ScreenedFew {
 public:
  ScreenedFew(const Arguments&, Arena&) {}
  bool run(const Tile&, Scratch&, int64_t, int64_t) { return false; }
};

}  // namespace

#endif

}  // namespace topk
