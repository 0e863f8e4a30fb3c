"""What the configuration says about a site that could be rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import DynamoTrace, ExportTrace, SymbolicTrace, assert_same, drawn
from topk_fx.passes import TopKPass
from torch import Tensor, nn

import topk_fx
from topk_fx.config import TopKConfig

QUERIES, KEYS, HIDDEN = 5, 9, 12


class Attention(nn.Module):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return (x @ memory.transpose(-2, -1)).softmax(-1) @ memory


class FFN(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(8, HIDDEN), activation, nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(), Attention()
        self.mlp, self.gelu_mlp = FFN(nn.ReLU()), FFN(nn.GELU())

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.cross_attn(x, memory)
        x = x + self.self_attn(x, x)
        x = x + self.mlp(x)
        return x + self.gelu_mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return x


INPUTS = (drawn(2, QUERIES, 8), drawn(2, KEYS, 8))
SITES = ("cross_attn", "self_attn", "mlp", "gelu_mlp")
"""Where the sites of a layer are: an FFN in the module that owns its layers."""


@pytest.fixture(scope="module")
def trace() -> ExportTrace:
    return ExportTrace(Model(), INPUTS)


def outcome(report: topk_fx.RewriteReport, layer: int = 0) -> dict[str, str]:
    """By module of a layer: "" if rewritten, else the reason."""
    prefix = f"layers.{layer}."
    return {site.where.removeprefix(prefix): site.reason for site in report if site.where.startswith(prefix)}


OUTCOMES: dict[str, tuple[dict[str, Any], tuple[str, str, str, str]]] = {
    "nothing_given": ({}, ("k_covers_all_keys", "k_covers_all_keys", "dense_is_faster", "ffn_k_not_given")),
    "count": ({"k": 2}, ("", "", "dense_is_faster", "ffn_k_not_given")),
    "share": ({"k": 0.5}, ("", "", "dense_is_faster", "ffn_k_not_given")),
    "all": ({"k": "all"}, ("", "", "", "")),
    "all_but_ffn_share": ({"k": "all", "ffn_k": 0.5}, ("", "", "", "")),
    "as_many_as_self_attention_has": ({"k": QUERIES}, ("", "k_covers_all_keys", "dense_is_faster", "ffn_k_not_given")),
    "one_less": ({"k": QUERIES - 1}, ("", "", "dense_is_faster", "ffn_k_not_given")),
    "share_that_rounds_up_to_all": ({"k": 0.85}, ("", "k_covers_all_keys", "dense_is_faster", "ffn_k_not_given")),
    "units": ({"k": 2, "ffn_k": 3}, ("", "", "", "")),
    "units_alone": ({"ffn_k": 3}, ("k_covers_all_keys", "k_covers_all_keys", "", "")),
    "all_units_by_count": ({"k": 2, "ffn_k": HIDDEN}, ("", "", "k_covers_all_units", "k_covers_all_units")),
    "all_units": ({"k": 2, "ffn_k": "all"}, ("", "", "", "")),
    "always": ({"when": "always"}, ("k_covers_all_keys", "k_covers_all_keys", "", "ffn_k_not_given")),
    "pays": ({"k": 2, "ffn_k": 3, "when": "pays"}, ("dense_is_faster",) * 4),
    "site_off": ({"k": 2, "sites": {"*.cross_attn": False}},
                 ("disabled_by_config", "", "dense_is_faster", "ffn_k_not_given")),
    "all_off_but_one": ({"k": 2, "ffn_k": 3, "sites": {"*": False, "*.mlp": True}},
                        ("disabled_by_config", "disabled_by_config", "", "disabled_by_config")),
    "site_of_its_own_k": ({"sites": {"*.self_attn": {"k": 2}}},
                          ("k_covers_all_keys", "", "dense_is_faster", "ffn_k_not_given")),
    "site_when_it_pays": ({"k": 2, "sites": {"*.self_attn": {"when": "pays"}}},
                          ("", "dense_is_faster", "dense_is_faster", "ffn_k_not_given")),
    "ffn_of_its_own_k": ({"k": 2, "sites": {"*.gelu_mlp": {"ffn_k": 1}}}, ("", "", "dense_is_faster", "")),
    "later_glob_wins": ({"k": 2, "sites": {"*_attn": False, "*.self_*": True}},
                        ("disabled_by_config", "", "dense_is_faster", "ffn_k_not_given")),
}  # fmt: skip


@pytest.mark.parametrize("options", OUTCOMES)
def test_configuration_decides_each_site(trace: ExportTrace, options: str) -> None:
    given, expected = OUTCOMES[options]
    _, report, _ = trace.rewrite(**given)
    assert outcome(report) == dict(zip(SITES, expected, strict=True))


def test_glob_names_one_layer(trace: ExportTrace) -> None:
    _, report, _ = trace.rewrite(k=2, sites={"layers.0.*": {"k": 3}, "layers.1.*": False})
    assert [site.k for site in report if site.where.endswith("_attn")] == ["3", "3", "", ""]
    assert set(outcome(report, 1).values()) == {"disabled_by_config"}


def test_module_paths_are_those_of_the_model_in_every_trace() -> None:
    """So that a glob written for one way of tracing holds for the others."""
    expected = [f"layers.{layer}.{site}" for layer in (0, 1) for site in SITES]
    model = Model()
    for trace in (ExportTrace(model, INPUTS), ExportTrace(model, INPUTS, strict=True), DynamoTrace(model, INPUTS)):
        assert [site.where for site in trace.rewrite(k="all")[1]] == expected
    torch._dynamo.reset()
    torch.compile(model, backend="topk", options={"k": "all", "inner": "eager"})(*INPUTS)
    assert [site.where for site in topk_fx.reports()[-1]] == expected


def test_module_path_of_symbolic_trace_is_that_of_the_model() -> None:
    _, report, _ = SymbolicTrace(Model()).rewrite(k=2)
    assert [site.where for site in report if site.kind == "attention"][:2] == [
        "layers.0.cross_attn",
        "layers.0.self_attn",
    ]


def test_k_that_covers_all_keys_is_rewritten_under_all(trace: ExportTrace) -> None:
    """How a rewrite is proven right: k = "all" leaves nothing dense, however few keys there are."""
    rewritten, report, text = trace.rewrite(k="all")
    assert "softmax" not in text
    assert len(report.rewritten) == len(report) == 8
    assert_same(rewritten(*INPUTS), trace.program.module()(*INPUTS))


def test_key_count_known_only_at_run_time_covers_nothing() -> None:
    length = torch.export.Dim("length", min=2, max=64)
    dynamic = ExportTrace(Attention(), INPUTS, dynamic_shapes=(None, {1: length}))
    rewritten, report, _ = dynamic.rewrite(k=KEYS)
    assert [site.rewritten for site in report] == [True]
    for keys in (2, KEYS, KEYS + 1, 33):
        x, memory = INPUTS[0], torch.randn(2, keys, 8)
        expected = topk_fx.reference.attention(x, memory, memory, k=KEYS, scale=1.0)
        assert_same(rewritten(x, memory), expected)


@pytest.mark.parametrize("pays", [True, False], ids=["pays", "does_not_pay"])
def test_what_pays_is_asked_with_the_site(pays: bool) -> None:
    """`pays` hears kind, shape, k and device of each site, and its answer holds where k was not given."""
    asked: list[tuple[str, tuple[int, ...], Any]] = []

    def does_pay(kind: str, shape: tuple[int, ...], keep: Any, device: str | None) -> bool:
        assert device == "cpu"
        asked.append((kind, shape, keep))
        return pays

    model = nn.Sequential(FFN(nn.ReLU()))
    queries, keys = torch.randn(2, 4, 8), torch.randn(2, 200, 8)
    reports = [
        TopKPass(TopKConfig(), "aten", does_pay)(DynamoTrace(model, (queries,)).program),
        TopKPass(TopKConfig(), "aten", does_pay)(DynamoTrace(Attention(), (queries, keys)).program),
    ]
    assert asked == [("ffn", (2, 4, HIDDEN), 0.25), ("attention", (2, 4, 200), 128)]
    assert [[site.reason for site in report] for report in reports] == [["" if pays else "dense_is_faster"]] * 2


def test_relu_like_activations_need_no_ffn_k() -> None:
    """Most of their units are zero; of the others, a quarter of the units is not the model."""

    def model(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
        relu2 = F.linear(F.relu(F.linear(x, up)) ** 2, down)
        silu = F.linear(F.silu(F.linear(x, up)), down)
        return [F.linear(F.relu(F.linear(x, up)), down), relu2, silu]

    trace = DynamoTrace(model, (torch.randn(3, 8), torch.randn(16, 8), torch.randn(8, 16)))
    _, report, _ = trace.rewrite(when="always")
    assert sorted((site.k, site.reason) for site in report) == [("", "ffn_k_not_given"), ("0.25", ""), ("0.25", "")]


class Reached(nn.Module):
    """A class with a __getattr__ of its own, through whose __dict__ Dynamo finds its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("model", [Reached(), nn.TransformerEncoder(Reached().layer, 1)], ids=["reached", "of_torch"])
def test_path_of_a_site_is_that_of_the_module_however_dynamo_reaches_it(model: nn.Module, is_global: bool) -> None:
    path = "layer.self_attn" if isinstance(model, Reached) else "layers.0.self_attn"
    sites = {f"*{path}" if is_global else path: False}
    globals()["module_of_this_test"] = model
    called = (lambda x: module_of_this_test(x)) if is_global else model  # type: ignore[name-defined]  # noqa: F821
    torch.compile(called, backend="topk", options={"k": 2, "inner": "eager", "sites": sites})(drawn(2, 5, 16))
    (site,) = (site for site in topk_fx.reports()[-1] if site.kind == "attention")
    assert site.where == (f"module_of_this_test.{path}" if is_global else path)
    assert site.reason == "disabled_by_config"
