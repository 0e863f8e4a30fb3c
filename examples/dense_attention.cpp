// Dense attention by the micro-kernel of the top-k kernels: a control, so that what top-k buys is told from what a faster
// product of matrices buys. It is no part of topk_fx.
//
//   for each tile of query rows, for each block of keys up to the diagonal, for each group of rows:
//     scores, in the first-level cache; the running maximum and sum of each row; exponentials
//     the output so far, scaled down where the maximum rose, and the exponentials times the block of V
//
// Query, key and value [heads, length, depth] are contiguous, of the element type that the build defines as QUERY. Products
// and sums are float32; where pairs of bfloat16 are multiplied, the exponentials are rounded to it.
// Source: Dao et al. 2022, arXiv:2205.14135.

#include <omp.h>

#include "filter.h"

namespace topk {

struct DenseArguments {
  const Query *query, *key, *value;
  Query* output;
  int64_t heads, length, depth, is_causal, threads;
  double scale;
};

namespace {

constexpr int TILE_ROWS = 8 * GROUP_ROWS;
constexpr int PER_FACTOR = PAIRS ? 2 : 1;  // columns, or keys, of a factor
constexpr int BLOCK_FACTORS = BLOCK / PER_FACTOR;

using Exponential = std::conditional_t<PAIRS, Query, float>;  // and what values are multiplied as

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Keys in panels, and for each block of keys its values as panels of columns, [factor of keys][PANEL].
struct Packed {
  int64_t blocks, key_factors, value_panels;
  Factor *keys, *values;

