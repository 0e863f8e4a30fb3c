"""The Triton kernels of attention, in Triton's interpreter: selection, weights, output and gradients."""

from __future__ import annotations

import pytest
import torch
from topk_fx.lowering import triton
from topk_fx.lowering.triton import availability
from topk_fx.lowering.triton.score_code import (
    NoCodeError,
    OperandKind,
    function_of,
    source_of,
    without_causal_mask,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_cases import CASES, check, why_not_interpreted

import topk_fx
from topk_fx import lowering
from topk_fx.errors import LoweringUnavailableError
from topk_fx.score import Score

needs_interpreter = pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_the_definition(case):
    check(case)


@needs_interpreter
@pytest.mark.parametrize("score", ["causal", "mul(0.5) causal"])
def test_deterministic_gradients_are_the_same_sums_in_a_fixed_order(score):
    query, key, value, grad = (torch.randn(1, heads, 20, 16) for heads in (4, 2, 2, 4))
    _, indices, weights = triton.attention_forward(query, key, value, [], score, 0.25, 5, None, 0.0, False)
    arguments = (grad, query, key, value, [], score, 0.25, indices, weights, 0.0, [])
    fast = triton.attention_backward(*arguments)
    torch.use_deterministic_algorithms(True)
    try:
        ordered = triton.attention_backward(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(ordered, fast, rtol=1e-5, atol=1e-6)


@needs_interpreter
def test_nan_in_a_key_makes_its_rows_nan_and_no_other():
    query, key, value = (torch.randn(1, 1, 18, 16) for _ in range(3))
    key[0, 0, 7, 3] = torch.nan
    output, *_ = triton.attention_forward(query, key, value, [], "causal", 0.25, 4, None, 0.0, False)
    assert output[:, :, 7:].isnan().all()
    assert not output[:, :, :7].isnan().any()


@needs_interpreter
def test_values_that_are_not_kept_may_be_infinite_or_nan():
    query, key, value = (torch.randn(1, 1, 18, 16) for _ in range(3))
    _, indices, _ = triton.attention_forward(query, key, value, [], "", 0.25, 2, None, 0.0, False)
    dropped = sorted({*range(18)} - {*indices.flatten().tolist()})
    value[:, :, dropped] = torch.inf
    output, *_ = triton.attention_forward(query, key, value, [], "", 0.25, 2, None, 0.0, False)
    assert dropped
    assert output.isfinite().all()


@needs_interpreter
def test_op_runs_them_where_it_names_them():
    query = torch.randn(1, 1, 18, 16, requires_grad=True)
    output = torch.ops.topk_fx.attention(query, query, query, [], "causal", 0.25, 3, lowering="triton")
    expected = topk_fx.reference.attention(query, query, query, k=3, scale=0.25, is_causal=True)
    torch.testing.assert_close(output, expected)
    (found,) = torch.autograd.grad(output.sum(), query)
    (wanted,) = torch.autograd.grad(expected.sum(), query)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@needs_interpreter
def test_compiled_model_runs_them_and_the_report_says_so():
    def model(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.randn(1, 1, 18, 16)
    compiled = torch.compile(model, backend="topk", options={"k": 3, "lowering": "triton"})
    torch.testing.assert_close(compiled(x), topk_fx.reference.attention(x, x, x, k=3, is_causal=True))
    assert [site.lowering for site in topk_fx.reports()[-1].sites] == ["triton"]


def test_tensors_of_a_gpu_get_them_and_a_reason_where_not():
    with FakeTensorMode():
        x, short = (torch.empty(1, 8, length, 64, dtype=torch.bfloat16, device="cuda") for length in (4096, 100))
        rest = ([], "causal", 0.25)
        why = availability.why_unavailable("cuda")
        dense = "64 of 100 keys are kept: dense products take less time than kernels that select"
        assert lowering.lowering_of("", (x, x, x, *rest, 64)) == (("aten", why) if why else ("triton", ""))
        assert lowering.lowering_of("", (x, short, short, *rest, 64)) == ("aten", why or dense)
        assert "2,000 keys are kept; there are kernels for 1,024" in triton.why_not(x, x, x, [], "causal", 2000)


class CausalAttention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_program_exported_for_a_gpu_is_rewritten_without_one(monkeypatch):
    monkeypatch.setattr(availability, "why_unavailable", lambda device: "")
    with FakeTensorMode():
        x = torch.empty(1, 2, 300, 16, device="cuda", dtype=torch.bfloat16)
        exported = torch.export.export(CausalAttention(), (x,))
    program, report = topk_fx.rewrite(exported, k=7)
    assert [site.lowering for site in report.sites] == ["triton"]
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert {str(value.device) for value in values} == {"cuda:0"}
    assert all(value.numel() <= x.numel() for value in values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "query has dtype torch.float64"),
        ({"depth": 200}, "query has head size 200 and dtype torch.float32; there are kernels for 1 to 128"),
        ({"score": "elu(1.0)"}, "has no Triton: the operation elu"),
    ],
)
def test_forced_kernels_that_cannot_run_are_an_error_that_says_why(change, reason):
    if why := availability.why_unavailable("cpu"):
        pytest.skip(why)
    query = torch.randn(1, 1, 8, change.get("depth", 16), dtype=change.get("dtype", torch.float32))
    with pytest.raises(LoweringUnavailableError, match=f"lowering='triton' cannot run: .*{reason}"):
        torch.ops.topk_fx.attention(query, query, query, [], change.get("score", ""), 1.0, 3, lowering="triton")


def test_masks_that_hold_before_the_diagonal_are_left_out_there():
    program = Score.parse("mul(2.0) keep(and(le(j, i), $0), -inf)").before
    kinds = (OperandKind(torch.bool, False, True),)
    past = source_of(without_causal_mask(program), kinds)
    assert "j <= i" in source_of(program, kinds)
    assert "j <= i" not in past
    assert "tl.where(x0, " in past
    assert source_of(without_causal_mask(Score.parse("causal").before), ()).endswith("    return s\n")


def test_functions_of_two_programs_have_names_of_their_own():
    """Triton tells the functions that a kernel calls by their names: it would compile one for both."""
    pytest.importorskip("triton")
    program = Score.parse("causal").before
    functions = [function_of(x, ()) for x in (program, without_causal_mask(program), Score.parse("neg").before)]
    assert len({function.fn.__name__ for function in functions}) == 3


def test_half_precision_steps_are_rounded_as_aten_rounds_them():
    text = source_of(Score.parse("add(mul($0, 0.5))").before, (OperandKind(torch.bfloat16, True, True),))
    assert "(x0 * 0.5)).to(tl.bfloat16).to(tl.float32)" in text


def test_operation_without_code_is_named():
    with pytest.raises(NoCodeError, match="the operation nan_to_num"):
        source_of(Score.parse("nan_to_num(0.0, 0.0, 0.0)").before, ())
