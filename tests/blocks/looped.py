"""Blocks that share their weights among depths, and blocks with the least there can be."""

from __future__ import annotations

import torch
from models import drawn
from torch import Tensor, nn

from .block import (
    BATCH,
    REWRITTEN,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    FeedForward,
    TransformerLayer,
    parameter,
)  # fmt: skip


class AlgoFormer(nn.Module):
    """A layer before, one layer applied three times to its own result, a layer after.

    Gao et al. 2024, "AlgoFormer: An Efficient Transformer Framework with Algorithmic Structures", arXiv:2402.13572.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before, self.loop, self.after = TransformerLayer(), TransformerLayer(), TransformerLayer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for _ in range(3):
            x = self.loop(x)
        return self.after(x)


class LoopedTransformer(nn.Module):
    """x_t = layer(x_(t-1) + p): one layer, the prompt p given to it anew at each of three steps.

    Yang et al. 2023, "Looped Transformers are Better at Learning Learning Algorithms", arXiv:2311.12424.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = TransformerLayer()

    def forward(self, prompt: Tensor) -> Tensor:
        x = torch.zeros_like(prompt)
        for _ in range(3):
            x = self.layer(x + prompt)
        return x


class SlicedRecursiveTransformer(nn.Module):
    """One layer applied twice; attention runs inside groups of tokens, which are permuted before and put back after.

    Shen et al. 2021, "Sliced Recursive Transformer", arXiv:2111.05297.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        for groups in (3, 2):
            sliced = self.norm(x).unflatten(1, (-1, groups)).transpose(1, 2)  # [B, groups, L / groups, E]
            x = x + self.attention(sliced).transpose(1, 2).flatten(1, 2)
            x = x + self.mlp(x)
        return x


class SingleLayerTransformer(nn.Module):
    """One self-attention whose query and key matrices have rank one, then one ReLU FFN.

    Kajitsuka & Sato 2023, "Are Transformers with One Layer Self-Attention Using Low-Rank Weight Matrices Universal
    Approximators?", arXiv:2307.14023.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = parameter(WIDTH, 1), parameter(WIDTH, 1), parameter(WIDTH, WIDTH)
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + ((x @ self.query) @ (x @ self.key).mT).softmax(-1) @ (x @ self.value)
        return x + self.mlp(x)


class ScanAndSnap(nn.Module):
    """The last token of a sequence attends to the tokens before it; the decoder reads the normalised result.

    Tian et al. 2023, "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer",
    arXiv:2305.16380.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.decoder = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        context, last = x[:, :-1], x[:, -1:]
        weights = torch.softmax(self.query(last) @ self.key(context).mT / WIDTH**0.5, -1)
        read = (weights @ context).squeeze(1)
        return self.decoder(read / read.norm(dim=-1, keepdim=True))


class CollapsedTransformer(nn.Module):
    """softmax(X A X^T) X: no MLP, query and key matrices collapsed into A, neither value matrix nor projection.

    Bermeitinger et al. 2024, "Reducing the Transformer Architecture to a Minimum", arXiv:2410.13732.
    """

    def __init__(self) -> None:
        super().__init__()
        self.similarity = nn.ParameterList([parameter(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for a in self.similarity:
            x = x + (x @ a @ x.mT / WIDTH**0.5).softmax(-1) @ x
        return x


class SymmetricTransformer(nn.Module):
    """softmax(X B (X B)^T) X, and with B B^T multiplied out: a token is as like another as that is like it.

    Bermeitinger et al. 2024, "Reducing the Transformer Architecture to a Minimum", arXiv:2410.13732.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factor = parameter(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        projected = x @ self.factor
        x = x + (projected @ projected.mT / WIDTH).softmax(-1) @ x
        similarity = self.factor @ self.factor.T
        return x + (x @ similarity @ x.mT / WIDTH).softmax(-1) @ x


LOOPED = [
    Block(AlgoFormer, (TOKENS,), REWRITTEN * 5, REWRITTEN * 5,
          where=("before.attention", "before.mlp", *("loop.attention", "loop.mlp") * 3,
                 "after.attention", "after.mlp")),
    Block(LoopedTransformer, (TOKENS,), REWRITTEN * 3, REWRITTEN * 3,
          where=("layer.attention", "layer.mlp") * 3),
    Block(SlicedRecursiveTransformer, (drawn(BATCH, 12, WIDTH),), REWRITTEN * 2, REWRITTEN * 2,
          where=("attention", "mlp") * 2),
    Block(SingleLayerTransformer, (TOKENS,), REWRITTEN, REWRITTEN),
    Block(ScanAndSnap, (TOKENS,), REWRITTEN),
    Block(CollapsedTransformer, (TOKENS,), REWRITTEN * 2),
    Block(SymmetricTransformer, (TOKENS,), REWRITTEN * 2),
]  # fmt: skip
