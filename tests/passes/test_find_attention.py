"""Every spelling of attention is found, by every tracer, and the op that replaces it computes what was asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import (
    TRACERS,
    DecomposedExportTrace,
    ExportTrace,
    KeepingTopK,
    SymbolicTrace,
    Trace,
    assert_same,
    drawn,
    leaves,
    values_and_gradients,
)  # fmt: skip
from spellings import SPELLINGS, Spelling, tensors
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import topk_fx

K = 3


def by_name(spelling: Spelling) -> str:
    return spelling.name


def check_rewrites(trace: Trace, spelling: Spelling) -> None:
    inputs = spelling.inputs()
    for k in ("all", K):
        model, report, text = trace.rewrite(k=k)
        assert [(site.kind, site.rewritten, site.reason) for site in report] == [("attention", True, "")]
        assert text.count("topk_fx.attention(") == 1
        assert "softmax(" not in text
        with KeepingTopK(k):
            expected = values_and_gradients(spelling.dense, inputs)
        assert_same(values_and_gradients(model, inputs), expected, spelling.dtype)
        if k == "all":
            assert_same(values_and_gradients(spelling.model, inputs), expected, spelling.dtype)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=by_name)
@pytest.mark.parametrize("tracer", ["dynamo", "export"])
def test_spelling_is_rewritten(spelling: Spelling, tracer: str) -> None:
    check_rewrites(TRACERS[tracer](spelling.model, leaves(spelling.inputs())), spelling)


@pytest.mark.parametrize("spelling", SPELLINGS[::3], ids=by_name)
def test_spelling_exported_strictly_is_rewritten(spelling: Spelling) -> None:
    """Such a graph is the other export's but for names, and takes three times as long: a third of the spellings."""
    check_rewrites(TRACERS["strict_export"](spelling.model, leaves(spelling.inputs())), spelling)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.symbolic == ""], ids=by_name)
def test_spelling_without_metadata_is_rewritten(spelling: Spelling) -> None:
    check_rewrites(SymbolicTrace(spelling.model), spelling)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.symbolic], ids=by_name)
def test_spelling_without_metadata_is_refused_where_shapes_matter(spelling: Spelling) -> None:
    trace = SymbolicTrace(spelling.model)
    _, report, text = trace.rewrite(k=K)
    assert [site.reason for site in report] == [spelling.symbolic]
    assert text == trace.text


FOR_MAKE_FX = (
    "matmul_operator",
    "additive_mask",
    "einsum_heads_last",
    "key_and_value_expanded",
    "sdpa_with_boolean_mask",
)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.name in FOR_MAKE_FX], ids=by_name)
@pytest.mark.parametrize("pre_dispatch", [True, False], ids=["pre_dispatch", "post_dispatch"])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_spelling_traced_by_make_fx_is_rewritten(spelling: Spelling, tracing_mode: str, pre_dispatch: bool) -> None:
    """Below autograd the graph is one of forward values alone."""
    inputs = spelling.inputs()
    graph = make_fx(spelling.model, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(*inputs)
    for k in ("all", K):
        model, report = topk_fx.rewrite(graph, k=k)
        with KeepingTopK(k):
            expected = spelling.dense(*inputs)
        assert_same(model(*inputs), expected)
        assert [(site.rewritten, site.reason) for site in report] == [(True, "")]


LEFT_DECOMPOSED = {
    "einsum_of_single_keys": "axes_not_followed",
    "sink_as_factor_of_the_output": "scores_used_elsewhere",
    "weights_without_nan": "probabilities_used_elsewhere",
    "weights_shared_by_the_batch": "mask_broadcasts_scores",
}
"""Spellings that stay dense after run_decompositions(): the other ones of SPELLINGS do not."""
DECOMPOSED = {
    *(spelling.name for spelling in SPELLINGS[::4]),
    *(spelling.name for spelling in SPELLINGS if "sdpa" in spelling.name),
    *("causal_by_triu", "exp_less_logsumexp", "exp_over_sum_less_detached_maximum", "safe_softmax_of_whole_rows"),
}


@pytest.mark.parametrize(
    "spelling", [s for s in SPELLINGS if s.name in DECOMPOSED - LEFT_DECOMPOSED.keys()], ids=by_name
)
def test_spelling_in_a_decomposed_export_is_rewritten(spelling: Spelling) -> None:
    check_rewrites(DecomposedExportTrace(spelling.model, leaves(spelling.inputs())), spelling)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.name in LEFT_DECOMPOSED], ids=by_name)
