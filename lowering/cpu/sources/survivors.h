// Survivors: the keys of a row that can be among its k largest scores by bounds of them, when bounds are met one by one.
#pragma once

#include "filter.h"

#if defined(TOPK_AVX512_VNNI)

namespace topk {
namespace {

// How many survivors a row has room for, and how many may be left when there was no room.
struct SurvivorLimits {
  int k, capacity, most_left;

  SurvivorLimits(int64_t kept, int64_t keys) : k(int(kept)) {
    const int64_t wanted = std::min(3 * kept + 512, keys + BLOCK);
    capacity = int(std::max<int64_t>(rounded_up(wanted, LANES) + LANES, Limits(kept, keys).capacity));
    most_left = capacity - BLOCK - LANES - (capacity - BLOCK) / 8;
  }
};

// Survivors of a row: as candidates by their lower bounds, with upper bounds beside.
struct Survivors {
  Candidates lower;
  float* upper;
};

// Raises the threshold to the k-th largest lower bound, or with up to `slack` more above it, and keeps what it can.
inline __attribute__((noinline)) void raise_threshold(Survivors& row, int k, int slack) {
  Candidates lower = row.lower;  // with its members in registers: the compiler cannot know that stores leave them alone
  float* const upper = row.upper;
  put_in_order(lower);
  int32_t low = lower.low;
  int left = lower.count;
  if (lower.threshold > -INF) {
    pad(lower, std::numeric_limits<int32_t>::min());
    low = ordered(lower.threshold);
    left = count_from(lower, low);
  }
  if (left > k) {
    lower.threshold = unordered(find_cut(lower, k, slack, low, left).least);
    const Vec threshold = broadcast(lower.threshold);
    int kept = 0;
    for (int n = 0; n < lower.count; n += LANES) {
      const Vec bounds = load(upper + n);
      uint32_t stays = _mm512_cmp_ps_mask(bounds, threshold, _CMP_GE_OQ);
      if (n + LANES > lower.count) stays &= (1u << (lower.count - n)) - 1;
      const __m512i scores = _mm512_loadu_si512(lower.scores + n), indices = _mm512_loadu_si512(lower.indices + n);
      _mm512_storeu_ps(upper + kept, _mm512_maskz_compress_ps(__mmask16(stays), bounds));
      _mm512_storeu_si512(lower.scores + kept, _mm512_maskz_compress_epi32(__mmask16(stays), scores));
      _mm512_storeu_si512(lower.indices + kept, _mm512_maskz_compress_epi32(__mmask16(stays), indices));
      kept += __builtin_popcount(stays);
    }
    lower.count = lower.ordered = kept;
  }
  row.lower = lower;
}

}  // namespace
}  // namespace topk

#endif
