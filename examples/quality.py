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


@torch.no_grad()
def predict(model: Callable[..., Any], windows: Tensor, progress: Callable[[], object]) -> Predictions:
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
