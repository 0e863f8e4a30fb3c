// Top-k attention: softmax over the k largest scores of each row, and the sum of their values.
//
//   for each tile of query rows that share a key head, for each block of keys:
//     ask the score function which blocks cannot hold a kept key: they are skipped
//     scores of a group of rows by the block of keys, in registers, then in a buffer of the first-level cache
//     the score function, on that buffer
//     candidates: the scores above a row's running threshold; when its buffer is full, the k largest stay
//   then, for each row: the k largest, their softmax, the sum of their values
//
// Products and sums are float32. Keys are packed once into panels, [depth][keys of a panel], that all tiles of a head
// share. Where only few rows share a key head (decoding), keys are read where they are instead, and the keys are split
// among the threads; each split selects its own candidates. Where it pays, screening in int8 first finds the few keys whose
// scores are needed (screening.h).
//
// The build defines QUERY and VALUE, the element types, and TOPK_AVX512_BF16 where pairs of bfloat16 are multiplied.
// Source: Gupta et al. 2021, arXiv:2106.06899.

#include <omp.h>

#include "kept_keys.h"
#include "screened_keys.h"
#include "screened_prefill.h"
#include "shared_matrices.h"

namespace topk {
namespace {

constexpr int TILE_BYTES = 1 << 18;  // of the candidates of a tile: they stay in the second-level cache
constexpr int64_t MIN_SPLIT = 512;  // keys

// Scores of up to FEW_ROWS rows by the keys of a block, where the keys lie. queries [rows][depth].
void multiply_few(const Arguments& a, int64_t batch, int64_t head, int64_t first, int64_t count, const Query* queries,
                  int64_t query_stride, int rows, float* scores) {
  const Vec scale = broadcast(float(a.scale));
  const Query* keys = row_of<Query>(a.key, batch, head, first);
  for (int64_t begin = 0; begin < count; begin += LANES) {
    const auto key_at = [&](int64_t n) { return keys + std::min(begin + n, count - 1) * a.key.strides[2]; };
    const auto multiply = [&](auto rows_at_once, int r) {
      Vec found[rows_at_once];
      dots(queries + r * query_stride, query_stride, key_at, a.depth, found);
      for (int i = 0; i < rows_at_once; i++) store(scores + (r + i) * BLOCK + begin, mul(found[i], scale));
    };
    int r = 0;
    if (a.depth <= 4 * DOT_COLUMNS<Query>)  // whose vectors stay in registers
      for (; r + 4 <= rows; r += 4) multiply(std::integral_constant<int, 4>(), r);
    for (; r + 2 <= rows; r += 2) multiply(std::integral_constant<int, 2>(), r);
    if (r < rows) multiply(std::integral_constant<int, 1>(), r);
  }
}

void scan_few(const Arguments& a, const Tile& tile, Scratch& s, int64_t begin, int64_t end, const Limits& limits) {
  for (int r = 0; r < tile.rows; r++) {
    const Query* row = row_of<Query>(a.query, tile.batch, s.positions[r].head, s.positions[r].query);
    std::copy(row, row + a.depth, s.queries + r * a.depth);
  }
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, end - first);
    const Block block{a.operands, tile.batch, s.positions, tile.rows, first, count};
    BlockFacts facts;
    if (can_skip(a, block, s.candidates, INF, facts)) continue;
    multiply_few(a, tile.batch, tile.key_head, first, count, s.queries, a.depth, tile.rows, s.scores);
    take_candidates(a, block, facts, s.candidates, s.scores, limits);
  }
}

// The values of a row's candidates, of which most are kept: they lie far apart, and none waits for another.
void fetch_values(const Arguments& a, const Tile& tile, const RowPosition& position, const Candidates& row) {
  if (row.count > 2 * a.kept) return;
  const Value* values = row_of<Value>(a.value, tile.batch, position.head / (a.heads / a.value_heads), 0);
  for (int n = 0; n < row.count; n++) prefetch_row(values + row.indices[n] * a.value.strides[2], a.value_size);
}

// --- The whole

