// Operands that have an element for each query and key and that heads share: what is known of them is kept for all heads.
#pragma once

#include <deque>
#include <vector>

#include "arguments.h"

namespace topk {
namespace {

class SharedMatrices {
 public:
  explicit SharedMatrices(const Arguments& a) : arguments_(a), operands_(a.operands, a.operands + a.operand_count) {
    for (Operand& x : operands_) {
      if (!is_matrix(x) || x.head_stride || a.heads == 1) continue;
      const int64_t blocks = rounded_up(a.keys, RANGE_KEYS) / RANGE_KEYS, bands = rounded_up(a.queries, BAND) / BAND;
      std::vector<uint64_t>& ends = ends_.emplace_back(size_t((x.batch_stride ? a.batch : 1) * bands * blocks));
      ranges_.push_back({ends.data(), x.batch_stride ? bands * blocks : 0, blocks, a.queries, a.keys});
      x.ranges = &ranges_.back();
    }
    arguments_.operands = operands_.data();
  }
  SharedMatrices(const SharedMatrices&) = delete;
  SharedMatrices& operator=(const SharedMatrices&) = delete;

  const Arguments& arguments() const { return arguments_; }

 private:
  Arguments arguments_;
  std::vector<Operand> operands_;
  std::deque<std::vector<uint64_t>> ends_;
  std::deque<Ranges> ranges_;
};

}  // namespace
}  // namespace topk
