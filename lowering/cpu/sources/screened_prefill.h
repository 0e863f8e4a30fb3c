// Tiles of query rows over keys in int8, some key heads at a time, as `prefill` over packed keys.
#pragma once

#include <omp.h>

#include <mutex>
#include <optional>
#include <vector>

#include "kept_keys.h"
#include "screening.h"

#if defined(TOPK_AVX512_VNNI)

namespace topk {
namespace {

constexpr int SCREENED_TILE_BYTES = 3 << 19;  // of the bounds of a tile
constexpr int MOST_SCREENED_ROWS = 48;

// Panels of a head's keys, packed once it is known that all of its remaining tiles need them.
class LatePanels {
 public:
  // Without memory for all of them, each tile packs block by block, as one does that needs them for a few rows.
  PackedKeys of(const Arguments& a, int64_t batch, int64_t head, Factor* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
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

  std::mutex mutex_;
  bool was_tried_ = false;
  std::optional<Buffer> panels_, norms_;
};

struct HeadOfKeys {
  bool is_screened;  // its tiles are
  float most_lost, most_left, mean_norm;
  float mean[MAX_INT8_DEPTH];
  LatePanels late_panels;
};

// The rows of a head's keys, from one on.
auto key_rows(const Arguments& a, int64_t head, int64_t first) {
  return [&a, head, first](int64_t n) { return row_of<Query>(a.key, head / a.key_heads, head % a.key_heads, first + n); };
}

// What a thread works with on a tile.
struct TileWork {
  Scratch plain;
  ScreenScratch screen;
  Factor* block;  // panels of a block, for rows that are left

  TileWork(const Arguments& a, Arena& arena, int64_t tile_rows, int64_t capacity)
      : plain(a, arena, tile_rows), screen(a, arena, tile_rows) {
    block = arena.take<Factor>(BLOCK * factors_of(a.depth));
    for (int64_t r = 0; r < tile_rows; r++) {
      int32_t* list = arena.take<int32_t>(2 * capacity);
      if (arena.is_counting()) continue;
      plain.candidates[r].scores = list;
      plain.candidates[r].indices = list + capacity;
    }
  }
};

class ScreenedPrefill {
 public:
  explicit ScreenedPrefill(const Arguments& a)
      : a_(a),
        limits_(a.kept, a.keys),
        rows_(a.heads / a.key_heads * a.queries),
        tile_rows_(tile_rows_of(rows_, a.keys)),
        tiles_(rounded_up(rows_, tile_rows_) / tile_rows_),
        panels_(rounded_up(a.keys, PANEL) / PANEL),
        quads_(quads_of(a.depth)),
        all_heads_(a.batch * a.key_heads),
        heads_at_once_(std::min(all_heads_, std::max(a.threads, rounded_up(4 * a.threads, tiles_) / tiles_))),
        heads_(heads_at_once_),
        rounded_(heads_at_once_ * panels_ * PANEL * quads_ * int64_t(sizeof(uint32_t))),
        facts_((3 * heads_at_once_ * panels_ + LANES) * int64_t(sizeof(float))) {}

