// Products of rows that lie anywhere: several dot products with one row, and weighted sums of rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>
#include <type_traits>

#include "simd.h"

namespace topk {

#if defined(TOPK_AVX512_BF16)
template <typename T>
constexpr bool IN_PAIRS = std::is_same_v<T, BFloat16>;  // products of two neighbouring columns at a time
#else
template <typename T>
constexpr bool IN_PAIRS = false;
#endif

// A tensor of rows [B, H, L, columns].
struct Tensor {
  const void* data;
  int64_t strides[3];  // of batch, head and position, in elements; the last axis is contiguous
};

template <typename T>
const T* row_of(const Tensor& x, int64_t batch, int64_t head, int64_t position) {
  return static_cast<const T*>(x.data) + batch * x.strides[0] + head * x.strides[1] + position * x.strides[2];
}

inline int64_t rounded_up(int64_t x, int64_t step) {
  return (x + step - 1) / step * step;
}

// Memory of its own, on cache lines; throws bad_alloc.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(static_cast<std::byte*>(::operator new(size_t(bytes) + 64, std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <typename T>
  T* as(int64_t offset = 0) const {
    return reinterpret_cast<T*>(data_ + offset);
  }

 private:
  std::byte* data_;
};

template <typename T>
inline void prefetch_row(const T* row, int64_t columns) {
  for (int64_t byte = 0; byte < columns * int64_t(sizeof(T)); byte += 64) prefetch(reinterpret_cast<const char*>(row) + byte);
}

template <typename T>
constexpr int DOT_COLUMNS = IN_PAIRS<T> ? 2 * LANES : LANES;  // that one vector of products takes

#if defined(TOPK_AVX512_BF16)
inline __m512i load_factors(const BFloat16* x) { return _mm512_loadu_si512(x); }
inline Vec add_product(__m512i a, __m512i b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else
inline Vec load_factors(const BFloat16* x) { return load(x); }
#endif
inline Vec load_factors(const Half* x) { return load(x); }
inline Vec load_factors(const float* x) { return load(x); }
inline Vec add_product(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

// products[i][n] += x[i * x_stride + column ..] * row_at(n)[column ..], with VECTORS vectors of each x in registers. One row
// after the other, as they lie in memory: that is how hardware looks ahead. (Measured on Zen 4, one core, 128 columns of
// float32: in this order 19 GB/s, and all unrolled, which is not in order any more, 10 GB/s.)
template <int VECTORS, int COUNT, typename T, typename RowAt>
inline void add_products(const T* x, int64_t x_stride, const RowAt& row_at, int64_t column,
                         Vec (&products)[COUNT][LANES]) {
  constexpr int STEP = DOT_COLUMNS<T>;
  decltype(load_factors(x)) factors[COUNT][VECTORS];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; c++) factors[i][c] = load_factors(x + i * x_stride + column + c * STEP);
#pragma GCC unroll 1
  for (int n = 0; n < LANES; n++) {
    const T* row = row_at(n) + column;
    Vec sums[COUNT];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) sums[i] = products[i][n];
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; c++) {
      const auto factor = load_factors(row + c * STEP);
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) sums[i] = add_product(factor, factors[i][c], sums[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) products[i][n] = sums[i];
  }
}

// Lane n of results[i] is the dot product of the i-th x and row_at(n). A table of the rows would be no help: reading back
// what was stored just now waits for all that came before.
template <int COUNT, typename T, typename RowAt>
void dots(const T* x, int64_t x_stride, const RowAt& row_at, int64_t columns, Vec (&results)[COUNT]) {
  constexpr int STEP = DOT_COLUMNS<T>, MOST = (LANES >= 16 ? 8 : 4) / (COUNT > 2 ? 2 : 1);
  Vec products[COUNT][LANES];
  for (int i = 0; i < COUNT; i++)
    for (int n = 0; n < LANES; n++) products[i][n] = zero();
  int64_t column = 0;
  for (; column + MOST * STEP <= columns; column += MOST * STEP)
    add_products<MOST>(x, x_stride, row_at, column, products);
  for (; column + MOST / 2 * STEP <= columns; column += MOST / 2 * STEP)
    add_products<MOST / 2>(x, x_stride, row_at, column, products);
  for (; column + STEP <= columns; column += STEP) add_products<1>(x, x_stride, row_at, column, products);
  for (int i = 0; i < COUNT; i++) {
    results[i] = sums(products[i]);
    if (column == columns) continue;
    float rest[LANES];
    for (int n = 0; n < LANES; n++) {
      const T* row = row_at(n);
      rest[n] = 0;
      for (int64_t c = column; c < columns; c++) rest[n] += to_float(row[c]) * to_float(x[i * x_stride + c]);
    }
    results[i] = add(results[i], load(rest));
  }
}

