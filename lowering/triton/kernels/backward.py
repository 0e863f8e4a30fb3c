"""Gradients of top-k attention: products with the sparse matrix of the kept keys, k entries a query.

`gradients` does all of them in one pass over the queries where the score function leaves gradients as they are; the
other kernels are the four products one by one. Keys that several queries keep get sums of several programs: by atomic
additions, or, where results must not differ from run to run, by `sum_of_rows`, which walks each key's queries in order.
"""

import triton
import triton.language as tl

from .scores import head_of


@triton.jit
def gradients(
    Q, K, V, GRAD, INDICES, WEIGHTS, DQ, DK, DV, q_strides, k_strides, v_strides, grad_strides, heads, group,
    value_group, queries, keys, scale, operands, operand_strides, kept, dropout_factor, score: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV_SIZE: tl.constexpr,
    BDV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One query a program. HAS_MASK: the score function masks keys out, and does nothing else; none of these is kept
    but in a row that has no other, and there they have no gradient.

    DQ [B, H, queries, D]; DK [B, Hk, keys, D] and DV [B, Hv, keys, DV_SIZE] are float32 sums."""
    row = tl.program_id(0).to(tl.int64)
    i, head, batch = row % queries, row // queries % heads, row // queries // heads
    slot, columns, value_columns = tl.arange(0, BK), tl.arange(0, BD), tl.arange(0, BDV)
    j = tl.load(INDICES + row * kept + slot, mask=slot < kept, other=-1)
    is_kept = j >= 0
    j = tl.where(is_kept, j, 0).to(tl.int64)
    weight = tl.load(WEIGHTS + row * kept + slot, mask=is_kept, other=0.0)
    probability = tl.abs(weight)
    summed = probability
    factor = tl.full([BK], 1.0, tl.float32)
    if HAS_DROPOUT:
        factor = tl.where(weight.to(tl.int32, bitcast=True) < 0, 0.0, dropout_factor)
        summed = probability * factor

    is_value = is_kept[:, None] & (value_columns < DV_SIZE)[None, :]
    v = tl.load(
        head_of(V, v_strides, batch, head // value_group) + j[:, None] * v_strides[2] + value_columns[None, :],
        mask=is_value, other=0.0,
    ).to(tl.float32)  # fmt: skip
    grad = tl.load(
        head_of(GRAD, grad_strides, batch, head) + i * grad_strides[2] + value_columns,
        mask=value_columns < DV_SIZE, other=0.0,
    ).to(tl.float32)  # fmt: skip
    grad_weight = tl.sum(v * grad[None, :], 1) * factor
    DV += ((batch * (heads // value_group) + head // value_group) * keys + j[:, None]) * DV_SIZE + value_columns[
        None, :
    ]
    tl.atomic_add(DV, summed[:, None] * grad[None, :], mask=is_value, sem="relaxed")

    expected = tl.sum(probability * grad_weight, 0)
    has_gradient = is_kept
    if HAS_MASK:
        zeros = tl.zeros([BK], tl.float32)
        at_kept = score(zeros, i.to(tl.int32), j.to(tl.int32), batch, head, queries, keys, operands, operand_strides)
        has_gradient = is_kept & (at_kept != float("-inf"))
    grad_score = tl.where(has_gradient, probability * (grad_weight - expected), 0.0) * scale
    is_key = is_kept[:, None] & (columns < D)[None, :]
    k = tl.load(
        head_of(K, k_strides, batch, head // group) + j[:, None] * k_strides[2] + columns[None, :],
        mask=is_key, other=0.0,
    ).to(tl.float32)  # fmt: skip
    grad_q = tl.sum(grad_score[:, None] * k, 0)
    tl.store(DQ + row * D + columns, grad_q.to(DQ.dtype.element_ty), mask=columns < D)
    q = tl.load(head_of(Q, q_strides, batch, head) + i * q_strides[2] + columns, mask=columns < D, other=0.0)
    DK += ((batch * (heads // group) + head // group) * keys + j[:, None]) * D + columns[None, :]
    tl.atomic_add(DK, grad_score[:, None] * q.to(tl.float32)[None, :], mask=is_key, sem="relaxed")


@triton.jit
def dot_products(
    ROWS, TABLE, INDICES, PRODUCTS, row_strides, table_strides, heads, group, queries, kept, D: tl.constexpr,
    BD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PRODUCTS [B, H, queries, kept]: of each row [D] and the kept rows of TABLE; 0 in empty slots."""
    row = tl.program_id(0).to(tl.int64)
    i, head, batch = row % queries, row // queries % heads, row // queries // heads
    columns = tl.arange(0, BD)
    x = tl.load(head_of(ROWS, row_strides, batch, head) + i * row_strides[2] + columns, mask=columns < D, other=0.0)
    TABLE = head_of(TABLE, table_strides, batch, head // group)
    for first in tl.range(0, kept, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        j = tl.load(INDICES + row * kept + slot, mask=slot < kept, other=-1)
        pointers = TABLE + j.to(tl.int64)[:, None] * table_strides[2] + columns[None, :]
        y = tl.load(pointers, mask=(j >= 0)[:, None] & (columns < D)[None, :], other=0.0)
        products = tl.sum(y.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        tl.store(PRODUCTS + row * kept + slot, tl.where(j >= 0, products, 0.0), mask=slot < kept)


@triton.jit
def weighted_sum(
    TABLE, INDICES, WEIGHTS, RESULT, table_strides, heads, group, queries, kept, D: tl.constexpr, BD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """RESULT [B, H, queries, D]: the sum of the kept rows of TABLE by their weights."""
    row = tl.program_id(0).to(tl.int64)
    head, batch = row // queries % heads, row // queries // heads
    columns = tl.arange(0, BD)
    TABLE = head_of(TABLE, table_strides, batch, head // group)
    result = tl.zeros([BD], tl.float32)
    for first in tl.range(0, kept, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        j = tl.load(INDICES + row * kept + slot, mask=slot < kept, other=-1)
        w = tl.load(WEIGHTS + row * kept + slot, mask=j >= 0, other=0.0)
        pointers = TABLE + j.to(tl.int64)[:, None] * table_strides[2] + columns[None, :]
        y = tl.load(pointers, mask=(j >= 0)[:, None] & (columns < D)[None, :], other=0.0)
        result += tl.sum(tl.where((j >= 0)[:, None], w[:, None] * y.to(tl.float32), 0.0), 0)
    tl.store(RESULT + row * D + columns, result.to(RESULT.dtype.element_ty), mask=columns < D)


@triton.jit
def scatter_rows(
    ROWS, INDICES, WEIGHTS, RESULT, row_strides, heads, group, queries, keys, kept, D: tl.constexpr, BD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds each row [D], by its weights, to the keys that it keeps: RESULT [B, Hk, keys, D], float32."""
    row = tl.program_id(0).to(tl.int64)
    i, head, batch = row % queries, row // queries % heads, row // queries // heads
    columns = tl.arange(0, BD)
    x = tl.load(head_of(ROWS, row_strides, batch, head) + i * row_strides[2] + columns, mask=columns < D, other=0.0)
    RESULT += (batch * (heads // group) + head // group) * keys * D
    for first in tl.range(0, kept, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        j = tl.load(INDICES + row * kept + slot, mask=slot < kept, other=-1)
        w = tl.load(WEIGHTS + row * kept + slot, mask=j >= 0, other=0.0)
        is_key = (j >= 0)[:, None] & (columns < D)[None, :]
        pointers = RESULT + j.to(tl.int64)[:, None] * D + columns[None, :]
        tl.atomic_add(pointers, w[:, None] * x.to(tl.float32)[None, :], mask=is_key, sem="relaxed")


@triton.jit
def sum_of_rows(
    ROWS, ENTRIES, STARTS, WEIGHTS, RESULT, row_strides, heads, group, queries, kept, D: tl.constexpr,
    BD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`scatter_rows` in a fixed order. One key a program: ENTRIES[STARTS[key]:STARTS[key + 1]] are where it is kept.

    An entry is a position in WEIGHTS [B, H, queries, kept]; keys count over [B, Hk, keys].
    """
    key = tl.program_id(0).to(tl.int64)
    first_entry, last_entry = tl.load(STARTS + key), tl.load(STARTS + key + 1)
    columns = tl.arange(0, BD)
    result = tl.zeros([BD], tl.float32)
    for first in tl.range(first_entry, last_entry, BLOCK):
        at = first + tl.arange(0, BLOCK)
        is_entry = at < last_entry
        entry = tl.load(ENTRIES + at, mask=is_entry, other=0)
        w = tl.load(WEIGHTS + entry, mask=is_entry, other=0.0)
        row = entry // kept
        i, head, batch = row % queries, row // queries % heads, row // queries // heads
        pointers = ROWS + batch * row_strides[0] + head * row_strides[1] + i * row_strides[2]
        x = tl.load(
            pointers[:, None] + columns[None, :], mask=is_entry[:, None] & (columns < D)[None, :], other=0.0
        ).to(tl.float32)  # fmt: skip
        result += tl.sum(w[:, None] * x, 0)
    tl.store(RESULT + key * D + columns, result.to(RESULT.dtype.element_ty), mask=columns < D)
