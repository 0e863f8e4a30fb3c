// The candidates of one query row, and the exact selection of its k largest scores.
//
// Scores are compared as int32 in the order of the floats, with NaN above infinity and the two zeros equal. Candidates
// arrive by ascending key and stay so; of equal scores the first ones are kept.
#pragma once

#include <algorithm>

#include "simd.h"

namespace topk {

constexpr int32_t ORDERED_NAN = std::numeric_limits<int32_t>::max();

inline int32_t ordered(float x) {
  if (x != x) return ORDERED_NAN;
  const int32_t bits = bit_cast<int32_t>(x + 0.0f);  // -0 becomes 0
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float unordered(int32_t x) {
  return bit_cast<float>(x ^ ((x >> 31) & 0x7fffffff));
}

struct Candidates {
  int32_t* scores;  // ordered
  int32_t* indices;
  int count;
  float threshold;  // k candidates are no smaller: a later key must be larger, or NaN
};

// Appends the lanes of `scores` whose bit is set. Writes a whole vector.
inline void append(Candidates& row, Vec scores, uint32_t bits, int64_t first_key) {
#if defined(TOPK_AVX512)
  const __mmask16 mask = __mmask16(bits);
  const __m512i raw = _mm512_castps_si512(_mm512_add_ps(scores, _mm512_setzero_ps()));
  const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(raw, 31), _mm512_set1_epi32(0x7fffffff));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(scores, scores, _CMP_UNORD_Q);
  const __m512i order =
      _mm512_mask_mov_epi32(_mm512_xor_si512(raw, flip), is_nan, _mm512_set1_epi32(ORDERED_NAN));
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i keys = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(first_key)));
  _mm512_storeu_si512(row.scores + row.count, _mm512_maskz_compress_epi32(mask, order));
  _mm512_storeu_si512(row.indices + row.count, _mm512_maskz_compress_epi32(mask, keys));
  row.count += __builtin_popcount(bits);
#else
  float lanes[LANES];
  store(lanes, scores);
  for (; bits; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    row.scores[row.count] = ordered(lanes[lane]);
    row.indices[row.count] = int32_t(first_key) + lane;
    row.count++;
  }
#endif
}

inline int count_from(const int32_t* scores, int count, int32_t least) {
  int found = 0;
  for (int n = 0; n < count; n++) found += scores[n] >= least;
  return found;
}

// Keeps the candidates above `least`, and the first `equal` of those that equal it.
inline void keep_from(Candidates& row, int32_t least, int equal) {
  int kept = 0;
#if defined(TOPK_AVX512)
  for (int n = 0; n < row.count; n += LANES) {
    const __mmask16 inside = __mmask16(row.count - n >= LANES ? 0xffff : (1u << (row.count - n)) - 1);
    const __m512i scores = _mm512_loadu_si512(row.scores + n), indices = _mm512_loadu_si512(row.indices + n);
    uint32_t equals = _mm512_mask_cmpeq_epi32_mask(inside, scores, _mm512_set1_epi32(least));
    const uint32_t above = _mm512_mask_cmpgt_epi32_mask(inside, scores, _mm512_set1_epi32(least));
    const int found = __builtin_popcount(equals);
    for (int extra = found - equal; extra > 0; extra--) equals &= ~(1u << (31 - __builtin_clz(equals)));
    equal -= std::min(found, equal);
    const __mmask16 mask = __mmask16(above | equals);
    _mm512_storeu_si512(row.scores + kept, _mm512_maskz_compress_epi32(mask, scores));
    _mm512_storeu_si512(row.indices + kept, _mm512_maskz_compress_epi32(mask, indices));
    kept += __builtin_popcount(mask);
  }
#else
  for (int n = 0; n < row.count; n++) {
    const int32_t score = row.scores[n];
    const int is_equal = score == least;
    const int is_kept = int(score > least) | (is_equal & int(equal > 0));
    equal -= is_equal;
    row.scores[kept] = score;
    row.indices[kept] = row.indices[n];
    kept += is_kept;
  }
#endif
  row.count = kept;
}

// Keeps the k largest of at least k candidates, or up to `slack` more, and sets the threshold.
//
// A bisection over the score from which on enough candidates are left. It halves the range of the numbers, which is
// quick for scores of one magnitude, and in turn the range of their representations, which ends for any.
inline void keep_largest(Candidates& row, int k, int slack) {
  if (row.count > k + slack) {
    int32_t low = row.scores[0], high = row.scores[0];
    for (int n = 1; n < row.count; n++) {
      low = std::min(low, row.scores[n]);
      high = std::max(high, row.scores[n]);
    }
    int left = row.count;  // from `low` on; beyond `high` there are fewer than k
    for (bool halve_numbers = true; left > k + slack && low < high; halve_numbers = !halve_numbers) {
      int32_t middle = int32_t((int64_t(low) + high + 1) >> 1);
      if (halve_numbers) {
        const int32_t mean = ordered(0.5f * unordered(low) + 0.5f * unordered(high));
        if (mean > low && mean <= high) middle = mean;
      }
      const int found = count_from(row.scores, row.count, middle);
      if (found >= k) {
        low = middle;
        left = found;
      } else {
        high = middle - 1;
      }
    }
    int equal = row.count;
    if (left > k + slack) {  // so many are equal
      const int above = low == ORDERED_NAN ? 0 : count_from(row.scores, row.count, low + 1);
      equal = k - above;
    }
    keep_from(row, low, equal);
    // NaN is above every number: once k are kept, only a NaN could be compared with them, and it comes too late.
    row.threshold = low == ORDERED_NAN ? INF : unordered(low);
  }
}

}  // namespace topk
