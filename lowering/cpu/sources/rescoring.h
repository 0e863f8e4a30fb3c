// Scores of one query row by keys that lie anywhere: the operations of `multiply_panel` in their order, so that each bit
// of a score is that which a scan over packed keys gives it.
#pragma once

#include "panels.h"

#if defined(TOPK_AVX512)

namespace topk {
namespace {

// Four factors, beginning with number `first`, of four rows: those of row n in part n.
template <typename T>
inline __m512i load_parts(const T* a, const T* b, const T* c, const T* d, int64_t first) {
  const auto part = [first](const T* row) {
    if constexpr (std::is_same_v<T, Half>)
      return _mm_castps_si128(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + first))));
    else
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (PAIRS ? 2 : 1) * first));
  };
  __m512i x = _mm512_broadcast_i32x4(part(a));
  x = _mm512_mask_broadcast_i32x4(x, 0x00f0, part(b));
  x = _mm512_mask_broadcast_i32x4(x, 0x0f00, part(c));
  return _mm512_mask_broadcast_i32x4(x, 0xf000, part(d));
}

// `query` is packed as in a group of one row.
inline Vec scores_of(const Factor* query, const Query* const (&keys)[LANES], int64_t depth, float scale) {
  const int64_t factors = factors_of(depth), whole = (PAIRS ? depth / 2 : depth) / 4 * 4;
  Vec total = zero();
#pragma GCC unroll 2
  for (int64_t first = 0; first < whole; first += 4) {
    __m512i rows[4], pairs[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) rows[n] = load_parts(keys[n], keys[n + 4], keys[n + 8], keys[n + 12], first);
    // Within each part, four rows by four factors are transposed: lane n of the result is key n.
    pairs[0] = _mm512_unpacklo_epi32(rows[0], rows[1]);
    pairs[1] = _mm512_unpackhi_epi32(rows[0], rows[1]);
    pairs[2] = _mm512_unpacklo_epi32(rows[2], rows[3]);
    pairs[3] = _mm512_unpackhi_epi32(rows[2], rows[3]);
    const __m512i factors_of_keys[4] = {
        _mm512_unpacklo_epi64(pairs[0], pairs[2]), _mm512_unpackhi_epi64(pairs[0], pairs[2]),
        _mm512_unpacklo_epi64(pairs[1], pairs[3]), _mm512_unpackhi_epi64(pairs[1], pairs[3])};
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) total = multiply_add(query[first + n], _mm512_castsi512_ps(factors_of_keys[n]), total);
  }
  if (whole < factors) {
    alignas(64) Factor rest[4][LANES];
    const int64_t column = PAIRS ? 2 * whole : whole;
    for (int n = 0; n < LANES; n++) pack_row(keys[n] + column, depth - column, rest[0], LANES, n);
    for (int64_t n = whole; n < factors; n++) total = multiply_add(query[n], rest[n - whole], total);
  }
  return mul(total, broadcast(scale));
}

}  // namespace
}  // namespace topk

#endif
