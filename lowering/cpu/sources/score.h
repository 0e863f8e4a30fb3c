// What the kernel and the generated code of a score function have in common.
//
// The kernel works on blocks of scores: some query rows by a range of keys. It asks a program first what is known of a
// block before its products are computed (`bound`), so that blocks which cannot hold a kept key are never computed and
// masks that mask nothing are not applied; then it has the program change the block's scores in place (`apply`).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace topk {

struct Ranges;

// A tensor [B|1, H|1, Lq|1, Lk|1], or a table [B|1, H|1, 1, N]. Strides are in elements, 0 along axes of size 1.
struct Operand {
  const void* data;
  int64_t batch_stride, head_stride, query_stride, key_stride;
  int64_t size;  // of the last axis
  const Ranges* ranges;  // or null
};

struct RowPosition {
  int64_t head, query;
};

// The scores of some query rows and of `key_count` keys from `first_key` on, or of the keys in `keys`.
struct Block {
  const Operand* operands;
  int64_t batch;
  const RowPosition* rows;
  int64_t row_count, first_key, key_count;
};

enum class Change : int64_t { ANY, WITHOUT_MASKS, NONE };

struct BlockFacts {
  double upper;  // no score of the block is larger, and if it is finite none is NaN
  Change change;  // what is left for the program to do
  double terms;  // of an affine program: the sum of the magnitudes of what its terms are at most
};

struct Program {
  void (*bound)(const Block&, float largest_product, BlockFacts&);
  void (*apply)(const Block&, float* scores, int64_t stride, Change);
  void (*apply_terms)(const Block&, float* terms, int64_t stride, Change);  // of scores of 0; null if it is not affine
  void (*apply_listed)(const Block&, const int32_t* keys, float* scores);  // of one row; or its probabilities
};

// --- Interval arithmetic, in float64; `has_nan` if a value may be NaN

struct Interval {
  double low, high;
  bool has_nan = false;
  bool is(double x) const { return low == x && high == x && !has_nan; }
};

inline Interval anything() {
  const double inf = std::numeric_limits<double>::infinity();
  return {-inf, inf, true};
}

inline Interval number(double x) {
  return x != x ? anything() : Interval{x, x};
}

inline Interval checked(double low, double high, bool has_nan) {
  return low <= high ? Interval{low, high, has_nan} : anything();
}

// A float32 result: rounding is monotonic, so the rounded ends bound the rounded values.
inline Interval as_float(Interval x) {
  return {double(float(x.low)), double(float(x.high)), x.has_nan};
}

// As it is after rounding to a type of 16 bits.
template <typename T>
inline float rounded_to(float x) {
  T result;
  from_float(x, result);
  return to_float(result);
}

template <typename T>
inline Interval interval_as(Interval x) {
  return {double(rounded_to<T>(float(x.low))), double(rounded_to<T>(float(x.high))), x.has_nan};
}

inline Interval interval_add(Interval a, Interval b) {
  // inf - inf can arise inside although the ends are numbers.
  const bool cancels = (std::isinf(a.high) && std::isinf(b.low)) || (std::isinf(a.low) && std::isinf(b.high));
  return checked(a.low + b.low, a.high + b.high, a.has_nan || b.has_nan || cancels);
}
inline Interval interval_neg(Interval a) { return {-a.high, -a.low, a.has_nan}; }
inline Interval interval_sub(Interval a, Interval b) { return interval_add(a, interval_neg(b)); }
inline Interval interval_mul(Interval a, Interval b) {
  const double x[] = {a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high};
  for (double y : x)
    if (y != y) return anything();
  const bool has_inf = std::isinf(a.low) || std::isinf(a.high) || std::isinf(b.low) || std::isinf(b.high);
  return {*std::min_element(x, x + 4), *std::max_element(x, x + 4), a.has_nan || b.has_nan || has_inf};
}
inline Interval interval_div(Interval a, Interval b) {
  if (b.has_nan || (b.low <= 0 && b.high >= 0) || std::isinf(b.low) || std::isinf(b.high)) return anything();
  return interval_mul(a, {1 / b.high, 1 / b.low});
}
inline Interval interval_abs(Interval a) {
  const double low = a.low <= 0 && a.high >= 0 ? 0 : std::min(std::fabs(a.low), std::fabs(a.high));
  return {low, std::max(std::fabs(a.low), std::fabs(a.high)), a.has_nan};
}
inline Interval interval_maximum(Interval a, Interval b) {
  return {std::max(a.low, b.low), std::max(a.high, b.high), a.has_nan || b.has_nan};
}
inline Interval interval_minimum(Interval a, Interval b) {
  return {std::min(a.low, b.low), std::min(a.high, b.high), a.has_nan || b.has_nan};
}
// The approximation of tanh is monotonic and at most 1, up to its last bits.
inline Interval interval_tanh(Interval a) {
  return {std::tanh(a.low) - 1e-5, std::tanh(a.high) + 1e-5, a.has_nan};
}
inline Interval unite(Interval a, Interval b) {
  return {std::min(a.low, b.low), std::max(a.high, b.high), a.has_nan || b.has_nan};
}