// Tiles of query rows over packed keys, some key heads at a time so that their panels need little memory.
void prefill(const Arguments& a) {
  const Limits limits(a.kept, a.keys);
  const int64_t capacity = limits.capacity, factors = factors_of(a.depth);
  const int64_t rows = a.heads / a.key_heads * a.queries;
  const int64_t row_bytes = capacity * 2 * int64_t(sizeof(int32_t));
  const int64_t tile_rows = rounded_up(
      std::clamp<int64_t>(std::min(TILE_BYTES / row_bytes, rows), 1, MAX_TILE_ROWS - GROUP_ROWS + 1), GROUP_ROWS);
  const int64_t tiles = rounded_up(rows, tile_rows) / tile_rows;
  const int64_t blocks = rounded_up(a.keys, BLOCK) / BLOCK;
  const int64_t all_heads = a.batch * a.key_heads;
  const int64_t heads_at_once = std::min(all_heads, rounded_up(4 * a.threads, tiles) / tiles);

  const Buffer packed(heads_at_once * blocks * BLOCK * factors * sizeof(Factor));
  const Buffer packed_norms(heads_at_once * blocks * sizeof(float));
  Factor* panels = packed.as<Factor>();
  float* key_norms = packed_norms.as<float>();
  Arena counter(nullptr);
  Scratch(a, counter, tile_rows);
  const int64_t scratch_bytes = int64_t(counter.used());
  const int64_t thread_bytes = rounded_up(scratch_bytes + tile_rows * row_bytes, 4096) + 64;
  const Buffer memory(a.threads * thread_bytes);

#pragma omp parallel num_threads(int(a.threads))
  {
    Arena arena(memory.as<std::byte>(omp_get_thread_num() * thread_bytes));
    Scratch scratch(a, arena, tile_rows);
    int32_t* lists = arena.take<int32_t>(0);
    for (int64_t r = 0; r < tile_rows; r++) {
      scratch.candidates[r].scores = lists + 2 * r * capacity;
      scratch.candidates[r].indices = lists + (2 * r + 1) * capacity;
    }
    for (int64_t head = 0; head < all_heads; head += heads_at_once) {
      const int64_t heads = std::min(heads_at_once, all_heads - head);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < heads * blocks; n++) {
        const int64_t which = head + n / blocks, first = n % blocks * BLOCK;
        key_norms[n] = pack_keys(a, which / a.key_heads, which % a.key_heads, first,
                                 std::min<int64_t>(BLOCK, a.keys - first), panels + n * BLOCK * factors);
      }
      // The last tiles first: under a causal mask they are the longest.
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < heads * tiles; n++) {
        const int64_t local = n % heads, which = head + local, first_row = (tiles - 1 - n / heads) * tile_rows;
        const Tile tile{which / a.key_heads, which % a.key_heads, first_row, int(std::min(tile_rows, rows - first_row))};
        start(a, tile, scratch);
        pack_queries(a, tile, scratch);
        const PackedKeys keys{panels + local * blocks * BLOCK * factors, key_norms + local * blocks, nullptr};
        TileScan(a, tile, scratch, keys, limits).run();
        for (int r = 0; r < tile.rows; r++)
          finish(a, tile, scratch.positions[r], scratch.candidates[r], scratch);
      }
    }
  }
}

