// Products of a weight matrix with the vectors of few tokens: the weights are read once, the tokens stay in the caches.
//
//   row_dots   result[t][r] = rows[r] . inputs[t]             for a matrix whose rows are contiguous
//   add_rows   result[t][c] += sum over n of w[t][n] * rows[n][c]    for one whose columns are, or a few of its rows
//
// Such a product is as fast as memory is read, and one stream of addresses does not keep enough reads under way: several
// rows are read side by side. (Measured on Zen 4, one core, float32: one row at a time 17 GB/s, eight 24 GB/s.)
#pragma once

#include "rows.h"

namespace topk {

constexpr int MOST_TOKENS = 8;  // of one pass over the weights

#if defined(TOPK_AVX512)
constexpr int SUMS = 24;  // of 32 registers
#else
constexpr int SUMS = 8;  // of 16 registers
#endif

// Calls with the smallest of 1, 2, 4 and 8 tokens that is enough.
template <typename Function>
void for_tokens(int64_t tokens, Function function) {
  if (tokens == 1)
    function(std::integral_constant<int, 1>());
  else if (tokens == 2)
    function(std::integral_constant<int, 2>());
  else if (tokens <= 4)
    function(std::integral_constant<int, 4>());
  else
    function(std::integral_constant<int, 8>());
}

// Vectors of the tokens, [tokens][stride]: zero beyond the last column, up to a whole number of vectors, and for the
// tokens that `for_tokens` adds.
template <typename Input>
struct Inputs {
  const Input* data;
  int64_t stride;
};

template <typename T>
inline Vec multiply_add(const T* row, const float* input, Vec sum) {
  return fma(load(row), load(input), sum);
}

#if defined(TOPK_AVX512_BF16)
inline Vec multiply_add(const BFloat16* row, const BFloat16* input, Vec sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(row), (__m512bh)_mm512_loadu_si512(input));
}
#endif

// result[t * result_stride + r] for ROWS rows of which `count` exist.
template <int TOKENS, int ROWS, typename T, typename Input>
inline __attribute__((always_inline)) void dots_of_group(const T* first_row, int64_t row_stride, int64_t count,
                                                         int64_t columns, const Inputs<Input>& inputs, float* result,
                                                         int64_t result_stride) {
  constexpr int STEP = std::is_same_v<Input, float> ? LANES : 2 * LANES;
  const T* rows[ROWS];
  Vec sums[ROWS][TOKENS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    rows[r] = first_row + std::min<int64_t>(r, count - 1) * row_stride;
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) sums[r][t] = zero();
  }
  // The processor foresees how a row goes on, but not where the next one begins.
  for (int r = 0; r < ROWS; r++)
    for (int line = 0; line < 4; line++)
      prefetch(reinterpret_cast<const char*>(rows[r] + ROWS * row_stride) + line * 64);
  const int64_t whole = columns / STEP * STEP;
  for (int64_t c = 0; c < whole; c += STEP) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++)
        sums[r][t] = multiply_add(rows[r] + c, inputs.data + t * inputs.stride + c, sums[r][t]);
    }
  }
  for (int r = 0; r < std::min<int64_t>(ROWS, count); r++) {
    for (int t = 0; t < TOKENS; t++) {
      float total = sum(sums[r][t]);
      for (int64_t c = whole; c < columns; c++)
        total += to_float(rows[r][c]) * to_float(inputs.data[t * inputs.stride + c]);
      result[t * result_stride + r] = total;
    }
  }
}

// result[t * result_stride + r] = rows[r] . inputs[t], for all of TOKENS tokens.
template <int TOKENS, typename T, typename Input>
void row_dots(const T* rows, int64_t row_stride, int64_t count, int64_t columns, const Inputs<Input>& inputs,
              float* result, int64_t result_stride) {
  constexpr int ROWS = std::min(8, SUMS / TOKENS);
  for (int64_t r = 0; r < count; r += ROWS)
    dots_of_group<TOKENS, ROWS>(rows + r * row_stride, row_stride, count - r, columns, inputs, result + r,
                                result_stride);
}

// result[t * result_stride + c] += sum over r of weights[t][r] * rows[r][c], for ROWS rows.
template <int TOKENS, int ROWS, typename T>
inline __attribute__((always_inline)) void add_group(const T* const (&rows)[ROWS], const float (&weights)[TOKENS][ROWS],
                                                     int64_t columns, float* result, int64_t result_stride) {
  const int64_t whole = columns / LANES * LANES;
  for (int64_t c = 0; c < whole; c += LANES) {
    Vec values[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) values[r] = load(rows[r] + c);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      Vec sum = load(result + t * result_stride + c);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) sum = fma(broadcast(weights[t][r]), values[r], sum);
      store(result + t * result_stride + c, sum);
    }
  }
  for (int64_t c = whole; c < columns; c++)
    for (int t = 0; t < TOKENS; t++)
      for (int r = 0; r < ROWS; r++) result[t * result_stride + c] += weights[t][r] * to_float(rows[r][c]);
}

// result[t * result_stride + c] += sum over n of weight(t, n) * row(n)[c], n ascending, for all of TOKENS tokens.
template <int TOKENS, typename Row, typename Weight>
void add_rows(int64_t count, int64_t columns, Row row, Weight weight, float* result, int64_t result_stride) {
  constexpr int ROWS = 8;
  using Pointer = decltype(row(int64_t(0)));
  int64_t n = 0;
  for (; n + ROWS <= count; n += ROWS) {
    Pointer rows[ROWS];
    float weights[TOKENS][ROWS];
    for (int r = 0; r < ROWS; r++) {
      rows[r] = row(n + r);
      for (int t = 0; t < TOKENS; t++) weights[t][r] = weight(t, n + r);
    }
    add_group<TOKENS, ROWS>(rows, weights, columns, result, result_stride);
  }
  for (; n < count; n++) {
    const Pointer rows[1] = {row(n)};
    float weights[TOKENS][1];
    for (int t = 0; t < TOKENS; t++) weights[t][0] = weight(t, n);
    add_group<TOKENS, 1>(rows, weights, columns, result, result_stride);
  }
}

}  // namespace topk