  void run() {
    Arena counter(nullptr);
    TileWork(a_, counter, tile_rows_, limits_.capacity);
    const int64_t thread_bytes = rounded_up(int64_t(counter.used()), 4096) + 64;
    const Buffer memory(a_.threads * thread_bytes);
    std::fill_n(facts_.as<float>(), 3 * heads_at_once_ * panels_ + LANES, 0.0f);
#pragma omp parallel num_threads(int(a_.threads))
    {
      Arena arena(memory.as<std::byte>(omp_get_thread_num() * thread_bytes));
      TileWork work(a_, arena, tile_rows_, limits_.capacity);
      for (int64_t head = 0; head < all_heads_; head += heads_at_once_) {
        const int64_t heads = std::min(heads_at_once_, all_heads_ - head);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < heads; n++)
          heads_[n].mean_norm = mean_key(a_.keys, a_.depth, key_rows(a_, head + n, 0), heads_[n].mean);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < heads * panels_; n++) round(head, n / panels_, n % panels_);
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < heads; n++) decide(head, n, work);
        // The last tiles first: under a causal mask they are the longest.
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = heads; n < heads * tiles_; n++) run_tile(head, n % heads, tiles_ - 1 - n / heads, work);
#pragma omp single
        for (HeadOfKeys& local : heads_) local.late_panels.free();
      }
    }
  }

 private:
  static int64_t tile_rows_of(int64_t rows, int64_t keys) {
    const int64_t fit = SCREENED_TILE_BYTES / (keys * int64_t(sizeof(int16_t)));
    return rounded_up(std::clamp<int64_t>(std::min(fit, rows), 1, MOST_SCREENED_ROWS - GROUP_ROWS + 1), GROUP_ROWS);
  }

  uint32_t* panels_of(int64_t local) const { return rounded_.as<uint32_t>() + local * panels_ * PANEL * quads_; }
  float* steps_of(int64_t local) const { return facts_.as<float>() + 3 * local * panels_; }

  void round(int64_t head, int64_t local, int64_t panel) {
    const HeadOfKeys& keys = heads_[local];
    const int64_t first = panel * PANEL;
    const PanelFacts facts =
        round_panel(std::min<int64_t>(PANEL, a_.keys - first), a_.depth, key_rows(a_, head + local, first), keys.mean,
                    keys.mean_norm, panels_of(local) + panel * PANEL * quads_);
    float* target = steps_of(local) + panel;
    target[0] = facts.step;
    target[panels_] = facts.lost;
    target[2 * panels_] = facts.left;
  }

  // Whether a head is screened: its keys must be bounded, and by its last tile not many rows be left. That depends on
  // nothing but the inputs, so that each call gives the same result, with any number of threads.
  void decide(int64_t head, int64_t local, TileWork& work) {
    HeadOfKeys& keys = heads_[local];
    const float* lost = steps_of(local) + panels_;
    keys.most_lost = *std::max_element(lost, lost + panels_);
    keys.most_left = *std::max_element(lost + panels_, lost + 2 * panels_);
    keys.is_screened = keys.most_lost < INF;
    const int64_t left = run_tile(head, local, tiles_ - 1, work);
    keys.is_screened = keys.is_screened && 4 * left <= rows_ - (tiles_ - 1) * tile_rows_;
  }

  // Returns how many rows were left to a scan of all scores.
  int64_t run_tile(int64_t head, int64_t local, int64_t number, TileWork& work) {
    const int64_t which = head + local, first_row = number * tile_rows_;
    Tile tile{which / a_.key_heads, which % a_.key_heads, first_row, int(std::min(tile_rows_, rows_ - first_row))};
    HeadOfKeys& keys = heads_[local];
    start(a_, tile, work.plain);
    if (keys.is_screened) {
      tile.rows = screen(tile, local, work);
    } else if (a_.screening_counts) {
      a_.screening_counts->add(0, tile.rows, 0);
    }
    if (tile.rows == 0) return 0;
    pack_queries(a_, tile, work.plain);
    const PackedKeys packed = keys.is_screened ? PackedKeys{nullptr, nullptr, work.block}
                                               : keys.late_panels.of(a_, tile.batch, tile.key_head, work.block);
    TileScan(a_, tile, work.plain, packed, limits_).run();
    for (int r = 0; r < tile.rows; r++) finish(a_, tile, work.plain.positions[r], work.plain.candidates[r], work.plain);
    return tile.rows;
  }

  // Finishes the rows of a tile whose survivors are found; moves the others to its front and returns their number.
  int screen(const Tile& tile, int64_t local, TileWork& work) {
    const float* steps = steps_of(local);
    const Int8Keys keys{panels_of(local), steps, steps + panels_, steps + 2 * panels_, heads_[local].most_lost,
                        heads_[local].most_left, heads_[local].mean_norm};
    ScreenScan scan(a_, tile, work.plain, work.screen, keys);
    scan.run();
    int left = 0;
    int64_t survivors = 0;
    for (int r = 0; r < tile.rows; r++) {
      const RowPosition position = work.plain.positions[r];
      if (Candidates* found = scan.find(r)) {
        survivors += found->count;
        finish(a_, tile, position, *found, work.plain);
      } else {
        work.plain.positions[left++] = position;
      }
    }
    if (a_.screening_counts) a_.screening_counts->add(tile.rows - left, left, survivors);
    return left;
  }

  const Arguments& a_;
  const Limits limits_;
  const int64_t rows_, tile_rows_, tiles_, panels_, quads_, all_heads_, heads_at_once_;
  std::vector<HeadOfKeys> heads_;
  const Buffer rounded_, facts_;  // panels of each head; their steps, lost and left
};

}  // namespace
}  // namespace topk

#endif
