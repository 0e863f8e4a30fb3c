// Tiles of query rows over keys in int8, some key heads at a time, as `prefill` over packed keys.
#pragma once

#include <omp.h>

#include <optional>
#include <vector>

#include "kept_keys.h"
#include "screening.h"

#if defined(TOPK_AVX512_VNNI)

namespace topk {
namespace {

// What became of the rows so far. Where many were left to the scan of all scores, to screen others first is a waste.
class RowCounts {
 public:
  bool is_worth_trying() const {
    const int64_t seen = screened_.load(std::memory_order_relaxed) + left_.load(std::memory_order_relaxed);
    return left_.load(std::memory_order_relaxed) <= seen / 4 + 4 * MOST_SCREENED_ROWS;
  }
  void add(int64_t screened, int64_t left, int64_t survivors) {
    screened_.fetch_add(screened, std::memory_order_relaxed);
    left_.fetch_add(left, std::memory_order_relaxed);
    survivors_.fetch_add(survivors, std::memory_order_relaxed);
  }
  void add_to(ScreeningCounts& counts) const {
    counts.screened += screened_;
    counts.left += left_;
    counts.survivors += survivors_;
  }

 private:
  std::atomic<int64_t> screened_{0}, left_{0}, survivors_{0};
};

// Whether the keys of a head are screened is known only when all were rounded: one that is too large forbids it.
struct HeadOfKeys {
  std::atomic<bool> is_bounded;
  float mean_norm;
  float mean[MAX_INT8_DEPTH];
};

// The panels of a head's keys, packed once it is known that most of its tiles need them.
class LatePanels {
 public:
  // Without memory for all of them, each tile packs block by block, as one does that needs them for a few rows.
  PackedKeys of(const Arguments& a, int64_t batch, int64_t head, Factor* block) {
#pragma omp critical(topk_late_panels)
    if (!was_tried_) pack(a, batch, head);
    return panels_ ? PackedKeys{panels_->as<Factor>(), norms_->as<float>(), nullptr} : PackedKeys{nullptr, nullptr, block};
  }

  void free() {
    panels_.reset();
    norms_.reset();
    was_tried_ = false;
  }

 private:
  void pack(const Arguments& a, int64_t batch, int64_t head) {
    was_tried_ = true;
    const int64_t blocks = rounded_up(a.keys, BLOCK) / BLOCK, size = BLOCK * factors_of(a.depth);
    try {  // no exception may leave a parallel region
      norms_.emplace(blocks * int64_t(sizeof(float)));
      panels_.emplace(blocks * size * int64_t(sizeof(Factor)));
    } catch (const std::bad_alloc&) {
      return;
    }
    for (int64_t n = 0; n < blocks; n++)
      norms_->as<float>()[n] = pack_keys(a, batch, head, n * BLOCK, std::min<int64_t>(BLOCK, a.keys - n * BLOCK),
                                         panels_->as<Factor>() + n * size);
  }

  bool was_tried_ = false;
  std::optional<Buffer> panels_, norms_;
};

// What a thread works with on a tile.
struct TileWork {
  Scratch plain;
  ScreenScratch screen;