def test_spelling_in_a_decomposed_export_is_left_with_a_reason(spelling: Spelling) -> None:
    trace = DecomposedExportTrace(spelling.model, spelling.inputs())
    _, report, text = trace.rewrite(k="all")
    assert [site.reason for site in report] == [LEFT_DECOMPOSED[spelling.name]]
    assert text == trace.text


def flash_attention(q: Tensor, k: Tensor, v: Tensor, bias_matrix: Tensor) -> Tensor:
    masked, _ = FLASH_ATTENTION(q, k, v, attn_mask=bias_matrix, scale=0.3)
    return masked + FLASH_ATTENTION(q, k, v, 0.0, True)[0]


FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def test_kernel_that_sdpa_dispatches_to_is_rewritten() -> None:
    q, k, v = (drawn(2, 3, length, 8, seed=length) for length in (7, 9, 10))
    inputs = (q, k, v[:, :, :9], drawn(7, 9))
    graph = make_fx(flash_attention, tracing_mode="fake")(*inputs)
    for keep in ("all", K):
        model, report = topk_fx.rewrite(graph, k=keep)
        assert [site.rewritten for site in report] == [True, True]
        options = ({"attn_mask": inputs[3], "scale": 0.3}, {"is_causal": True})
        expected = sum(topk_fx.reference.attention(*inputs[:3], k=keep, **named) for named in options)
        assert_same(model(*inputs), expected)


def test_kernel_whose_sums_are_used_is_left() -> None:
    q = drawn(2, 3, 7, 8)
    graph = make_fx(lambda q: FLASH_ATTENTION(q, q, q), tracing_mode="fake")(q)
    _, report = topk_fx.rewrite(graph, k=K)
    assert [site.reason for site in report] == ["scores_used_elsewhere"]


def attention_of_attention(q: Tensor, k: Tensor) -> Tensor:
    inner = F.scaled_dot_product_attention(q, k, k)
    return F.scaled_dot_product_attention(inner, k, k)


def values_from_attention(q: Tensor, k: Tensor) -> Tensor:
    inner = (k @ k.transpose(-2, -1)).softmax(-1) @ k
    return (q @ k.transpose(-2, -1)).softmax(-1) @ inner


def bias_from_attention(q: Tensor, k: Tensor) -> Tensor:
    bias = (q @ k.transpose(-2, -1)).softmax(-1) @ (k @ k.transpose(-2, -1))
    return (q @ k.transpose(-2, -1) + bias).softmax(-1) @ k


def scale_from_attention(q: Tensor, k: Tensor) -> Tensor:
    scale = F.scaled_dot_product_attention(q, k, k[..., :1])
    return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ k


CHAINS = [attention_of_attention, values_from_attention, bias_from_attention, scale_from_attention]


