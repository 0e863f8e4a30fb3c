"""The candidates of each query: every key whose score may be among its k largest.

`mark` computes all scores, tile by tile, and leaves of each a bit: whether it reaches the threshold of its row, which
`bound` found. `list_marked` turns a row's bits into the list of its candidates, in the order of the keys. Where that
list would overflow, because many scores are equal or the threshold is low, `recollect` makes the lists of the whole
block again, slower: full lists are cut to their exact k largest so far, and the row's threshold rises, so that a later
score which equals the k-th is below it. Whatever the data, no key is lost, and equal scores do not fill a list again.
"""

import triton
import triton.language as tl

from .scores import block_position, head_of, load_queries, score_candidates, tile_products
from .selection import LOWEST_KEY, bit_count, take_largest, threshold_above, to_key


@triton.jit
def mark_tile(
    q, K, stride, n, threshold, i, batch, head, queries, keys, scale, operands, operand_strides, score: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """[BM, BN / 32] words: a bit for each key from n on whose score is at or above the row's threshold, or NaN."""
    columns = tl.arange(0, BN)
    s = tile_products(q, K, stride, n, keys, D, BD, BN, DOT, PRECISION, RAGGED) * scale
    j = (n + columns)[None, :]
    s = score(s, i, j, batch, head, queries, keys, operands, operand_strides)
    is_out = s < threshold[:, None]
    if RAGGED:
        is_out = is_out | (j >= keys)
    bits = tl.where(is_out, 0, (1 << (columns % 32))[None, :])
    return tl.sum(tl.reshape(bits, [BM, BN // 32, 32]), 2)


@triton.jit
def mark(
    Q, K, THRESHOLDS, WORDS, q_strides, k_strides, first_block, blocks_a_head, heads, group, queries, keys, scale,
    operands, operand_strides, row_words, score: tl.constexpr, score_of_past: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """WORDS [rows, row_words]: the marks of the keys that a block sees."""
    batch, head, block = block_position(first_block + tl.program_id(0), blocks_a_head, heads)
    K = head_of(K, k_strides, batch, head // group)
    start = block * BM
    q = load_queries(head_of(Q, q_strides, batch, head), q_strides[2], start, queries, D, BD, BM, DOT)
    rows, words = tl.arange(0, BM), tl.arange(0, BN // 32)
    i = (start + rows)[:, None]
    seen, whole = keys, keys // BN * BN
    if CAUSAL:
        seen = tl.minimum(keys, start + BM)
        whole = tl.minimum(whole, (start + 1) // BN * BN)
    row = (tl.program_id(0) * BM + rows).to(tl.int64)
    threshold = tl.load(THRESHOLDS + row)
    pointers = WORDS + row[:, None] * row_words + words[None, :]
    for n in tl.range(0, whole, BN, num_stages=STAGES):
        marks = mark_tile(
            q, K, k_strides[2], n, threshold, i, batch, head, queries, keys, scale, operands, operand_strides,
            score_of_past, D, BD, BM, BN, DOT, PRECISION, False,
        )  # fmt: skip
        tl.store(pointers + n // 32, marks)
    for n in tl.range(whole, seen, BN, num_stages=1):
        marks = mark_tile(
            q, K, k_strides[2], n, threshold, i, batch, head, queries, keys, scale, operands, operand_strides,
            score, D, BD, BM, BN, DOT, PRECISION, True,
        )  # fmt: skip
        tl.store(pointers + n // 32, marks)


@triton.jit
def list_marked(
    WORDS, LISTS, COUNTS, first_block, blocks_a_head, heads, queries, keys, row_words, CAUSAL: tl.constexpr,
    BM: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LISTS [rows, CAPACITY] of the marked keys, and COUNTS [rows], which may be more. One query a program."""
    local_row = tl.program_id(0)
    _, _, block = block_position(first_block + local_row // BM, blocks_a_head, heads)
    i = block * BM + local_row % BM
    seen = keys
    if CAUSAL:
        seen = tl.minimum(keys, i + 1)
    seen = tl.where(i < queries, seen, 0)
    WORDS += local_row.to(tl.int64) * row_words
    LISTS += local_row.to(tl.int64) * CAPACITY
    count = 0
    for first in tl.range(0, tl.cdiv(seen, 32), BLOCK):
        at = first + tl.arange(0, BLOCK)
        words = tl.load(WORDS + at, mask=at * 32 < seen, other=0)
        new = bit_count(words)
        position = count + tl.cumsum(new, 0) - new
        count += tl.sum(new, 0)
        while tl.max((words != 0).to(tl.int32), 0) > 0:
            key = at * 32 + bit_count((words & (-words)) - 1)
            tl.store(LISTS + position, key, mask=(words != 0) & (position < CAPACITY))
            position += 1
            words = words & (words - 1)
    tl.store(COUNTS + local_row, count)


@triton.jit
def cut_list(
    Q, K, q_stride, k_stride, LIST, SCORES, count, i, batch, head, queries, keys, scale, operands, operand_strides, k,
    score: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leaves the k largest of the `count` candidates of a query; gives their number and a new threshold."""
    columns, at = tl.arange(0, BD), tl.arange(0, CAPACITY)
    q = tl.load(Q + i.to(tl.int64) * q_stride + columns, mask=columns < D, other=0.0).to(tl.float32)
    score_candidates(
        q, K, k_stride, LIST, SCORES, count, i, batch, head, queries, keys, scale, operands, operand_strides,
        score, D, BD, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    s = tl.load(SCORES + at, mask=at < count, other=float("-inf"))
    j = tl.load(LIST + at, mask=at < count, other=0)
    taken, cut = take_largest(tl.where(s == float("-inf"), LOWEST_KEY, to_key(s)), k)
    number = tl.sum(taken.to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(LIST + tl.cumsum(taken.to(tl.int32), 0) - 1, j, mask=taken)
    return number, tl.where(number < k, float("-inf"), threshold_above(cut))


@triton.jit
def recollect(
    Q, K, THRESHOLDS, LISTS, SCORES, COUNTS, q_strides, k_strides, first_block, blocks_a_head, heads, group, queries,
    keys, scale, operands, operand_strides, k, score: tl.constexpr, score_of_past: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAPACITY: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Makes LISTS and COUNTS of a block again if one of its rows has more than CAPACITY, which is at least k + 32.

    SCORES [rows, CAPACITY] is scratch.
    """
    first_row = tl.program_id(0).to(tl.int64) * BM
    rows = tl.arange(0, BM)
    if tl.max(tl.load(COUNTS + first_row + rows), 0) > CAPACITY:
        batch, head, block = block_position(first_block + tl.program_id(0), blocks_a_head, heads)
        Q = head_of(Q, q_strides, batch, head)
        K = head_of(K, k_strides, batch, head // group)
        start = block * BM
        q = load_queries(Q, q_strides[2], start, queries, D, BD, BM, DOT)
        i = (start + rows)[:, None]
        words = tl.arange(0, BN // 32)[None, :]
        LISTS += first_row * CAPACITY
        SCORES += first_row * CAPACITY
        threshold = tl.load(THRESHOLDS + first_row + rows)
        counts = tl.zeros([BM], tl.int32)
        seen = keys
        if CAUSAL:
            seen = tl.minimum(keys, start + BM)
        for n in tl.range(0, seen, BN, num_stages=1):
            marks = mark_tile(
                q, K, k_strides[2], n, threshold, i, batch, head, queries, keys, scale, operands, operand_strides,
                score, D, BD, BM, BN, DOT, PRECISION, True,
            )  # fmt: skip
            marks = tl.where(i < queries, marks, 0)
            for w in tl.range(0, BN // 32, num_stages=1):
                word = tl.sum(tl.where(words == w, marks, 0), 1)
                if tl.max(counts, 0) + 32 > CAPACITY:
                    tl.debug_barrier()
                    for r in tl.range(0, BM, num_stages=1):
                        count = tl.sum(tl.where(rows == r, counts, 0), 0)
                        if count + 32 > CAPACITY:
                            number, above = cut_list(
                                Q, K, q_strides[2], k_strides[2], LISTS + r * CAPACITY, SCORES + r * CAPACITY, count,
                                start + r, batch, head, queries, keys, scale, operands, operand_strides, k,
                                score, D, BD, CAPACITY, 32,
                            )  # fmt: skip
                            counts = tl.where(rows == r, number, counts)
                            threshold = tl.where(rows == r, tl.maximum(threshold, above), threshold)
                    tl.debug_barrier()
                while tl.max((word != 0).to(tl.int32), 0) > 0:
                    key = n + w * 32 + bit_count((word & (-word)) - 1)
                    tl.store(LISTS + rows * CAPACITY + counts, key, mask=word != 0)
                    counts += (word != 0).to(tl.int32)
                    word = word & (word - 1)
        tl.store(COUNTS + first_row + rows, counts)
