"""Attention and FFN in the manner of the paper's own code, and dense ones in chunks: what top-k is measured against.

Written anew from what that code does (github.com/ag1988/top_k_attention at 1f0e736), none of it copied: queries are
taken in chunks; a chunk's scores are computed densely, the k largest selected with `torch.topk`, and their
activations scattered into a dense matrix that multiplies the values. What is kept for the backward is the selected
scores and their int64 indices, and there the activation alone is computed again; all of the products are dense. For
an FFN the queries are the tokens, the keys and values the rows of its two weights, and the activation is ReLU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Queries, and what the paper took for attention; for its FFN it took 16,384 tokens."""


class _TopKChunk(torch.autograd.Function):
    """activation(top-k of query keyᵀ) value for one chunk of queries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, first: int | None, k: int, scale: float | None
    ) -> Tensor:
        """query [..., Cq, D], key [..., L, D], value [..., L, Dv]; `first`: the causal mask's first row, if any.

        With a scale the activation is a softmax of the scaled scores, without one it is ReLU.
        """
        scores = query @ key.mT
        if first is not None:
            rows = torch.arange(first, first + query.size(-2), device=query.device)
            hidden = torch.arange(key.size(-2), device=query.device) > rows[:, None]
            scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
        top, indices = scores.topk(k)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, top, indices)
        return torch.zeros_like(scores).scatter_(-1, indices, _activate(top, scale)) @ value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, top, indices = ctx.saved_tensors
        with torch.enable_grad():
            leaf = top.detach().requires_grad_()
            weights = _activate(leaf, ctx.scale)
        dense = torch.zeros(*query.shape[:-1], key.size(-2), dtype=query.dtype, device=query.device)
        grad_value = dense.scatter_(-1, indices, weights.detach()).mT @ grad
        (grad_top,) = torch.autograd.grad(weights, leaf, (grad @ value.mT).gather(-1, indices))
        dense.zero_().scatter_(-1, indices, grad_top)
        return dense @ key, dense.mT @ query, grad_value, None, None, None


def _activate(top: Tensor, scale: float | None) -> Tensor:
    return F.relu(top) if scale is None else F.softmax(top * scale, dim=-1)


def topk_attention(query: Tensor, key: Tensor, value: Tensor, k: int, chunk: int = CHUNK) -> Tensor:
    """Causal attention that keeps k keys of each query; query, key [B, H, L, D], value [B, H, L, Dv]."""
    k, scale = min(k, key.size(-2)), query.size(-1) ** -0.5
    parts = query.split(chunk, -2)
    return torch.cat(
        [_TopKChunk.apply(part.clone(), key, value, n * chunk, k, scale) for n, part in enumerate(parts)], -2
    )


def topk_ffn(x: Tensor, up: Tensor, down: Tensor, k: int, chunk: int = CHUNK) -> Tensor:
    """relu(top-k of x upᵀ) downᵀ; x [T, D], up [hidden, D], down [D, hidden], as nn.Linear holds them."""
    k = min(k, up.size(0))
    return torch.cat([_TopKChunk.apply(part.clone(), up, down.mT, None, k, None) for part in x.split(chunk)])


def vanilla_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, written out."""
    return _rows(query, key, value, 0)


def chunked_attention(query: Tensor, key: Tensor, value: Tensor, chunk: int = CHUNK) -> Tensor:
    """Causal attention in chunks of queries, each computed again in the backward."""
    parts = query.split(chunk, -2)
    return torch.cat(
        [checkpoint(_rows, part, key, value, n * chunk, use_reentrant=False) for n, part in enumerate(parts)], -2
    )


def _rows(query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
    rows = torch.arange(first, first + query.size(-2), device=query.device)
    hidden = torch.arange(key.size(-2), device=query.device) > rows[:, None]
    scores = (query @ key.mT * query.size(-1) ** -0.5).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value


def vanilla_ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)), down)


def chunked_ffn(x: Tensor, up: Tensor, down: Tensor, chunk: int = CHUNK) -> Tensor:
    """In chunks of tokens, each computed again in the backward."""
    return torch.cat([checkpoint(vanilla_ffn, part, up, down, use_reentrant=False) for part in x.split(chunk)])
