"""calibrate: the budget is met with fewer keys than one k for all needs, and each site is named."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import assert_same
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import topk_fx
from topk_fx.calibration.metric import metric_of
from topk_fx.errors import CalibrationError, ConfigError, DTypeError

BUDGET = 0.02


class Attention(nn.Module):
    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.qkv, self.sharpness = nn.Linear(16, 48), sharpness

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q * self.sharpness, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """A language model of layers that look at many tokens, at few, and at fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.dropout = nn.Embedding(30, 16), nn.Linear(16, 30), nn.Dropout(0.5)
        self.layers = nn.ModuleList(Attention(sharpness) for sharpness in (1.0, 8.0, 20.0))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = self.dropout(x + layer(x))
        return self.head(x)


class Block(nn.Module):
    """Two attentions and two FFNs in the module itself, called twice: eight sites at one path."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for sharpness in (0.2, 3.0):
            for scale in (sharpness, 4 * sharpness):
                x = x + (x @ x.transpose(-2, -1) * scale).softmax(-1) @ x
                x = x + self.down(torch.relu(self.up(x)))
            x = x / x.square().mean(-1, keepdim=True).sqrt()
        return self.head(x)


def texts(count: int = 3, length: int = 48) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(30, (2, length), generator=generator)} for _ in range(count)]


def loss_under(model: nn.Module, batches: list[dict[str, Tensor]], name: str, **options: Any) -> float:
    """The loss of the model compiled with options, by the metric of that name."""
    torch._dynamo.reset()
    model.eval()
    compiled = torch.compile(model, backend="topk", options={"inner": "eager", **options})
    metric = metric_of(name)
    with torch.no_grad():
        samples = [metric.samples(compiled(**batch), model(**batch), batch) for batch in batches]
    return metric.loss(torch.cat(samples).mean().item())


def kept(report: topk_fx.RewriteReport, length: int = 48) -> int:
    """Keys that the queries of a text keep at causal sites."""
    return sum(
        kept_at(int(site.k) if site.rewritten else length, length) for site in report if site.kind == "attention"
    )


def kept_at(k: int, length: int = 48) -> int:
    return sum(min(k, query + 1) for query in range(length))


@pytest.fixture(scope="module")
def calibrated() -> tuple[Model, topk_fx.TopKConfig]:
    torch.manual_seed(0)
    model = Model()
    return model, topk_fx.calibrate(model, texts(), budget=BUDGET, verbose=False)


@pytest.mark.usefixtures("calibrated")
class TestByKL:
    def test_budget_is_met_and_used(self, calibrated: tuple[Model, topk_fx.TopKConfig]) -> None:
        model, config = calibrated
        assert 0.5 * BUDGET < loss_under(model, texts(), "kl", config=config) < BUDGET

    def test_every_site_is_rewritten_with_a_k_of_its_own(self, calibrated: tuple[Model, topk_fx.TopKConfig]) -> None:
        model, config = calibrated
        loss_under(model, texts(), "kl", config=config)
        ks = {site.where: site.k for site in topk_fx.reports()[-1].rewritten}
        assert list(ks) == ["layers.0", "layers.1", "layers.2"]
        assert {name: str(dict(items)["k"]) for name, items in config.sites[1:]} == ks
        assert int(ks["layers.0"]) > int(ks["layers.1"]) > int(ks["layers.2"])

    def test_one_k_loses_more_with_as_many_keys(self, calibrated: tuple[Model, topk_fx.TopKConfig]) -> None:
        """And still does with a fifth more."""
        model, config = calibrated
        by_site = loss_under(model, texts(), "kl", config=config)
        keys = kept(topk_fx.reports()[-1])
        for more, least in ((1.0, 1.2), (1.2, 1.0)):
            k = next(k for k in range(1, 48) if len(model.layers) * kept_at(k) >= more * keys)
            assert loss_under(model, texts(), "kl", k=k) > least * by_site
            assert kept(topk_fx.reports()[-1]) >= more * keys

    def test_configuration_survives_json(self, calibrated: tuple[Model, topk_fx.TopKConfig], tmp_path: Path) -> None:
        model, config = calibrated
        path = tmp_path / "config.json"
        assert topk_fx.TopKConfig.from_json(config.to_json(path)) == config
        assert topk_fx.TopKConfig.from_json(path) == config
        losses = [loss_under(model, texts(1), "kl", config=x) for x in (config, str(path), path)]
        assert losses == [losses[0]] * 3

    def test_exported_program_takes_it_too(self, calibrated: tuple[Model, topk_fx.TopKConfig], tmp_path: Path) -> None:
        model, config = calibrated
        config.to_json(tmp_path / "config.json")
        program = torch.export.export(model.eval(), (), texts(1)[0])
        for given in (config, tmp_path / "config.json"):
            new, report = topk_fx.rewrite(program, given)
            assert [site.k for site in report.rewritten] == [str(dict(items)["k"]) for _, items in config.sites[1:]]
        compiled = torch.compile(model, backend="topk", options={"inner": "eager", "config": config})
        assert_same(new.module()(**texts(1)[0]), compiled(**texts(1)[0]))


def test_perplexity_may_rise_as_much_as_is_asked() -> None:
    model, batches = Model(), texts()
    config = topk_fx.calibrate(model, batches, budget=0.01, metric="perplexity", confidence=0.5, verbose=False)
    assert loss_under(model, batches, "perplexity", config=config) <= 0.01
    with pytest.raises(AssertionError):  # and it does rise, with fewer keys
        assert loss_under(model, batches, "perplexity", k=2) <= 0.01


def test_function_measures_whatever_the_model_returns() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(Attention(1.0), Attention(9.0))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"pooled": self.layers(x).mean(1)}

    def angle(outputs: Any, dense: Any, batch: Any) -> Tensor:
        return 1 - F.cosine_similarity(outputs["pooled"], dense["pooled"], dim=-1).mean()

    model, batches = Encoder(), [{"x": torch.randn(2, 40, 16)} for _ in range(3)]
    config = topk_fx.calibrate(model, batches, budget=1e-3, metric=angle, verbose=False)
    compiled = torch.compile(model, backend="topk", options={"inner": "eager", "config": config})
    losses = [angle(compiled(**batch), model(**batch), batch).item() for batch in batches]
    assert 0 < sum(losses) / 3 <= 1e-3


def test_several_sites_at_one_path_are_told_apart() -> None:
    model, batches = Block(), texts(2, 24)
    config = topk_fx.calibrate(model, batches, budget=0.05, ffn=True, verbose=False)
    assert loss_under(model, batches, "kl", config=config) <= 0.05
    planned = {name: dict(items) for name, items in config.sites[1:]}
    assert set(planned) <= {f"#{number}" for number in range(8)}
    for site in topk_fx.reports()[-1]:
        asked = planned.get(f"#{site.number}", {})
        assert site.k == str(asked.get("k" if site.kind == "attention" else "ffn_k", ""))
        assert site.rewritten == bool(asked)
    ks = [items["k"] for items in planned.values() if "k" in items]
    assert len(set(ks)) > 1, "sites at one path have settings of their own"


def test_what_is_not_asked_for_stays_dense_beside_what_is() -> None:
    """An attention and a ReLU FFN in one module: without `ffn` its units are all kept."""

    class Mixed(Attention):
        def __init__(self, sharpness: float) -> None:
            super().__init__(sharpness)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = x + super().forward(x)
            return self.down(torch.relu(self.up(x)))

    model, batches = Model(), texts(1, 24)
    model.layers = nn.ModuleList([Mixed(1.0), Mixed(9.0)])
    config = topk_fx.calibrate(model, batches, budget=0.05, verbose=False)
    assert [name for name, _ in config.sites] == ["*", "layers.0#0", "layers.1#0"]
    loss_under(model, batches, "kl", config=config)
    assert [site.kind for site in topk_fx.reports()[-1].rewritten] == ["attention"] * 2
    assert len(topk_fx.reports()[-1].left_dense) == 2


def test_names_with_the_signs_of_globs_are_matched_as_they_are() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
            self.layers = nn.ModuleDict({"a*": Attention(1.0), "ab": Attention(15.0), "a?": Attention(5.0)})

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for layer in self.layers.values():
                x = x + layer(x)
            return self.head(x)

    model = Named()
    config = topk_fx.calibrate(model, texts(2), budget=BUDGET, verbose=False)
    assert loss_under(model, texts(2), "kl", config=config) <= BUDGET
    ks = [int(site.k) for site in topk_fx.reports()[-1].rewritten]
    assert ks == [dict(items)["k"] for _, items in config.sites[1:]]
    assert len(set(ks)) == 3


def test_graphs_of_a_broken_model_and_batches_of_other_lengths_are_one_model() -> None:
    class Broken(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            x = x + self.layers[0](x)
            torch._dynamo.graph_break()
            x = x + self.layers[1](x)
            torch._dynamo.graph_break()
            return self.head(x + self.layers[2](x))

    model, batches = Broken(), [*texts(1, 32), *texts(1, 48), *texts(1, 40)]
    config = topk_fx.calibrate(model, batches, budget=BUDGET, probe_batches=3, verbose=False)
    assert [name for name, _ in config.sites] == ["*", "layers.0", "layers.1", "layers.2"]
    assert loss_under(model, batches, "kl", config=config) <= BUDGET


def test_sites_turned_off_and_the_lowering_are_taken_over() -> None:
    base = topk_fx.TopKConfig(k=3, lowering="aten", sites={"layers.0": False, "layers.1": {"k": 2}})
    config = topk_fx.calibrate(Model(), texts(1), budget=BUDGET, config=base, verbose=False)
    assert [name for name, _ in config.sites] == ["*", "layers.1", "layers.2"]
    assert (config.lowering, config.k) == ("aten", "all")


def test_model_is_given_back_as_it_was() -> None:
    class Counting(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input_ids: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input_ids)

    model = Counting().train()
    model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    topk_fx.calibrate(model, texts(1), budget=BUDGET, verbose=False)
    assert_same(dict(model.state_dict()), before)
    assert [module.training for module in (model, model.dropout, model.layers[0], model.layers[1])] == [True] * 3 + [
        False
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert topk_fx.reports() == []


def test_a_budget_that_no_k_meets_is_an_error() -> None:
    message = (
        r"no k meets the budget of 1e-12 nats per token: the first that is worth giving up .* at 'layers\.\d' alone"
    )
    with pytest.raises(CalibrationError, match=message):
        topk_fx.calibrate(Model(), texts(1), budget=1e-12, verbose=False)


def test_a_model_without_a_site_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match=r"no attention site of the model can be rewritten; topk_fx\.explain"):
        topk_fx.calibrate(model, [{"input": torch.randn(2, 4)}], budget=0.1, verbose=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget": 0}, ConfigError, "budget=0 is not accepted: give a finite float > 0"),
        ({"budget": True}, ConfigError, "budget=True is not accepted"),
        ({"budget": math.nan}, ConfigError, "budget=nan is not accepted"),
        ({"budget": "2 %"}, ConfigError, "budget='2 %' is not accepted"),
        ({"metric": "loss"}, ConfigError, "metric='loss' is not accepted"),
        ({"confidence": 95}, ConfigError, r"confidence=95 is not accepted: give a float in \[0.5, 1\)"),
        ({"probe_batches": 0}, ConfigError, "probe_batches=0 is not accepted: give an int >= 1"),
        ({"batches": []}, ConfigError, "batches is empty; give an iterable of dicts"),
        ({"batches": {"input_ids": torch.zeros(1)}}, DTypeError, "batches is a dict; give an iterable of dicts"),
        ({"batches": [torch.zeros(1)]}, DTypeError, r"batches\[0\] is a Tensor; give an iterable of dicts"),
        ({"model": 3}, DTypeError, "model is a int; accepted: a module or a function"),
        ({"config": 3}, ConfigError, "config=3 is not accepted: give a topk_fx.TopKConfig"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_argument_that_is_not_accepted_is_an_error(changes: dict[str, Any], error: type, message: str) -> None:
    arguments = {"model": Model(), "batches": texts(1), "budget": BUDGET, **changes}
    with pytest.raises(error, match=message):
        topk_fx.calibrate(arguments.pop("model"), arguments.pop("batches"), **arguments)


def test_table_names_every_site_and_what_it_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    topk_fx.calibrate(Model(), texts(2), budget=BUDGET)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["layers.0", "layers.1", "layers.2"]
    assert "nats per token over 2 batches, at most" in printed.out
    assert "budget 0.02 nats per token" in printed.out
    assert "the same at every site (k=" in printed.out
    assert "sites, one at a time" in printed.err


def test_progress_needs_no_tqdm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topk_fx.calibration.progress.importlib.util.find_spec", lambda name: None)
    topk_fx.calibrate(Model(), texts(1), budget=BUDGET)
    printed = capsys.readouterr().err
    assert "topk_fx: statistics of the dense model: 1/1" in printed
    assert "topk_fx: sites, one at a time: 3/3" in printed


def test_json_that_is_no_configuration_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, message in (
        ("{", "is no JSON"),
        ("[1]", "holds a list; give an object"),
        ('{"kk": 3}', r"unknown option 'kk'.*Did you mean 'k'\?"),
        ('{"k": 0}', "k=0 is not accepted"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            topk_fx.TopKConfig.from_json(path)
    with pytest.raises(ConfigError, match="No such file"):
        topk_fx.TopKConfig.from_json(os.fspath(tmp_path / "nowhere.json"))
    model: Callable[..., Any] = Model()
    compiled = torch.compile(model, backend="topk", options={"config": str(tmp_path / "nowhere.json")})
    with pytest.raises(BackendCompilerFailed, match="No such file"):
        compiled(**texts(1)[0])


@pytest.mark.parametrize(
    "config",
    [
        topk_fx.TopKConfig(),
        topk_fx.TopKConfig(k=1.0),
        topk_fx.TopKConfig(k=1),
        topk_fx.TopKConfig(k="all", ffn_k=0.25, when="pays", lowering="aten", inner="eager", validate="raise"),
        topk_fx.TopKConfig(sites={"a.*": {"k": 1.0, "when": "pays"}, "*.b": False, "c#1": {"ffn_k": "all"}}),
    ],
)
def test_any_configuration_survives_json(config: topk_fx.TopKConfig) -> None:
    again = topk_fx.TopKConfig.from_json(config.to_json())
    assert again == config
    assert again.at("x") == config.at("x")
