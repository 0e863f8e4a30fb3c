"""From candidates to the output: exact scores, the k largest, softmax over them, and the sum of their values."""

import triton
import triton.language as tl

from .scores import block_position, head_of, score_candidates
from .selection import LOWEST_KEY, take_largest, to_key


@triton.jit
def finish_row(
    V, SINK, KEEP, LIST, SCORE, count, OUTPUT, INDICES, WEIGHTS, v_strides, sink_strides, batch, head, i, heads,
    value_group, queries, keys, operands, operand_strides, k, kept, dropout_factor, after: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_AFTER: tl.constexpr, ZERO_EMPTY: tl.constexpr,
    DV: tl.constexpr, BDV: tl.constexpr, CAPACITY: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the `count` candidates of a query, CAPACITY at most, and their scores, which are overwritten.

    OUTPUT [B, H, queries, DV], INDICES and WEIGHTS [B, H, queries, kept]; kept keys ascend. Empty slots have index -1
    and weight 0. A row with no key at all is zero if ZERO_EMPTY, else NaN with the lowest keys. A kept key that dropout
    dropped has its weight with a minus sign.
    """
    row = (batch.to(tl.int64) * heads + head) * queries + i
    at = tl.arange(0, CAPACITY)
    s = tl.load(SCORE + at, mask=at < count, other=float("-inf"))
    j = tl.load(LIST + at, mask=at < count, other=0)
    taken, _ = take_largest(tl.where(s == float("-inf"), LOWEST_KEY, to_key(s)), k)
    number = tl.sum(taken.to(tl.int32), 0)
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1

    largest = tl.max(tl.where(taken, s, float("-inf")), 0)
    if HAS_SINK:
        sink = tl.load(head_of(SINK, sink_strides, batch, head) + i.to(tl.int64) * sink_strides[2]).to(tl.float32)
        largest = tl.maximum(largest, sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.where(taken, tl.exp(s - largest), 0.0)
    total = tl.sum(share, 0)
    if HAS_SINK:
        total += tl.exp(sink - largest)
    is_empty = total == 0.0
    weight = tl.div_rn(share, tl.where(is_empty, 1.0, total))

    summed = weight
    if HAS_AFTER:
        summed = after(weight, i, j, batch, head, queries, keys, operands, operand_strides)
    if HAS_DROPOUT:
        keep = tl.load(KEEP + row * kept + slot, mask=taken, other=0) != 0
        summed = summed * tl.where(keep, dropout_factor, 0.0)
        weight = tl.where(keep, weight, -weight)
    tl.debug_barrier()  # all have read the scores, which the weights of the sum overwrite
    tl.store(INDICES + row * kept + slot, j, mask=taken)
    tl.store(WEIGHTS + row * kept + slot, weight, mask=taken)
    tl.store(SCORE + slot, summed, mask=taken)
    slots = tl.arange(0, BK)
    no_weight = tl.where(is_empty & (ZERO_EMPTY == 0), float("nan"), 0.0)
    no_index = tl.where(is_empty & (ZERO_EMPTY == 0), slots, -1)
    is_free = (slots >= number) & (slots < kept)
    tl.store(INDICES + row * kept + slots, no_index, mask=is_free)
    tl.store(WEIGHTS + row * kept + slots, tl.zeros([BK], tl.float32) + no_weight, mask=is_free)
    tl.debug_barrier()

    columns = tl.arange(0, BDV)
    V = head_of(V, v_strides, batch, head // value_group)
    result = tl.zeros([BDV], tl.float32) + no_weight  # NaN in an empty row of softmax
    for first in tl.range(0, number, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        key = tl.load(INDICES + row * kept + entry, mask=entry < number, other=0)
        w = tl.load(SCORE + entry, mask=entry < number, other=0.0)
        pointers = V + key.to(tl.int64)[:, None] * v_strides[2] + columns[None, :]
        v = tl.load(pointers, mask=(entry < number)[:, None] & (columns < DV)[None, :], other=0.0)
        result += tl.sum(w[:, None] * v.to(tl.float32), 0)
    tl.store(OUTPUT + row * DV + columns, result.to(OUTPUT.dtype.element_ty), mask=columns < DV)


@triton.jit
def attend(
    Q, K, LISTS, SCORES, COUNTS, q_strides, k_strides, first_block, blocks_a_head, heads, group, queries, keys, scale,
    operands, operand_strides, V, SINK, KEEP, OUTPUT, INDICES, WEIGHTS, v_strides, sink_strides, value_group, k, kept,
    dropout_factor, score: tl.constexpr, after: tl.constexpr, HAS_SINK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_AFTER: tl.constexpr, ZERO_EMPTY: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    BDV: tl.constexpr, BM: tl.constexpr, CAPACITY: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`finish_row` of the query whose candidates are the program's row of LISTS [rows, CAPACITY], scored here."""
    local_row = tl.program_id(0)
    batch, head, block = block_position(first_block + local_row // BM, blocks_a_head, heads)
    i = block * BM + local_row % BM
    if i < queries:
        columns = tl.arange(0, BD)
        LIST = LISTS + local_row.to(tl.int64) * CAPACITY
        SCORE = SCORES + local_row.to(tl.int64) * CAPACITY
        count = tl.load(COUNTS + local_row)
        q = tl.load(
            head_of(Q, q_strides, batch, head) + i.to(tl.int64) * q_strides[2] + columns, mask=columns < D, other=0.0
        ).to(tl.float32)  # fmt: skip
        score_candidates(
            q, head_of(K, k_strides, batch, head // group), k_strides[2], LIST, SCORE, count, i, batch, head, queries,
            keys, scale, operands, operand_strides, score, D, BD, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
        finish_row(
            V, SINK, KEEP, LIST, SCORE, count, OUTPUT, INDICES, WEIGHTS, v_strides, sink_strides, batch, head, i,
            heads, value_group, queries, keys, operands, operand_strides, k, kept, dropout_factor, after, HAS_SINK,
            HAS_DROPOUT, HAS_AFTER, ZERO_EMPTY, DV, BDV, CAPACITY, BK, BLOCK,
        )  # fmt: skip