template <typename T, typename RowAt>
Vec dots(const T* x, const RowAt& row_at, int64_t columns) {
  Vec results[1];
  dots(x, 0, row_at, columns, results);
  return results[0];
}

// result[0 .. VECTORS * LANES) = sum over n of weights[n] * rows[offsets[n] ..]
template <int VECTORS, typename T>
void weigh_columns(const T* rows, const int64_t* offsets, const float* weights, int64_t count, float* result) {
  constexpr int AHEAD = 8;
  Vec sums[VECTORS];
#pragma GCC unroll 8
  for (int c = 0; c < VECTORS; c++) sums[c] = zero();
  for (int64_t n = 0; n < count; n++) {
    if (n + AHEAD < count) {
      const char* next = reinterpret_cast<const char*>(rows + offsets[n + AHEAD]);
      for (size_t byte = 0; byte < VECTORS * LANES * sizeof(T); byte += 64) prefetch(next + byte);
    }
    const T* row = rows + offsets[n];
    const Vec weight = broadcast(weights[n]);
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; c++) sums[c] = fma(weight, load(row + c * LANES), sums[c]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < VECTORS; c++) store(result + c * LANES, sums[c]);
}

// sums[offsets[n] ..][0 .. VECTORS * LANES) += weights[n] * row[..], the row staying in registers. The offsets differ.
template <int VECTORS, typename T>
void add_columns(const T* row, const int64_t* offsets, const float* weights, int64_t count, float* sums) {
  constexpr int AHEAD = 8;
  Vec columns[VECTORS];
#pragma GCC unroll 8
  for (int c = 0; c < VECTORS; c++) columns[c] = load(row + c * LANES);
  for (int64_t n = 0; n < count; n++) {
    if (n + AHEAD < count)
      for (int c = 0; c < VECTORS; c++) prefetch(sums + offsets[n + AHEAD] + c * LANES);
    float* target = sums + offsets[n];
    const Vec weight = broadcast(weights[n]);
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; c++) store(target + c * LANES, fma(weight, columns[c], load(target + c * LANES)));
  }
}

// Calls with the number of vectors, 8, 4, 2 or 1, and the first column of each block of columns, and for what is left
// with 0 vectors.
template <typename Function>
void for_column_blocks(int64_t columns, const Function& function) {
  int64_t column = 0;
  while (column < columns) {
    const int64_t vectors = (columns - column) / LANES;
    if (vectors >= 8) {
      function(std::integral_constant<int, 8>(), column);
      column += 8 * LANES;
    } else if (vectors >= 4) {
      function(std::integral_constant<int, 4>(), column);
      column += 4 * LANES;
    } else if (vectors >= 2) {
      function(std::integral_constant<int, 2>(), column);
      column += 2 * LANES;
    } else if (vectors == 1) {
      function(std::integral_constant<int, 1>(), column);
      column += LANES;
    } else {
      function(std::integral_constant<int, 0>(), column);
      column = columns;
    }
  }
}

// result[0 .. columns) = sum over n of weights[n] * rows[offsets[n] ..]
template <typename T>
void weigh(const T* rows, const int64_t* offsets, const float* weights, int64_t count, int64_t columns, T* result) {
  for_column_blocks(columns, [&](auto vectors, int64_t column) {
    float sums[8 * LANES];
    int64_t width = vectors * LANES;
    if constexpr (vectors > 0) {
      weigh_columns<vectors>(rows + column, offsets, weights, count, sums);
    } else {
      width = columns - column;
      std::fill(sums, sums + width, 0.0f);
      for (int64_t n = 0; n < count; n++)
        for (int64_t c = 0; c < width; c++) sums[c] += weights[n] * to_float(rows[offsets[n] + column + c]);
    }
    for (int64_t c = 0; c < width; c++) from_float(sums[c], result[column + c]);
  });
}

// sums[offsets[n] ..][0 .. columns) += weights[n] * row[..]; the offsets differ.
template <typename T>
void add_weighted(const T* row, const int64_t* offsets, const float* weights, int64_t count, int64_t columns,
                  float* sums) {
  for_column_blocks(columns, [&](auto vectors, int64_t column) {
    if constexpr (vectors > 0) {
      add_columns<vectors>(row + column, offsets, weights, count, sums + column);
    } else {
      for (int64_t n = 0; n < count; n++)
        for (int64_t c = column; c < columns; c++) sums[offsets[n] + c] += weights[n] * to_float(row[c]);
    }
  });
}

}  // namespace topk
