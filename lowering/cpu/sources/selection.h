// The candidates of one query row, and the exact selection of its k largest scores.
//
// Candidates are appended as the floats they are. Only where they are compared with each other, they become int32 in the
// order of the floats, with NaN above infinity and the two zeros equal. They arrive by ascending key and stay so; of
// equal scores the first ones are kept.
#pragma once

#include <algorithm>

#include "simd.h"

namespace topk {

constexpr int32_t ORDERED_NAN = std::numeric_limits<int32_t>::max();
// Compared as bits: the compiler is told that the sign of a zero does not matter, and may leave an addition of 0 out.
constexpr int32_t NEGATIVE_ZERO = std::numeric_limits<int32_t>::min();

inline int32_t ordered(float x) {
  if (x != x) return ORDERED_NAN;
  const int32_t bits = bit_cast<int32_t>(x);
  return bits == NEGATIVE_ZERO ? 0 : bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float unordered(int32_t x) {
  return bit_cast<float>(x ^ ((x >> 31) & 0x7fffffff));
}

struct Candidates {
  int32_t* scores;  // the first `ordered` are in order, the others bits of floats; room for a vector beyond the last
  int32_t* indices;
  int count, ordered;
  int32_t low, high;  // of those in order: none is smaller, and one is the largest
  float threshold;  // k candidates are no smaller: a later key must be larger, or NaN

  void clear() {
    count = ordered = 0;
    low = std::numeric_limits<int32_t>::max();
    high = std::numeric_limits<int32_t>::min();
    threshold = -INF;
  }
};

// Appends the lanes of `scores` whose bit is set. Writes a whole vector.
inline void append(Candidates& row, Vec scores, uint32_t bits, int64_t first_key) {
#if defined(TOPK_AVX512)
  const __mmask16 mask = __mmask16(bits);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i keys = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(first_key)));
  _mm512_storeu_ps(row.scores + row.count, _mm512_maskz_compress_ps(mask, scores));
  _mm512_storeu_si512(row.indices + row.count, _mm512_maskz_compress_epi32(mask, keys));
  row.count += __builtin_popcount(bits);
#else
  float lanes[LANES];
  store(lanes, scores);
  for (; bits; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    row.scores[row.count] = bit_cast<int32_t>(lanes[lane]);
    row.indices[row.count] = int32_t(first_key) + lane;
    row.count++;
  }
#endif
}

// Fills the last vector of scores up, so that loops over the candidates take whole vectors.
inline void pad(Candidates& row, int32_t score) {
  for (int n = 0; n < LANES; n++) row.scores[row.count + n] = score;
}

// Makes the scores that were appended comparable.
inline void put_in_order(Candidates& row) {
  if (row.ordered == row.count) return;
  pad(row, row.scores[row.ordered]);
  Ints low = Ints{} + row.low, high = Ints{} + row.high;
  for (int n = row.ordered; n < row.count; n += LANES) {
    const Ints bits = load(row.scores + n), flipped = bits == NEGATIVE_ZERO ? Ints{} : bits ^ ((bits >> 31) & 0x7fffffff);
    // Beyond the bits of the infinities lie NaNs.
    const Ints order = (bits & 0x7fffffff) > 0x7f800000 ? Ints{} + ORDERED_NAN : flipped;
    store(row.scores + n, order);
    low = smaller(low, order);
    high = larger(high, order);
  }
  row.low = smallest(low);
  row.high = largest(high);
  row.ordered = row.count;
}

// How many are `least` or more; the scores are padded by the lowest of all numbers.
inline int count_from(const Candidates& row, int32_t least) {
  int found = 0;
#if defined(TOPK_AVX512)
  const __m512i bound = _mm512_set1_epi32(least);
  for (int n = 0; n < row.count; n += LANES)
    found += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(row.scores + n), bound));
#else
  Ints lanes{};
  for (int n = 0; n < row.count; n += LANES) lanes -= load(row.scores + n) >= least;
  for (int lane = 0; lane < LANES; lane++) found += lanes[lane];
#endif
  return found;
}

