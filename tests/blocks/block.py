"""A block of the literature and what the passes owe it, and what several blocks are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import drawn
from torch import Tensor, nn

BATCH, LENGTH, HEADS, HEAD_SIZE, HIDDEN = 2, 11, 3, 4, 10
WIDTH = HEADS * HEAD_SIZE

REWRITTEN = ("",)


@dataclasses.dataclass(frozen=True)
class Block:
    """A model whose docstring says what it computes and where it is published, and what a rewrite of it must give.

    Attributes:
        model: the module's class, or a function that makes one.
        inputs: its arguments. Floating ones get gradients.
        attention: for each softmax and SDPA call in the order of the graph, why it stays dense; "" if it is rewritten.
        ffn: the same for each FFN.
        mask_is_tensor: whether a tensor of queries x keys reaches a rewritten attention; if not, all masks and biases
            are read as structure.
        where: the module path of each rewritten site; not checked if empty.
        unmet: why the passes do not do yet what is owed; "" if they do.
    """

    model: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    attention: tuple[str, ...] = ()
    ffn: tuple[str, ...] = ()
    mask_is_tensor: bool = False
    where: tuple[str, ...] = ()
    unmet: str = ""

    @property
    def name(self) -> str:
        return self.model.__name__


TOKENS = drawn(BATCH, LENGTH, WIDTH)


def heads_of(x: Tensor, heads: int = HEADS) -> Tensor:
    """[..., L, H * D] -> [..., H, L, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def joined(x: Tensor) -> Tensor:
    """[..., H, L, D] -> [..., L, H * D]."""
    return x.transpose(-3, -2).flatten(-2)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt D) V, written out, over the keys where `keep` is true."""
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head attention of x to a context, which is x itself if not given."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            heads_of(layer(y), self.heads) for layer, y in ((self.query, x), (self.key, context), (self.value, context))
        )
        return self.out(joined(attend(q, k, v, keep)))


class FeedForward(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu, width: int = WIDTH) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.down = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu, width: int = WIDTH) -> None:
        super().__init__()
        self.activation = activation
        self.gate, self.up, self.down = nn.Linear(width, HIDDEN), nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class TransformerLayer(nn.Module):
    """x + Attention(norm(x)), then the same with a feed-forward."""

    def __init__(self, feed_forward: nn.Module | None = None, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = FeedForward(width=width) if feed_forward is None else feed_forward

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), keep=keep)
        return x + self.mlp(self.norm2(x))
