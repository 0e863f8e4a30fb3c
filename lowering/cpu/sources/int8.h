// Queries and keys in int8, and proven bounds of how far products of them are from the scores.
//
// Let a be the float32 sum of q.k that the kernel computes, k' = R (k - m) a key less the mean key m, rotated, q' = R q,
// and q^, k^ what q' and k' are as multiples of one step each. R is orthogonal and m the same for all keys, so that
// q.k - q.m = q'.k', and by Cauchy-Schwarz
//
//   |a - q.m - q^.k^|  <=  |q| |k' - k^| + |q' - q^| |k^| + rounding |q| (|k| + |m|)
//
// q.m is the same for all keys of a row and takes no part in a selection. The rounding is that of a, of its product with
// the scale, of m subtracted, R applied and of the bounds themselves: see `roundings`. q^.k^ is a sum of integers: exact.
// The mean is subtracted and R applied to make k' short and its columns alike: they change the margin, not the proof.
#pragma once

#include "panels.h"

#if defined(TOPK_AVX512_VNNI)

namespace topk {
namespace {

constexpr int MAX_INT8_DEPTH = 512;  // up to it the sums of products, and the sums of queries times 128, are exact floats
constexpr float MAX_INT8_NORM = 0x1p40f;  // larger rows, infinities and NaN are not rounded
constexpr float SMALLEST_STEP = 0x1p-60f;

// Also a scale whose product with a sum rounds as one of ordinary size does.
inline bool can_screen(int64_t depth, double scale) {
  return depth > 0 && depth <= MAX_INT8_DEPTH && std::fabs(scale) >= 0x1p-20 && std::fabs(scale) <= 0x1p20;
}

inline int64_t quads_of(int64_t depth) { return (depth + 3) / 4; }
inline int64_t padded(int64_t depth) { return rounded_up(depth, LANES); }

// In units of |q| (|k| + |m|): a has up to 3 roundings for two columns, R one a level for q and for k, of which there are
// log2(depth) <= 9, and all else takes some 30.
inline float roundings(int64_t depth) { return float(2 * depth + 64) * 0x1p-24f; }

// An upper bound of a norm whose square was summed in float32: of the sum's roundings, and of numbers so small that their
// squares, or products with the other norm, are flushed to 0.
inline float norm_bound(float square, int64_t depth) {
  return std::sqrt(square) * (1 + float(depth + 64) * 0x1p-23f) + float(depth) * 0x1p-52f;
}

inline float squared_norm_of(const float* x, int64_t width) {
  Vec total = zero();
  for (int64_t c = 0; c < width; c += LANES) total = fma(load(x + c), load(x + c), total);
  return sum(total);
}

inline float largest_magnitude(const float* x, int64_t width) {
  Vec largest = zero();
  for (int64_t c = 0; c < width; c += LANES) largest = _mm512_max_ps(largest, _mm512_abs_ps(load(x + c)));
  return _mm512_reduce_max_ps(largest);
}

// R: Hadamard transforms of neighbouring columns, as many as the largest power of 2 that divides their number.
inline void rotate(float* x, int64_t depth) {
  const int64_t size = depth & -depth;
  const float norm = 1 / std::sqrt(float(size));
  for (int64_t half = 1; half < std::min<int64_t>(size, LANES); half *= 2) {
    if (size < LANES) {
      for (int64_t c = 0; c < depth; c += 2 * half)
        for (int64_t n = c; n < c + half; n++) {
          const float a = x[n], b = x[n + half];
          x[n] = a + b, x[n + half] = a - b;
        }
      continue;
    }
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i other = _mm512_xor_si512(lanes, _mm512_set1_epi32(int(half)));
    const __mmask16 is_upper = _mm512_test_epi32_mask(lanes, _mm512_set1_epi32(int(half)));
    for (int64_t c = 0; c < depth; c += LANES) {
      const Vec own = load(x + c), partner = _mm512_permutexvar_ps(other, own);
      store(x + c, _mm512_mask_sub_ps(_mm512_add_ps(own, partner), is_upper, partner, own));
    }
  }
  for (int64_t half = LANES; half < size; half *= 2)
    for (int64_t c = 0; c < depth; c += 2 * half)
      for (int64_t n = c; n < c + half; n += LANES) {
        const Vec a = load(x + n), b = load(x + n + half);
        store(x + n, _mm512_add_ps(a, b));
        store(x + n + half, _mm512_sub_ps(a, b));
      }
  for (int64_t c = 0; c < depth; c++) x[c] *= norm;
}

// A row as multiples of a step: upper bounds of the norm of what is lost and of what is left, and the sum of the integers.
struct Rounded {
  float lost, left;
  int sum;
};

inline float step_of(const float* x, int64_t width) {
  return std::max(largest_magnitude(x, width) / 127, SMALLEST_STEP);
}

// `x` and `integers` have a whole number of vectors.
inline Rounded round_row(const float* x, int64_t depth, float step, int8_t* integers) {
  const Vec inverse = broadcast(1 / step), size = broadcast(step);
  const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127);
  Vec lost = zero(), left = zero();
  __m512i total = _mm512_setzero_si512();
  for (int64_t c = 0; c < padded(depth); c += LANES) {
    const Vec row = load(x + c);
    const __m512i number =
        _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(mul(row, inverse)), most), least);
    const Vec multiple = mul(_mm512_cvtepi32_ps(number), size), rest = _mm512_sub_ps(row, multiple);
    lost = fma(rest, rest, lost);
    left = fma(multiple, multiple, left);
    total = _mm512_add_epi32(total, number);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(integers + c), _mm512_cvtepi32_epi8(number));
  }
  return {norm_bound(sum(lost), depth), norm_bound(sum(left), depth), _mm512_reduce_add_epi32(total)};
}

