"""Scores of a tile of queries and keys, and of one query and its candidates: scale * q.k through the score function.

Every kernel of this folder takes the same description of an attention:

    Q, K, V                 [B, H, L, D], the last axis contiguous; their other strides as tuples of three
    heads, group            query heads, and how many of them share a head of K
    queries, keys           lengths
    scale, operands, operand_strides, and the score functions of `score_code`

A block is BM queries of a head. Blocks count along queries, then heads, then batch elements; kernels that are launched
for a part of them work on those from `first_block` on, and use scratch memory as if theirs were the first.
"""

import triton
import triton.language as tl


@triton.jit
def block_position(block, blocks_a_head, heads):
    """Batch element, head, and block of queries. Late queries first: under a causal mask they take longest."""
    head = block // blocks_a_head
    return head // heads, head % heads, blocks_a_head - 1 - block % blocks_a_head


@triton.jit
def head_of(X, strides, batch, head):
    return X + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load_queries(Q, stride, start, queries, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr):
    """[BM, BD] from query `start` on, 0 beyond the last, in the dtype in which products are made."""
    rows, columns = tl.arange(0, BM), tl.arange(0, BD)
    pointers = Q + start * tl.cast(stride, tl.int64) + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=(start + rows < queries)[:, None] & (columns < D)[None, :], other=0.0).to(DOT)


@triton.jit
def tile_products(
    q,
    K,
    stride,
    start,
    keys,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """q [BM, BD] times the keys from `start` on: [BM, BN] in float32. RAGGED: the last of them may not exist."""
    rows, columns = tl.arange(0, BN), tl.arange(0, BD)
    pointers = K + start * tl.cast(stride, tl.int64) + rows[None, :] * stride + columns[:, None]
    if RAGGED:
        k = tl.load(pointers, mask=(start + rows < keys)[None, :] & (columns < D)[:, None], other=0.0)
    elif BD == D:
        k = tl.load(pointers)
    else:
        k = tl.load(pointers, mask=(columns < D)[:, None], other=0.0)
    return tl.dot(q, k.to(DOT), input_precision=PRECISION)


@triton.jit
def score_candidates(
    q, K, stride, LIST, SCORES, count, i, batch, head, queries, keys, scale, operands, operand_strides,
    score: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the scores of the `count` keys in LIST of the query i, q [BD] in float32, to SCORES."""
    columns = tl.arange(0, BD)
    for start in tl.range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        j = tl.load(LIST + at, mask=at < count, other=0)
        pointers = K + j.to(tl.int64)[:, None] * stride + columns[None, :]
        k = tl.load(pointers, mask=(at < count)[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
        s = tl.sum(k * q[None, :], 1) * scale
        s = score(s, i, j, batch, head, queries, keys, operands, operand_strides)
        tl.store(SCORES + at, s, mask=at < count)


@triton.jit
def unchanged(s, i, j, batch, head, queries, keys, operands, strides):
    """The score function that does nothing."""
    return s


@triton.jit
def tanh(x):
    """Accurate to float32's last places: by its series near 0, where 1 - 2 / (exp(2x) + 1) cancels."""
    a = tl.abs(x)
    y = x * x
    near = 62 / 2835 - y * (1382 / 155925)
    near = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * near)))
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    far = tl.where(x < 0.0, -far, far)
    return tl.where(a < 0.25, near, far)