// Few rows to a key head: the keys are split, each split leaves up to k candidates of a row, and these are joined.
void decode(const Arguments& a) {
  const Limits limits(a.kept, a.keys);
  const int64_t capacity = limits.capacity, rows = a.heads / a.key_heads * a.queries;
  const int64_t all_heads = a.batch * a.key_heads;
  const int64_t most = std::max<int64_t>(1, a.keys / std::max(MIN_SPLIT, 4 * a.kept));
  const int64_t wanted = all_heads >= 4 * a.threads ? 1 : rounded_up(4 * a.threads, all_heads) / all_heads;
  const int64_t split_keys = rounded_up(rounded_up(a.keys, std::min(most, wanted)) / std::min(most, wanted), BLOCK);
  const int64_t splits = rounded_up(a.keys, split_keys) / split_keys;
  const int64_t kept_of_split = std::min(a.kept, split_keys) + LANES;

  Arena counter(nullptr);
  Scratch(a, counter, FEW_ROWS);
  ScreenedFew(a, counter);
  const int64_t joined = std::max(capacity, splits * kept_of_split);
  const int64_t list_bytes = std::max(rows * capacity, joined) * 2 * int64_t(sizeof(int32_t));
  const int64_t thread_bytes = rounded_up(int64_t(counter.used()) + list_bytes, 4096) + 64;
  const Buffer memory(a.threads * thread_bytes);
  const Buffer found_memory(all_heads * splits * rows * (2 * kept_of_split + 1) * sizeof(int32_t));
  int32_t* found = found_memory.as<int32_t>();
  const auto found_of = [&](int64_t head, int64_t split, int64_t row) {
    return found + ((head * splits + split) * rows + row) * (2 * kept_of_split + 1);
  };

#pragma omp parallel num_threads(int(a.threads))
  {
    Arena arena(memory.as<std::byte>(omp_get_thread_num() * thread_bytes));
    Scratch scratch(a, arena, FEW_ROWS);
    ScreenedFew screened(a, arena);
    int32_t* lists = arena.take<int32_t>(0);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < all_heads * splits; n++) {
      const int64_t head = n / splits, split = n % splits, begin = split * split_keys;
      const int64_t end = std::min(begin + split_keys, a.keys);
      const Tile tile{head / a.key_heads, head % a.key_heads, 0, int(rows)};
      start(a, tile, scratch);
      for (int64_t r = 0; r < rows; r++) {
        scratch.candidates[r].scores = lists + 2 * r * capacity;
        scratch.candidates[r].indices = lists + (2 * r + 1) * capacity;
      }
      if (!screened.run(tile, scratch, begin, end)) scan_few(a, tile, scratch, begin, end, limits);
      for (int64_t r = 0; r < rows; r++) {
        Candidates& row = scratch.candidates[r];
        keep_exactly(row, int(a.kept));
        int32_t* target = found_of(head, split, r);
        target[0] = row.count;
        std::copy(row.scores, row.scores + row.count, target + 1);
        std::copy(row.indices, row.indices + row.count, target + 1 + kept_of_split);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < all_heads * rows; n++) {
      const int64_t head = n / rows, r = n % rows;
      const Tile tile{head / a.key_heads, head % a.key_heads, r, 1};
      start(a, tile, scratch);
      Candidates row{lists, lists + joined};
      row.clear();
      for (int64_t split = 0; split < splits; split++) {
        const int32_t* source = found_of(head, split, r);
        for (int n = 0; n < source[0]; n++) row.scores[row.count + n] = bit_cast<int32_t>(unordered(source[1 + n]));
        std::copy(source + 1 + kept_of_split, source + 1 + kept_of_split + source[0], row.indices + row.count);
        row.count += source[0];
      }
      fetch_values(a, tile, scratch.positions[0], row);
      finish(a, tile, scratch.positions[0], row, scratch);
    }
  }
}

}  // namespace
}  // namespace topk

// Rounds keys to int8, into a copy of them.
extern "C" void copy_keys(const topk::CopyArguments* arguments) {
#if defined(TOPK_AVX512_VNNI)
  topk::copy_keys(*arguments);
#endif
}

// 0, or 1 if there is not enough memory.
extern "C" int64_t attention_forward(const topk::ForwardArguments* arguments) {
  try {
    const bool is_few = arguments->heads / arguments->key_heads * arguments->queries <= topk::FEW_ROWS;
    if (is_few) {
      topk::decode(*arguments);
      return 0;
    }
    const topk::SharedMatrices shared(*arguments);
#if defined(TOPK_AVX512_VNNI)
    if (arguments->screens && topk::can_screen(arguments->depth, arguments->scale)) {
      topk::ScreenedPrefill(shared.arguments()).run();
      return 0;
    }
#endif
    topk::prefill(shared.arguments());
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
