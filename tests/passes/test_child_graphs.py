"""Attention in the bodies of higher-order operators: checkpoints, grad modes, autocast, branches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import DynamoTrace, ExportTrace, KeepingTopK, assert_same, drawn, leaves, values_and_gradients
from torch import Tensor, fx
from torch._higher_order_ops import scan, while_loop
from torch.utils.checkpoint import checkpoint

import topk_fx
from topk_fx.export import copy_graph_module

INPUTS = (drawn(2, 3, 7, 4, seed=1), drawn(2, 3, 9, 4, seed=2), drawn(2, 3, 9, 5, seed=3))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def ffn(x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, torch.ones(8, 5))), torch.ones(5, 8))


def once(q: Tensor, k: Tensor, v: Tensor, checkpoint: Callable[..., Tensor] = checkpoint) -> Tensor:
    return checkpoint(attention, q, k, v, use_reentrant=False) + attention(q, k, v)


def nested(q: Tensor, k: Tensor, v: Tensor, checkpoint: Callable[..., Tensor] = checkpoint) -> Tensor:
    def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ffn(attention(q, k, v).tanh()) + checkpoint(attention, q, k, v, use_reentrant=False)

    return checkpoint(outer, q, k, v, use_reentrant=False)


def call(function: Callable[..., Tensor], *args: Tensor, use_reentrant: bool) -> Tensor:
    """What `checkpoint` computes."""
    return function(*args)


def ops(program: fx.GraphModule) -> list[list[str]]:
    """The names of topk_fx's ops in each graph of a module, its own first."""
    modules = [m for m in program.modules() if isinstance(m, fx.GraphModule)]
    names = [[str(node.target) for node in module.graph.nodes] for module in modules]
    return [[name.split(".")[1] for name in graph if name.startswith("topk_fx")] for graph in names]


@pytest.mark.parametrize(
    ("model", "expected"),
    [(once, [["attention"], ["attention"]]), (nested, [[], ["attention"], ["attention", "ffn"]])],
    ids=["once", "nested"],
)
def test_body_of_checkpoint_is_rewritten(model: Callable[..., Tensor], expected: list[list[str]]) -> None:
    trace = DynamoTrace(model, leaves(INPUTS))
    for k in ("all", 3):
        rewritten, report, text = trace.rewrite(k=k, ffn_k="all")
        assert len(report) == len(report.rewritten) == sum(map(len, expected))
        assert "softmax" not in text
        with KeepingTopK(k):
            reference = values_and_gradients(functools.partial(model, checkpoint=call), INPUTS)
        assert_same(values_and_gradients(rewritten, INPUTS), reference)
    program, _ = topk_fx.rewrite(trace.program, k=3, ffn_k="all")
    assert sorted(ops(program)) == expected


def test_rewriting_a_copy_leaves_the_bodies_of_the_original() -> None:
    trace = DynamoTrace(nested, leaves(INPUTS))
    before = trace.text
    rewritten, _ = topk_fx.rewrite(trace.program, k=3)
    assert trace.text == before
    assert {id(m) for m in rewritten.modules()}.isdisjoint(id(m) for m in trace.program.modules())


