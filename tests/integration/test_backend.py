"""torch.compile(model, backend="topk"): the entry point, its options, and how often it compiles."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import KeepingTopK, assert_same, drawn, leaves, values_and_gradients
from topk_fx.lowering.triton import availability
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config

import topk_fx
from topk_fx.backend import split_options, topk_backend
from topk_fx.errors import ConfigError, LoweringUnavailableError, UnknownOptionError

INPUTS = (drawn(2, 3, 7, 4, seed=1), drawn(2, 3, 9, 4, seed=2), drawn(2, 3, 9, 5, seed=3))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v


def compiled(function: Callable[..., Any], inner: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    """What most tests need: nothing of them tests Inductor, which takes seconds."""
    return torch.compile(function, backend="topk", fullgraph=True, options={"inner": inner, **options})


def run_in_fresh_process(code: str, folder: Path, **environment: str) -> str:
    """What a script prints; it is a file, for Dynamo reads sources."""
    script = folder / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The entry point.


def test_entry_point_needs_no_import(tmp_path: Path) -> None:
    printed = run_in_fresh_process(
        """
import sys
import torch

def attention(q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v

assert "topk_fx" not in sys.modules
compiled = torch.compile(attention, backend="topk", options={"k": 2, "inner": "eager"})
inputs = [torch.randn(3, 5, 4) for _ in range(3)]
output = compiled(*inputs)
import topk_fx
torch.testing.assert_close(output, topk_fx.reference.attention(*inputs, k=2, scale=1.0))
print(topk_fx.reports()[0].summary())
""",
        tmp_path,
    )
    assert printed == "topk_fx: graph 0: 1 of 1 attention sites rewritten"


def test_first_call_of_fresh_process_compiles_one_graph(tmp_path: Path) -> None:
    """With Inductor, training, and nothing but torch and topk_fx imported."""
    printed = run_in_fresh_process(
        """
import torch

def attention(q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v

inputs = [torch.randn(3, 5, 4, requires_grad=True) for _ in range(3)]
output = torch.compile(attention, backend="topk", fullgraph=True, options={"k": 2})(*inputs)
output.sum().backward()
import topk_fx
expected = topk_fx.reference.attention(*inputs, k=2, scale=1.0)
torch.testing.assert_close(output, expected)
for x, gradient in zip(inputs, torch.autograd.grad(expected.sum(), inputs)):
    torch.testing.assert_close(x.grad, gradient)
print(len(topk_fx.reports()), len(topk_fx.reports()[0].rewritten))
""",
        tmp_path,
    )
    assert printed == "1 1"


def test_backend_is_listed_and_callable_by_itself() -> None:
    assert "topk" in torch._dynamo.list_backends()
    function = torch.compile(attention, backend=topk_backend, options={"k": "all", "inner": "eager"})
    assert_same(function(*INPUTS), attention(*INPUTS))
    assert len(topk_fx.reports()[-1].rewritten) == 1


# What is compiled.


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_compiled_attention_and_its_gradients_are_the_reference(inner: str) -> None:
    for k in ("all", 3):
        torch._dynamo.reset()
        with KeepingTopK(k):
            expected = values_and_gradients(attention, INPUTS)
        assert_same(values_and_gradients(compiled(attention, inner, k=k), INPUTS), expected)


def test_pointwise_neighbours_compiled_by_inductor_are_right() -> None:
    """Inductor fuses what stands around the op, and may lay out its inputs anew."""

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (F.linear(x, weight) * 0.5).view(2, 9, 3, 3, 4).permute(2, 0, 3, 1, 4)
        output = (q.exp() @ k.tanh().transpose(-2, -1)).softmax(-1) @ (v + 1)
        return (2 * output.transpose(1, 2).reshape(2, 9, 12)).relu() + x

    inputs = (drawn(2, 9, 12), drawn(36, 12))
    with KeepingTopK(3):
        expected = layer(*inputs)
    assert_same(compiled(layer, "inductor", k=3)(*inputs), expected)


def test_without_k_nothing_is_rewritten_that_does_not_pay() -> None:
    keys = drawn(1, 1, 200, 4)
    function = compiled(attention, "eager")
    assert_same(function(INPUTS[0], keys, keys), attention(INPUTS[0], keys, keys))
    assert [site.reason for site in topk_fx.reports()[-1]] == ["dense_is_faster"]


def test_model_without_attention_is_compiled_as_it_is() -> None:
    x = INPUTS[0]
    assert_same(compiled(torch.sin, k=3)(x), x.sin())
    (report,) = topk_fx.reports()
    assert len(report) == 0
    assert str(report).endswith("no softmax, attention call or FFN found; nothing was changed")


def test_each_graph_of_a_broken_model_has_its_report() -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(output, output, output)

    function = torch.compile(broken, backend="topk", options={"k": 3, "inner": "eager"})
    with KeepingTopK(3):
        expected = broken(*INPUTS)
    assert_same(function(*INPUTS), expected)
    reports = topk_fx.reports()
    assert [[site.shapes["scores"] for site in report.rewritten] for report in reports] == [
        ["[2, 3, 7, 9]"],
        ["[2, 3, 7, 7]"],
    ]
    topk_fx.clear_reports()
    assert topk_fx.reports() == []
    assert len(reports) == 2


# Options.


def test_options_are_split_between_topk_fx_and_inductor() -> None:
    config, rest = split_options(
        {"k": 8, "ffn_k": 0.5, "when": "always", "max_autotune": True, "triton.cudagraphs": False}
    )
    assert config == topk_fx.TopKConfig(k=8, ffn_k=0.5, when="always")
    assert rest == {"max_autotune": True, "triton.cudagraphs": False}


def test_inductor_options_may_be_written_with_dashes() -> None:
    assert split_options({"max-autotune": True}) == (topk_fx.TopKConfig(), {"max_autotune": True})


def test_config_option_is_changed_by_its_neighbours() -> None:
    base = topk_fx.TopKConfig(k=8, when="pays")
    config, rest = split_options({"config": base, "k": 4, "max_autotune": True})
    assert (config, rest) == (topk_fx.TopKConfig(k=4, when="pays"), {"max_autotune": True})
    with pytest.raises(ConfigError, match="config={'k': 3} is not accepted: give a topk_fx.TopKConfig"):
        split_options({"config": {"k": 3}})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kk": 3}, UnknownOptionError, r"unknown option 'kk'.*Did you mean 'k'\?"),
        ({"ffnk": 3}, UnknownOptionError, r"unknown option 'ffnk'.*Did you mean 'ffn_k'\?"),
        ({"max_autotun": True}, UnknownOptionError, r"unknown option 'max_autotun'.*Did you mean 'max_autotune'\?"),
        ({"k": 0}, ConfigError, r"k=0 is not accepted: a count must be at least 1"),
        ({"k": 1.5}, ConfigError, r"k=1.5 is not accepted: a float is a share"),
        ({"k": "most"}, ConfigError, r"k='most' is not accepted: give an int >= 1, a float in \(0, 1\]"),
        (
            {"max_autotune": "yes"},
            ConfigError,
            r"max_autotune='yes' is not accepted: Inductor takes a value of type bool",
        ),
        ({"inner": "inducter"}, ConfigError, r"inner='inducter' is not accepted.*Did you mean 'inductor'\?"),
        ({"mode": "max-autotun"}, ConfigError, r"mode='max-autotun' is not accepted.*Did you mean 'max-autotune'\?"),
        ({"sites": {"*": {"kk": 3}}}, UnknownOptionError, r"sites\['\*'\]: unknown setting 'kk'"),
    ],
    ids=[
        *("ours", "ours_misspelled", "inductors_misspelled", "count", "share", "word", "inductors_type", "inner"),
        *("mode", "sites"),
    ],
)
def test_option_that_is_not_accepted_is_an_error(options: Mapping[str, Any], error: type, message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=message) as raised:
        torch.compile(attention, backend="topk", options=dict(options))(*INPUTS)
    assert isinstance(raised.value.inner_exception, error)
    assert topk_fx.reports() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton can run on this machine")
def test_forced_lowering_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "why_unavailable", lambda device: "there is no GPU")
    with pytest.raises(BackendCompilerFailed, match="lowering='triton' cannot run: there is no GPU") as raised:
        torch.compile(attention, backend="topk", options={"k": 3, "lowering": "triton"})(*INPUTS)
    assert isinstance(raised.value.inner_exception, LoweringUnavailableError)
    with pytest.raises(LoweringUnavailableError, match="lowering='triton' cannot run"):
        topk_fx.rewrite(fx.symbolic_trace(attention), k=3, lowering="triton")


def test_forced_lowering_that_can_run_is_reported() -> None:
    assert_same(compiled(attention, k="all", lowering="aten")(*INPUTS), attention(*INPUTS))
    assert [site.lowering for site in topk_fx.reports()[-1]] == ["aten"]


@pytest.fixture
def inner_options(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that each compile hands to Inductor, which is not run."""
    seen: list[dict[str, Any]] = []

    def record(inner: str, module: fx.GraphModule, inputs: Any, options: dict[str, Any], identity: str) -> Any:
        seen.append(options)
        return module.forward

    monkeypatch.setattr("topk_fx.backend.compile_with", record)
    return seen


def test_mode_is_accepted_both_ways(inner_options: list[dict[str, Any]]) -> None:
    """torch.compile lets mode stand only without options, so that with k it is an option itself."""
    expected = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    torch.compile(attention, backend="topk", mode="max-autotune-no-cudagraphs")(*INPUTS)
    torch._dynamo.reset()
    options = {"k": 3, "mode": "max-autotune-no-cudagraphs"}
    torch.compile(attention, backend="topk", options=options)(*INPUTS)
    assert inner_options == [expected, expected]
    assert [site.rewritten for site in topk_fx.reports()[-1]] == [True]


def test_default_mode_changes_nothing(inner_options: list[dict[str, Any]]) -> None:
    torch.compile(attention, backend="topk", options={"mode": "default"})(*INPUTS)
    assert inner_options == [{}]


def test_option_beside_mode_wins(inner_options: list[dict[str, Any]]) -> None:
    options = {"mode": "max-autotune-no-cudagraphs", "max_autotune": False}
    torch.compile(attention, backend="topk", options=options)(*INPUTS)
    assert inner_options[0]["max_autotune"] is False


@pytest.mark.parametrize("given", ["as_option", "as_global_setting"])
def test_users_own_pass_runs_under_users_own_options(given: str) -> None:
    """The pass whose place topk_fx takes, to have its identity in the cache keys."""
    seen: list[tuple[int, bool]] = []

    def users_pass(graph: fx.Graph) -> None:
        ops = [node for node in graph.nodes if node.target is torch.ops.topk_fx.attention_forward.default]
        seen.append((inductor_config.max_fusion_size, len(ops) == 1))

    options: dict[str, Any] = {"max_fusion_size": 7}
    if given == "as_option":
        options["post_grad_custom_pre_pass"] = users_pass
    with inductor_config.patch(post_grad_custom_pre_pass=users_pass if given == "as_global_setting" else None):
        output = compiled(attention, "inductor", k="all", **options)(*INPUTS)
        assert inductor_config.post_grad_custom_pre_pass is (users_pass if given == "as_global_setting" else None)
    assert seen == [(7, True)]
    assert_same(output, attention(*INPUTS))


# Sizes known only at run time.


def by_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its scale, its views and its causal mask all depend on sizes."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    _, heads, queries, keys = scores.shape
    past = torch.arange(keys) <= torch.arange(queries).unsqueeze(-1) + (keys - queries)
    weights = scores.masked_fill(~past, torch.finfo(q.dtype).min).softmax(-1)
    return (weights.view(-1, queries, keys) @ v.reshape(-1, keys, v.size(-1))).view(-1, heads, queries, v.size(-1))


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


LENGTHS = ((8, 19), (3, 4), (2, 33), (7, 7), (5, 6), (6, 3))
"""The first are no other axis' size: Dynamo takes sizes that are equal at first for equal at all times. Of the last 3
keys a share of 0.3 is one, and a size that is 1 is what tracing likes to guard on."""


@pytest.mark.parametrize("model", [by_size, by_sdpa])
@pytest.mark.parametrize("k", [7, 0.3, "all"])
@pytest.mark.parametrize("dynamic", ["lengths", "everything"])
def test_dynamic_lengths_compile_once(model: Callable[..., Tensor], k: Any, dynamic: str) -> None:
    """k = 7 crosses the number of keys both ways."""
    function = torch.compile(
        model, backend="topk", fullgraph=True, options={"k": k, "inner": "aot_eager"},
        dynamic=True if dynamic == "everything" else None,
    )  # fmt: skip
    for queries, keys in LENGTHS:
        inputs = [drawn(2, 3, n, size, seed=n) for n, size in ((queries, 4), (keys, 4), (keys, 5))]
        with KeepingTopK(k):
            expected = model(*inputs)
        for x in inputs if dynamic == "lengths" else ():
            torch._dynamo.mark_dynamic(x, 2)
        assert_same(function(*inputs), expected)
    (report,) = topk_fx.reports()
    assert [site.rewritten for site in report] == [True]


def test_lengths_found_to_vary_compile_twice() -> None:
    function = compiled(attention, k=7)
    for keys in (9, 5, 19, 33):
        memory = drawn(2, 3, keys, 4, seed=keys)
        with KeepingTopK(7):
            expected = values_and_gradients(attention, (INPUTS[0], memory, memory))
        assert_same(values_and_gradients(function, (INPUTS[0], memory, memory)), expected)
    static, dynamic = topk_fx.reports()
    assert [site.shapes["scores"] for site in static] == ["[2, 3, 7, 9]"]
    assert [site.dense_bytes for site in dynamic] == [None]


def test_dynamic_lengths_compiled_by_inductor_compile_once() -> None:
    """In training; the last length keeps one key."""
    function = compiled(attention, "inductor", k=0.5)
    for keys in (6, 19, 2):
        memory = drawn(2, 3, keys, 4, seed=keys)
        with KeepingTopK(0.5):
            expected = values_and_gradients(lambda q, x: attention(q, x, x), (INPUTS[0], memory))
        query, memory = leaves((INPUTS[0], memory))
        torch._dynamo.mark_dynamic(memory, 2)
        output = function(query, memory, memory)
        weights = torch.linspace(-1, 2, output.numel()).view(output.shape)
        assert_same((output.detach(), list(torch.autograd.grad(output, (query, memory), weights))), expected)
    assert len(topk_fx.reports()) == 1


def test_module_compiled_in_place_follows_train_and_eval() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.dropout((q @ k.transpose(-2, -1)).softmax(-1)) @ v

    model = Model().eval()
    with KeepingTopK(3):
        expected = model(*INPUTS)
    model.compile(backend="topk", options={"k": 3, "inner": "aot_eager"})
    assert_same(model(*INPUTS), expected)
    assert not torch.equal(model.train()(*INPUTS), expected)
    assert_same(model.eval()(*INPUTS), expected)
    assert [len(report.rewritten) for report in topk_fx.reports()] == [1, 1]


def test_ffn_of_any_number_of_tokens_compiles_once() -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return topk_fx.rewrite(graph, k="all")[0]

    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for length in (5, 7, 9):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1
