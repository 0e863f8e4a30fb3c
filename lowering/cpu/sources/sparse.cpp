// Products with the sparse matrix of the kept keys, indices [B, Hq, Lq, kept] with -1 for an empty slot:
//
//   dot_products   d[i, n] = rows[i] . table[indices[i, n]]                  0 in an empty slot
//   weighted_sum   out[i]  = sum over n of w[i, n] * table[indices[i, n]]
//   scatter_rows   out[j]  = sum over the i, n with indices[i, n] = j of w[i, n] * rows[i]
//
// and the backward of attention up to the last of them, in one pass over the query rows, row_gradients.
//
// Rows [B, Hq, Lq, columns] and a table [B, H, Lk, columns] of one element type (defined as ELEMENT by the build), with
// H a divisor of Hq; sums are float32. The last product takes a range of keys at a time, and adds to each of its rows in
// the order of the queries, so that the number of threads changes no bit.

#include <atomic>
#include <cmath>

#include <omp.h>

#include "rows.h"

namespace topk {

using Element = ELEMENT;

struct SparseArguments {
  Tensor rows, table;
  const int32_t* indices;
  float* weights;  // [B, Hq, Lq, kept]: given, or the result of dot_products
  Element* result;  // contiguous
  int64_t batch, heads, table_heads, queries, keys, columns, kept, threads;
};

// Of scores that no operation changes but by adding to them.
struct GradientArguments {
  Tensor grad, key, value;
  const int32_t* indices;
  const float* weights;  // with a minus sign where dropout dropped one
  float* grad_products;  // [B, Hq, Lq, kept]: of q.k, scaled; 0 in an empty slot
  float* summed;  // the same shape: the weights of the values after dropout; null without dropout
  Element* grad_query;  // contiguous
  int64_t batch, heads, key_heads, value_heads, queries, depth, value_size, kept;
  double scale, dropout_factor;
  int64_t threads;
};

namespace {

constexpr int64_t RANGE_SUMS = 1 << 19;  // sums that are held at a time, about

// products[n] = row . table[indices[n]], 0 in an empty slot
void kept_products(const Element* row, const Element* table, int64_t stride, const int32_t* indices, int64_t kept,
                   int64_t columns, float* products) {
  for (int64_t first = 0; first < kept; first += LANES) {
    const int64_t count = std::min<int64_t>(LANES, kept - first);
    const auto row_at = [&](int64_t n) {
      return n < count && indices[first + n] >= 0 ? table + indices[first + n] * stride : row;
    };
    for (int64_t n = first + LANES; n < std::min(first + 2 * LANES, kept); n++)
      if (indices[n] >= 0) prefetch(table + indices[n] * stride);
    float found[LANES];
    store(found, dots(row, row_at, columns));
    for (int64_t n = 0; n < count; n++) products[first + n] = indices[first + n] >= 0 ? found[n] : 0.0f;
  }
}

void dot_products(const SparseArguments& a) {
#pragma omp parallel for num_threads(int(a.threads)) schedule(static)
  for (int64_t number = 0; number < a.batch * a.heads * a.queries; number++) {
    const int64_t query = number % a.queries, head = number / a.queries % a.heads, batch = number / a.queries / a.heads;
    const Element* table = row_of<Element>(a.table, batch, head / (a.heads / a.table_heads), 0);
    kept_products(row_of<Element>(a.rows, batch, head, query), table, a.table.strides[2], a.indices + number * a.kept,
                  a.kept, a.columns, a.weights + number * a.kept);
  }
}

// The gradient of the weights, through the softmax to that of the products, and by those that of the query.
void row_gradients(const GradientArguments& a) {
  const int64_t thread_bytes = rounded_up((a.kept + 8) * int64_t(sizeof(int64_t) + sizeof(float)), 64);
  const Buffer memory(a.threads * thread_bytes);
  const float scale = float(a.scale), dropout_factor = float(a.dropout_factor);
#pragma omp parallel num_threads(int(a.threads))
  {
    int64_t* offsets = memory.as<int64_t>(omp_get_thread_num() * thread_bytes);
    float* chosen = reinterpret_cast<float*>(offsets + a.kept);
#pragma omp for schedule(static)
    for (int64_t number = 0; number < a.batch * a.heads * a.queries; number++) {
      const int64_t query = number % a.queries, head = number / a.queries % a.heads;
      const int64_t batch = number / a.queries / a.heads;
      const int32_t* indices = a.indices + number * a.kept;
      const float* weights = a.weights + number * a.kept;
      float* grads = a.grad_products + number * a.kept;
      const Element* values = row_of<Element>(a.value, batch, head / (a.heads / a.value_heads), 0);
      kept_products(row_of<Element>(a.grad, batch, head, query), values, a.value.strides[2], indices, a.kept,
                    a.value_size, grads);
      if (a.summed != nullptr) {
        float* summed = a.summed + number * a.kept;
        for (int64_t n = 0; n < a.kept; n++) {
          const float factor = std::signbit(weights[n]) ? 0.0f : dropout_factor;
          summed[n] = std::fabs(weights[n]) * factor;
          grads[n] *= factor;
        }
      }
      float sums[LANES] = {};
      for (int64_t n = 0; n < a.kept; n++) sums[n % LANES] += std::fabs(weights[n]) * grads[n];
      const float expected = sum(load(sums));
      int64_t count = 0;
      for (int64_t n = 0; n < a.kept; n++) {
        grads[n] = indices[n] >= 0 ? std::fabs(weights[n]) * (grads[n] - expected) * scale : 0.0f;
        offsets[count] = indices[n] * a.key.strides[2];
        chosen[count] = grads[n];
        count += indices[n] >= 0;
      }
      const Element* keys = row_of<Element>(a.key, batch, head / (a.heads / a.key_heads), 0);
      weigh(keys, offsets, chosen, count, a.depth, a.grad_query + number * a.depth);
    }
  }
}

void weighted_sum(const SparseArguments& a) {
  const int64_t thread_bytes = rounded_up((a.kept + 8) * int64_t(sizeof(int64_t) + sizeof(float)), 64);
  const Buffer memory(a.threads * thread_bytes);
#pragma omp parallel num_threads(int(a.threads))
  {
    int64_t* offsets = memory.as<int64_t>(omp_get_thread_num() * thread_bytes);
    float* weights = reinterpret_cast<float*>(offsets + a.kept);
#pragma omp for schedule(static)
    for (int64_t number = 0; number < a.batch * a.heads * a.queries; number++) {
      const int64_t head = number / a.queries % a.heads, batch = number / a.queries / a.heads;
      int64_t count = 0;
      for (int64_t n = number * a.kept; n < (number + 1) * a.kept; n++) {
        offsets[count] = a.indices[n] * a.table.strides[2];
        weights[count] = a.weights[n];
        count += a.indices[n] >= 0;
      }
      const Element* table = row_of<Element>(a.table, batch, head / (a.heads / a.table_heads), 0);
      weigh(table, offsets, weights, count, a.columns, a.result + number * a.columns);
    }
  }
}

// The rows [first, first + count) of one head of the result.
void scatter_range(const SparseArguments& a, int64_t batch, int64_t table_head, int64_t first, int64_t count) {
  const int64_t group = a.heads / a.table_heads;
  Element* result = a.result + ((batch * a.table_heads + table_head) * a.keys + first) * a.columns;
  const Buffer sum_memory(std::is_same_v<Element, float> ? 0 : count * a.columns * int64_t(sizeof(float)));
  float* sums = std::is_same_v<Element, float> ? reinterpret_cast<float*>(result) : sum_memory.as<float>();
  std::fill(sums, sums + count * a.columns, 0.0f);
  const Buffer memory((a.kept + 8) * int64_t(sizeof(int64_t) + sizeof(float)));
  int64_t* offsets = memory.as<int64_t>();
  float* weights = reinterpret_cast<float*>(offsets + a.kept);
  for (int64_t head = table_head * group; head < (table_head + 1) * group; head++) {
    for (int64_t query = 0; query < a.queries; query++) {
      const int64_t row = ((batch * a.heads + head) * a.queries + query) * a.kept;
      int64_t entries = 0;
      for (int64_t n = row; n < row + a.kept; n++) {
        const int64_t key = a.indices[n] - first;
        offsets[entries] = key * a.columns;
        weights[entries] = a.weights[n];
        entries += uint64_t(key) < uint64_t(count);
      }
      add_weighted(row_of<Element>(a.rows, batch, head, query), offsets, weights, entries, a.columns, sums);
    }
  }
  if constexpr (!std::is_same_v<Element, float>)
    for (int64_t n = 0; n < count * a.columns; n++) from_float(sums[n], result[n]);
}

void scatter_rows(const SparseArguments& a) {
  const int64_t heads = a.batch * a.table_heads;
  const int64_t wanted = std::max(a.keys * a.columns / RANGE_SUMS, (2 * a.threads + heads - 1) / heads);
  const int64_t ranges = std::clamp<int64_t>(wanted, 1, a.keys), range = rounded_up(a.keys, ranges) / ranges;
  std::atomic<bool> has_memory = true;
#pragma omp parallel for num_threads(int(a.threads)) schedule(dynamic, 1)
  for (int64_t n = 0; n < heads * ranges; n++) {
    const int64_t head = n / ranges, first = n % ranges * range;
    if (first >= a.keys) continue;
    try {
      scatter_range(a, head / a.table_heads, head % a.table_heads, first, std::min(range, a.keys - first));
    } catch (const std::bad_alloc&) {
      has_memory = false;
    }
  }
  if (!has_memory) throw std::bad_alloc();
}

template <auto function, typename Arguments>
int64_t run(const Arguments* arguments) {
  try {
    function(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace topk

// 0, or 1 if there is not enough memory.
extern "C" int64_t dot_products(const topk::SparseArguments* a) { return topk::run<topk::dot_products>(a); }
extern "C" int64_t weighted_sum(const topk::SparseArguments* a) { return topk::run<topk::weighted_sum>(a); }
extern "C" int64_t scatter_rows(const topk::SparseArguments* a) { return topk::run<topk::scatter_rows>(a); }
extern "C" int64_t row_gradients(const topk::GradientArguments* a) { return topk::run<topk::row_gradients>(a); }
