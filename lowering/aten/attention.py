"""Top-k attention in chunks of queries, and its sparse gradient.

Forward, a chunk of queries at a time: scores [B, H, chunk, Lk] in float32, the score function, selection, softmax over
the kept, and the sum of the kept values. The chunk is as long as SCORE_BUDGET allows, so that no buffer grows with
queries x keys. Backward: four sparse products over the kept keys, with no scores of the other keys at all.
Source: Gupta et al. 2021, arXiv:2106.06899, whose backward multiplies dense matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from topk_fx.reference import compute
from topk_fx.score import Program, Score, differentiate, evaluate

from .bags import BagProducts, Bags, SparseProductsOf, as_table
from .positions import ChunkPositions, KeptPositions

SCORE_BUDGET = 2**21
"""Elements of one chunk of scores in the forward: 8 MiB in float32."""

DENSE_SHARE = 8
"""From one kept key in so many on, a dense product with V takes less time than a gather."""

KEPT_BUDGET = 2**18
"""Kept entries that the backward works on at a time; it holds some ten temporaries of that many elements."""


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
    zero_empty_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, Hq, Lq, Dv], key indices int32 and weights float32 (float64), both [B, Hq, Lq, min(k, Lk)].

    A slot of a row with fewer than k keys has index -1 and weight 0. Where dropout dropped a kept key, its weight is
    stored with a minus sign: the backward needs both its value and that it was dropped.
    """
    batch, heads, queries, _ = query.shape
    key_count, kept = key.size(-2), min(k, key.size(-2))
    function = Score.parse(score)
    dtype = compute(query).dtype
    output = value.new_empty(batch, heads, queries, value.size(-1))
    indices = torch.empty(batch, heads, queries, kept, dtype=torch.int32, device=query.device)
    weights = query.new_empty(batch, heads, queries, kept, dtype=dtype)
    if 0 in (output.numel(), weights.numel()):
        return output.zero_(), indices.zero_(), weights.zero_()
    keys, values = compute(key).transpose(-2, -1), as_table(value, dtype)
    chunk_size = max(1, SCORE_BUDGET // max(1, batch * heads * key_count))
    for start in range(0, queries, chunk_size):
        rows = slice(start, min(start + chunk_size, queries))
        # A causal chunk sees no key beyond its last row. Dropout counts slots, whose order must not hang on chunks.
        is_narrowed = function.is_causal and dropout_keep is None
        visible = min(max(rows.stop, kept), key_count) if is_narrowed else key_count
        scores = _products(compute(query[:, :, rows]), keys[..., :visible]).mul_(scale)
        scores = evaluate(function.before, scores, ChunkPositions(operands, rows, visible, query.device))
        top, chunk_indices = select(scores, kept)
        sink = None if function.sink is None else _rows_of(operands[function.sink.index], rows).to(dtype)
        chunk_weights, chunk_indices = _softmax(top, chunk_indices, zero_empty_rows, sink)
        summed = chunk_weights
        if function.after:
            summed = _after(function.after, chunk_weights, operands, rows, chunk_indices)
        if dropout_keep is not None:
            keep = dropout_keep[:, :, rows]
            summed = summed * dropout_factor(keep, dropout_p, dtype)
            chunk_weights = torch.where(keep, chunk_weights, -chunk_weights)
        result = _weigh(summed, chunk_indices, values, value, visible)
        output[:, :, rows] = result.view(output[:, :, rows].shape).to(value.dtype)
        indices[:, :, rows], weights[:, :, rows] = chunk_indices, chunk_weights
    return output, indices, weights


def _weigh(weights: Tensor, indices: Tensor, table: Tensor, value: Tensor, visible: int) -> Tensor:
    """The sum of the kept values by their weights: gathered, or where many keys are kept as a dense product.

    In a dense product a key that is not kept has weight 0, which must not meet inf or NaN. So these count as 0 there,
    and the rows that do keep such a key are gathered after all.
    """
    if weights.size(-1) * DENSE_SHARE < visible:
        return Bags.of(indices, value.size(1), value.size(2)).weighted_sum(table, weights)
    batch, heads, chunk, _ = weights.shape
    dense = weights.masked_fill(indices < 0, 0)
    if dense.size(-1) < visible:  # else every key is kept, in the order of the keys
        dense = weights.new_zeros(batch, heads, chunk, visible).scatter_add_(-1, indices.clamp(min=0).long(), dense)
    values = table[:-1].view(value.shape)[:, :, :visible]
    is_odd = ~values.isfinite().all(-1, keepdim=True)
    if not is_odd.any():
        return _products(dense, values)
    result = _products(dense, values.masked_fill(is_odd, 0))
    keeps_odd = _products((dense != 0).to(dense.dtype), is_odd.to(dense.dtype)) > 0
    gathered = Bags.of(indices, value.size(1), value.size(2)).weighted_sum(table, weights)
    return torch.where(keeps_odd, gathered.view(result.shape), result)


def dropout_factor(keep: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies by: NaN stays NaN, kept or dropped."""
    return keep.to(dtype) / (1 - dropout_p) if dropout_p < 1 else torch.zeros_like(keep, dtype=dtype)


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """Q K^T [B, Hq, C, Lk] from query [B, Hq, C, D] and keys [B, Hk, D, Lk]; K is not repeated for grouped heads.

    As well the product of dense weights [B, Hq, C, Lk] and values [B, Hv, Lk, Dv].
    """
    batch, heads, chunk, size = query.shape
    grouped = query.reshape(batch, keys.size(1), heads // keys.size(1) * chunk, size)
    return torch.matmul(grouped, keys).view(batch, heads, chunk, keys.size(-1))


def _rows_of(operand: Tensor, rows: slice) -> Tensor:
    return operand[:, :, rows] if operand.size(-2) > 1 else operand


def _after(program: Program, weights: Tensor, operands: Sequence[Tensor], rows: slice, indices: Tensor) -> Tensor:
    """What becomes of the probabilities of the kept keys; a slot without a key stays 0."""
    is_empty = indices < 0
    positions = KeptPositions(operands, rows, indices.clamp(min=0).long())
    return evaluate(program, weights, positions).masked_fill(is_empty, 0)


def select(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The `kept` largest of each row of scores [..., Lk] and their indices, in no order; ties keep the lowest index."""
    key_count = scores.size(-1)
    if kept >= key_count:
        return scores, torch.arange(key_count, device=scores.device).expand(scores.shape)
    # topk breaks ties as it likes. That matters only in rows where equal scores stand on both sides of the cut, and one
    # score more tells which these are.
    top, indices = scores.topk(kept + 1, dim=-1)
    is_cut = (top[..., kept] == top[..., kept - 1]) | top[..., kept].isnan()
    threshold = top[..., kept - 1 : kept]
    top, indices = top[..., :kept].contiguous(), indices[..., :kept].contiguous()
    if is_cut.any():
        rows, limit = scores[is_cut], threshold[is_cut]
        # NaN stands above every number, as topk has it.
        above = ~((rows <= limit) | limit.isnan())
        equal = (rows == limit) | (rows.isnan() & limit.isnan())
        free = kept - above.sum(-1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(-1) <= free))
        fixed = chosen.nonzero()[:, 1].view(-1, kept)
        indices[is_cut] = fixed
        top[is_cut] = rows.gather(-1, fixed)
    return top, indices


def _softmax(top: Tensor, indices: Tensor, zero_empty_rows: bool, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights over the kept scores and int32 indices; masked slots get weight 0 and index -1.

    A sink [B|1, Hq|1, Lq|1, 1] is one score more in the denominator.
    """
    if sink is None:
        weights = top.softmax(-1)
    else:
        weights = torch.cat([top, sink.expand(*top.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
    is_masked = top == -torch.inf
    indices = indices.to(torch.int32)
    if not is_masked.any():
        return weights, indices
    if sink is not None:  # no row is empty: the sink is always there
        return weights, indices.masked_fill(is_masked, -1)
    is_empty = is_masked.all(-1, keepdim=True)
    if zero_empty_rows:
        return weights.masked_fill(is_empty, 0), indices.masked_fill(is_masked, -1)
    # A row of NaN weights keeps the lowest keys, so that its gradient is NaN where that of the definition is.
    lowest = torch.arange(top.size(-1), dtype=torch.int32, device=top.device)
    return weights, torch.where(is_empty, lowest, indices.masked_fill(is_masked, -1))


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    indices: Tensor,
    weights: Tensor,
    dropout_p: float,
    operand_needs_grad: Sequence[bool],
    sparse_products: SparseProductsOf = BagProducts,
    kept_budget: int = KEPT_BUDGET,
) -> list[Tensor]:
    """The gradients of query, key, value and of the operands that need one, each in its tensor's shape and dtype.

    Works on as many batch elements or heads at a time as `kept_budget` allows; `sparse_products` computes the products
    with the sparse matrix of the kept keys.
    """
    dtype = weights.dtype
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    sums = [
        torch.zeros(x.shape, dtype=dtype, device=x.device) if needed else None
        for x, needed in zip(operands, operand_needs_grad, strict=True)
    ]
    if 0 in (grad.numel(), weights.numel()):
        return [
            *(x.zero_() for x in grads),
            *(x.to(y.dtype) for x, y in zip(sums, operands, strict=True) if x is not None),
        ]
    function = Score.parse(score)
    for batch, heads in _head_groups(key.size(1), value.size(1), weights, kept_budget):

        def part(x: Tensor, batch: slice = batch, heads: slice = heads) -> Tensor:
            return _narrow(x, batch, heads, weights.size(1))

        found = _backward_part(
            part(grad),
            part(query),
            part(key),
            part(value),
            part(indices),
            part(weights),
            function,
            [part(x) for x in operands],
            [None if x is None else part(x) for x in sums],
            scale,
            dropout_p,
            sparse_products,
        )
        for whole, gradient in zip(grads, found, strict=True):
            part(whole).copy_(gradient)
    return [*grads, *(x.to(y.dtype) for x, y in zip(sums, operands, strict=True) if x is not None)]


def _head_groups(key_heads: int, value_heads: int, weights: Tensor, budget: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the query heads, each with whole groups of grouped heads."""
    batch, heads, queries, kept = weights.shape
    group = heads // key_heads if key_heads == value_heads else heads
    size = max(1, queries * kept)
    batch_count = max(1, budget // (heads * size))
    head_count = min(heads, max(1, budget // (group * size)) * group)
    for start in range(0, batch, batch_count):
        for head in range(0, heads, head_count):
            yield slice(start, min(start + batch_count, batch)), slice(head, min(head + head_count, heads))


def _narrow(x: Tensor, batch: slice, heads: slice, query_heads: int) -> Tensor:
    """The part of x [B|1, H, ...] that a slice of the batch and of the query heads reads; H divides the query heads."""
    if x.size(0) > 1:
        x = x[batch]
    if x.size(1) > 1:
        group = query_heads // x.size(1)
        x = x[:, heads.start // group : heads.stop // group]
    return x


def _backward_part(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    weights: Tensor,
    function: Score,
    operands: Sequence[Tensor],
    sums: Sequence[Tensor | None],
    scale: float,
    dropout_p: float,
    sparse_products: SparseProductsOf,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a part's query, key and value; those of the operands are added to `sums`."""
    dtype = weights.dtype
    with_values = sparse_products(indices, value, dtype)
    grad_weights = with_values.dot_products(grad)
    operand_grads = OperandGrads(sums, KeptPositions(operands, slice(0, query.size(2)), indices.clamp(min=0).long()))
    probabilities = weights.abs()
    summed = probabilities
    if function.after:
        summed = _after(function.after, probabilities, operands, operand_grads.positions.rows, indices)
    if dropout_p > 0:
        factor = dropout_factor(~weights.signbit(), dropout_p, dtype)
        summed, grad_weights = summed * factor, grad_weights * factor
    grad_value = with_values.scatter_rows(grad, summed)
    if function.after:
        grad_weights = operand_grads.differentiate(function.after, probabilities, grad_weights, indices)
    expected = (probabilities * grad_weights).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_weights - expected)
    if function.sink is not None:
        share = (1 - probabilities.sum(-1, keepdim=True)).clamp(min=0)
        operand_grads.add(function.sink.index, -share * expected, torch.zeros_like(share, dtype=torch.int64))
    del grad_weights, summed, probabilities, expected, with_values

    with_keys = sparse_products(indices, key, dtype)
    before = with_keys.dot_products(query).mul_(scale) if function.before.needs_scores_in_backward else None
    grad_products = operand_grads.differentiate(function.before, before, grad_scores, indices) * scale
    return with_keys.weighted_sum(grad_products), with_keys.scatter_rows(query, grad_products), grad_value


@dataclasses.dataclass(frozen=True)
class OperandGrads:
    """Sums of the gradients of the operands, None where none is wanted, and the positions at which they arise."""

    sums: Sequence[Tensor | None]
    positions: KeptPositions

    def differentiate(self, program: Program, scores: Tensor | None, grad: Tensor, indices: Tensor) -> Tensor:
        """The gradient [B, Hq, Lq, kept] before a program's steps, from that after them; adds those of operands."""
        if not program:
            return grad
        wanted = [index for index, total in enumerate(self.sums) if total is not None]
        grad, found = differentiate(program, scores, grad, self.positions, wanted)
        # A slot with no key reads scores and operands that are no key's, and there the derivative may be infinite.
        has_key = indices >= 0
        for operand in found:
            at_keys = torch.where(has_key, operand.grad, 0)
            entries = self.positions.indices if operand.entries is None else operand.entries
            self.add(operand.index, at_keys, entries.expand(at_keys.shape))
        return torch.where(has_key, grad, 0)

    def add(self, index: int, grad: Tensor, entries: Tensor) -> None:
        """Adds grad [B, Hq, Lq, n] to the sum of an operand [B|1, Hq|1, Lq|1, Lk|1] at its entries."""
        target = self.sums[index]
        if target is not None:
            _scatter(target, grad, entries)


def _scatter(target: Tensor, grad: Tensor, positions: Tensor) -> None:
    """Adds grad [B, Hq, Lq, kept] to target [B|1, Hq|1, Lq|1, Lk|1] at the keys in positions [B, Hq, Lq, kept]."""
    strides = [stride if size > 1 else 0 for size, stride in zip(target.shape, target.stride(), strict=True)]
    flat = positions * strides[-1]
    for dim in range(3):
        steps = torch.arange(grad.size(dim), device=grad.device) * strides[dim]
        flat = flat + steps.view([-1 if d == dim else 1 for d in range(4)])
    extent = 1 + sum((size - 1) * stride for size, stride in zip(target.shape, target.stride(), strict=True))
    target.as_strided((extent,), (1,)).scatter_add_(0, flat.reshape(-1), grad.reshape(-1))