template <typename T>
inline void widen(const T* row, int64_t depth, float* x) {
  int64_t c = 0;
  for (; c + LANES <= depth; c += LANES) store(x + c, load(row + c));
  for (; c < padded(depth); c++) x[c] = c < depth ? to_float(row[c]) : 0;
}

// --- Keys

// Of a panel of keys: their common step, and what is needed of them for bounds, for every key an upper bound.
struct PanelFacts {
  float step;
  float lost;  // |k' - k^| and the rounding; infinite if a key is not within MAX_INT8_NORM
  float left;  // |k^|
};

// The mean key [padded depth] of a head; returns an upper bound of its norm.
template <typename Row>
float mean_key(int64_t keys, int64_t depth, Row row_at, float* mean) {
  const int64_t width = padded(depth);
  float row[MAX_INT8_DEPTH];
  std::fill(mean, mean + width, 0.0f);
  for (int64_t j = 0; j < keys; j++) {
    widen(row_at(j), depth, row);
    for (int64_t c = 0; c < width; c += LANES) store(mean + c, add(load(mean + c), load(row + c)));
  }
  for (int64_t c = 0; c < width; c++) mean[c] *= 1.0f / float(keys);
  return norm_bound(squared_norm_of(mean, width), depth);
}

// In which lane of a panel its n-th key is, so that packing the two vectors of its products to one of int16, which takes
// four of each in turn, brings the keys in order.
inline int64_t packed_lane(int64_t n) { return n / 8 * 4 + n % 4 + (n % 8 < 4 ? 0 : LANES); }

// One panel of up to PANEL keys, [quad][PANEL] of four columns, 128 added to each; zeros beyond the last key.
template <typename Row>
PanelFacts round_panel(int64_t count, int64_t depth, Row row_at, const float* mean, float mean_norm, uint32_t* panel) {
  const int64_t width = padded(depth), quads = quads_of(depth);
  alignas(64) float rows[PANEL][MAX_INT8_DEPTH];
  alignas(64) int8_t integers[MAX_INT8_DEPTH];
  float longest = 0;
  PanelFacts facts{SMALLEST_STEP, 0, 0};
  for (int64_t j = 0; j < count; j++) {
    widen(row_at(j), depth, rows[j]);
    const float norm = norm_bound(squared_norm_of(rows[j], width), depth);
    if (!(norm + mean_norm <= MAX_INT8_NORM)) return {SMALLEST_STEP, INF, 0};
    longest = std::max(longest, norm);
    for (int64_t c = 0; c < width; c += LANES) store(rows[j] + c, _mm512_sub_ps(load(rows[j] + c), load(mean + c)));
    rotate(rows[j], depth);
    facts.step = std::max(facts.step, step_of(rows[j], width));
  }
  for (int64_t j = 0; j < PANEL; j++) {
    std::fill(integers, integers + width, int8_t(0));
    if (j < count) {
      const Rounded rounded = round_row(rows[j], depth, facts.step, integers);
      facts.lost = std::max(facts.lost, rounded.lost);
      facts.left = std::max(facts.left, rounded.left);
    }
    for (int64_t n = 0; n < quads; n++) {
      uint32_t quad;
      std::memcpy(&quad, integers + 4 * n, sizeof(quad));
      panel[n * PANEL + packed_lane(j)] = quad ^ 0x80808080;
    }
  }
  facts.lost += roundings(depth) * (longest + mean_norm);
  return facts;
}

// --- Queries