def test_copy_of_graph_shares_parameters_at_every_depth() -> None:
    weight = torch.nn.Parameter(drawn(5, 5))

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(5, 5)
            self.register_buffer("scale", torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.inner = weight, fx.symbolic_trace(Inner())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ self.weight

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
            return True

    outer = Outer()
    module = fx.GraphModule(outer, Tracer().trace(outer))
    copied = copy_graph_module(module)
    originals = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    copies = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    assert originals.keys() == copies.keys() == {"weight", "inner.linear.weight", "inner.linear.bias", "inner.scale"}
    assert all(copies[name] is original for name, original in originals.items())
    assert copied.inner is not module.inner
    assert copied.inner.graph is not module.inner.graph


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("is_whole_model", [False, True], ids=["part", "whole"])
def test_region_without_gradients_is_rewritten_in_exports(strict: bool, is_whole_model: bool) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = attention(q, k, v)
        return frozen if is_whole_model else frozen + attention(q, k, v)

    trace = ExportTrace(model, INPUTS, strict=strict)
    for k in ("all", 3):
        rewritten, report, text = trace.rewrite(k=k)
        assert [site.rewritten for site in report] == [True] * (1 if is_whole_model else 2)
        assert "softmax" not in text
        with KeepingTopK(k):
            expected = model(*INPUTS) if is_whole_model else values_and_gradients(model, INPUTS)
        assert_same(rewritten(*INPUTS) if is_whole_model else values_and_gradients(rewritten, INPUTS), expected)


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return attention(q, k, v)


def without_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return attention(q, k, v)


def reference_under_autocast(k: object) -> Callable[..., Tensor]:
    """Autocast rounds the inputs of a product; scores are accumulated in float32 all the same."""

    def reference(q: Tensor, key: Tensor, v: Tensor) -> Tensor:
        q, key, v = (x.bfloat16() for x in (q, key, v))
        return topk_fx.reference.attention(q, key, v, k=k, scale=1.0)

    return reference


@pytest.mark.parametrize("tracer", [DynamoTrace, ExportTrace], ids=["dynamo", "export"])
def test_attention_under_autocast_computes_in_its_dtype(tracer: type) -> None:
    trace = tracer(under_autocast, leaves(INPUTS))
    for k in ("all", 3):
        rewritten, report, _ = trace.rewrite(k=k)
        assert [site.rewritten for site in report] == [True]
        output, gradients = values_and_gradients(rewritten, INPUTS)
        assert output.dtype == under_autocast(*INPUTS).dtype == torch.bfloat16
        assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
        expected = values_and_gradients(reference_under_autocast(k), INPUTS)
        assert_same((output, gradients), expected, torch.bfloat16)


@pytest.mark.parametrize("tracer", [DynamoTrace, ExportTrace], ids=["dynamo", "export"])
def test_attention_exempt_from_autocast_keeps_its_precision(tracer: type) -> None:
    """Traced and run under autocast, which its own region turns off."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace = tracer(without_autocast, INPUTS)
        rewritten, report, _ = trace.rewrite(k="all")
        output = rewritten(*INPUTS)
    assert [site.rewritten for site in report] == [True]
    assert output.dtype == torch.float32
    assert_same(output, attention(*INPUTS))


def test_both_branches_of_a_condition_are_rewritten() -> None:
    def model(is_scaled: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(
            is_scaled, lambda q, k, v: attention(0.5 * q, k, v), lambda q, k, v: attention(q, k, v).clone(), (q, k, v)
        )

    trace = ExportTrace(model, (torch.tensor(True), *INPUTS))
    rewritten, report, text = trace.rewrite(k=3)
    assert [site.rewritten for site in report] == [True, True]
    assert "softmax" not in text
    for is_scaled in (True, False):
        with KeepingTopK(3):
            expected = attention((0.5 if is_scaled else 1.0) * INPUTS[0], *INPUTS[1:])
        assert_same(rewritten(torch.tensor(is_scaled), *INPUTS), expected)


def test_body_used_twice_is_rewritten_once() -> None:
    """Regional compilation calls one body for every layer: one graph, one report of it, both calls rewritten."""
    body = torch.compiler.nested_compile_region(attention)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return body(q, k, v) + body(2 * q, k, v)

    trace = DynamoTrace(model, INPUTS)
    rewritten, report, text = trace.rewrite(k=3)
    assert [site.rewritten for site in report] == [True]
    assert "softmax" not in text
    with KeepingTopK(3):
        expected = attention(*INPUTS) + attention(2 * INPUTS[0], *INPUTS[1:])
    assert_same(rewritten(*INPUTS), expected)


def scanned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def step(total: Tensor, of_batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        output = attention(*of_batch)
        return total + output.sum(), output.clone()

    return scan(step, q.new_zeros(()), (q, k, v))[1]


def mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch._higher_order_ops.map(lambda of_batch: attention(*of_batch), (q, k, v))


def looped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def step(count: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, attention(x, k, v[..., :4])

    return while_loop(lambda count, x: count < 3, step, (torch.tensor(0), q))[1]


@pytest.mark.parametrize("tracer", [DynamoTrace, ExportTrace], ids=["dynamo", "export"])
@pytest.mark.parametrize("model", [scanned, mapped], ids=["scan", "map"])
def test_body_of_scan_and_map_is_rewritten(model: Callable[..., Tensor], tracer: type) -> None:
    trace = tracer(model, leaves(INPUTS))
    for k in ("all", 3):
        rewritten, report, text = trace.rewrite(k=k)
        assert [site.rewritten for site in report] == [True]
        assert "softmax" not in text
        with KeepingTopK(k):
            expected = values_and_gradients(attention, INPUTS)
        assert_same(values_and_gradients(rewritten, INPUTS), expected)


@pytest.mark.parametrize("tracer", [DynamoTrace, ExportTrace], ids=["dynamo", "export"])
def test_body_of_while_loop_is_rewritten(tracer: type) -> None:
    trace = tracer(looped, INPUTS)
    for k in ("all", 3):
        rewritten, report, text = trace.rewrite(k=k)
        assert [site.rewritten for site in report] == [True]
        assert "softmax" not in text
        x, key, value = INPUTS
        with KeepingTopK(k):
            for _ in range(3):
                x = attention(x, key, value[..., :4])
        assert_same(rewritten(*INPUTS), x)
