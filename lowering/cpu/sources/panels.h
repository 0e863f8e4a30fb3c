// Keys in panels, and the micro-kernel: products of a group of query rows with a panel, in registers.
//
//   query rows in groups  [factor][GROUP_ROWS]
//   keys in panels        [factor][PANEL]
//
// A factor is a column, or with AVX512_BF16 a pair of neighbouring columns of bfloat16, whose products are exact.
// The build defines QUERY, the element type of queries and keys.
#pragma once

#include "rows.h"

namespace topk {
namespace {

using Query = QUERY;

constexpr int PANEL = 2 * LANES;  // keys of a panel
constexpr bool PAIRS = IN_PAIRS<Query>;

using Factor = std::conditional_t<PAIRS, uint32_t, float>;

int64_t factors_of(int64_t depth) {
  return PAIRS ? (depth + 1) / 2 : depth;
}

inline Vec multiply_add(Factor a, Vec b, Vec c) {
#if defined(TOPK_AVX512_BF16)
  if constexpr (PAIRS)
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  else
#endif
    return fma(broadcast(bit_cast<float>(a)), b, c);
}

inline Vec multiply_add(Factor a, const Factor* b, Vec c) {
  return multiply_add(a, load(reinterpret_cast<const float*>(b)), c);
}

// result[r] = scale * sum over n of query[n][r] * panel[n][..]
template <int ROWS>
inline __attribute__((always_inline)) void multiply_panel(const Factor* query, const Factor* panel, int64_t factors,
                                                          float scale, Vec (&result)[ROWS][2]) {
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) result[r][0] = result[r][1] = zero();
#pragma GCC unroll 2
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

// Sets lane `lane` of every factor in a group or a panel of `width` lanes to the columns of a row, or to 0 without one.
// An odd number of columns is filled up to pairs with 0.
template <typename T>
void pack_row(const T* row, int64_t depth, Factor* target, int64_t width, int64_t lane) {
  target += lane;
  if (!row) {
    for (int64_t n = 0; n < factors_of(depth); n++) target[n * width] = 0;
  } else if constexpr (PAIRS) {
    for (int64_t n = 0; n < depth / 2; n++) std::memcpy(target + n * width, row + 2 * n, sizeof(Factor));
    if (depth % 2) target[depth / 2 * width] = row[depth - 1].bits;
  } else {
    for (int64_t n = 0; n < depth; n++) target[n * width] = to_float(row[n]);
  }
}

float squared_norm(const Query* row, int64_t depth) {
  Vec total = zero();
  int64_t n = 0;
  for (; n + LANES <= depth; n += LANES) total = fma(load(row + n), load(row + n), total);
  float rest = sum(total);
  for (; n < depth; n++) rest += to_float(row[n]) * to_float(row[n]);
  return rest;
}

}  // namespace
}  // namespace topk