// A query whose bounds are in units of its step: |q.k - q.m - q^.k^| <= lost_keys * (lost of a panel) + left_keys * (left).
struct RoundedQuery {
  float lost_keys, left_keys;
  int32_t correction;  // what adding 128 to the keys adds to a sum of products
  float step;
};

// Sets lane `lane` of every quad in a group of GROUP_ROWS, of the query times `sign`; whether it is within MAX_INT8_NORM.
inline bool round_query(const Query* row, int64_t depth, float sign, uint32_t* group, int64_t lane, RoundedQuery& query) {
  alignas(64) float x[MAX_INT8_DEPTH];
  alignas(64) int8_t integers[MAX_INT8_DEPTH];
  widen(row, depth, x);
  const float norm = norm_bound(squared_norm_of(x, padded(depth)), depth);
  if (!(norm <= MAX_INT8_NORM)) return false;
  for (int64_t c = 0; c < depth; c++) x[c] *= sign;
  rotate(x, depth);
  const float step = step_of(x, padded(depth));
  const Rounded rounded = round_row(x, depth, step, integers);
  for (int64_t n = 0; n < quads_of(depth); n++) std::memcpy(group + n * GROUP_ROWS + lane, integers + 4 * n, sizeof(uint32_t));
  const float more = 1 + 0x1p-20f;  // for the divisions, and the sums of products that bounds are
  query = {norm / step * more, rounded.lost / step * more, 128 * rounded.sum, step};
  return true;
}

// --- Products

// sums[r] = queries[0][r] + sum over the quads n of queries[1 + n][r] times the keys of a panel. In one piece of assembly:
// GCC 12 spills the sums.
inline __attribute__((always_inline)) void multiply_int8(const uint32_t* queries, const uint32_t* panel, int64_t quads,
                                                         __m512i (&sums)[GROUP_ROWS][2]) {
  static_assert(GROUP_ROWS == 12 && PANEL == 32);
#define TOPK_START(offset, low, high) "vpbroadcastd " offset "(%[queries]), %" low "\n\tvmovdqa64 %" low ", %" high "\n\t"
#define TOPK_ROW(offset, query, low, high)               \
  "vpbroadcastd " offset "(%[queries]), %%" query "\n\t" \
  "vpdpbusd %%" query ", %%zmm30, %" low "\n\t"          \
  "vpdpbusd %%" query ", %%zmm31, %" high "\n\t"
#define TOPK_SUMS(r) "=&v"(sums[r][0]), "=&v"(sums[r][1])
  asm volatile(
      TOPK_START("0", "0", "1") TOPK_START("4", "2", "3") TOPK_START("8", "4", "5") TOPK_START("12", "6", "7")
      TOPK_START("16", "8", "9") TOPK_START("20", "10", "11") TOPK_START("24", "12", "13") TOPK_START("28", "14", "15")
      TOPK_START("32", "16", "17") TOPK_START("36", "18", "19") TOPK_START("40", "20", "21") TOPK_START("44", "22", "23")
      "add $48, %[queries]\n\t"
      "1:\n\t"
      "vmovdqu64 (%[panel]), %%zmm30\n\t"
      "vmovdqu64 64(%[panel]), %%zmm31\n\t"
      TOPK_ROW("0", "zmm28", "0", "1") TOPK_ROW("4", "zmm29", "2", "3") TOPK_ROW("8", "zmm28", "4", "5")
      TOPK_ROW("12", "zmm29", "6", "7") TOPK_ROW("16", "zmm28", "8", "9") TOPK_ROW("20", "zmm29", "10", "11")
      TOPK_ROW("24", "zmm28", "12", "13") TOPK_ROW("28", "zmm29", "14", "15") TOPK_ROW("32", "zmm28", "16", "17")
      TOPK_ROW("36", "zmm29", "18", "19") TOPK_ROW("40", "zmm28", "20", "21") TOPK_ROW("44", "zmm29", "22", "23")
      "add $48, %[queries]\n\t"
      "sub $-128, %[panel]\n\t"
      "dec %[quads]\n\t"
      "jne 1b\n\t"
      : TOPK_SUMS(0), TOPK_SUMS(1), TOPK_SUMS(2), TOPK_SUMS(3), TOPK_SUMS(4), TOPK_SUMS(5), TOPK_SUMS(6), TOPK_SUMS(7),
        TOPK_SUMS(8), TOPK_SUMS(9), TOPK_SUMS(10), TOPK_SUMS(11), [queries] "+r"(queries), [panel] "+r"(panel),
        [quads] "+r"(quads)
      :
      : "zmm28", "zmm29", "zmm30", "zmm31", "memory", "cc");
#undef TOPK_START
#undef TOPK_ROW
#undef TOPK_SUMS
}

}  // namespace
}  // namespace topk

#endif
