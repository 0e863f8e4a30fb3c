// What the kernel of attention is called with.
//
// The build defines QUERY, of queries and keys, and VALUE, the element types.
#pragma once

#include <cstddef>

#include "rows.h"
#include "score.h"

namespace topk {

// What became of the rows.
struct ScreeningCounts {
  int64_t screened, left, survivors;

  // From any thread.
  void add(int64_t more_screened, int64_t more_left, int64_t more_survivors) {
    __atomic_fetch_add(&screened, more_screened, __ATOMIC_RELAXED);
    __atomic_fetch_add(&left, more_left, __ATOMIC_RELAXED);
    __atomic_fetch_add(&survivors, more_survivors, __ATOMIC_RELAXED);
  }
};

// What the program before the softmax makes of a product: an affine function or a soft cap, a number or -inf (affine.py).
struct Affine {
  int64_t only_masks;  // a score stays as it is, or becomes -inf
  int64_t operations;  // that may round a score
  double factor;  // of the product
  double cap;  // of cap * tanh(factor * product), or 0
  double highest_fill;  // the largest number that scores are filled with, before terms; -inf if there is none
};

// A copy of the keys in int8: for each head [panel][quad][PANEL] and facts [panel][3][PANEL], the step, lost and left of
// each key (int8.h).
struct KeyCopy {
  uint32_t* panels;  // null if there is none
  float* facts;
  const float* means;  // [B, Hk, depth]: what is subtracted from the keys of a head
  int64_t capacity;  // in panels, for each head
};

// The order is that of the structure which the caller fills.
struct ForwardArguments {
  Tensor query, key, value;
  void* output;  // [B, Hq, Lq, Dv]
  int32_t* indices;  // [B, Hq, Lq, kept]
  float* weights;  // [B, Hq, Lq, kept]
  const bool* dropout_keep;  // [B, Hq, Lq, kept] or null
  int64_t batch, heads, key_heads, value_heads, queries, keys, depth, value_size, kept;
  double scale, dropout_factor;
  int64_t zero_empty_rows, threads;
  int64_t screens;  // whether to screen the keys in int8: the program before the softmax is affine
  ScreeningCounts* screening_counts;  // or null
  Affine affine;
  KeyCopy copy;  // of the keys, which few query rows are screened by; the program only masks
  Program before, after;
  const Operand* operands;
  int64_t operand_count, sink;  // which operand is the sink, or -1
};

namespace {

using Arguments = ForwardArguments;
using Value = VALUE;

// Hands out parts of a buffer.
class Arena {
 public:
  explicit Arena(std::byte* data) : data_(data) {}
  template <typename T>
  T* take(size_t count) {
    T* result = reinterpret_cast<T*>(data_ + used_);
    used_ += size_t(rounded_up(int64_t(count * sizeof(T)), 64));
    return result;
  }
  size_t used() const { return used_; }
  bool is_counting() const { return !data_; }  // how much would be used

 private:
  std::byte* data_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace topk
