"""A lower bound of each query's k-th largest score, for a third of what finding that score would take.

The keys that a block of queries sees are parted into groups, and only the largest score of each group is kept. The k-th
largest of these maxima is the score of some key, and k keys are at or above it: it bounds the k-th largest score from
below. With four times k groups few other keys are above it, so that `collect` finds little more than k candidates.
"""

import triton
import triton.language as tl

from .scores import block_position, head_of, load_queries, tile_products
from .selection import LOWEST_KEY, cut_for, threshold_at, to_key


@triton.jit
def group_maxima(
    Q, K, MAXIMA, q_strides, k_strides, first_block, blocks_a_head, heads, group, queries, keys, scale,
    operands, operand_strides, parts, score: tl.constexpr, score_of_past: tl.constexpr, CAUSAL: tl.constexpr,
    STEP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """MAXIMA [rows, parts * BN]: the largest score of each group, -inf of an empty one.

    The tiles of BN keys are parted into `parts` of neighbours; a group is one column of a part's tiles. Of the tiles
    that need no mask only every STEP-th is looked at.
    """
    batch, head, block = block_position(first_block + tl.program_id(0), blocks_a_head, heads)
    Q = head_of(Q, q_strides, batch, head)
    K = head_of(K, k_strides, batch, head // group)
    start = block * BM
    q = load_queries(Q, q_strides[2], start, queries, D, BD, BM, DOT)
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    i = (start + rows)[:, None]
    seen, whole = keys, keys // BN * BN
    if CAUSAL:
        seen = tl.minimum(keys, start + BM)
        whole = tl.minimum(whole, (start + 1) // BN * BN)
    part_size = tl.cdiv(tl.cdiv(seen, BN), parts) * BN
    row = (tl.program_id(0) * BM + rows).to(tl.int64)
    for part in tl.range(0, parts, num_stages=1):
        first = tl.minimum(part * part_size, seen)
        last = tl.minimum(first + part_size, seen)
        middle = tl.maximum(tl.minimum(last, whole), first)
        largest = tl.full([BM, BN], float("-inf"), tl.float32)
        for n in tl.range(first, middle, STEP * BN, num_stages=STAGES):
            s = tile_products(q, K, k_strides[2], n, keys, D, BD, BN, DOT, PRECISION, False) * scale
            j = (n + columns)[None, :]
            s = score_of_past(s, i, j, batch, head, queries, keys, operands, operand_strides)
            largest = tl.maximum(largest, s)
        for n in tl.range(middle, last, BN, num_stages=1):
            s = tile_products(q, K, k_strides[2], n, keys, D, BD, BN, DOT, PRECISION, True) * scale
            j = (n + columns)[None, :]
            s = score(s, i, j, batch, head, queries, keys, operands, operand_strides)
            largest = tl.maximum(largest, tl.where(j < keys, s, float("-inf")))
        tl.store(MAXIMA + row[:, None] * (parts * BN) + part * BN + columns[None, :], largest)


@triton.jit
def thresholds(MAXIMA, THRESHOLDS, groups, k, N: tl.constexpr):
    """THRESHOLDS [rows]: no more than the k-th largest of the `groups` maxima of a row, the lowest score if too few."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, N)
    maxima = tl.load(MAXIMA + row * groups + at, mask=at < groups, other=float("-inf"))
    cut = cut_for(tl.where(maxima == float("-inf"), LOWEST_KEY, to_key(maxima)), k)
    tl.store(THRESHOLDS + row, threshold_at(cut))