// Keeps the candidates above `least`, and the first `equal` of those that equal it. The scores are padded as above.
inline void keep_from(Candidates& row, int32_t least, int equal) {
  int kept = 0;
#if defined(TOPK_AVX512)
  const bool all_equal_stay = equal >= row.count;
  const __m512i bound = _mm512_set1_epi32(least);
  for (int n = 0; n < row.count; n += LANES) {
    const __m512i scores = _mm512_loadu_si512(row.scores + n), indices = _mm512_loadu_si512(row.indices + n);
    uint32_t stays = _mm512_cmpge_epi32_mask(scores, bound);
    if (!all_equal_stay) {
      const uint32_t equals = _mm512_cmpeq_epi32_mask(scores, bound);
      uint32_t chosen = equals;
      for (int extra = __builtin_popcount(equals) - equal; extra > 0; extra--)
        chosen &= ~(1u << (31 - __builtin_clz(chosen)));
      stays = (stays & ~equals) | chosen;
      equal -= __builtin_popcount(chosen);
    }
    _mm512_storeu_si512(row.scores + kept, _mm512_maskz_compress_epi32(__mmask16(stays), scores));
    _mm512_storeu_si512(row.indices + kept, _mm512_maskz_compress_epi32(__mmask16(stays), indices));
    kept += __builtin_popcount(stays);
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
  row.count = row.ordered = kept;
  row.low = least;
}

// The logarithm to base 2, linear between the powers of 2, and shifted.
inline float log_like(float x) {
  return float(bit_cast<int32_t>(x));
}

// Where to cut next between `low`, from which on `left` scores are left, and `high`, beyond which there are `above`.
//
// Three ways in turn, each quick where another is not: as if the numbers of scores left fell exponentially, as they do in
// the tail of most distributions; half of the range of the numbers; half of that of their representations, which ends
// for any numbers.
inline int32_t next_cut(int step, int32_t low, int32_t high, int left, int above, float wanted) {
  if (step % 3 < 2) {
    const float fall = log_like(float(left)) - log_like(float(above + 1));
    const float share = step % 3 == 0 && fall > 0 ? (log_like(float(left)) - log_like(wanted)) / fall : 0.5f;
    const float part = std::min(std::max(share, 0.05f), 0.95f);
    const int32_t cut = ordered((1 - part) * unordered(low) + part * unordered(high));
    if (cut > low && cut <= high) return cut;
  }
  return int32_t((int64_t(low) + high + 1) >> 1);
}

// Where candidates in order can be cut: `left` of them are `least` or more. That are k, up to `slack` more, or more than
// these because so many are equal.
struct Cut {
  int32_t least;
  int left;
};

// Of k or more candidates, of which `left` are `low` or more and at least k.
inline Cut find_cut(Candidates& row, int k, int slack, int32_t low, int left) {
  int32_t high = row.high;
  pad(row, std::numeric_limits<int32_t>::min());
  int above = 0;
  for (int step = 0; left > k + slack && low < high; step++) {
    const int32_t cut = next_cut(step, low, high, left, above, float(k) + 0.5f * float(slack));
    const int found = count_from(row, cut);
    if (found >= k) {
      low = cut;
      left = found;
    } else {
      high = cut - 1;
      above = found;
    }
  }
  return {low, left};
}

// Keeps the k largest of at least k candidates, or up to `slack` more, and sets the threshold.
inline __attribute__((noinline)) void keep_largest(Candidates& row, int k, int slack) {
  put_in_order(row);
  if (row.count <= k + slack) return;
  const Cut cut = find_cut(row, k, slack, row.low, row.count);
  int equal = row.count;
  if (cut.left > k + slack) {  // so many are equal
    const int larger_ones = cut.least == ORDERED_NAN ? 0 : count_from(row, cut.least + 1);
    equal = k - larger_ones;
  }
  keep_from(row, cut.least, equal);
  // NaN is above every number: once k are kept, only a NaN could be compared with them, and it comes too late.
  row.threshold = cut.least == ORDERED_NAN ? INF : unordered(cut.least);
}

// Keeps exactly the k largest: first a few more, so that the last steps look at these alone.
inline void keep_exactly(Candidates& row, int k) {
  if (row.count > k + k / 2 + 2 * LANES) keep_largest(row, k, k / 4 + 8);
  keep_largest(row, k, 0);
}

}  // namespace topk
