// What becomes of the kept keys of a row: their weights, and the sum of their values.
#pragma once

#include "tiles.h"

namespace topk {
namespace {

template <typename T>
T element(const Operand& x, int64_t batch, const RowPosition& row) {
  return static_cast<const T*>(x.data)[batch * x.batch_stride + row.head * x.head_stride + row.query * x.query_stride];
}

// Probabilities of the kept scores; the sink is a score more, of no key.
void softmax(const Candidates& row, const float* sink, float* probabilities) {
  const int32_t most = std::max(ordered(sink ? *sink : -INF), row.high);
  if (most == ORDERED_NAN) {
    std::fill(probabilities, probabilities + row.count, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const float largest = unordered(most);
  for (int n = 0; n < row.count; n++) probabilities[n] = unordered(row.scores[n]);
  for (int n = 0; n < row.count; n++) probabilities[n] = exp_nonpositive(probabilities[n] - largest);
  Vec totals = zero();
  int n = 0;
  for (; n + LANES <= row.count; n += LANES) totals = add(totals, load(probabilities + n));
  float total = sum(totals) + (sink ? exp_nonpositive(*sink - largest) : 0.0f);
  for (; n < row.count; n++) total += probabilities[n];
  const float factor = 1 / total;
  for (int n = 0; n < row.count; n++) probabilities[n] *= factor;
}

void finish(const Arguments& a, const Tile& tile, const RowPosition& position, Candidates& row, const Scratch& s) {
  float* probabilities = s.probabilities;
  const int64_t number = (tile.batch * a.heads + position.head) * a.queries + position.query;
  int32_t* indices = a.indices + number * a.kept;
  float* weights = a.weights + number * a.kept;
  keep_exactly(row, int(a.kept));
  float sink = 0;
  if (a.sink >= 0) sink = element<float>(a.operands[a.sink], tile.batch, position);
  if (row.count == 0 && a.sink < 0 && !a.zero_empty_rows) {
    // A row of NaN weights keeps the lowest keys, so that its gradient is NaN where that of the definition is.
    row.count = int(a.kept);
    for (int n = 0; n < row.count; n++) {
      row.indices[n] = n;
      row.scores[n] = row.high = ORDERED_NAN;
    }
  }
  softmax(row, a.sink >= 0 ? &sink : nullptr, probabilities);
  std::copy(row.indices, row.indices + row.count, indices);
  std::fill(indices + row.count, indices + a.kept, -1);
  std::copy(probabilities, probabilities + row.count, weights);
  std::fill(weights + row.count, weights + a.kept, 0.0f);
  if (a.after.apply_listed) {
    const Block block{a.operands, tile.batch, &position, 1, 0, row.count};
    a.after.apply_listed(block, row.indices, probabilities);
  }
  if (a.dropout_keep) {
    const bool* keep = a.dropout_keep + number * a.kept;
    for (int n = 0; n < row.count; n++) {
      probabilities[n] *= keep[n] ? float(a.dropout_factor) : 0.0f;
      if (!keep[n]) weights[n] = -weights[n];
    }
  }
  const Value* values = row_of<Value>(a.value, tile.batch, position.head / (a.heads / a.value_heads), 0);
  for (int n = 0; n < row.count; n++) s.offsets[n] = row.indices[n] * a.value.strides[2];
  weigh(values, s.offsets, probabilities, row.count, a.value_size, static_cast<Value*>(a.output) + number * a.value_size);
}

}  // namespace
}  // namespace topk
