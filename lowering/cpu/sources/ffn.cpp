// The top-k FFN of few tokens: h = act(x W_up^T + b_up), or act(x W_gate^T + b_gate) * (x W_up^T + b_up) with a gate; the
// k hidden units of largest |h| of each token, and the sum of their columns of W_down.
//
//   for at most MOST_TOKENS tokens at a time:
//     all hidden units, a block of them at a time: each weight is read once for all tokens
//     for each token: the k largest
//     the output: where the columns of W_down are contiguous, those of the kept units alone are read; where its rows are
//     (as nn.Linear holds them) nearly every cache line holds a kept unit, and its rows are read as they lie
//
// Which units are kept is only known when all are computed, so both W_up and W_gate are read in full. Products and sums
// are float32. No sum is shared among threads, so that their number changes no bit.
//
// The build defines ELEMENT, the element type, and TOPK_AVX512_BF16 where pairs of bfloat16 are multiplied.
// Source: Gupta et al. 2021, arXiv:2106.06899.

#include <omp.h>

#include "activations.h"
#include "few_products.h"
#include "selection.h"

namespace topk {
namespace {

using Element = ELEMENT;
using Input = std::conditional_t<IN_PAIRS<Element>, BFloat16, float>;  // what weights are multiplied by

constexpr int64_t UNITS = 64;  // hidden units of a block
constexpr int64_t OUTPUT_ROWS = 32;  // rows of W_down of a block
constexpr int64_t LONGEST_SUM = 4096;  // columns that are summed at a time: they stay in the first-level cache

}  // namespace

// A matrix whose rows, or whose columns, are contiguous.
struct Matrix {
  const void* data;
  int64_t stride;  // from one row, or one column, to the next, in elements
  int64_t by_columns;
};

// The order is that of the structure which the caller fills.
struct FFNArguments {
  const void* input;  // [tokens, model size] of any strides
  int64_t input_strides[2];
  Matrix up, gate, down;
  const float *up_bias, *gate_bias;  // [hidden units] or null
  void* output;  // [tokens, output size]
  int32_t* indices;  // [tokens, kept]
  float *up_kept, *gate_kept;  // [tokens, kept], before the activation
  const bool* dropout_keep;  // [tokens, kept] or null
  int64_t tokens, model_size, hidden_size, output_size, kept;
  double dropout_factor;
  int64_t activation, has_gate, threads;
};

namespace {

using Arguments = FFNArguments;

const Element* at(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<const Element*>(matrix.data) +
         (matrix.by_columns ? column * matrix.stride + row : row * matrix.stride + column);
}

// The tokens that one pass over the weights computes, and what is known of their hidden units.
class Pass {
 public:
  Pass(const Arguments& a, int64_t first_token)
      : a_(a),
        first_token_(first_token),
        tokens_(std::min<int64_t>(MOST_TOKENS, a.tokens - first_token)),
        input_stride_(rounded_up(a.model_size, 2 * LANES)),
        unit_stride_(rounded_up(a.hidden_size, UNITS)),
        inputs_(MOST_TOKENS * input_stride_ * int64_t(sizeof(Input))),
        up_(MOST_TOKENS * unit_stride_ * int64_t(sizeof(float))),
        gate_(a.has_gate ? MOST_TOKENS * unit_stride_ * int64_t(sizeof(float)) : 0),
        hidden_(MOST_TOKENS * unit_stride_ * int64_t(sizeof(float))),
        coefficients_(tokens_ * a.kept * int64_t(sizeof(float))),
        candidates_(tokens_ * candidate_stride() * 2 * int64_t(sizeof(int32_t))) {
    pack_inputs();
  }

  void run() {
#pragma omp parallel num_threads(int(a_.threads))
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < a_.hidden_size; unit += UNITS)
        compute_units(unit, std::min(UNITS, a_.hidden_size - unit));
#pragma omp for schedule(dynamic, 1)
      for (int64_t token = 0; token < tokens_; token++) select(token);
      a_.down.by_columns ? sum_kept_columns() : multiply_rows();
    }
  }

 private:
  int64_t candidate_stride() const { return a_.hidden_size + LANES; }
  float* up(int64_t token) const { return up_.as<float>() + token * unit_stride_; }
  float* gate(int64_t token) const { return gate_.as<float>() + token * unit_stride_; }
  float* hidden(int64_t token) const { return hidden_.as<float>() + token * unit_stride_; }
  float* coefficients(int64_t token) const { return coefficients_.as<float>() + token * a_.kept; }
  int32_t* indices(int64_t token) const { return a_.indices + (first_token_ + token) * a_.kept; }
  Element* output(int64_t token) const {
    return static_cast<Element*>(a_.output) + (first_token_ + token) * a_.output_size;
  }

  void pack_inputs() {
    Input* target = inputs_.as<Input>();
    std::fill(target, target + MOST_TOKENS * input_stride_, Input{});
    const Element* source = static_cast<const Element*>(a_.input);
    for (int64_t t = 0; t < tokens_; t++)
      for (int64_t c = 0; c < a_.model_size; c++) {
        const Element x = source[(first_token_ + t) * a_.input_strides[0] + c * a_.input_strides[1]];
        from_float(to_float(x), target[t * input_stride_ + c]);
      }
  }

