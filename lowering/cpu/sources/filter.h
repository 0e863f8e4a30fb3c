// The filter against the running threshold: which scores of a panel or of a block become candidates of their rows.
#pragma once

#include "panels.h"
#include "selection.h"

namespace topk {
namespace {

constexpr int BLOCK = 128;  // keys of a block

// How many candidates a row keeps at least, and has room for.
struct Limits {
  int k, capacity;

  Limits(int64_t kept, int64_t keys) : k(int(kept)) {
    const int64_t wanted = std::max(2 * kept, kept + 128) + BLOCK;
    // A vector more, which appending may write.
    capacity = int(rounded_up(std::min(wanted, keys + BLOCK), LANES) + LANES);
  }
};

inline bool has_room(const Candidates& row, const Limits& limits, int coming) {
  return row.count + coming + LANES <= limits.capacity;
}

// Leaves room for the scores of `coming` keys. A few more than k stay, which spares the search for exactly k.
inline void make_room(Candidates& row, const Limits& limits, int coming) {
  if (!has_room(row, limits, coming)) keep_largest(row, limits.k, limits.k / 4 + 8);
}

// Appends the scores of a block that are above the row's threshold. As before, there is room for a panel afterwards.
void filter_block(Candidates& row, const float* scores, int64_t count, int64_t first_key, const Limits& limits) {
  static_assert(BLOCK / LANES <= 32);
  const Vec threshold = broadcast(row.threshold);
  uint32_t bits[BLOCK / LANES], found = 0;
  for (int64_t n = 0; n < count; n += LANES) {
    uint32_t above = not_less_equal(load(scores + n), threshold);
    if (n + LANES > count) above &= (1u << (count - n)) - 1;
    bits[n / LANES] = above;
    found |= uint32_t(above != 0) << (n / LANES);
  }
  if (!found) return;
  make_room(row, limits, BLOCK);
  for (; found; found &= found - 1) {
    const int n = __builtin_ctz(found);
    append(row, load(scores + n * LANES), bits[n], first_key + n * LANES);
  }
  make_room(row, limits, PANEL);
}

// A group of query rows and a panel of keys, of which `count` are keys.
struct Pairing {
  const Factor *query, *panel;
  int64_t factors;
  float scale;
  int rows;
  int64_t first_key, count;
};

template <int ROWS>
void store_scores(const Pairing& pair, float* scores) {
  Vec found[ROWS][2];
  multiply_panel(pair.query, pair.panel, pair.factors, pair.scale, found);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    store(scores + r * BLOCK, found[r][0]);
    store(scores + r * BLOCK + LANES, found[r][1]);
  }
}

// Candidates straight from the registers: scores that are none are never stored. `rows` has ROWS elements.
template <int ROWS>
void filter_panel(const Pairing& pair, Candidates* rows, const Limits& limits) {
  Vec found[ROWS][2];
  multiply_panel(pair.query, pair.panel, pair.factors, pair.scale, found);
  const uint32_t last = pair.count >= PANEL ? 0 : uint32_t(1) << pair.count;
  const uint32_t inside = last - 1;
  // All comparisons first: they need not wait for a branch.
  uint32_t bits[ROWS];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    const Vec threshold = broadcast(rows[r].threshold);
    const uint32_t low = not_less_equal(found[r][0], threshold), high = not_less_equal(found[r][1], threshold);
    bits[r] = (low | high << LANES) & inside;
  }
  uint32_t full = 0;
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    if (r >= pair.rows) break;
    if (!bits[r]) continue;
    Candidates& row = rows[r];
    // With its members in registers: the compiler cannot know that appending leaves them alone.
    Candidates local = row;
    append(local, found[r][0], bits[r] & ((1u << LANES) - 1), pair.first_key);
    append(local, found[r][1], bits[r] >> LANES, pair.first_key + LANES);
    row.count = local.count;
    full |= uint32_t(!has_room(local, limits, PANEL)) << r;
  }
  // Here, where the scores need no longer stay in registers.
  for (; full; full &= full - 1) make_room(rows[__builtin_ctz(full)], limits, PANEL);
}

// Calls with the smallest of three group sizes that holds the rows.
template <typename Function>
inline void for_rows(int rows, Function function) {
  if (rows > GROUP_ROWS * 2 / 3)
    function(std::integral_constant<int, GROUP_ROWS>());
  else if (rows > GROUP_ROWS / 3)
    function(std::integral_constant<int, GROUP_ROWS * 2 / 3>());
  else
    function(std::integral_constant<int, (GROUP_ROWS + 2) / 3>());
}

}  // namespace
}  // namespace topk
