"""How well a language model predicts windows of text, and how often it says the same as another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """What a model says of every token but the first of each window; all tensors [windows, length - 1].

    Attributes:
        actual: the token that stands there.
        log_probability: what the model gave that token.
        likeliest: the token to which the model gave most.
    """

    actual: Tensor
    log_probability: Tensor
    likeliest: Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_probability.mean().item())

    @property
    def accuracy(self) -> float:
        """The share of tokens that were the model's likeliest."""
        return _share(self.likeliest == self.actual)

    def agreement(self, other: Predictions) -> float:
        """The share of places where both models name the same likeliest token."""
        return _share(self.likeliest == other.likeliest)

    def largest_difference(self, other: Predictions) -> float:
        """The largest difference between the log-probabilities that both models gave an actual token."""
        return (self.log_probability - other.log_probability).abs().max().item()


@dataclass(frozen=True)
class Interval:
    """A measured value, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


BLOCK = 64
"""Tokens that are drawn together: those near each other in a text are not independent."""

DRAWS = 2000


def bootstrap(values: Tensor, statistic: Callable[[Tensor], Tensor], block: int = BLOCK) -> Interval:
    """A statistic of the mean of values, with the interval of a bootstrap of blocks.

    Args:
        values: [..., windows, n]; blocks of neighbours are drawn anew, all leading axes alike.
        statistic: from means [..., draws] to values [draws]; or, undrawn, from means [..., 1].
    """
    blocks = torch.stack([part.mean(-1) for part in values.double().split(block, -1)], -1).flatten(-2)
    sizes = torch.tensor([part.size(-1) for part in values.split(block, -1)], dtype=torch.float64)
    weights = sizes.repeat(values.size(-2))
    chosen = torch.randint(weights.numel(), (DRAWS, weights.numel()), generator=torch.Generator().manual_seed(0))
    drawn = (blocks[..., chosen] * weights[chosen]).sum(-1) / weights[chosen].sum(-1)
    whole = (blocks * weights).sum(-1, keepdim=True) / weights.sum()
    low, high = statistic(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(statistic(whole).item(), low, high)


def perplexity_ratio(predictions: Predictions, dense: Predictions) -> Interval:
    """Perplexity over that of another model on the same tokens."""
    return bootstrap(dense.log_probability - predictions.log_probability, torch.exp)


def _nothing() -> None:
    pass


@torch.no_grad()
def predict(model: Callable[..., Any], windows: Tensor, progress: Callable[[], object] = _nothing) -> Predictions:
    """Runs a causal language model of transformers over windows [windows, length], one at a time."""
    log_probabilities, likeliest = [], []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        log_probabilities.append(-torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
        likeliest.append(logits.argmax(-1))
        progress()
    return Predictions(windows[:, 1:], torch.stack(log_probabilities), torch.stack(likeliest))


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