  // Units [first, first + count) of all tokens: before the activation, then hidden.
  void compute_units(int64_t first, int64_t count) {
    project(a_.up, a_.up_bias, first, count, up(0) + first);
    if (a_.has_gate) project(a_.gate, a_.gate_bias, first, count, gate(0) + first);
    for (int64_t t = 0; t < tokens_; t++) {
      float* result = hidden(t) + first;
      activate(Activation(a_.activation), (a_.has_gate ? gate(t) : up(t)) + first, count, result);
      if (a_.has_gate)
        for (int64_t n = 0; n < count; n++) result[n] *= up(t)[first + n];
    }
  }

  // result[t * unit_stride + n] = input[t] . matrix[first + n] + bias[first + n]
  void project(const Matrix& matrix, const float* bias, int64_t first, int64_t count, float* result) {
    const Inputs<Input> inputs{inputs_.as<Input>(), input_stride_};
    for_tokens(tokens_, [&](auto tokens) {
      if (!matrix.by_columns) {
        row_dots<tokens>(at(matrix, first, 0), matrix.stride, count, a_.model_size, inputs, result, unit_stride_);
        return;
      }
      for (int t = 0; t < tokens; t++) std::fill(result + t * unit_stride_, result + t * unit_stride_ + count, 0.0f);
      add_rows<tokens>(
          a_.model_size, count, [&](int64_t c) { return at(matrix, first, c); },
          [&](int t, int64_t c) { return to_float(inputs.data[t * inputs.stride + c]); }, result, unit_stride_);
    });
    if (!bias) return;
    for (int64_t t = 0; t < tokens_; t++)
      for (int64_t n = 0; n < count; n++) result[t * unit_stride_ + n] += bias[first + n];
  }

  // The kept units of a token, in ascending order, and what W_down is multiplied by.
  void select(int64_t token) {
    int32_t* lists = candidates_.as<int32_t>() + token * 2 * candidate_stride();
    Candidates row{.scores = lists, .indices = lists + candidate_stride()};
    row.clear();
    for (int64_t unit = 0; unit < a_.hidden_size; unit++) {
      row.scores[unit] = bit_cast<int32_t>(std::fabs(hidden(token)[unit]));
      row.indices[unit] = int32_t(unit);
    }
    row.count = int(a_.hidden_size);
    keep_largest(row, int(a_.kept), 0);
    std::copy(row.indices, row.indices + a_.kept, indices(token));
    const int64_t begin = (first_token_ + token) * a_.kept;
    for (int64_t n = 0; n < a_.kept; n++) {
      const int32_t unit = row.indices[n];
      a_.up_kept[begin + n] = up(token)[unit];
      if (a_.has_gate) a_.gate_kept[begin + n] = gate(token)[unit];
      float coefficient = hidden(token)[unit];
      if (a_.dropout_keep) coefficient *= a_.dropout_keep[begin + n] ? float(a_.dropout_factor) : 0.0f;
      coefficients(token)[n] = coefficient;
    }
  }

  // output[t] = sum over the kept units of coefficient * column of W_down. Threads share the columns of the result.
  void sum_kept_columns() {
    const int64_t share = rounded_up(rounded_up(a_.output_size, a_.threads) / a_.threads, 64);
    const int64_t width = std::clamp<int64_t>(share, 1, LONGEST_SUM);
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t token = 0; token < tokens_; token++) {
      for (int64_t first = 0; first < a_.output_size; first += width) {
        const int64_t count = std::min(width, a_.output_size - first);
        float sums[LONGEST_SUM];
        std::fill(sums, sums + count, 0.0f);
        add_rows<1>(
            a_.kept, count, [&](int64_t n) { return at(a_.down, first, indices(token)[n]); },
            [&](int, int64_t n) { return coefficients(token)[n]; }, sums, 0);
        for (int64_t c = 0; c < count; c++) from_float(sums[c], output(token)[first + c]);
      }
    }
  }

  // output[t][o] = row o of W_down . the hidden units, of which those that are not kept are zero.
  void multiply_rows() {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < MOST_TOKENS; token++) {
      std::fill(hidden(token), hidden(token) + unit_stride_, 0.0f);
      if (token >= tokens_) continue;
      for (int64_t n = 0; n < a_.kept; n++) hidden(token)[indices(token)[n]] = coefficients(token)[n];
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < a_.output_size; first += OUTPUT_ROWS) {
      const int64_t count = std::min(OUTPUT_ROWS, a_.output_size - first);
      float sums[MOST_TOKENS * OUTPUT_ROWS];
      const Inputs<float> inputs{hidden(0), unit_stride_};
      for_tokens(tokens_, [&](auto tokens) {
        row_dots<tokens>(at(a_.down, first, 0), a_.down.stride, count, a_.hidden_size, inputs, sums, OUTPUT_ROWS);
      });
      for (int64_t t = 0; t < tokens_; t++)
        for (int64_t o = 0; o < count; o++) from_float(sums[t * OUTPUT_ROWS + o], output(t)[first + o]);
    }
  }

  const Arguments& a_;
  const int64_t first_token_, tokens_, input_stride_, unit_stride_;
  const Buffer inputs_, up_, gate_, hidden_;  // [MOST_TOKENS][stride]
  const Buffer coefficients_;  // [tokens][kept]
  const Buffer candidates_;  // [tokens][2][hidden units and a vector more]
};

}  // namespace
}  // namespace topk

// 0, or 1 if there is not enough memory.
extern "C" int64_t ffn_forward(const topk::FFNArguments* arguments) {
  try {
    for (int64_t token = 0; token < arguments->tokens; token += topk::MOST_TOKENS) topk::Pass(*arguments, token).run();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