// Conditions are the intervals [0, 0], [1, 1] and [0, 1]. Comparisons with NaN are false.
inline Interval condition(bool can_be_false, bool can_be_true) {
  return {can_be_false ? 0.0 : 1.0, can_be_true ? 1.0 : 0.0};
}
inline Interval interval_lt(Interval a, Interval b) {
  return condition(a.has_nan || b.has_nan || a.high >= b.low, a.low < b.high);
}
inline Interval interval_le(Interval a, Interval b) {
  return condition(a.has_nan || b.has_nan || a.high > b.low, a.low <= b.high);
}
inline Interval interval_gt(Interval a, Interval b) { return interval_lt(b, a); }
inline Interval interval_ge(Interval a, Interval b) { return interval_le(b, a); }
inline Interval interval_eq(Interval a, Interval b) {
  const bool is_one = a.low == a.high && b.low == b.high && a.low == b.low && !a.has_nan && !b.has_nan;
  return condition(!is_one, a.low <= b.high && b.low <= a.high);
}
inline Interval interval_not(Interval a) { return {1 - a.high, 1 - a.low}; }
inline Interval interval_ne(Interval a, Interval b) { return interval_not(interval_eq(a, b)); }
inline Interval interval_and(Interval a, Interval b) { return {std::min(a.low, b.low), std::min(a.high, b.high)}; }
inline Interval interval_or(Interval a, Interval b) { return {std::max(a.low, b.low), std::max(a.high, b.high)}; }
inline Interval interval_xor(Interval a, Interval b) { return interval_ne(a, b); }
inline Interval interval_where(Interval c, Interval a, Interval b) {
  return c.low == 1 ? a : c.high == 0 ? b : unite(a, b);
}

// The range of what it meets: elements of a row, a vector at a time.
template <typename T>
class Range {
 public:
  void meet(const T* x, int64_t count, int64_t stride) {
    for (int64_t n = 0; n < count; n++) low_ = std::min(low_, x[n * stride]), high_ = std::max(high_, x[n * stride]);
  }
  Interval interval() const { return {double(low_), double(high_)}; }

 private:
  T low_ = std::numeric_limits<T>::max(), high_ = std::numeric_limits<T>::lowest();
};

// Bytes of 0 and 1, of which a loop without a branch takes a vector at a time.
template <>
class Range<bool> {
 public:
  void meet(const bool* x, int64_t count, int64_t stride) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(x);
    uint8_t all = 1, any = 0;
    if (stride == 1)
      for (int64_t n = 0; n < count; n++) all &= bytes[n], any |= bytes[n];
    else
      for (int64_t n = 0; n < count; n++) all &= bytes[n * stride], any |= bytes[n * stride];
    all_ &= all;
    any_ |= any;
  }
  Interval interval() const { return condition(!all_, any_); }

 private:
  uint8_t all_ = 1, any_ = 0;
};

