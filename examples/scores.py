"""What a language model says of every token, beside what the dense one says; each figure with its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quality import Interval, bootstrap

ROWS = 256
"""Tokens whose softmax over the vocabulary is taken at a time."""


@dataclass(frozen=True)
class Scores:
    """All [windows, length - 1], of every token but the first of each window.

    Attributes:
        loss: -log of the probability that the model gave the token.
        correct: 1 where its likeliest token is the one that follows.
        agrees: 1 where its likeliest token is the dense model's.
        kl: KL(dense || model), in nats.
    """

    loss: Tensor
    correct: Tensor
    agrees: Tensor
    kl: Tensor

    def figures(self, dense: Scores) -> dict[str, Interval]:
        return {
            "perplexity": bootstrap(self.loss, torch.exp),
            "of dense": bootstrap(self.loss - dense.loss, torch.exp),
            "accuracy": bootstrap(self.correct, _mean),
            "agreement": bootstrap(self.agrees, _mean),
            "KL": bootstrap(self.kl, _mean),
        }


def _mean(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def logits_of(run: Callable[[Tensor], Tensor], windows: Tensor, progress: Callable[[], object]) -> list[Tensor]:
    """The logits [length - 1, V] of each window but its last token's."""
    found = []
    for window in windows:
        found.append(run(window)[:-1])
        progress()
    return found


@torch.no_grad()
def score(
    run: Callable[[Tensor], Tensor], windows: Tensor, dense: list[Tensor], progress: Callable[[], object]
) -> Scores:
    """Scores of `run`, which gives the logits [length, V] of a window, against the dense logits of the same windows."""
    parts: list[dict[str, list[Tensor]]] = []
    for window, dense_logits in zip(windows, dense, strict=True):
        columns: dict[str, list[Tensor]] = {"loss": [], "correct": [], "agrees": [], "kl": []}
        logits = run(window)[:-1]
        for x, y, target in zip(logits.split(ROWS), dense_logits.split(ROWS), window[1:].split(ROWS), strict=True):
            log_q, log_p = x.float().log_softmax(-1), y.float().log_softmax(-1)
            columns["loss"].append(-log_q.gather(-1, target[:, None])[:, 0].double())
            columns["correct"].append((x.argmax(-1) == target).double())
            columns["agrees"].append((x.argmax(-1) == y.argmax(-1)).double())
            columns["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1).double().clamp(min=0))
        parts.append(columns)
        progress()
    return Scores(*(torch.stack([torch.cat(x[name]) for x in parts]) for name in ("loss", "correct", "agrees", "kl")))


def logits_only(model: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """A model of transformers as a function from a window [length] to its logits [length, V]."""
    return lambda window: model(input_ids=window[None], use_cache=False).logits[0]
