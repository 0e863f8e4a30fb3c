"""vmap over the attention ops: the mapped dimension becomes part of the batch, so one kernel call serves all samples.

The FFN ops have no rule: torch's own fallback calls them once a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import library

Dim = int | None


def _attention(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    query, key, value, operands, score, scale, k, *rest = args
    if rest and rest[0] > 0.0 and info.randomness != "different":
        raise RuntimeError(
            f"topk_fx::attention draws dropout: vmap needs randomness='different', and was given {info.randomness!r}"
        )
    tensors = [query, key, value, *operands]
    dims = [*in_dims[:3], *_list_dims(operands, in_dims[3])]
    ranks = [x.dim() - (dim is not None) for x, dim in zip(tensors, dims, strict=True)]
    if ranks[0] == 1 or ranks[2] == 1:  # a vector in a product: its axis is added here and taken away again
        in_dims = (*(None if dim is None else 0 for dim in in_dims[:3]), *in_dims[3:])
        query, key, value = (
            x if dim is None else x.movedim(dim, 0) for x, dim in zip((query, key, value), dims[:3], strict=True)
        )
        query = query.unsqueeze(-2) if ranks[0] == 1 else query
        value = value.unsqueeze(-1) if ranks[2] == 1 else value
        output, _ = _attention(info, in_dims, query, key, value, operands, score, scale, k, *rest)
        output = output.squeeze(-1) if ranks[2] == 1 else output
        return (output.squeeze(-2 if ranks[2] > 1 else -1) if ranks[0] == 1 else output), 0
    rank = max(ranks)
    aligned = [_lead(x, dim, max(rank, 3)) for x, dim in zip(tensors, dims, strict=True)]
    output = torch.ops.topk_fx.attention(*aligned[:3], aligned[3:], score, scale, k, *rest)
    return output.reshape(output.size(0), *output.shape[output.dim() - rank :]), 0


def _attention_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    query, key, value, operands, score, scale, k, keep, *rest = args
    size, batch = info.batch_size, _batch_size(query, in_dims[0])
    query, key, value = (_fold(x, dim, size, batch) for x, dim in zip((query, key, value), in_dims[:3], strict=True))
    dims = _list_dims(operands, in_dims[3])
    operands = [_fold_broadcast(x, dim, size, batch) for x, dim in zip(operands, dims, strict=True)]
    keep = None if keep is None else _fold(keep, in_dims[7], size, batch)
    outputs = torch.ops.topk_fx.attention_forward(query, key, value, operands, score, scale, k, keep, *rest)
    return tuple(_unfold(x, size, batch) for x in outputs), (0, 0, 0)


def _attention_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    grad, query, key, value, operands, score, scale, indices, weights, dropout_p, needs_grad, *rest = args
    size, batch = info.batch_size, _batch_size(query, in_dims[1])
    tensors, dims = (grad, query, key, value, indices, weights), (*in_dims[:4], *in_dims[7:9])
    grad, query, key, value, indices, weights = (
        _fold(x, dim, size, batch) for x, dim in zip(tensors, dims, strict=True)
    )
    operand_dims = _list_dims(operands, in_dims[4])
    # Each sample has its own gradient, so an operand that needs one is folded at its full batch size.
    folded = [
        (_fold if needed else _fold_broadcast)(x, dim, size, batch)
        for x, dim, needed in zip(operands, operand_dims, needs_grad, strict=True)
    ]
    grads = torch.ops.topk_fx.attention_backward(
        grad, query, key, value, folded, score, scale, indices, weights, dropout_p, needs_grad, *rest
    )
    grads = [_unfold(x, size, batch) for x in grads]
    wanted = [(x, dim) for x, dim, needed in zip(operands, operand_dims, needs_grad, strict=True) if needed]
    for position, (x, dim) in enumerate(wanted, start=3):
        if _batch_size(x, dim) != batch:
            grads[position] = grads[position].sum(1, keepdim=True)
    return grads, [0] * len(grads)


def _no_second_derivative(info: Any, in_dims: tuple[Any, ...], op: str, *args: Any) -> tuple[list[Tensor], list[int]]:
    grads, inputs = args
    dims = _list_dims(inputs, in_dims[2])
    samples = [
        x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
        for x, dim in zip(inputs, dims, strict=True)
    ]
    return torch.ops.topk_fx.no_second_derivative(op, grads, samples), [0] * len(inputs)


def _list_dims(operands: Sequence[Tensor], dims: Sequence[Dim] | None) -> Sequence[Dim]:
    return dims if dims is not None else [None] * len(operands)


def _batch_size(x: Tensor, dim: Dim) -> int:
    """The batch size of x without its mapped dimension."""
    return x.size(1) if dim == 0 else x.size(0)


def _lead(x: Tensor, dim: Dim, rank: int) -> Tensor:
    """The mapped dimension in front of `rank` others, so that it cannot take the place of the heads."""
    if dim is None:
        return x
    x = x.movedim(dim, 0)
    return x.reshape(x.size(0), *(1,) * (rank - x.dim() + 1), *x.shape[1:])


def _fold(x: Tensor, dim: Dim, size: int, batch: int) -> Tensor:
    """[size * batch, ...] from a tensor [batch | 1, ...] in which a dimension of `size` is mapped or not."""
    x = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
    return x.expand(size, batch, *x.shape[2:]).reshape(size * batch, *x.shape[2:])


def _fold_broadcast(x: Tensor, dim: Dim, size: int, batch: int) -> Tensor:
    """As `_fold`, but what is the same for all samples and batches stays [1, ...]."""
    return x if dim is None and x.size(0) == 1 else _fold(x, dim, size, batch)


def _unfold(x: Tensor, size: int, batch: int) -> Tensor:
    return x.reshape(size, batch, *x.shape[1:])


torch.library.register_vmap("topk_fx::attention", _attention, lib=library)
torch.library.register_vmap("topk_fx::attention_forward", _attention_forward, lib=library)
torch.library.register_vmap("topk_fx::attention_backward", _attention_backward, lib=library)
torch.library.register_vmap("topk_fx::no_second_derivative", _no_second_derivative, lib=library)
