"""How far the outputs of a model are from those of the dense one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from topk_fx.config import nearest
from topk_fx.errors import ConfigError

Batch = Mapping[str, Any]
OutputsMetric = Callable[[Any, Any, Batch], Any]
NAMES = ("kl", "perplexity")
LOGIT_BUDGET = 2**24
"""Logits whose softmax is taken at a time."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss over all batches, and what it is at most on other data like these."""

    value: float
    upper: float


class Metric(Protocol):
    """A loss of a batch is the mean of samples of it."""

    def samples(self, outputs: Any, dense: Any, batch: Batch) -> Tensor:
        """float64 [n], 0 where the outputs are the dense ones."""

    def loss(self, mean: float) -> float:
        """The loss that a mean of samples stands for."""

    def text(self, loss: float) -> str:
        """A loss as it is printed."""


def metric_of(metric: object) -> Metric:
    """The metric that a caller named, or gave as a function; ConfigError if there is none."""
    if metric == "kl":
        return KL()
    if metric == "perplexity":
        return Perplexity()
    if callable(metric):
        return Given(metric)
    hint = nearest(metric, NAMES) if isinstance(metric, str) else ""
    raise ConfigError(
        f'metric={metric!r} is not accepted: give "kl", "perplexity", or a function of (outputs, dense_outputs, batch) '
        f"that returns a float.{hint}"
    )


def summarise(metric: Metric, samples: Tensor, confidence: float) -> Loss:
    """The loss that samples [n] of all batches stand for, and its one-sided upper bound at a confidence.

    The bound is that of a normal mean, with each sample by itself: the tokens of one text are taken for independent.
    """
    mean = samples.mean().item()
    error = samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else 0.0
    return Loss(metric.loss(mean), metric.loss(mean + max(0.0, NormalDist().inv_cdf(confidence)) * error))


@dataclasses.dataclass(frozen=True)
class KL:
    """KL(dense || top-k) of the distributions that the logits are, in nats per token."""

    def samples(self, outputs: Any, dense: Any, batch: Batch) -> Tensor:
        is_counted = _attended(batch, logits_of(dense))
        logits, dense_logits = (logits_of(x)[is_counted] for x in (outputs, dense))
        rows = max(1, LOGIT_BUDGET // logits.size(-1))
        parts = [_kl(*pair) for pair in zip(logits.split(rows), dense_logits.split(rows), strict=True)]
        return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float64)

    def loss(self, mean: float) -> float:
        return mean

    def text(self, loss: float) -> str:
        return f"{loss:.3g} nats per token"


def _kl(logits: Tensor, dense_logits: Tensor) -> Tensor:
    log_p, log_q = dense_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().clamp(min=0)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity over that of the dense model, less 1. A language model: logits [B, L, V] predict the next token.

    The tokens are `labels`, of which -100 does not count, else `input_ids`; what `attention_mask` hides does not count.
    """

    def samples(self, outputs: Any, dense: Any, batch: Batch) -> Tensor:
        tokens = batch.get("labels", batch.get("input_ids"))
        logits = logits_of(outputs)
        if not isinstance(tokens, Tensor) or logits.dim() != 3 or tokens.shape != logits.shape[:-1]:
            raise ConfigError(
                'metric="perplexity" needs labels or input_ids [B, L] in each batch and logits [B, L, V]; the batch '
                f"has {', '.join(batch)} and the logits the shape {tuple(logits.shape)}"
            )
        target = tokens[:, 1:]
        is_counted = (target != -100) & _attended(batch, logits)[:, 1:]
        target = target[is_counted]
        losses = [_cross_entropy(logits_of(x)[:, :-1][is_counted], target) for x in (outputs, dense)]
        return losses[0] - losses[1]

    def loss(self, mean: float) -> float:
        return math.expm1(min(mean, 700.0))

    def text(self, loss: float) -> str:
        return f"perplexity {loss:+.2%}"


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    rows = max(1, LOGIT_BUDGET // logits.size(-1))
    parts = zip(logits.split(rows), target.split(rows), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none").double() for x, y in parts])


@dataclasses.dataclass(frozen=True)
class Given:
    """A function of the user's; one sample a batch."""

    function: OutputsMetric

    def samples(self, outputs: Any, dense: Any, batch: Batch) -> Tensor:
        value = self.function(outputs, dense, batch)
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"metric returned {value!r}; it must return a float, or a tensor of one") from error
        if not math.isfinite(value):
            raise ConfigError(f"metric returned {value}; it must return a finite float")
        return torch.tensor([value], dtype=torch.float64)

    def loss(self, mean: float) -> float:
        return mean

    def text(self, loss: float) -> str:
        return f"{loss:.4g}"


@dataclasses.dataclass(frozen=True)
class Divergence:
    """By what the sites are compared: KL where the outputs have logits, else the squared relative error of all outputs.

    Neither is below 0, so that even a small effect of one site shows.
    """

    kind: Literal["kl", "relative"]

    @classmethod
    def of(cls, metric: Metric, outputs: Any) -> Divergence:
        has_logits = not isinstance(metric, Given) or isinstance(_named_logits(outputs), Tensor)
        return cls("kl" if has_logits else "relative")

    def samples(self, outputs: Any, dense: Any, batch: Batch) -> Tensor:
        if self.kind == "kl":
            return KL().samples(outputs, dense, batch)
        pairs = list(zip(_floating(outputs), _floating(dense), strict=True))
        error = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
        norm = sum(b.double().square().sum().item() for _, b in pairs)
        return torch.tensor([error / norm if norm else 0.0], dtype=torch.float64)


def logits_of(outputs: Any) -> Tensor:
    """The logits [..., V] of a model's outputs: `.logits`, `["logits"]`, the first of a tuple, or the tensor itself."""
    logits = _named_logits(outputs)
    if logits is None:
        logits = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        raise ConfigError(
            f'metric="kl" and "perplexity" need logits, and the model returned a {type(outputs).__name__} without '
            "them: give a function of (outputs, dense_outputs, batch) that returns a float"
        )
    return logits


def _named_logits(outputs: Any) -> Any:
    return outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)


def _floating(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _attended(batch: Batch, logits: Tensor) -> Tensor:
    """Which tokens count: boolean, of the logits' shape without its last axis."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        return mask != 0
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
