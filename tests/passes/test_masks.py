"""Masks and biases that a model builds from positions reach the op as an expression, and not as queries x keys numbers."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import TRACERS as TRACERS_BY_NAME
from models import DynamoTrace, KeepingTopK, Trace, assert_same, leaves, values_and_gradients
from spellings import INF, LK, LQ, B, H, tensors
from torch import Tensor

import topk_fx
from topk_fx.testing import graph_text

MIN = torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True)
class Mask:
    """Attention under a mask that a model builds, and the score function that it becomes."""

    model: Callable[..., Tensor]
    score: str

    def inputs(self) -> tuple[Tensor, ...]:
        available = {**tensors(), **EXTRA}
        return tuple(available[name] for name in inspect.signature(self.model).parameters)


EXTRA = {
    "table": torch.linspace(-2.0, 2.0, 32 * H).view(32, H),
    "lengths": torch.tensor([LK, 6]),
    "documents": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 2, 2, 2]]),
}
MASKS: list[Mask] = []


def becomes(score: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        MASKS.append(Mask(model, score))
        return model

    return register


def positions() -> tuple[Tensor, Tensor]:
    return torch.arange(LQ)[:, None], torch.arange(LK)[None, :]


@becomes("fill(gt(j, i), -inf)")
def causal_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions()
    return (q @ k.transpose(-2, -1)).masked_fill(j > i, -INF).softmax(-1) @ v


@becomes("fill(not(le(j, i)), -inf)")
def causal_by_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(LQ, LK, dtype=torch.bool).tril()
    return (q @ k.transpose(-2, -1)).masked_fill(~keep, -INF).softmax(-1) @ v


@becomes(f"fill(eq(where(le(j, add(i, 2)), 1.0, 0.0), 0), {MIN!r})")
def causal_with_offset_by_tril_of_floats(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.tril(torch.ones(LQ, LK), diagonal=LK - LQ)
    return (q @ k.transpose(-2, -1)).masked_fill(allowed == 0, MIN).softmax(-1) @ v


@becomes("add(where(ge(j, add(i, 1)), -inf, 0.0))")
def additive_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) + torch.full((LQ, LK), -INF).triu(1)).softmax(-1) @ v


@becomes(f"add(where(le(j, i), 0.0, {MIN!r}))")
def additive_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions()
    bias = torch.where(j <= i, 0.0, MIN)[None, None].expand(B, 1, LQ, LK)
    return (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v


@becomes("keep(and(le(j, i), gt(j, add(i, -3))), -inf)")
def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j > i - 3), scale=1.0)


@becomes("keep(eq(floor_div(j, 4), floor_div(i, 4)), -inf)")
def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j // 4 == i // 4).expand(B, 1, LQ, LK), scale=1.0)


@becomes("keep(or(le(j, i), lt(j, 3)), -inf)")
def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) | (j < 3), scale=1.0)


@becomes("")
def every_key_of_every_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers, for models without a mask, where torch 2.11 traces them."""
    mask = (torch.arange(LQ)[:, None] >= 0).expand(B, 1, LQ, LK)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


