"""Transformer layers with other heads, projections or residuals than usual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import (
    BATCH,
    HEAD_SIZE,
    LENGTH,
    REWRITTEN,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    GatedFeedForward,
    attend,
    heads_of,
    joined,
    parameter,
)  # fmt: skip


class SparseQueryAttention(nn.Module):
    """Fewer query heads than a multi-head attention has, and keys of as many heads or fewer, each repeated.

    Filipek 2025, "Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query Heads
    Reduction", arXiv:2510.01817.
    """

    def __init__(self, query_heads: int = 4, key_heads: int = 2) -> None:
        super().__init__()
        self.query_heads, self.key_heads = query_heads, key_heads
        self.query, self.out = nn.Linear(WIDTH, query_heads * HEAD_SIZE), nn.Linear(query_heads * HEAD_SIZE, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, key_heads * HEAD_SIZE) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q = heads_of(self.query(x), self.query_heads)
        k, v = (heads_of(layer(x), self.key_heads) for layer in (self.key, self.value))
        return self.out(joined(self.attend(q, k, v)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = self.query_heads // self.key_heads
        return attend(q, *(y.repeat_interleave(repeats, dim=1) for y in (k, v)))


class GroupedSparseQueryAttention(SparseQueryAttention):
    """The same by scaled_dot_product_attention, which repeats the keys itself."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class SymmetricSparseQueryAttention(SparseQueryAttention):
    """As many key heads as query heads: half of those of the model."""

    def __init__(self) -> None:
        super().__init__(query_heads=2, key_heads=2)


class ReverseSparseQueryAttention(SparseQueryAttention):
    """Fewer query heads than key heads: the queries are repeated."""

    def __init__(self) -> None:
        super().__init__(query_heads=2, key_heads=4)
        self.out = nn.Linear(self.key_heads * HEAD_SIZE, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = self.key_heads // self.query_heads
        q = q.unsqueeze(2).expand(-1, -1, repeats, -1, -1).reshape(BATCH, self.key_heads, LENGTH, HEAD_SIZE)
        return attend(q, k, v)


class MemoryFormer(nn.Module):
    """Projections by hashing: the signs of a chunk of the token are the row of a table; rows of all chunks are added.

    Ding et al. 2024, "MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers",
    arXiv:2411.12992.
    """

    def __init__(self, chunk: int = 4) -> None:
        super().__init__()
        self.chunk = chunk
        self.tables = nn.ParameterDict(
            {name: parameter(WIDTH // chunk, 2**chunk, WIDTH) for name in ("query", "key", "value", "up", "down")}
        )
        self.norm = nn.LayerNorm(WIDTH)

    def project(self, x: Tensor, name: str) -> Tensor:
        chunks = x.unflatten(-1, (-1, self.chunk))
        row = ((chunks > 0) * 2 ** torch.arange(self.chunk)).sum(-1)  # [B, L, chunks]
        distance = chunks.abs().sum(-1, keepdim=True)
        return (self.tables[name][torch.arange(row.size(-1)), row] * torch.sigmoid(distance)).sum(-2)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (heads_of(self.project(normed, name)) for name in ("query", "key", "value"))
        x = x + joined(attend(q, k, v))
        return x + self.project(self.project(self.norm(x), "up"), "down")


class LadderResidual(nn.Module):
    """Each module reads the residual without the output of the module before it, which may still be on its way.

    Zhang et al. 2025, "Ladder-residual: parallelism-aware architecture for accelerating large model inference with
    communication overlapping", arXiv:2501.06589.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modules_in_order = nn.ModuleList([Attention(), GatedFeedForward(), Attention(), GatedFeedForward()])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in self.modules_in_order])

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.size(1))
        causal = position[:, None] >= position
        arriving = torch.zeros_like(x)
        for norm, module in zip(self.norms, self.modules_in_order, strict=True):
            normed = norm(x)
            output = module(normed, keep=causal) if isinstance(module, Attention) else module(normed)
            x = x + arriving
            arriving = output
        return x + arriving


LAYERS = [
    Block(SparseQueryAttention, (TOKENS,), REWRITTEN),
    Block(GroupedSparseQueryAttention, (TOKENS,), REWRITTEN),
    Block(SymmetricSparseQueryAttention, (TOKENS,), REWRITTEN),
    Block(ReverseSparseQueryAttention, (TOKENS,), REWRITTEN),
    Block(MemoryFormer, (TOKENS,), REWRITTEN),
    Block(LadderResidual, (TOKENS,), REWRITTEN * 2, REWRITTEN * 2),
]
