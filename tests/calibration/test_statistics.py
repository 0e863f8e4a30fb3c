"""What the measuring run says of a site, against the definition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import DynamoTrace, assert_same, drawn
from torch import Tensor, nn

import topk_fx
from topk_fx.calibration.statistics import SiteKey, SiteStatistics, measure_graph

QUERY, KEY, VALUE = drawn(2, 4, 9, 8, seed=1), drawn(2, 2, 11, 8, seed=2), drawn(2, 2, 11, 5, seed=3)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def capped_with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A score function with an operand; K and V repeated."""
    scores = (q @ k.repeat_interleave(2, 1).transpose(-2, -1)).div(3).tanh() + QUERY[..., :1] * torch.arange(11)
    return scores.softmax(-1) @ v.repeat_interleave(2, 1)


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.repeat_interleave(2, 1).transpose(-2, -1)
    scores = torch.cat([scores, torch.ones(2, 4, 9, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)


def measured(model: Callable[..., Any], *inputs: Tensor, kind: str = "attention") -> tuple[Any, SiteStatistics]:
    """The output of the measuring graph, and the statistics of the one site."""
    found: dict[SiteKey, SiteStatistics] = {}
    trace = DynamoTrace(model, inputs)
    output = trace.callable(measure_graph(trace.program, topk_fx.TopKConfig(k="all"), (kind,), found, set()))(*inputs)
    (site,) = found.values()
    return output, site


@pytest.mark.parametrize("model", [grouped, capped_with_bias, with_sink])
def test_error_of_each_k_is_that_of_the_op(model: Callable[..., Tensor]) -> None:
    output, site = measured(model, QUERY, KEY, VALUE)
    dense = model(QUERY, KEY, VALUE)
    assert_same(output, dense)
    assert site.grid == [1, 2, 4, 8]
    assert (site.total, site.width) == (11, 5)
    for k in site.grid:
        torch._dynamo.reset()
        options = {"k": k, "inner": "eager"}
        kept = torch.compile(model, backend="topk", fullgraph=True, options=options)(QUERY, KEY, VALUE)
        assert len(topk_fx.reports()[-1].rewritten) == 1
        expected = (kept - dense).square().sum() / dense.square().sum()
        assert site.relative_error(k) == pytest.approx(expected.item(), rel=1e-4)


def test_kept_keys_are_those_that_are_not_masked_out() -> None:
    _, site = measured(grouped, QUERY, KEY, VALUE)
    assert site.kept(None) == 2 * 4 * sum(range(1, 10))
    assert site.kept(3) == 2 * 4 * sum(min(3, n) for n in range(1, 10))


def test_mass_is_the_probability_of_the_kept() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    _, site = measured(attention, QUERY, QUERY, QUERY)
    probabilities = (QUERY @ QUERY.transpose(-2, -1)).softmax(-1)
    for k in site.grid:
        assert site.mass_share(k) == pytest.approx(probabilities.topk(k).values.sum(-1).mean().item(), abs=1e-5)
    assert site.mass_share(9) == 1


def test_long_texts_are_sampled_evenly() -> None:
    """The sums stand for all rows, and memory for none of them."""
    x = drawn(1, 2, 700, 4)

    def causal(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    _, site = measured(causal, x)
    assert sum(rows.numel() for rows, _ in site.visible) < 700 * 2
    assert site.kept(None) == pytest.approx(2 * sum(range(1, 701)), rel=0.01)
    dense = causal(x)
    kept = topk_fx.attention(x, x, x, k=16, is_causal=True)
    expected = (kept - dense).square().sum() / dense.square().sum()
    assert site.relative_error(16) == pytest.approx(expected.item(), rel=0.1)


def test_error_between_and_beyond_the_grid_falls_to_zero() -> None:
    _, site = measured(grouped, QUERY, KEY, VALUE)
    errors = [site.relative_error(k) for k in range(1, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0 < errors[-2]


@pytest.mark.parametrize("activation", [F.relu, F.silu])
def test_error_of_an_ffn_is_that_of_the_op(activation: Callable[..., Tensor]) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(activation(self.gate(x)) * self.up(x))

    model, x = Gated(), drawn(2, 9, 6)
    with torch.no_grad():
        output, site = measured(model, x, kind="ffn")
        dense = model(x)
        assert_same(output, dense)
        assert (site.grid, site.total, site.kept(5)) == ([1, 2, 4, 8, 16], 20, 18 * 5)
        ffn = functools.partial(topk_fx.ffn, x, model.up.weight, model.down.weight, gate_weight=model.gate.weight)
        ffn = functools.partial(ffn, up_bias=model.up.bias, gate_bias=model.gate.bias, activation=activation.__name__)
        for k in site.grid:
            expected = (ffn(k=k) - dense).square().sum() / dense.square().sum()
            assert site.relative_error(k) == pytest.approx(expected.item(), rel=1e-4)
