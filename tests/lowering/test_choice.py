"""Which lowering computes a site, and when a site is worth rewriting."""

from __future__ import annotations

import pytest
import torch
from topk_fx.lowering.choice import AVAILABLE
from topk_fx.lowering.cpu import build
from topk_fx.lowering.triton import availability

import topk_fx
from topk_fx import TopKConfig, lowering
from topk_fx.config import LOWERINGS
from topk_fx.errors import LoweringUnavailableError, TopKError


def test_best_of_a_processor_is_chosen_where_nothing_is_asked_for():
    query = torch.randn(1, 1, 8, 4)
    assert lowering.choose(TopKConfig()) == ""
    assert lowering.lowering_of("", (query, query, query, [], "", 1.0, 3)) == ("cpu", "")


def test_without_a_compiler_aten_computes_and_the_report_says_why(monkeypatch):
    monkeypatch.setattr(build, "why_unavailable", lambda: "no C++ compiler")
    query = torch.randn(1, 1, 8, 4)
    assert lowering.lowering_of("", (query, query, query, [], "", 1.0, 3)) == ("aten", "no C++ compiler")
    output = torch.ops.topk_fx.attention(query, query, query, [], "", 1.0, 3)
    torch.testing.assert_close(output, topk_fx.reference.attention(query, query, query, k=3, scale=1.0))
    with pytest.raises(LoweringUnavailableError, match="lowering='cpu' cannot run: no C\\+\\+ compiler"):
        lowering.choose(TopKConfig(lowering="cpu"))
    with pytest.raises(LoweringUnavailableError, match="lowering='cpu' cannot run: no C\\+\\+ compiler"):
        torch.ops.topk_fx.attention(query, query, query, [], "", 1.0, 3, lowering="cpu")


@pytest.mark.parametrize("name", ["aten", "cpu"])
def test_op_runs_the_lowering_that_it_names(name, monkeypatch):
    calls = []
    for module in (lowering.aten, lowering.cpu):
        for function in ("attention_forward", "attention_backward"):
            original = getattr(module, function)

            def record(*args, original=original, module=module, function=function):
                calls.append((module.__name__.rpartition(".")[2], function))
                return original(*args)

            monkeypatch.setattr(module, function, record)
    query = torch.randn(1, 1, 8, 4, requires_grad=True)
    torch.ops.topk_fx.attention(query, query, query, [], "causal", 1.0, 3, lowering=name).sum().backward()
    assert calls == [(name, "attention_forward"), (name, "attention_backward")]


def test_forced_kernels_that_cannot_compute_a_score_are_an_error_that_names_it():
    query = torch.randn(1, 1, 8, 4)
    with pytest.raises(LoweringUnavailableError, match="lowering='cpu' cannot run: .*the operation elu"):
        torch.ops.topk_fx.attention(query, query, query, [], "elu(1.0)", 1.0, 3, lowering="cpu")
    with pytest.raises(LoweringUnavailableError, match="lowering='cpu' cannot run: query has dtype torch.float64"):
        torch.ops.topk_fx.attention(*(query.double(),) * 3, [], "", 1.0, 3, lowering="cpu")


@pytest.mark.parametrize("name", AVAILABLE)
def test_available_lowering_is_chosen_when_asked_for(name, monkeypatch):
    monkeypatch.setattr(availability, "why_unavailable", lambda device: "")
    assert lowering.choose(TopKConfig(lowering=name)) == name


def test_unavailable_lowering_is_an_error_and_no_silent_other(monkeypatch):
    monkeypatch.setattr(availability, "why_unavailable", lambda device: "there is no GPU")
    message = "lowering='triton' cannot run: there is no GPU"
    with pytest.raises(LoweringUnavailableError, match=message):
        lowering.choose(TopKConfig(lowering="triton"))
    linear = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(TopKError, match=message):
        topk_fx.rewrite(linear, lowering="triton")


@pytest.mark.parametrize("name", LOWERINGS)
def test_lowering_of_every_name_is_known(name):
    assert name in AVAILABLE


@pytest.mark.parametrize(("keys", "keep", "expected"), [(65536, 64, True), (65536, 128, False), (16384, 8, False)])
def test_triton_pays_where_it_was_measured_to(keys, keep, expected, monkeypatch):
    monkeypatch.setattr(availability, "why_unavailable", lambda device: "")
    assert lowering.pays("attention", (1, 32, keys, keys), keep, "cuda") is expected
    assert not lowering.pays("attention", (1, 32, keys, keys), keep, "cuda", lowering="aten")


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("keep", [1, 0.5, "all"])
def test_aten_never_pays_by_time(kind, keep):
    assert not lowering.pays(kind, (2, 8, 4096, 65536), keep)
    assert not lowering.pays(kind, None, keep)
    assert not lowering.pays(kind, (2, 8, 4096, 65536), keep, "cuda", lowering="cpu")


