"""explain: the report that compiling would give, from tracing alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import assert_same, drawn
from torch import Tensor, fx, nn

import topk_fx

X = drawn(2, 9, 8)


class Model(nn.Module):
    """Attention, then an FFN in a second graph where `is_broken`."""

    def __init__(self, is_broken: bool = False) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8)
        self.is_broken = is_broken

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
        if self.is_broken:
            torch._dynamo.graph_break()
        return self.down(F.relu(self.up(x.tanh())))


@pytest.mark.parametrize("options", [{"k": 3}, {"k": "all"}, {"k": 3, "ffn_k": 2}, {}, {"k": 3, "sites": {"*": False}}])
def test_explanation_is_the_report_of_compiling(options: dict[str, Any]) -> None:
    model = Model()
    report = topk_fx.explain(model, (X,), **options)
    torch._dynamo.reset()
    torch.compile(model, backend="topk", options={**options, "inner": "eager"})(X)
    assert report.sites == topk_fx.reports()[-1].sites
    assert len(report) == 2


def test_graphs_of_a_broken_model_are_explained_together() -> None:
    whole, broken = (topk_fx.explain(Model(is_broken), (X,), k=3, ffn_k=2) for is_broken in (False, True))
    assert [site.kind for site in broken.rewritten] == [site.kind for site in whole.rewritten] == ["attention", "ffn"]
    assert whole.summary().startswith("topk_fx: 1 graph of Model: 1 of 1 attention sites rewritten; 1 of 1 ffn")
    assert broken.summary().startswith("topk_fx: 2 graphs of Model: ")


def test_explaining_changes_nothing() -> None:
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = model(X)
    topk_fx.explain(model, (X,), k="all")
    assert topk_fx.reports() == []
    assert_same(model(X), output)
    assert_same(dict(model.state_dict()), before)
    assert type(model) is Model
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(compiled(X), output)


def test_explaining_draws_no_random_numbers_and_counts_no_batches() -> None:
    model = nn.Sequential(nn.BatchNorm1d(9), Model(), nn.Dropout(0.5))
    state = torch.get_rng_state()
    topk_fx.explain(model, (X,), k=3)
    assert model[0].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_model_is_explained_as_often_as_one_likes() -> None:
    """For each k of a sweep, say: Dynamo stops compiling a function that it has compiled too often."""
    model = Model()
    limit = torch._dynamo.config.recompile_limit
    reports = [topk_fx.explain(model, (X,), k=k) for k in range(1, limit + 4)]
    assert [[site.k for site in report.rewritten] for report in reports[:8]] == [[str(k)] for k in range(1, 9)]
    assert [len(report) for report in reports] == [2] * len(reports)


def test_compiled_model_is_explained_and_still_compiled() -> None:
    model = torch.compile(Model(), backend="topk", options={"k": 3, "inner": "eager"})
    output = model(X)
    assert [site.k for site in topk_fx.explain(model, (X,), k=2).rewritten] == ["2"]
    assert_same(model(X), output)
    assert len(topk_fx.reports()) == 1


def test_arguments_are_taken_as_the_model_takes_them() -> None:
    model = Model()
    by_position = topk_fx.explain(model, (X, 0.5), k=3)
    assert topk_fx.explain(model, X, k=3).sites == topk_fx.explain(model, [X], k=3).sites
    assert topk_fx.explain(model, (), {"x": X, "scale": 0.5}, k=3).sites == by_position.sites
    assert topk_fx.explain(model, (X,), {"scale": 0.5}, topk_fx.TopKConfig(k=3)).sites == by_position.sites


def test_function_and_traced_programs_are_explained() -> None:
    def attention(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, scale=1.0)

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attention(x)

    graph, program = fx.symbolic_trace(attention), torch.export.export(Attention(), (X,))
    for model, args in ((attention, (X,)), (graph, ()), (program, ())):
        assert [site.k for site in topk_fx.explain(model, args, k=3).rewritten] == ["3"]
    assert any(node.target is F.scaled_dot_product_attention for node in graph.graph.nodes)


def test_model_without_attention_is_explained_as_such() -> None:
    report = topk_fx.explain(nn.Linear(8, 2), (X,), k=3)
    assert str(report) == "topk_fx: 1 graph of Linear: no softmax, attention call or FFN found; nothing was changed"


def test_options_are_checked() -> None:
    with pytest.raises(topk_fx.errors.UnknownOptionError, match="unknown option 'kk'.*Did you mean 'k'"):
        topk_fx.explain(Model(), (X,), kk=3)
    with pytest.raises(topk_fx.errors.ConfigError, match="config={'k': 3} is not accepted"):
        topk_fx.explain(Model(), (X,), config={"k": 3})  # type: ignore[arg-type]


def test_error_of_the_model_is_the_models_own() -> None:
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied|got|must match"):
        topk_fx.explain(Model(), (drawn(2, 9, 7),), k=3)


def test_glob_of_either_graph_counts_as_matched() -> None:
    sites = {"": {"k": 4}, "decoder.*": {"k": 2}}
    report = topk_fx.explain(Model(is_broken=True), (X,), k=3, sites=sites)
    assert len(report.sites) == 2
    assert report.unmatched == ("decoder.*",)
    assert topk_fx.explain(Model(), (X,), k=3, sites={"encoder.*": False}).unmatched == ("encoder.*",)


def test_model_of_which_no_graph_is_captured_is_explained_as_such() -> None:
    @torch.compiler.disable
    def hidden_from_dynamo(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    def model(x: Tensor) -> Tensor:
        return hidden_from_dynamo(x)

    assert "captured no graph of model" in topk_fx.explain(model, (X,), k=3).summary()