  TileWork(const Arguments& a, Arena& arena, int64_t tile_rows) : plain(a, arena, tile_rows), screen(a, arena, tile_rows) {}
};

// Finishes the rows of a tile whose survivors are known; moves the others to its front and returns their number.
int finish_screened(const Arguments& a, const Tile& tile, TileWork& work, ScreenScan& scan, RowCounts& counts) {
  int left = 0;
  int64_t survivors = 0;
  for (int r = 0; r < tile.rows; r++) {
    const RowPosition position = work.plain.positions[r];
    if (work.screen.rows[r].is_left) {
      work.plain.positions[left++] = position;
    } else {
      Candidates found = scan.score(r);
      survivors += found.count;
      finish(a, tile, position, found, work.plain);
    }
  }
  counts.add(tile.rows - left, left, survivors);
  return left;
}

void prefill_screened(const Arguments& a) {
  const Limits limits(a.kept, a.keys);
  const SurvivorLimits survivor_limits(a.kept, a.keys, limits);
  const int64_t capacity = survivor_limits.capacity, quads = quads_of(a.depth);
  const int64_t rows = a.heads / a.key_heads * a.queries;
  const int64_t row_bytes = capacity * 3 * int64_t(sizeof(int32_t));
  const int64_t tile_rows = rounded_up(
      std::clamp<int64_t>(std::min(SCREENED_TILE_BYTES / row_bytes, rows), 1, MOST_SCREENED_ROWS - GROUP_ROWS + 1), GROUP_ROWS);
  const int64_t tiles = rounded_up(rows, tile_rows) / tile_rows;
  const int64_t panels = rounded_up(a.keys, PANEL) / PANEL;
  const int64_t all_heads = a.batch * a.key_heads;
  const int64_t heads_at_once = std::min(all_heads, rounded_up(4 * a.threads, tiles) / tiles);

  const Buffer rounded(heads_at_once * panels * PANEL * quads * int64_t(sizeof(uint32_t)));
  const Buffer facts_memory(heads_at_once * panels * int64_t(sizeof(PanelFacts)));
  const Buffer heads_memory(heads_at_once * int64_t(sizeof(HeadOfKeys)));
  uint32_t* all_panels = rounded.as<uint32_t>();
  PanelFacts* facts = facts_memory.as<PanelFacts>();
  HeadOfKeys* head_facts = heads_memory.as<HeadOfKeys>();
  Arena counter(nullptr);
  TileWork(a, counter, tile_rows);
  const int64_t thread_bytes = rounded_up(int64_t(counter.used()) + tile_rows * row_bytes, 4096) + 64;
  const Buffer memory(a.threads * thread_bytes);
  RowCounts counts;
  std::vector<LatePanels> late_panels(heads_at_once);

#pragma omp parallel num_threads(int(a.threads))
  {
    Arena arena(memory.as<std::byte>(omp_get_thread_num() * thread_bytes));
    TileWork work(a, arena, tile_rows);
    int32_t* lists = arena.take<int32_t>(0);
    for (int64_t r = 0; r < tile_rows; r++) {
      int32_t* list = lists + 3 * r * capacity;
      work.plain.candidates[r].scores = work.screen.rows[r].lower.scores = list;
      work.plain.candidates[r].indices = work.screen.rows[r].lower.indices = list + capacity;
      work.screen.rows[r].upper = reinterpret_cast<float*>(list + 2 * capacity);
    }
    for (int64_t head = 0; head < all_heads; head += heads_at_once) {
      const int64_t heads = std::min(heads_at_once, all_heads - head);
      const auto key_rows = [&](int64_t local, int64_t first) {
        return [&a, which = head + local, first](int64_t n) {
          return row_of<Query>(a.key, which / a.key_heads, which % a.key_heads, first + n);
        };
      };
#pragma omp for schedule(static)
      for (int64_t n = 0; n < heads; n++) {
        head_facts[n].mean_norm = mean_key(a.keys, a.depth, key_rows(n, 0), head_facts[n].mean);
        head_facts[n].is_bounded.store(true, std::memory_order_relaxed);
      }
#pragma omp for schedule(static)
      for (int64_t n = 0; n < heads * panels; n++) {
        const int64_t first = n % panels * PANEL;
        HeadOfKeys& local = head_facts[n / panels];
        const bool is_bounded = round_panel(std::min<int64_t>(PANEL, a.keys - first), a.depth, key_rows(n / panels, first),
                                            local.mean, local.mean_norm, all_panels + n * quads * PANEL, facts[n]);
        if (!is_bounded) local.is_bounded.store(false, std::memory_order_relaxed);
      }
      // The last tiles first: under a causal mask they are the longest.
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < heads * tiles; n++) {
        const int64_t local = n % heads, which = head + local, first_row = (tiles - 1 - n / heads) * tile_rows;
        Tile tile{which / a.key_heads, which % a.key_heads, first_row, int(std::min(tile_rows, rows - first_row))};
        start(a, tile, work.plain);
        PackedKeys keys{nullptr, nullptr, work.screen.block};
        if (head_facts[local].is_bounded.load(std::memory_order_relaxed) && counts.is_worth_trying()) {
          const Int8Keys rounded_keys{all_panels + local * panels * quads * PANEL, facts + local * panels};
          ScreenScan scan(a, tile, work.plain, work.screen, rounded_keys, survivor_limits);
          scan.run();
          tile.rows = finish_screened(a, tile, work, scan, counts);
          if (tile.rows == 0) continue;
        } else {
          counts.add(0, tile.rows, 0);
          keys = late_panels[local].of(a, tile.batch, tile.key_head, work.screen.block);
        }
        pack_queries(a, tile, work.plain);
        TileScan(a, tile, work.plain, keys, limits).run();
        for (int r = 0; r < tile.rows; r++) finish(a, tile, work.plain.positions[r], work.plain.candidates[r], work.plain);
      }
#pragma omp single
      for (LatePanels& panels_of_head : late_panels) panels_of_head.free();
    }
  }
  if (a.screening_counts) counts.add_to(*a.screening_counts);
}

}  // namespace
}  // namespace topk

#endif
