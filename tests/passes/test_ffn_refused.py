"""FFNs whose hidden units are not read elementwise stand in the report, and layers that are none do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import topk_fx


class Layers(nn.Module):
    """Layers of 16 -> 40 -> 16, a norm and a factor of the hidden units, and low-rank layers, put together by `form`."""

    def __init__(self, form: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.up, self.gate, self.down = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)
        self.square, self.head = nn.Linear(16, 16), nn.Linear(16, 50)
        self.narrow, self.wide = nn.Linear(16, 4, bias=False), nn.Linear(4, 40, bias=False)
        self.norm, self.factor = nn.LayerNorm(40), nn.Parameter(torch.rand(40))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def norm_between(m: Layers, x: Tensor) -> Tensor:
    return m.down(m.norm(F.gelu(m.up(x))))


def norm_written_out(m: Layers, x: Tensor) -> Tensor:
    h = F.silu(m.gate(x)) * m.up(x)
    return m.down(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def factor_of_each_unit(m: Layers, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x) * m.factor)


def term_of_each_unit(m: Layers, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)) + m.factor)


def low_rank_layer_beside_the_first(m: Layers, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x) + 2.0 * m.wide(m.narrow(F.dropout(x, 0.1)))))


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (norm_between, "layer_norm"),
        (norm_written_out, "mean"),
        (factor_of_each_unit, "mul"),
        (term_of_each_unit, "add"),
        (low_rank_layer_beside_the_first, "sum of several layers"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_ffn_is_refused_by_name(form: Callable[[Layers, Tensor], Tensor], told: str) -> None:
    report = topk_fx.explain(Layers(form), torch.randn(2, 5, 16), k="all")
    (site,) = report.sites
    assert (site.kind, site.rewritten, site.reason) == ("ffn", False, "hidden_not_elementwise")
    assert told in site.detail


def language_model_head(m: Layers, x: Tensor) -> Tensor:
    return m.head(F.layer_norm(F.gelu(m.square(x)), (16,)))


def nothing_activated(m: Layers, x: Tensor) -> Tensor:
    return m.down(m.norm(m.up(x)))


def mixed_along_the_tokens(m: Layers, x: Tensor) -> Tensor:
    return m.down(F.silu(m.up(x)).cumsum(1))


def of_other_tokens(m: Layers, x: Tensor) -> Tensor:
    return m.down(F.silu(m.up(x)) * m.gate(x.flip(1)))


@pytest.mark.parametrize(
    "form", [language_model_head, nothing_activated, mixed_along_the_tokens, of_other_tokens], ids=lambda f: f.__name__
)
def test_what_is_no_ffn_is_in_no_report(form: Callable[[Layers, Tensor], Tensor]) -> None:
    assert topk_fx.explain(Layers(form), torch.randn(2, 5, 16), k="all").sites == ()