@pytest.mark.parametrize("model", CHAINS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("tracer", TRACERS)
def test_attention_that_reads_another_is_rewritten_with_it(model: Callable[..., Tensor], tracer: str) -> None:
    """The second site reads the node that rewriting the first one replaced."""
    inputs = (tensors()["q"], tensors()["k"])
    trace = TRACERS[tracer](model, leaves(inputs))
    for k in ("all", K):
        rewritten, report, _ = trace.rewrite(k=k)
        with KeepingTopK(k):
            expected = values_and_gradients(model, inputs)
        assert_same(values_and_gradients(rewritten, inputs), expected)
        assert [site.rewritten for site in report] == [True, True]


STEPS: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "scaled": lambda s, t: s * 0.7,
    "scaled_in_place": lambda s, t: s.mul_(1.3),
    "divided": lambda s, t: s / 1.7,
    "negated": lambda s, t: -s,
    "biased": lambda s, t: s + t["bias"],
    "biased_in_place": lambda s, t: s.add_(t["bias_keys"]),
    "subtracted_from": lambda s, t: torch.sub(t["bias_matrix"], s, alpha=0.6),
    "added_with_factor": lambda s, t: torch.add(t["bias"], s, alpha=0.4),
    "bounded": lambda s, t: torch.tanh(s),
    "clamped": lambda s, t: s.clamp(-0.9, 1.1),
    "filled": lambda s, t: s.masked_fill(~t["keep"], -3.0),
    "filled_in_place": lambda s, t: s.masked_fill_(~t["padding"], -2.0),
    "replaced": lambda s, t: torch.where(t["keep"], s, t["bias"]),
    "scaled_by_head": lambda s, t: s * t["scale_heads"],
    "scaled_by_number": lambda s, t: s / t["temperature"],
    "shifted": lambda s, t: s - s.amax(-1, keepdim=True),
    "cast": lambda s, t: s.double().float(),
    "joined": lambda s, t: (s.reshape(6, 7, 9) + t["bias_joined"]).view(2, 3, 7, 9),
    "transposed": lambda s, t: (s.transpose(-2, -1) + t["bias_matrix"].t()).transpose(-2, -1),
    "heads_last": lambda s, t: (s.permute(0, 2, 3, 1) * t["scale_heads"].view(3)).permute(0, 3, 1, 2),
}
NAMES = (
    "q",
    "k",
    "v",
    "bias",
    "bias_matrix",
    "bias_keys",
    "bias_joined",
    "scale_heads",
    "temperature",
    "keep",
    "padding",
)
WRITES = {name for name in STEPS if name.endswith("in_place")}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=5))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_chain_of_known_steps_computes_the_reference(steps: list[str]) -> None:
    """Rewritten or, where the score language cannot say it, left dense with a reason; wrong never."""
    assume(
        not WRITES & set(steps) or not {"bounded", "clamped"} & set(steps)
    )  # autograd forbids writing to what it saved

    def model(*args: Tensor) -> Tensor:
        t = dict(zip(NAMES, args, strict=True))
        scores = t["q"] @ t["k"].transpose(-2, -1) * 1.0
        for step in steps:
            scores = STEPS[step](scores, t)
        return scores.softmax(-1) @ t["v"]

    inputs = tuple(tensors()[name] for name in NAMES)
    trace = TRACERS["export"](model, leaves(inputs))
    for k in ("all", K):
        rewritten, report, _ = trace.rewrite(k=k)
        with KeepingTopK(k if report.rewritten else "all"):
            expected = values_and_gradients(model, inputs)
        assert_same(values_and_gradients(rewritten, inputs), expected)
        assert report.rewritten or "shifted" in steps


@pytest.mark.parametrize("clamp", [F.hardtanh, torch.clamp], ids=["hardtanh", "clamp"])
def test_scores_at_the_bounds_of_a_clamp_have_its_gradient(clamp: Callable[..., Tensor]) -> None:
    """That of hardtanh is 0 there, and that of clamp 1, or 0, too; the scores of a query of zeros are 0."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        return (clamp(scores, 0.0, 1.0) + scores * clamp(scores + 1, -1.0, 1.0)).softmax(-1) @ v

    inputs = (torch.zeros(2, 7, 4), drawn(2, 9, 4), drawn(2, 9, 5))
    rewritten, report, _ = ExportTrace(model, inputs).rewrite(k="all")
    assert [site.rewritten for site in report] == [True]
    assert_same(values_and_gradients(rewritten, inputs), values_and_gradients(model, inputs))


@pytest.mark.parametrize("is_outer", [True, False], ids=["under_autocast", "alone"])
def test_softmax_with_autocast_switched_off_is_rewritten(is_outer: bool) -> None:
    """Both products see the same autocast, and what lies between them reads no product."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_outer):
            scores = q @ k.transpose(-2, -1)
            with torch.autocast("cpu", enabled=False):
                weights = (scores.float() / 2).softmax(-1)
            return weights @ v

    inputs = tuple(tensors()[name] for name in "qkv")
    rewritten, report, _ = TRACERS["dynamo"](model, inputs).rewrite(k="all")
    assert [site.rewritten for site in report] == [True]
    dtype = torch.bfloat16 if is_outer else torch.float32
    actual, expected = rewritten(*inputs), model(*inputs)
    assert actual.dtype == expected.dtype == dtype
    assert_same(actual, expected, dtype)
