"""Losses of outputs against dense ones."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import drawn
from torch import Tensor

from topk_fx.calibration.metric import LOGIT_BUDGET, Divergence, Given, logits_of, metric_of, summarise
from topk_fx.errors import ConfigError

DENSE = drawn(2, 7, 11, seed=1)
LOGITS = DENSE + 0.3 * drawn(2, 7, 11, seed=2)
TOKENS = torch.arange(14).view(2, 7) % 11


def test_kl_is_that_of_the_distributions() -> None:
    samples = metric_of("kl").samples(LOGITS, DENSE, {})
    p, q = (torch.distributions.Categorical(logits=x.flatten(0, 1)) for x in (DENSE, LOGITS))
    torch.testing.assert_close(samples, torch.distributions.kl_divergence(p, q).double(), rtol=1e-4, atol=1e-6)
    assert metric_of("kl").samples(DENSE, DENSE, {}).abs().max() < 1e-6


def test_logits_are_read_in_parts_that_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [metric_of(name).samples(LOGITS, DENSE, {"input_ids": TOKENS}) for name in ("kl", "perplexity")]
    assert LOGITS.numel() < LOGIT_BUDGET
    monkeypatch.setattr("topk_fx.calibration.metric.LOGIT_BUDGET", 3 * 11)
    parts = [metric_of(name).samples(LOGITS, DENSE, {"input_ids": TOKENS}) for name in ("kl", "perplexity")]
    torch.testing.assert_close(parts, whole)


def test_perplexity_is_relative_to_the_dense_one() -> None:
    metric = metric_of("perplexity")
    samples = metric.samples(LOGITS, DENSE, {"input_ids": TOKENS})
    kept, dense = (
        math.exp(F.cross_entropy(x[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item()) for x in (LOGITS, DENSE)
    )
    assert metric.loss(samples.mean().item()) == pytest.approx(kept / dense - 1, rel=1e-3)


def test_what_does_not_count_is_left_out() -> None:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    labels = TOKENS.masked_fill(mask == 0, -100)
    masked = metric_of("perplexity").samples(LOGITS, DENSE, {"input_ids": TOKENS, "attention_mask": mask})
    labelled = metric_of("perplexity").samples(LOGITS, DENSE, {"input_ids": TOKENS.flip(0), "labels": labels})
    assert len(masked) == 6 + 3
    torch.testing.assert_close(labelled, masked)
    assert len(metric_of("kl").samples(LOGITS, DENSE, {"attention_mask": mask})) == 7 + 4


@pytest.mark.parametrize(
    "outputs", [DENSE, (DENSE, None), {"logits": DENSE}, types.SimpleNamespace(logits=DENSE)], ids=type
)
def test_logits_are_found_in_the_outputs(outputs: Any) -> None:
    assert logits_of(outputs) is DENSE


def test_outputs_without_logits_are_an_error() -> None:
    with pytest.raises(ConfigError, match="need logits, and the model returned a SimpleNamespace without them"):
        metric_of("kl").samples(types.SimpleNamespace(last_hidden_state=DENSE), DENSE, {})
    with pytest.raises(ConfigError, match="labels or input_ids .* the batch has ids and the logits the shape"):
        metric_of("perplexity").samples(LOGITS, DENSE, {"ids": TOKENS})


def test_a_functions_value_is_one_sample_a_batch() -> None:
    def difference(outputs: Tensor, dense: Tensor, batch: Any) -> Tensor:
        return (outputs - dense).abs().max() * batch["weight"]

    samples = metric_of(difference).samples(LOGITS, DENSE, {"weight": 2})
    assert samples.tolist() == [2 * (LOGITS - DENSE).abs().max().item()]
    for value, message in ((None, "returned None; it must return a float"), (math.nan, "finite float")):
        with pytest.raises(ConfigError, match=message):
            metric_of(lambda outputs, dense, batch, value=value: value).samples(LOGITS, DENSE, {})


def test_unknown_metric_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"metric='perplexty' is not accepted.*Did you mean 'perplexity'\?"):
        metric_of("perplexty")


def test_upper_bound_holds_as_often_as_it_says() -> None:
    metric = metric_of("kl")
    draws = torch.rand(1000, 50, dtype=torch.float64)
    losses = [summarise(metric, x, 0.9) for x in draws]
    assert sum(loss.upper >= 0.5 for loss in losses) / 1000 == pytest.approx(0.9, abs=0.03)
    even = summarise(metric, draws[0], 0.5)
    assert even.upper == even.value == pytest.approx(draws[0].mean().item())
    assert summarise(metric, draws[0, :1], 0.99).upper == draws[0, 0]


def test_sites_are_compared_by_kl_or_by_relative_error() -> None:
    given = Given(lambda outputs, dense, batch: 0.0)
    assert Divergence.of(given, {"logits": DENSE}).kind == Divergence.of(metric_of("kl"), DENSE).kind == "kl"
    relative = Divergence.of(given, (DENSE, TOKENS))
    expected = (LOGITS - DENSE).square().sum() / DENSE.square().sum()
    assert relative.samples((LOGITS, TOKENS), (DENSE, TOKENS), {}).item() == pytest.approx(expected.item())
