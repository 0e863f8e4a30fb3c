"""Scores that two attentions share are copied for each, where nothing but attentions reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TRACERS, KeepingTopK, assert_same, leaves, values_and_gradients
from spellings import tensors
from torch import Tensor

K = 3


def sum_of_two_products(q: Tensor, k: Tensor, v: Tensor, q_one: Tensor, additive: Tensor) -> Tensor:
    """LiLT: what text and layout score is added both ways, and weighs the values of both."""
    text = q @ k.transpose(-2, -1) / 2
    layout = q_one @ k.transpose(-2, -1) / 3
    first = (layout + text + additive).softmax(-1) @ v
    return first + ((text + layout + additive).softmax(-1) @ v.flip(-1)).exp()


def two_values(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)).masked_fill(~keep, -torch.inf)
    return scores.softmax(-1) @ v + torch.softmax(scores * 2, -1) @ v.square()


def both_ways(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Queries attend to keys, and keys to queries."""
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    return scores.softmax(-1) @ v, scores.transpose(-2, -1).softmax(-1) @ q


@pytest.mark.parametrize("model", [sum_of_two_products, two_values, both_ways], ids=lambda model: model.__name__)
@pytest.mark.parametrize("tracer", ["dynamo", "export"])
def test_both_attentions_are_rewritten(model: Callable[..., Any], tracer: str) -> None:
    available = tensors()
    inputs = leaves(available[name] for name in inspect.signature(model).parameters)
    trace = TRACERS[tracer](model, inputs)
    for k in ("all", K):
        rewritten, report, text = trace.rewrite(k=k)
        assert [(site.rewritten, site.reason) for site in report] == [(True, "")] * 2
        assert "softmax" not in text
        with KeepingTopK(k):
            expected = model(*inputs)
        assert_same(rewritten(*inputs), expected)


def test_gradients_reach_what_both_attentions_read() -> None:
    available = tensors()
    inputs = [available[name] for name in inspect.signature(sum_of_two_products).parameters]
    rewritten, _, _ = TRACERS["export"](sum_of_two_products, inputs).rewrite(k="all")
    assert_same(values_and_gradients(rewritten, inputs), values_and_gradients(sum_of_two_products, inputs))


def one_of_them_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v, scores.softmax(-1)


def shared_and_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v, (scores + 1).softmax(-1) @ v, scores


def shared_and_written_to(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1)
    first = scores.softmax(-1) @ v
    scores.mul_(2)
    return first, scores.softmax(-1) @ v


LEFT = {
    one_of_them_returned: ["scores_used_elsewhere", "probabilities_used_elsewhere"],
    shared_and_returned: ["scores_used_elsewhere", "scores_used_elsewhere"],
}


@pytest.mark.parametrize("model", LEFT, ids=lambda model: model.__name__)
def test_scores_that_something_else_reads_are_not_copied(model: Callable[..., Any]) -> None:
    available = tensors()
    inputs = [available[name] for name in "qkv"]
    trace = TRACERS["export"](model, inputs)
    _, report, text = trace.rewrite(k="all")
    assert [site.reason for site in report] == LEFT[model]
    assert text == trace.text


def test_scores_written_to_between_two_attentions_compute_what_dense_computes() -> None:
    inputs = [tensors()[name] for name in "qkv"]
    rewritten, _, _ = TRACERS["dynamo"](shared_and_written_to, inputs).rewrite(k="all")
    assert_same(rewritten(*inputs), shared_and_written_to(*inputs))


def test_site_that_the_configuration_leaves_dense_shares_its_scores_again() -> None:
    inputs = [tensors()[name] for name in ("q", "k", "v", "keep")]
    trace = TRACERS["export"](two_values, inputs)
    _, report, text = trace.rewrite(k=100)
    assert [site.reason for site in report] == ["k_covers_all_keys"] * 2
    assert text == trace.text
