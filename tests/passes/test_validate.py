"""validate=True: a rewrite that is wrong is seen and not made, one that is right is made, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TRACERS, DynamoTrace, SymbolicTrace, Trace, drawn
from topk_fx.passes import topk, validate
from topk_fx.passes.layout import Layout
from topk_fx.passes.sites import AttentionSite, FFNSite
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import topk_fx
from topk_fx.errors import ValidationError
from topk_fx.score.language import Call
from topk_fx.testing import graph_text

LENGTH = 7
INPUTS = tuple(drawn(2, 3, LENGTH, 4, seed=seed) for seed in range(3))


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.size(-2))
        scores = (q @ k.transpose(-2, -1) * 0.5).masked_fill(position > position[:, None], float("-inf"))
        return scores.softmax(-1) @ v


class Masked(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)).masked_fill(~kept, float("-inf"))
        return scores.softmax(-1) @ v


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """So that a site has a module path."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(*inputs) for layer in self.layers]


Change = Callable[[AttentionSite], dict[str, Any]]


def found_wrongly(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Has finding get some facts of each attention wrong."""

    def find(softmax: Any, order: Any) -> Any:
        site = topk_find(softmax, order)
        return dataclasses.replace(site, **change(site)) if isinstance(site, AttentionSite) else site

    topk_find = topk.find_attention
    monkeypatch.setattr(topk, "find_attention", find)


def excluding_oneself(site: AttentionSite) -> dict[str, Any]:
    """The predicate of the mask, j > i, as j >= i."""
    (step,) = site.steps
    assert str(step.arguments[0]).startswith("gt(")
    predicate = Call("ge", step.arguments[0].arguments)
    return {"steps": (dataclasses.replace(step, arguments=(predicate, *step.arguments[1:])),)}


WRONG: dict[str, tuple[type[nn.Module], Change]] = {
    "scale": (Causal, lambda site: {"scale": site.scale * 1.01}),
    "mask_predicate": (Causal, excluding_oneself),
    "mask_dropped": (Causal, lambda site: {"steps": ()}),
    "softmax_axis": (Causal, lambda site: {"steps": (), "score_layout": Layout(axes=(-1, -2), rank=4)}),
    "keys_for_values": (Causal, lambda site: {"value": dataclasses.replace(site.key, transposed=True)}),
    "rows_without_keys": (Masked, lambda site: {"zero_empty_rows": True}),
}


def inputs_of(model: type[nn.Module]) -> tuple[Tensor, ...]:
    return INPUTS if model is Causal else (*INPUTS, drawn(2, 1, LENGTH, LENGTH) > 0)


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rewrite_leaves_site_dense(monkeypatch: pytest.MonkeyPatch, wrong: str, tracer: str) -> None:
    model, change = WRONG[wrong]
    trace = TRACERS[tracer](Model(model()), inputs_of(model))
    found_wrongly(monkeypatch, change)
    _, report, text = trace.rewrite(k=3)
    (site,) = report
    assert (site.rewritten, site.reason, site.where) == (False, "validation_failed", "layers.0")
    assert "with every key or unit kept, matmul_1 differs by " in site.detail
    assert text == trace.text
    with pytest.raises(ValidationError, match=r"^layers\.0: with every key or unit kept, matmul_1 differs by "):
        trace.rewrite(k=3, validate="raise")
    assert text == trace.text
    assert trace.rewrite(k=3, validate=False)[1].rewritten


def test_difference_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    def passed(q: Tensor, v: Tensor) -> Tensor:
        return (q @ q.transpose(-2, -1) * 0.0).softmax(-1) @ v

    trace = DynamoTrace(passed, INPUTS[:2])
    found_wrongly(monkeypatch, lambda site: {"scale": float("nan")})
    (site,) = trace.rewrite(k=3)[1]
    assert site.detail == (
        "with every key or unit kept, matmul_1 differs by NaN: 168 values are, and of the dense form's 0"
    )


def test_wrong_ffn_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(call: Any, order: Any) -> Any:
        site = topk_find(call, order)
        return dataclasses.replace(site, activation="gelu_tanh") if isinstance(site, FFNSite) else site

    topk_find = topk.find_ffn
    trace = DynamoTrace(FFN(), (drawn(3, 8),))
    assert [site.reason for site in trace.rewrite(ffn_k=3)[1]] == [""]
    monkeypatch.setattr(topk, "find_ffn", find)
    _, report, text = trace.rewrite(ffn_k=3)
    assert [site.reason for site in report] == ["validation_failed"]
    assert text == trace.text


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["query", "key", "value"])
def test_wrong_gradient_alone_is_seen(monkeypatch: pytest.MonkeyPatch, argument: int) -> None:
    def rewrite(site: AttentionSite, keep: Any) -> fx.Node:
        op = rewrite_attention(site, keep)
        with op.graph.inserting_before(op):
            op.update_arg(argument, op.graph.call_function(torch.detach, (op.args[argument],)))
        return op

    rewrite_attention = validate.rewrite_attention
    monkeypatch.setattr(validate, "rewrite_attention", rewrite)
    (site,) = DynamoTrace(Causal(), INPUTS).rewrite(k=3)[1]
    assert site.reason == "validation_failed"
    assert "with every key or unit kept, the gradient of " in site.detail


def test_op_that_raises_leaves_site_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def rewrite(site: AttentionSite, keep: Any) -> fx.Node:
        op = rewrite_attention(site, keep)
        op.update_arg(4, "unknown($0)")
        return op

    rewrite_attention = validate.rewrite_attention
    monkeypatch.setattr(validate, "rewrite_attention", rewrite)
    (site,) = DynamoTrace(Causal(), INPUTS).rewrite(k=3)[1]
    assert site.reason == "validation_failed"
    assert site.detail.startswith("in the place of matmul_1 the op raises ")


# torch.compile.


def test_error_of_compile_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    found_wrongly(monkeypatch, WRONG["scale"][1])
    model = Model(Causal())
    options = {"k": 3, "inner": "eager", "validate": "raise"}
    with pytest.raises(BackendCompilerFailed, match=r"layers\.0: with every key") as raised:
        torch.compile(model, backend="topk", options=options)(*INPUTS)
    assert isinstance(raised.value.inner_exception, ValidationError)
    torch._dynamo.reset()
    found = torch.compile(model, backend="topk", options={**options, "validate": True})(*INPUTS)
    assert [site.reason for site in topk_fx.reports()[-1]] == ["validation_failed"]
    torch.testing.assert_close(found, model(*INPUTS))


def test_explain_validates(monkeypatch: pytest.MonkeyPatch) -> None:
    found_wrongly(monkeypatch, WRONG["scale"][1])
    reasons = [[site.reason for site in topk_fx.explain(Causal(), INPUTS, k=3, validate=v)] for v in (True, False)]
    assert reasons == [["validation_failed"], [""]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_site_under_autocast_is_proven(dtype: torch.dtype) -> None:
    model = torch.compile(Causal(), backend="topk", options={"k": 3, "inner": "eager", "validate": True})
    with torch.autocast("cpu", dtype=dtype):
        model(*INPUTS)
    assert [(site.rewritten, site.detail) for site in topk_fx.reports()[-1]] == [(True, "")]


def test_dropout_is_off_while_validating() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_hand = F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.5) @ v
        return by_hand + F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    _, report, text = DynamoTrace(model, INPUTS).rewrite(k="all")
    assert [(site.rewritten, site.detail) for site in report] == [(True, "")] * 2
    assert text.count(f", {LENGTH}, 0.5") == 2


def test_random_state_is_untouched() -> None:
    trace = DynamoTrace(Model(Causal(), Causal()), INPUTS)
    before = torch.get_rng_state()
    assert len(trace.rewrite(k=3)[1].rewritten) == 2
    assert torch.equal(torch.get_rng_state(), before)


# Sizes.


def shape_env_of(graph: fx.GraphModule) -> Any:
    values = (node.meta.get("example_value") for node in graph.graph.nodes)
    return next(value.fake_mode.shape_env for value in values if hasattr(value, "fake_mode"))


def test_symbolic_sizes_get_no_guards() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = Causal()(q, k, v)
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        return causal + (scores.view(-1, *scores.shape[2:]).softmax(-1) @ v.flatten(0, 1)).view(v.shape)

    guards = {}
    for validated in (False, True):
        graphs: list[fx.GraphModule] = []

        def record(graph: fx.GraphModule, inputs: Any, graphs: list[fx.GraphModule] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        torch.compile(model, backend=record, dynamic=True)(*INPUTS)
        (graph,) = graphs
        _, report = topk_fx.rewrite(graph, k=3, validate=validated)
        assert [(site.rewritten, site.detail) for site in report] == [(True, "")] * 2
        guards[validated] = [str(guard.expr) for guard in shape_env_of(graph).guards]
    assert guards[True] == guards[False]


def test_symbolic_site_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = DynamoTrace(Causal(), INPUTS, dynamic=True)
    assert [site.detail for site in trace.rewrite(k=3)[1]] == [""]
    found_wrongly(monkeypatch, excluding_oneself)
    assert [site.reason for site in trace.rewrite(k=3)[1]] == ["validation_failed"]


@pytest.mark.parametrize("trace", [DynamoTrace, SymbolicTrace])
def test_what_cannot_be_run_is_rewritten_and_said(monkeypatch: pytest.MonkeyPatch, trace: type[Trace]) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    monkeypatch.setattr(validate, "MOST_BYTES", 1)
    (site,) = trace(model, INPUTS).rewrite(k=3)[1]  # type: ignore[call-arg]
    assert site.rewritten
    sentence = "the dense form would take 0.0 GiB" if trace is DynamoTrace else "tracing recorded no value of k"
    assert site.detail == f"validation_skipped: {sentence}"


def test_equal_sites_are_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = validate._compare
    monkeypatch.setattr(validate, "_compare", lambda *forms: compared.append(forms) or compare(*forms))
    model = nn.Sequential(*(FFN() for _ in range(3)))
    _, report, _ = DynamoTrace(model, (drawn(3, 8),)).rewrite(k="all")
    assert len(report.rewritten) == 3
    assert len(compared) == 1


def test_graph_is_the_same_as_without_validating() -> None:
    trace = DynamoTrace(Model(Causal(), Causal()), INPUTS)
    texts = {graph_text(topk_fx.rewrite(trace.program, k=3, validate=v)[0]) for v in (True, False, "raise")}
    assert len(texts) == 1


# What rounding explains.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    exact = drawn(5, 9).double()
    dense = exact.to(dtype)
    assert validate.largest_difference(dense.clone(), dense, exact, dtype) == ""
    assert validate.largest_difference((exact * 1.1).to(dtype), dense, exact, dtype).startswith("up to ")


def test_nan_must_stand_where_dense_has_it() -> None:
    dense = drawn(5, 9)
    dense[2] = torch.nan
    zero = dense.nan_to_num(0.0)
    assert validate.largest_difference(dense.clone(), dense, dense.double(), torch.float32) == ""
    assert validate.largest_difference(zero, dense, dense.double(), torch.float32).startswith("NaN: 0 values are")


def test_masks_keep_something_in_every_row_and_then_not() -> None:
    mask = torch.empty(2, 40, 6, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for share in (0.9, 0.1):
        drawn_mask = validate._drawn(mask, validate.Case(share), torch.device("cpu"), generator)
        assert bool((drawn_mask.any(-1) & ~drawn_mask.all(-1)).all())
    drawn_mask = validate._drawn(mask, validate.Case(0.5, 9, empty_rows=True), torch.device("cpu"), generator)
    assert bool(drawn_mask.all(-1).any())
    assert not bool(drawn_mask.any(-1).all())
