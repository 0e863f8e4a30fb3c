"""Attention whose scores depend on the distance between query and key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import drawn
from torch import Tensor, nn

from .block import (
    BATCH,
    HEAD_SIZE,
    HEADS,
    LENGTH,
    REWRITTEN,
    TOKENS,
    WIDTH,
    Block,
    FeedForward,
    heads_of,
    joined,
    parameter,
)  # fmt: skip

MEMORY = 4


def shifted(x: Tensor) -> Tensor:
    """Row i of [..., Lq, Lr] moved left by Lq - 1 - i: column r, a distance, becomes the key at that distance."""
    padded = F.pad(x, (1, 0))
    return padded.view(*x.shape[:-2], x.size(-1) + 1, x.size(-2))[..., 1:, :].reshape(x.shape)


def sinusoids(length: int, width: int) -> Tensor:
    """Of the distances length - 1, ..., 0."""
    angles = torch.arange(length - 1, -1, -1.0)[:, None] / 10000 ** (torch.arange(0.0, width, 2) / width)
    return torch.cat([angles.sin(), angles.cos()], -1)


class RelativeAttention(nn.Module):
    """softmax((Q + u) K^T + shift((Q + v) R^T)) V over a memory of past states and the tokens up to the query.

    Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv:1901.02860.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.position, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.key_value = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.content_bias, self.position_bias = parameter(HEADS, 1, HEAD_SIZE), parameter(HEADS, 1, HEAD_SIZE)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        context = torch.cat([memory, x], 1)
        length, span = x.size(1), context.size(1)
        q = heads_of(self.query(x))
        k, v = map(heads_of, self.key_value(context).chunk(2, -1))
        r = heads_of(self.position(sinusoids(span, WIDTH)))
        scores = (q + self.content_bias) @ k.mT + shifted((q + self.position_bias) @ r.mT)
        future = torch.ones(length, span, dtype=torch.bool).triu(1 + span - length)
        weights = (scores * HEAD_SIZE**-0.5).masked_fill(future, -torch.inf).softmax(-1)
        return self.out(joined(weights @ v))


class TransformerXL(nn.Module):
    """The same attention in the axes of the paper's code (queries, keys, batch, heads), and an FFN.

    Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv:1901.02860.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.position, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.key_value = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.content_bias, self.position_bias = parameter(HEADS, HEAD_SIZE), parameter(HEADS, HEAD_SIZE)
        self.mlp = FeedForward()

    def shift(self, x: Tensor) -> Tensor:
        padded = torch.cat([x.new_zeros(x.size(0), 1, *x.shape[2:]), x], dim=1)
        return padded.view(x.size(1) + 1, x.size(0), *x.shape[2:])[1:].view_as(x)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        context = torch.cat([memory, x])
        length, span = x.size(0), context.size(0)
        q = self.query(x).view(length, -1, HEADS, HEAD_SIZE)
        k, v = (y.view(span, -1, HEADS, HEAD_SIZE) for y in self.key_value(context).chunk(2, -1))
        r = self.position(sinusoids(span, WIDTH)).view(span, HEADS, HEAD_SIZE)
        content = torch.einsum("ibnd,jbnd->ijbn", q + self.content_bias, k)
        position = self.shift(torch.einsum("ibnd,jnd->ijbn", q + self.position_bias, r))
        scores = content + position
        scores.mul_(HEAD_SIZE**-0.5)
        future = torch.triu(x.new_ones(length, span), diagonal=1 + span - length).bool()[:, :, None, None]
        weights = F.softmax(scores.float().masked_fill(future, -torch.inf).type_as(scores), dim=1)
        read = torch.einsum("ijbn,jbnd->ibnd", weights, v).contiguous()
        x = x + self.out(read.view(length, -1, WIDTH))
        return x + self.mlp(x)


class Gate(nn.Module):
    """The update of a GRU in the place of a residual sum: (1 - z) x + z tanh(W y + U (r x))."""

    def __init__(self) -> None:
        super().__init__()
        self.of_new, self.of_old = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.of_reset = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        new_reset, new_update, new = self.of_new(y).chunk(3, -1)
        old_reset, old_update = self.of_old(x).chunk(2, -1)
        update = torch.sigmoid(new_update + old_update - 2.0)
        candidate = torch.tanh(new + self.of_reset(torch.sigmoid(new_reset + old_reset) * x))
        return (1 - update) * x + update * candidate


class GatedTransformerXL(nn.Module):
    """Transformer-XL with norms before attention and MLP, and gates in the place of residual sums.

    Parisotto et al. 2019, "Stabilizing Transformers for Reinforcement Learning", arXiv:1910.06764.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = RelativeAttention(), FeedForward()
        self.gate1, self.gate2 = Gate(), Gate()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.gate1(x, F.relu(self.attention(self.norm1(x), self.norm1(memory.detach()))))
        return self.gate2(x, F.relu(self.mlp(self.norm2(x))))


class DistanceAwareTransformer(nn.Module):
    """softmax(ReLU(Q K^T) * f(w R) / sqrt D) V with R = |i - j| and f(x) = (1 + e^u) / (1 + e^(u - x)); w, u of each head.

    Wu, Wu & Huang 2020, "DA-Transformer: Distance-aware Transformer", arXiv:2010.06925.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.reach, self.steepness = parameter(HEADS, 1, 1), parameter(HEADS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        positions = torch.arange(x.size(1))
        distance = self.reach * (positions[:, None] - positions).abs()
        weight = (1 + self.steepness.exp()) / (1 + (self.steepness - distance).exp())
        scores = F.relu(q @ k.mT) * weight / HEAD_SIZE**0.5
        return joined(scores.softmax(-1) @ v)


MEMORIES = drawn(BATCH, MEMORY, WIDTH, seed=1)

RELATIVE_POSITIONS = [
    Block(TransformerXL, (drawn(LENGTH, BATCH, WIDTH), drawn(MEMORY, BATCH, WIDTH, seed=1)), REWRITTEN, REWRITTEN,
          mask_is_tensor=True),
    Block(RelativeAttention, (TOKENS, MEMORIES), REWRITTEN, mask_is_tensor=True),
    Block(GatedTransformerXL, (TOKENS, MEMORIES), REWRITTEN, REWRITTEN, mask_is_tensor=True,
          unmet="a gate's linear layer that reads the ReLU of a linear layer passes for the end of an FFN"),
    Block(DistanceAwareTransformer, (TOKENS,), REWRITTEN),
]  # fmt: skip
