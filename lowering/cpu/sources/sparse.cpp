// Products with the sparse matrix of the kept keys, indices [B, Hq, Lq, kept] with -1 for an empty slot:
//
//   dot_products   d[i, n] = rows[i] . table[indices[i, n]]                  0 in an empty slot
//   weighted_sum   out[i]  = sum over n of w[i, n] * table[indices[i, n]]
//   scatter_rows   out[j]  = sum over the i, n with indices[i, n] = j of w[i, n] * rows[i]
//
// Rows [B, Hq, Lq, columns] and a table [B, H, Lk, columns] of one element type (defined as ELEMENT by the build), with
// H a divisor of Hq; sums are float32. The last product takes a range of keys at a time, and adds to each of its rows in
// the order of the queries, so that the number of threads changes no bit.

#include <atomic>

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

namespace {

constexpr int64_t RANGE_SUMS = 1 << 19;  // sums that are held at a time, about

void dot_products(const SparseArguments& a) {
#pragma omp parallel for num_threads(int(a.threads)) schedule(static)
  for (int64_t number = 0; number < a.batch * a.heads * a.queries; number++) {
    const int64_t query = number % a.queries, head = number / a.queries % a.heads, batch = number / a.queries / a.heads;
    const Element* row = row_of<Element>(a.rows, batch, head, query);
    const Element* table = row_of<Element>(a.table, batch, head / (a.heads / a.table_heads), 0);
    const int32_t* indices = a.indices + number * a.kept;
    float* products = a.weights + number * a.kept;
    for (int64_t first = 0; first < a.kept; first += LANES) {
      const int64_t count = std::min<int64_t>(LANES, a.kept - first);
      const Element* chosen[LANES];
      for (int64_t n = 0; n < LANES; n++)
        chosen[n] = n < count && indices[first + n] >= 0 ? table + indices[first + n] * a.table.strides[2] : row;
      for (int64_t n = first + LANES; n < std::min(first + 2 * LANES, a.kept); n++)
        if (indices[n] >= 0) prefetch(table + indices[n] * a.table.strides[2]);
      float found[LANES];
      store(found, dots(row, chosen, a.columns));
      for (int64_t n = 0; n < count; n++) products[first + n] = indices[first + n] >= 0 ? found[n] : 0.0f;
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

template <void (*function)(const SparseArguments&)>
int64_t run(const SparseArguments* arguments) {
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