  Factor* key_panels(int64_t block) const { return keys + block * BLOCK * key_factors; }
  Factor* value_panel(int64_t block, int64_t panel) const {
    return values + (block * value_panels + panel) * BLOCK_FACTORS * PANEL;
  }
};

void pack_block(const DenseArguments& a, int64_t head, int64_t block, const Packed& packed) {
  for (int64_t j = 0; j < BLOCK; j++) {
    const int64_t position = block * BLOCK + j;
    const bool exists = position < a.length;
    const Query* row = exists ? a.key + (head * a.length + position) * a.depth : nullptr;
    pack_row(row, a.depth, packed.key_panels(block) + j / PANEL * packed.key_factors * PANEL, PANEL, j % PANEL);
    const Query* values = a.value + (head * a.length + position) * a.depth;
    for (int64_t c = 0; c < packed.value_panels * PANEL; c++) {
      Factor* target = packed.value_panel(block, c / PANEL) + j / PER_FACTOR * PANEL + c % PANEL;
      Exponential x{};
      if (exists && c < a.depth) from_float(to_float(values[c]), x);
      std::memcpy(reinterpret_cast<char*>(target) + j % PER_FACTOR * sizeof(x), &x, sizeof(x));
    }
  }
}

struct Scratch {
  float scores[GROUP_ROWS * BLOCK];
  Exponential exponentials[GROUP_ROWS * BLOCK];
  float highest[TILE_ROWS], totals[TILE_ROWS];
};

// The exponentials of a row of scores; its output so far is to be multiplied by the factor that comes back.
float exponentials_of(float* scores, float& highest, float& total, Exponential* result) {
  Vec most = load(scores);
  for (int j = LANES; j < BLOCK; j += LANES) most = larger(most, load(scores + j));
  float lanes[LANES], largest = highest;
  store(lanes, most);
  for (float x : lanes) largest = x > largest ? x : largest;
  const float factor = exp_nonpositive(highest - largest);
  for (int j = 0; j < BLOCK; j++) scores[j] = exp_nonpositive(scores[j] - largest);
  Vec sums = zero();
  for (int j = 0; j < BLOCK; j += LANES) sums = add(sums, load(scores + j));
  for (int j = 0; j < BLOCK; j++) from_float(scores[j], result[j]);
  highest = largest;
  total = total * factor + sum(sums);
  return factor;
}

// output[r][0 .. PANEL) += sum over n of exponentials[r][n] * values[n][..], for a group of rows
inline void add_values(const Factor* exponentials, const Factor* values, float* output, int64_t stride) {
  Vec sums[GROUP_ROWS][2];
#pragma GCC unroll 12
  for (int r = 0; r < GROUP_ROWS; r++)
    sums[r][0] = load(output + r * stride), sums[r][1] = load(output + r * stride + LANES);
  for (int64_t n = 0; n < BLOCK_FACTORS; n++) {
#pragma GCC unroll 12
    for (int r = 0; r < GROUP_ROWS; r++) {
      const Factor factor = exponentials[r * BLOCK_FACTORS + n];
      sums[r][0] = multiply_add(factor, values + n * PANEL, sums[r][0]);
      sums[r][1] = multiply_add(factor, values + n * PANEL + LANES, sums[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < GROUP_ROWS; r++)
    store(output + r * stride, sums[r][0]), store(output + r * stride + LANES, sums[r][1]);
}

// A group of rows, the first of which is query `first`, and a block of keys.
void attend(const DenseArguments& a, const Packed& packed, int64_t block, const Factor* queries, int64_t first, int row,
            Scratch& s, float* output) {
  const int64_t width = packed.value_panels * PANEL, end = std::min<int64_t>(BLOCK, a.length - block * BLOCK);
  for (int64_t key = 0; key < BLOCK; key += PANEL)
    store_scores<GROUP_ROWS>({queries, packed.key_panels(block) + key * packed.key_factors, packed.key_factors,
                              float(a.scale), GROUP_ROWS, key, PANEL}, s.scores + key);
  for (int r = 0; r < GROUP_ROWS; r++) {
    const int64_t seen = a.is_causal ? std::clamp<int64_t>(first + r + 1 - block * BLOCK, 0, end) : end;
    std::fill(s.scores + r * BLOCK + seen, s.scores + (r + 1) * BLOCK, -INF);
    const float factor = exponentials_of(s.scores + r * BLOCK, s.highest[row + r], s.totals[row + r],
                                         s.exponentials + r * BLOCK);
    if (factor != 1)
      for (int64_t c = 0; c < width; c++) output[r * width + c] *= factor;
  }
  for (int64_t panel = 0; panel < packed.value_panels; panel++)
    add_values(reinterpret_cast<const Factor*>(s.exponentials), packed.value_panel(block, panel), output + panel * PANEL,
               width);
}

void attend_tile(const DenseArguments& a, const Packed& packed, int64_t head, int64_t first, Scratch& s, Factor* queries,
                 float* output) {
  const int64_t width = packed.value_panels * PANEL;
  std::fill(output, output + TILE_ROWS * width, 0.0f);
  std::fill(s.highest, s.highest + TILE_ROWS, -3e38f);  // no infinity, which rows beyond the last would subtract
  std::fill(s.totals, s.totals + TILE_ROWS, 0.0f);
  const int64_t rows = std::min<int64_t>(TILE_ROWS, a.length - first);
  for (int64_t r = 0; r < TILE_ROWS; r++) {
    const Query* row = r < rows ? a.query + (head * a.length + first + r) * a.depth : nullptr;
    pack_row(row, a.depth, queries + r / GROUP_ROWS * packed.key_factors * GROUP_ROWS, GROUP_ROWS, r % GROUP_ROWS);
  }
  for (int64_t block = 0; block < packed.blocks; block++)
    for (int row = 0; row < rows; row += GROUP_ROWS) {
      if (a.is_causal && block * BLOCK >= first + row + GROUP_ROWS) continue;
      attend(a, packed, block, queries + row * packed.key_factors, first + row, row, s, output + row * width);
    }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < a.depth; c++)
      from_float(output[r * width + c] / s.totals[r], a.output[(head * a.length + first + r) * a.depth + c]);
}

}  // namespace
}  // namespace topk

extern "C" void dense_attention(const topk::DenseArguments* arguments) {
  using namespace topk;
  const DenseArguments& a = *arguments;
  const int64_t tiles = rounded_up(a.length, TILE_ROWS) / TILE_ROWS, panels = rounded_up(a.depth, PANEL) / PANEL;
  Packed packed{rounded_up(a.length, BLOCK) / BLOCK, factors_of(a.depth), panels, nullptr, nullptr};
  const Buffer keys(packed.blocks * BLOCK * packed.key_factors * int64_t(sizeof(Factor)));
  const Buffer values(packed.blocks * BLOCK_FACTORS * panels * PANEL * int64_t(sizeof(Factor)));
  packed.keys = keys.as<Factor>();
  packed.values = values.as<Factor>();
  for (int64_t head = 0; head < a.heads; head++) {
#pragma omp parallel num_threads(int(a.threads))
    {
      const Buffer scratch(sizeof(Scratch));
      const Buffer queries(TILE_ROWS * packed.key_factors * int64_t(sizeof(Factor)));
      const Buffer output(TILE_ROWS * panels * PANEL * int64_t(sizeof(float)));
#pragma omp for schedule(static)
      for (int64_t block = 0; block < packed.blocks; block++) pack_block(a, head, block, packed);
#pragma omp for schedule(dynamic, 1)
      for (int64_t tile = tiles - 1; tile >= 0; tile--)
        attend_tile(a, packed, head, tile * TILE_ROWS, *scratch.as<Scratch>(), queries.as<Factor>(), output.as<float>());
    }
  }
}