@pytest.mark.parametrize(
    ("shape", "keep", "expected"),
    [
        ((1, 8, 4096, 4096), 64, True),
        ((1, 8, 4096, 512), 64, False),
        ((1, 8, 4096, 4096), 0.5, False),
        ((1, 8, 4096, 4096), "all", False),
        (None, 64, False),
    ],
)
def test_kernels_pay_where_few_of_many_keys_are_kept(shape, keep, expected):
    assert lowering.pays("attention", shape, keep, "cpu", lowering="cpu") is expected


@pytest.mark.parametrize(
    ("shape", "keep", "expected"),
    [
        ((1, 1, 8192), 0.1, True),
        ((2, 2, 8192), 0.25, True),
        ((1, 5, 8192), 0.25, False),
        ((1, 1, 1024), 0.25, False),
        ((1, 1, 8192), 0.9, False),
        (None, 64, False),
    ],
)
def test_kernels_of_ffns_pay_for_few_tokens_of_many_units(shape, keep, expected):
    assert lowering.pays("ffn", shape, keep, "cpu") is expected
    assert lowering.pays("ffn", shape, keep, "cpu", lowering="cpu") is expected
    assert not lowering.pays("ffn", shape, keep, "cpu", lowering="aten")


def ffn_arguments(tokens, units=16, dtype=torch.float32):
    return torch.randn(tokens, 4).to(dtype), torch.randn(units, 4).to(dtype), torch.randn(4, units).to(dtype)


def test_kernels_compute_ffns_of_few_tokens_and_the_report_says_why_not_of_many():
    assert lowering.ffn_lowering_of("", ffn_arguments(3)) == ("cpu", "")
    name, why = lowering.ffn_lowering_of("", ffn_arguments(500))
    assert (name, why) == ("aten", "500 tokens: chunks of ATen calls take less time than C++ above 16")
    assert lowering.ffn_lowering_of("cpu", ffn_arguments(500)) == ("cpu", "")
    name, why = lowering.ffn_lowering_of("", ffn_arguments(3, dtype=torch.float64))
    assert (name, "torch.float64" in why) == ("aten", True)


def test_backward_of_an_ffn_is_sparse_where_many_tokens_keep_few_units():
    many, few = ffn_arguments(500, units=64), ffn_arguments(20, units=64)
    assert lowering.ffn_lowering_of("", many, kept_in_backward=4) == ("cpu", "")
    assert lowering.ffn_lowering_of("", many, kept_in_backward=32) == ("aten", "")
    assert lowering.ffn_lowering_of("", few, kept_in_backward=4) == ("aten", "")
    assert lowering.ffn_lowering_of("cpu", few, kept_in_backward=32) == ("cpu", "")


@pytest.mark.parametrize("name", ["aten", "cpu"])
def test_ffn_runs_the_lowering_that_it_names(name, monkeypatch):
    calls = []
    for module in (lowering.aten, lowering.cpu):
        for function in ("ffn_forward", "ffn_backward"):
            original = getattr(module, function)

            def record(*args, original=original, module=module, function=function):
                calls.append((module.__name__.rpartition(".")[2], function))
                return original(*args)

            monkeypatch.setattr(module, function, record)
    input, up, down = (x.requires_grad_() for x in ffn_arguments(300))
    rest = (None, down, None, "relu", 3)
    torch.ops.topk_fx.ffn(input, up, None, None, *rest, lowering=name).sum().backward()
    assert calls == [(name, "ffn_forward"), (name, "ffn_backward")]


def test_forced_kernels_that_cannot_compute_an_ffn_are_an_error_that_says_why(monkeypatch):
    input, up, down = ffn_arguments(2, dtype=torch.float64)
    with pytest.raises(LoweringUnavailableError, match="lowering='cpu' cannot run: input has dtype torch.float64"):
        torch.ops.topk_fx.ffn(input, up, None, None, None, down, None, "relu", 3, lowering="cpu")
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).double()
    program = torch.export.export(model, (input,))
    with pytest.raises(LoweringUnavailableError, match="lowering='cpu' cannot run: input has dtype torch.float64"):
        topk_fx.rewrite(program, ffn_k=3, lowering="cpu")


@pytest.mark.parametrize("name", ["aten", "cpu"])
def test_report_names_what_computes_an_ffn(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    program = torch.export.export(model, (torch.randn(2, 4),))
    assert [site.lowering for site in topk_fx.rewrite(program, ffn_k=3)[1]] == ["cpu"]
    new, report = topk_fx.rewrite(program, ffn_k=3, lowering=name)
    assert [site.lowering for site in report] == [name]
    assert f"lowering='{name}'" in topk_fx.testing.graph_text(new)


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward", "ffn_forward", "ffn_backward"])
def test_inner_ops_have_a_kernel_on_every_device(op):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"topk_fx::{op}", "CPU")
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"topk_fx::{op}", "CUDA")
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"topk_fx::{op}", "Meta")
