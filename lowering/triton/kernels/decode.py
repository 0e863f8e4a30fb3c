"""Few queries and many keys, as when a model generates: K is read once, at the memory's speed, and V only where kept.

`row_scores` splits the keys over programs and writes the scores, which for a few queries are few, and the largest of
every tile of keys. `attend_to_scores` reads those tiles alone that may hold one of the k largest, and finishes as the
other kernels do.
"""

import triton
import triton.language as tl

from .finish import finish_row
from .scores import block_position, head_of, tile_products
from .selection import LOWEST_KEY, cut_for, take_largest, threshold_above, threshold_at, to_key


@triton.jit
def row_scores(
    Q, K, SCORES, MAXIMA, q_strides, k_strides, heads, group, queries, keys, scale, operands, operand_strides,
    tiles_a_program, score: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """SCORES [B, H, queries, keys] and MAXIMA [B, H, queries, tiles] of all queries that share a head of K.

    These are BM at most; a program works on `tiles_a_program` tiles of BN keys. A tile with a NaN has NaN.
    """
    key_heads = heads // group
    batch, key_head = tl.program_id(1) // key_heads, tl.program_id(1) % key_heads
    rows, depth, columns = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    is_row = rows < group * queries
    row = tl.where(is_row, rows, 0)
    head, i = (key_head * group + row // queries)[:, None], (row % queries)[:, None]
    pointers = head_of(Q, q_strides, batch, head) + i.to(tl.int64) * q_strides[2] + depth[None, :]
    q = tl.load(pointers, mask=is_row[:, None] & (depth < D)[None, :], other=0.0).to(DOT)
    K = head_of(K, k_strides, batch, key_head)
    tiles = tl.cdiv(keys, BN)
    out_row = (batch.to(tl.int64) * heads + head) * queries + i
    first = tl.program_id(0) * tiles_a_program
    last = tl.minimum(first + tiles_a_program, tiles)
    for tile in tl.range(first, last, num_stages=STAGES):
        n = tile * BN
        s = tile_products(q, K, k_strides[2], n, keys, D, BD, BN, DOT, PRECISION, True) * scale
        j = (n + columns)[None, :]
        s = score(s, i, j, batch, head, queries, keys, operands, operand_strides)
        s = tl.where(j < keys, s, float("-inf"))
        is_nan = tl.max((s != s).to(tl.int32), 1) > 0
        largest = tl.where(is_nan, float("nan"), tl.max(s, 1))
        tl.store(SCORES + out_row * keys + j, s, mask=is_row[:, None] & (j < keys))
        tl.store(MAXIMA + out_row * tiles + tile, largest[:, None], mask=is_row[:, None])


@triton.jit
def cut_scored_list(LIST, SCORES, count, k, LONGEST: tl.constexpr):
    """Leaves the k largest of the `count` scored candidates; gives their number and a new threshold."""
    at = tl.arange(0, LONGEST)
    tl.debug_barrier()
    s = tl.load(SCORES + at, mask=at < count, other=float("-inf"))
    j = tl.load(LIST + at, mask=at < count, other=0)
    taken, cut = take_largest(tl.where(s == float("-inf"), LOWEST_KEY, to_key(s)), k)
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1
    number = tl.sum(taken.to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(SCORES + slot, s, mask=taken)
    tl.store(LIST + slot, j, mask=taken)
    return number, tl.where(number < k, float("-inf"), threshold_above(cut))


@triton.jit
def attend_to_scores(
    SCORES, MAXIMA, TILES, LISTS, LIST_SCORES, heads, queries, keys, operands, operand_strides, V, SINK, KEEP, OUTPUT,
    INDICES, WEIGHTS, v_strides, sink_strides, value_group, k, kept, dropout_factor, after: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_AFTER: tl.constexpr, ZERO_EMPTY: tl.constexpr,
    DV: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, N: tl.constexpr, STRETCH: tl.constexpr,
    LONGEST: tl.constexpr, CAPACITY: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`finish_row` of the query whose scores are the program's row of SCORES.

    TILES [rows, tiles], LISTS and LIST_SCORES [rows, LONGEST] are scratch. N, a power of two, is at least the number of
    tiles; LONGEST at least k + STRETCH.
    """
    local_row = tl.program_id(0)
    batch, head, i = block_position(local_row, queries, heads)
    row = (batch.to(tl.int64) * heads + head) * queries + i
    tiles = tl.cdiv(keys, BN)
    SCORES += row * keys
    TILES += row * tiles
    LISTS += row * LONGEST
    LIST_SCORES += row * LONGEST

    tile = tl.arange(0, N)
    maxima = tl.load(MAXIMA + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    largest = tl.where(maxima == float("-inf"), LOWEST_KEY, to_key(maxima))
    cut = cut_for(largest, k)  # no more than the k-th largest score, as k tiles reach it
    threshold = threshold_at(cut)
    is_read = (largest > LOWEST_KEY) & (largest >= cut)
    tl.store(TILES + tl.cumsum(is_read.to(tl.int32), 0) - 1, tile, mask=is_read)
    key_count = tl.sum(is_read.to(tl.int32), 0) * BN
    tl.debug_barrier()

    count = 0
    for first in tl.range(0, key_count, STRETCH, num_stages=1):
        if count + STRETCH > LONGEST:
            count, above = cut_scored_list(LISTS, LIST_SCORES, count, k, LONGEST)
            threshold = tl.maximum(threshold, above)
        at = first + tl.arange(0, STRETCH)
        j = tl.load(TILES + at // BN, mask=at < key_count, other=0) * BN + at % BN
        is_key = (at < key_count) & (j < keys)
        s = tl.load(SCORES + j, mask=is_key, other=float("-inf"))
        is_candidate = is_key & ((s < threshold) == 0)
        slot = count + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
        tl.store(LIST_SCORES + slot, s, mask=is_candidate)
        tl.store(LISTS + slot, j, mask=is_candidate)
        count += tl.sum(is_candidate.to(tl.int32), 0)
    if count > CAPACITY:
        count, _ = cut_scored_list(LISTS, LIST_SCORES, count, k, LONGEST)
    tl.debug_barrier()
    finish_row(
        V, SINK, KEEP, LISTS, LIST_SCORES, count, OUTPUT, INDICES, WEIGHTS, v_strides, sink_strides, batch, head, i,
        heads, value_group, queries, keys, operands, operand_strides, k, kept, dropout_factor, after, HAS_SINK,
        HAS_DROPOUT, HAS_AFTER, ZERO_EMPTY, DV, BDV, CAPACITY, BK, BLOCK,
    )  # fmt: skip