// Floats are compared as integers in the order of the floats; the NaNs stand beyond the infinities.
template <typename T>
class FloatRange {
 public:
  void meet(const T* x, int64_t count, int64_t stride) {
    int64_t n = 0;
    if (stride == 1)
      for (; n + LANES <= count; n += LANES) meet(load(x + n));
    for (; n < count; n++) meet(broadcast(to_float(x[n * stride])));
  }
  Interval interval() const {
    const float low = number_of(smallest(low_)), high = number_of(largest(high_));
    return low != low || high != high ? anything() : Interval{double(low), double(high)};
  }

 private:
  void meet(Vec x) {
    const Ints bits = bit_cast<Ints>(x), order = bits ^ ((bits >> 31) & 0x7fffffff);
    low_ = smaller(low_, order);
    high_ = larger(high_, order);
  }
  static float number_of(int32_t x) { return bit_cast<float>(x ^ ((x >> 31) & 0x7fffffff)); }
  Ints low_ = Ints{} + std::numeric_limits<int32_t>::max(), high_ = Ints{} + std::numeric_limits<int32_t>::min();
};
template <>
class Range<float> : public FloatRange<float> {};
template <>
class Range<BFloat16> : public FloatRange<BFloat16> {};
template <>
class Range<Half> : public FloatRange<Half> {};

// Whether an operand has an element for each query and key. To read those of a block takes time, and often other operands
// tell that the block is masked.
inline bool is_matrix(const Operand& x) { return x.query_stride && x.key_stride; }
enum class Matrices { READ, UNREAD };

// The interval of elements of some rows. They are read side by side, a few cache lines of each at a time: that is quicker
// than one after the other.
template <typename T, typename RowAt>
inline Interval interval_of_rows(int64_t rows, const RowAt& row_at, int64_t count, int64_t stride) {
  constexpr int64_t PIECE = 256 / int64_t(sizeof(T));
  Range<T> range;
  for (int64_t first = 0; first < count; first += PIECE) {
    const T* previous = nullptr;
    for (int64_t r = 0; r < rows; r++) {
      const T* row = row_at(r);
      if (row != previous) range.meet(row + first * stride, std::min(PIECE, count - first), stride);
      previous = row;
    }
  }
  return range.interval();
}

// What is known of a matrix: the interval of each BAND queries by RANGE_KEYS keys that was asked for. Heads that share the
// matrix share these, so that it is read once for all of them. Any thread may find one, as all find the same.
constexpr int64_t BAND = 12, RANGE_KEYS = 128;

struct Ranges {
  uint64_t* ends;  // [B|1][bands][blocks of keys]: two floats, or 0 if it was not asked for
  int64_t batch_stride, band_stride, queries, keys;
};

template <typename T>
inline Interval range_of(const Operand& x, int64_t batch, int64_t band, int64_t number) {
  const Ranges& known = *x.ranges;
  uint64_t* cell = known.ends + batch * known.batch_stride + band * known.band_stride + number;
  uint64_t bits = ~__atomic_load_n(cell, __ATOMIC_RELAXED);
  if (bits == ~uint64_t(0)) {
    const T* corner = static_cast<const T*>(x.data) + batch * x.batch_stride + band * BAND * x.query_stride +
                      number * RANGE_KEYS * x.key_stride;
    const Interval found = interval_of_rows<T>(
        std::min(BAND, known.queries - band * BAND), [&](int64_t r) { return corner + r * x.query_stride; },
        std::min(RANGE_KEYS, known.keys - number * RANGE_KEYS), x.key_stride);
    // Not the bits of a NaN that would make the cell 0.
    const float low = found.has_nan ? std::numeric_limits<float>::quiet_NaN() : float(found.low);
    bits = uint64_t(bit_cast<uint32_t>(low)) << 32 | bit_cast<uint32_t>(float(found.high));
    __atomic_store_n(cell, ~bits, __ATOMIC_RELAXED);
  }
  const float low = bit_cast<float>(uint32_t(bits >> 32)), high = bit_cast<float>(uint32_t(bits));
  return low != low ? anything() : Interval{double(low), double(high)};
}