@becomes("keep(and(le(j, i), $0), -inf)")
def causal_and_padding(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    i, j = positions()
    valid = torch.arange(LK) < lengths[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & valid[:, None, None, :], scale=1.0)


@becomes("keep(and(le(j, i), eq($0, $1)), -inf)")
def documents_packed(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    i, j = positions()
    same = documents[:, None, :LQ, None] == documents[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & same, scale=1.0)


@becomes("mask($0)")
def padding_expanded(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=padding.expand(B, 1, LQ, LK), scale=1.0)


@becomes("add(mul($0, sub(j, i)))")
def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    i, j = positions()
    return (q @ k.transpose(-2, -1) + slopes * (j - i)).softmax(-1) @ v


@becomes("add(lookup($0, add(minimum(maximum(sub(j, i), -4), 4), 4)))")
def clipped_distances(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i, j = positions()
    return (q @ k.transpose(-2, -1) + table[(j - i).clamp(-4, 4) + 4].permute(2, 0, 1)).softmax(-1) @ v


@becomes(
    "%0 = abs(sub(j, i)) add(lookup($0, add(mul(int64(gt(sub(j, i), 0)), 16), where(lt(%0, 8), %0, minimum(add(int64("
    "mul(div(log(div(float32(%0), 8)), 2.772588722239781), 8)), 8), 15)))))"
)
def buckets_of_t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    i, j = positions()
    buckets = ((j - i) > 0).to(torch.long) * 16
    distance = (j - i).abs()
    far = (torch.log(distance.float() / 8) / math.log(128 / 8) * 8).to(torch.long) + 8
    far = torch.min(far, torch.full_like(far, 15))
    buckets += torch.where(distance < 8, distance, far)
    return (q @ k.transpose(-2, -1) + F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)).softmax(-1) @ v


@becomes("add(mul(float32(gt(j, i)), -10000.0))")
def one_minus_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions()
    return (q @ k.transpose(-2, -1) + (j > i).float() * -10000.0).softmax(-1) @ v


def by_name(mask: Mask) -> str:
    return mask.model.__name__


def score_text(module: torch.fx.GraphModule) -> str:
    (op,) = module.graph.find_nodes(op="call_function", target=torch.ops.topk_fx.attention.default)
    return op.args[4]


def queries_by_keys(module: torch.fx.GraphModule) -> list[str]:
    """The nodes of a graph with both a query and a key axis."""
    values = {node.name: node.meta.get("val", node.meta.get("example_value")) for node in module.graph.nodes}
    return [name for name, x in values.items() if isinstance(x, Tensor) and x.shape[-2:] == (LQ, LK)]


@pytest.mark.parametrize("mask", MASKS, ids=by_name)
@pytest.mark.parametrize("tracer", ["dynamo", "export"])
def test_mask_becomes_an_expression(mask: Mask, tracer: str) -> None:
    inputs = mask.inputs()
    trace: Trace = TRACERS_BY_NAME[tracer](mask.model, leaves(inputs))
    for k in ("all", 3):
        model, report, _ = trace.rewrite(k=k)
        (site,) = report
        assert site.rewritten
        assert site.mask_bytes == 0
        with KeepingTopK(k):
            expected = values_and_gradients(mask.model, inputs)
        assert_same(values_and_gradients(model, inputs), expected, torch.float32)


@pytest.mark.parametrize("mask", MASKS, ids=by_name)
def test_expression_of_a_mask(mask: Mask) -> None:
    trace = DynamoTrace(mask.model, leaves(mask.inputs()))
    module, _ = topk_fx.rewrite(trace.program, k=3)
    assert score_text(module) == mask.score
    assert queries_by_keys(module) == []
    assert "arange" not in graph_text(module) or "$" in mask.score


# What is not read stays a tensor, and the report tells its bytes.


def given_whole(q: Tensor, k: Tensor, v: Tensor, bias_matrix: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) + bias_matrix).softmax(-1) @ v


def written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(LQ, LK, dtype=torch.bool).tril()
    keep[:, 0] = True
    return (q @ k.transpose(-2, -1)).masked_fill(~keep, -INF).softmax(-1) @ v


def gathered_by_index(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Whose order no position tells."""
    keep = torch.ones(LK, LK, dtype=torch.bool).tril()[documents[0, :LQ]]
    return (q @ k.transpose(-2, -1)).masked_fill(~keep, -INF).softmax(-1) @ v


@pytest.mark.parametrize(
    ("model", "size"), [(given_whole, LQ * LK * 4), (written_to, LQ * LK), (gathered_by_index, LQ * LK)]
)
def test_what_is_not_read_stays_a_tensor(model: Callable[..., Tensor], size: int) -> None:
    mask = Mask(model, "")
    trace = DynamoTrace(model, leaves(mask.inputs()))
    for k in ("all", 3):
        rewritten, report, _ = trace.rewrite(k=k)
        assert [(site.rewritten, site.mask_bytes) for site in report] == [(True, size)]
        with KeepingTopK(k):
            expected = values_and_gradients(model, mask.inputs())
        assert_same(values_and_gradients(rewritten, mask.inputs()), expected, torch.float32)


def test_bias_made_without_gradient_gets_none() -> None:
    """The op stands where gradients are recorded, and would give the table one."""

    def model(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        i, j = positions()
        with torch.no_grad():
            bias = table[(j - i).clamp(-4, 4) + 4].permute(2, 0, 1)
        return (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v

    inputs = Mask(model, "").inputs()
    rewritten, report, _ = DynamoTrace(model, leaves(inputs)).rewrite(k="all")
    assert [site.rewritten for site in report] == [True]
    assert_same(values_and_gradients(rewritten, inputs), values_and_gradients(model, inputs), torch.float32)
