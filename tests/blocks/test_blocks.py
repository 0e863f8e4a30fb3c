"""Every block of the literature gets what the passes owe it, traced by Dynamo and by export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TRACERS, KeepingTopK, Trace, assert_same, drawn, leaves
from torch import Tensor, fx, nn

import topk_fx

from .block import Block, attend
from .layers import LAYERS
from .linear_attention import LINEAR_ATTENTION
from .looped import LOOPED
from .memory import MEMORY
from .relative_positions import RELATIVE_POSITIONS
from .vision import VISION

BLOCKS = [*LOOPED, *LAYERS, *RELATIVE_POSITIONS, *VISION, *MEMORY, *LINEAR_ATTENTION]
K, FFN_K = 2, 3


class KeepingSites(KeepingTopK):
    """Runs a block with the softmaxes that are owed a rewrite as the reference has them, and its FFNs too.

    A top-k FFN is one whose down projection reads only the largest hidden units.
    """

    def __init__(self, block: Block, model: nn.Module, k: Any, ffn_k: Any) -> None:
        super().__init__(k)
        self.ffn_k = ffn_k
        self.owed = iter(block.attention)
        self.down_weights = {
            id(m.down.weight) for m in model.modules() if isinstance(getattr(m, "down", None), nn.Linear)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self.down_weights:
            hidden = args[0]
            kept = min(topk_fx.config.kept_count(self.ffn_k, hidden.size(-1)), hidden.size(-1))
            indices = hidden.detach().abs().argsort(dim=-1, descending=True, stable=True)[..., :kept]
            mask = torch.zeros_like(hidden, dtype=torch.bool).scatter(-1, indices, True)
            return F.linear(hidden * mask, *args[1:])
        is_site = func in (F.softmax, torch.softmax, Tensor.softmax, F.scaled_dot_product_attention)
        if is_site and not is_rewritten(next(self.owed), self.k):
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def is_rewritten(reason: str, k: Any) -> bool:
    return reason == "" or (reason == "k_covers_all_keys" and k == "all")


def run(function: Callable[..., Tensor], parameters: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """The output, and the gradient of each parameter and of each floating input."""
    arguments = leaves(inputs)
    output = function(*arguments)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    wanted = [*parameters, *(x for x in arguments if isinstance(x, Tensor) and x.requires_grad)]
    return [output.detach(), *torch.autograd.grad(output, wanted, weights, materialize_grads=True)]


def assert_as_expected(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal up to rounding, of which there is more the larger the numbers of a tensor are: gradients are sums."""
    sizes = [x.abs().max().clamp(min=1) for x in expected]
    assert_same(*([x / size for x, size in zip(tensors, sizes, strict=True)] for tensors in (found, expected)))


def marked(block: Block) -> Any:
    return pytest.param(block, marks=pytest.mark.xfail(reason=block.unmet)) if block.unmet else block


@pytest.mark.parametrize("block", [marked(block) for block in BLOCKS], ids=lambda block: block.name)
@pytest.mark.parametrize("tracer", ["dynamo", "export"])
def test_block_gets_what_it_is_owed(block: Block, tracer: str) -> None:
    model = block.model()
    trace: Trace = TRACERS[tracer](model, leaves(block.inputs))
    parameters = list(model.parameters())
    for k, ffn_k in (("all", "all"), (K, FFN_K)):
        rewritten, report, text = trace.rewrite(k=k, ffn_k=ffn_k)
        check_report(block, report, k)
        if not report.rewritten:
            assert text == trace.text
        with KeepingSites(block, model, k, ffn_k):
            expected = run(model, parameters, block.inputs)
        own = list(rewritten.parameters()) if isinstance(rewritten, nn.Module) else parameters
        assert_as_expected(run(rewritten, own, block.inputs), expected)
        if k == "all":
            assert_as_expected(run(model, parameters, block.inputs), expected)


def check_report(block: Block, report: topk_fx.RewriteReport, k: Any) -> None:
    owed = tuple("" if is_rewritten(reason, k) else reason for reason in block.attention)
    assert tuple(site.reason for site in report if site.kind == "attention") == owed
    assert tuple(site.reason for site in report if site.kind == "ffn") == block.ffn
    assert all(site.rewritten == (site.reason == "") for site in report)
    masks = [site.mask_bytes for site in report.rewritten if site.kind == "attention"]
    assert any(masks) == block.mask_is_tensor
    assert ("  mask  " in str(report)) == block.mask_is_tensor
    if block.where:
        assert tuple(site.where for site in report.rewritten) == block.where
    if not block.attention and not block.ffn:
        assert str(report).endswith("no softmax, attention call or FFN found; nothing was changed")


def test_looped_layer_is_one_row_of_the_report() -> None:
    block = LOOPED[0]
    lines = str(topk_fx.explain(block.model(), block.inputs, k=K)).splitlines()[3:]
    assert [line.split("  ")[0] for line in lines] == [
        "before.attention", "before.mlp", "loop.attention (3x)", "loop.mlp (3x)", "after.attention",
        "after.mlp",
    ]  # fmt: skip


def nested_attention(x: Tensor, weight: Tensor) -> Tensor:
    """Attention over sequences of several lengths without padding, as in ByteTransformer."""
    q, k, v = (F.linear(x, part).unflatten(-1, (2, 8)).transpose(1, 2) for part in weight.chunk(3))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def nested_tensor() -> Tensor:
    rows = [drawn(length, 16, seed=length) for length in (3, 7, 5)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("k", ["all", K])
def test_attention_over_nested_tensors_is_compiled_as_it_is(k: Any) -> None:
    """Dynamo breaks the graph at it, or puts it into one: dense in either case."""
    inputs = nested_tensor().requires_grad_(), drawn(48, 16).requires_grad_()
    compiled = torch.compile(nested_attention, backend="topk", options={"k": k, "inner": "eager"})
    found, expected = (
        ((y := f(*inputs)).values(), *torch.autograd.grad(y.values().sum(), inputs[1]))
        for f in (compiled, nested_attention)
    )
    assert_same(found, expected)
    assert not any(report.rewritten for report in topk_fx.reports())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("model", [F.scaled_dot_product_attention, attend], ids=lambda model: model.__name__)
def test_attention_over_nested_tensors_is_left_with_a_reason(model: Any) -> None:
    graph = fx.symbolic_trace(lambda q: model(q, q, q))
    for node in graph.graph.nodes:
        node.meta["example_value"] = nested_tensor().unsqueeze(1)
    report = topk_fx.explain(graph, k=K)
    assert [(site.rewritten, site.reason) for site in report] == [(False, "nested_tensor")]