// Of the queries of whole bands: an interval that may be larger.
template <typename T>
inline Interval interval_by_ranges(const Block& block, const Operand& x) {
  Interval found{INF, -INF};
  int64_t previous = -1;
  for (int64_t r = 0; r < block.row_count; r++) {
    const int64_t band = block.rows[r].query / BAND;
    if (band == previous) continue;
    previous = band;
    for (int64_t n = block.first_key / RANGE_KEYS; n * RANGE_KEYS < block.first_key + block.key_count; n++)
      found = unite(found, range_of<T>(x, block.batch, band, n));
  }
  return found;
}

// The interval of what an operand holds for a block.
template <typename T>
inline Interval interval_of(const Block& block, int operand, Matrices matrices) {
  const Operand& x = block.operands[operand];
  if (matrices == Matrices::UNREAD && is_matrix(x)) return std::is_same_v<T, bool> ? condition(true, true) : anything();
  if (x.ranges && (std::is_same_v<T, bool> || !std::is_integral_v<T>)) return interval_by_ranges<T>(block, x);
  return interval_of_rows<T>(
      block.row_count,
      [&](int64_t r) {
        return static_cast<const T*>(x.data) + block.batch * x.batch_stride + block.rows[r].head * x.head_stride +
               block.rows[r].query * x.query_stride + block.first_key * x.key_stride;
      },
      x.key_stride ? block.key_count : 1, x.key_stride);
}

// The interval of a table, if it is short.
template <typename T>
inline Interval interval_of_table(const Block& block, int operand) {
  const Operand& x = block.operands[operand];
  if (x.size > block.key_count || x.size == 0) return anything();
  Range<T> range;
  int64_t previous = -1;
  for (int64_t r = 0; r < block.row_count; r++) {
    const int64_t head = block.rows[r].head;
    if (head == previous) continue;
    previous = head;
    range.meet(static_cast<const T*>(x.data) + block.batch * x.batch_stride + head * x.head_stride, x.size, x.key_stride);
  }
  return range.interval();
}

// --- Elementwise functions without a branch, so that loops of them vectorise

inline float exp_of(float x) {
  const float clamped = x > 89.0f ? 89.0f : x < -104.0f ? -104.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // In two factors, as 2^n need not be a normal number.
  const int32_t exponent = bit_cast<int32_t>(shifted) - 0x4b400000, half = exponent >> 1;
  const float a = bit_cast<float>((half + 127) << 23), b = bit_cast<float>((exponent - half + 127) << 23);
  return p * a * b;
}

inline float tanh_of(float x) {
  const float magnitude = std::fabs(x);
  // Near 0 a polynomial (Cephes), as the quotient cancels there.
  const float y = x * x;
  float p = -5.70498872745e-3f;
  p = p * y + 2.06390887954e-2f;
  p = p * y - 5.37397155531e-2f;
  p = p * y + 1.33314422036e-1f;
  p = p * y - 3.33332819422e-1f;
  const float near = p * y * x + x;
  const float far = 1.0f - 2.0f / (exp_of(2.0f * (magnitude > 20.0f ? 20.0f : magnitude)) + 1.0f);
  const float signed_far = x < 0.0f ? -far : far;
  return magnitude < 0.625f ? near : x != x ? x : signed_far;
}

// A conditional expression would become a branch around the operations on one side, and its loop would not vectorise.
inline float select(bool condition, float a, float b) {
  const uint32_t mask = -uint32_t(condition);
  return bit_cast<float>((bit_cast<uint32_t>(a) & mask) | (bit_cast<uint32_t>(b) & ~mask));
}

template <typename T>
inline T maximum_of(T a, T b) {
  return a != a ? a : b != b ? b : a > b ? a : b;
}

template <typename T>
inline T minimum_of(T a, T b) {
  return a != a ? a : b != b ? b : a < b ? a : b;
}

inline float sigmoid_of(float x) {
  return 1.0f / (1.0f + exp_of(-x));
}

// Quotients of integers, rounded down.
template <typename T>
inline T floor_div_of(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return T(a / b - ((a % b != 0) && ((a < 0) != (b < 0))));
  } else {
    return std::floor(a / b);
  }
}

}  // namespace topk
