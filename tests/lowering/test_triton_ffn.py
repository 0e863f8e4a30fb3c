"""The Triton kernels of FFNs, in Triton's interpreter: selection, pre-activations, output and gradients."""

from __future__ import annotations

import pytest
import torch
from inputs import LAYOUTS, assert_near, double
from kernel_checks import DTYPES, INF, NAN, ffn_arguments, hidden_units, normal
from kernel_checks import check_ffn as check_with
from topk_fx.lowering import aten, triton
from topk_fx.lowering.triton import ffn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_cases import why_not_interpreted

import topk_fx
from topk_fx import lowering
from topk_fx.activation import ACTIVATIONS
from topk_fx.errors import LoweringUnavailableError

needs_interpreter = pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())
interpreted = [needs_interpreter, pytest.mark.usefixtures("nan_filled_memory")]


def marked(test):
    for mark in interpreted:
        test = mark(test)
    return test


def check(args, k, activation="relu", *, is_exact=False):
    return check_with(args, k, activation, is_exact=is_exact, lowering=triton)


@marked
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (3, 17), (2, 131), (3, 200), (19, 17)])
def test_exact_hidden_units_are_selected_exactly(tokens, k, dtype, gated):
    """Small integers, of which many are equal; 19 tokens are a tile and a part of one."""
    check(ffn_arguments(tokens, gated=gated, dtype=dtype), k, is_exact=True)


@marked
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_activation(activation, gated):
    check(ffn_arguments(3, gated=gated, biased=False, draw=normal), 20, activation)


@marked
@pytest.mark.parametrize(
    "layout", ["contiguous", "head_size_before_length", "every_second_row", "columns_of_wider_rows"]
)
def test_tensors_of_any_layout(layout):
    args = {name: x if x.dim() == 1 else LAYOUTS[layout](x) for name, x in ffn_arguments(3).items()}
    check(args, 17, is_exact=True)


@marked
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_nan_is_the_largest_and_stays_in_its_row(poison):
    clean = ffn_arguments(3)
    without, _ = check(clean, 9, is_exact=True)
    args = {**clean, "input": clean["input"].clone()}
    args["input"][1, 2] = poison
    output, indices, _, _ = triton.ffn_forward(**args, activation="relu", k=9, dropout_keep=None, dropout_p=0.0)
    *_, hidden = hidden_units(args, "relu")
    expected = hidden.abs().argsort(dim=-1, descending=True, stable=True)[:, :9].sort(-1).values
    assert indices.long().equal(expected)
    assert output[1].isnan().all()
    assert output[[0, 2]].equal(without[[0, 2]])


@marked
def test_units_beyond_the_last_are_never_kept():
    """131 units in 256 lanes, all of them 0: the lanes that are no units have a lower key than 0."""
    args = ffn_arguments(2, gated=False, biased=False)
    args["input"].zero_()
    _, indices = check(args, 131, is_exact=True)
    assert indices.tolist() == [list(range(131))] * 2


@marked
@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 5, 0), (4, 0, 3)], ids=str)
def test_empty_sizes_match_the_definition(sizes):
    check(ffn_arguments(2, sizes), 2, is_exact=True)
    check(ffn_arguments(0), 2, is_exact=True)


@marked
def test_parts_of_the_tokens_are_put_together(monkeypatch):
    args = ffn_arguments(40, draw=normal)
    whole = check(args, 17, "silu")
    monkeypatch.setattr(ffn, "SCRATCH_BYTES", 1)
    for part, expected in zip(check(args, 17, "silu"), whole, strict=True):
        assert part.equal(expected)


@marked
@pytest.mark.parametrize(
    ("dtype", "gated", "dropout_p"),
    [
        *((dtype, gated, 0.0) for dtype in DTYPES for gated in (False, True)),
        *((torch.float32, gated, 0.5) for gated in (False, True)),
        (torch.float32, True, 1.0),
    ],
)
def test_dropout_and_gradients_are_those_of_aten_in_float64(dtype, gated, dropout_p):
    args = ffn_arguments(5, gated=gated, dtype=dtype, draw=normal)
    keep = torch.rand(5, 17) >= dropout_p if dropout_p else None
    options = {"activation": "gelu", "dropout_keep": keep, "dropout_p": dropout_p}
    output, indices, up, gate = triton.ffn_forward(**args, k=17, **options)
    hidden = hidden_units(args, "gelu")[-1].gather(-1, indices.long())
    if dropout_p:
        hidden = hidden * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    sparse = torch.zeros(5, 131, dtype=torch.float64).scatter(-1, indices.long(), hidden)
    assert_near(output, (sparse @ args["down_weight"].double().T).to(dtype))
    grad = torch.randn(output.shape).to(dtype)
    weights = [args[name] for name in ("input", "up_weight", "gate_weight", "down_weight")]
    found = triton.ffn_backward(grad, *weights, indices, up, gate, keep, "gelu", dropout_p)
    exact = [double(x) for x in (grad, *weights)]
    expected = aten.ffn_backward(*exact, indices, up.double(), gate.double(), keep, "gelu", dropout_p)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert_near(x, y.to(x.dtype))


@marked
def test_op_runs_them_where_it_names_them():
    args = ffn_arguments(3, gated=True, biased=False, draw=normal)
    input, up, gate, down = (args[n].requires_grad_() for n in ("input", "up_weight", "gate_weight", "down_weight"))
    output = torch.ops.topk_fx.ffn(input, up, None, gate, None, down, None, "silu", 9, lowering="triton")
    expected = torch.ops.topk_fx.ffn(input, up, None, gate, None, down, None, "silu", 9, lowering="aten")
    inputs = (input, up, gate, down)
    found, wanted = (torch.autograd.grad(x.square().sum(), inputs) for x in (output, expected))
    for x, y in zip((output, *found), (expected, *wanted), strict=True):
        assert_near(x, y)


@marked
def test_compiled_model_runs_them_and_the_report_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8))
    compiled = torch.compile(model, backend="topk", options={"ffn_k": "all", "lowering": "triton"})
    x = torch.randn(2, 8)
    torch.testing.assert_close(compiled(x), model(x))
    assert [site.lowering for site in topk_fx.reports()[-1].sites] == ["triton"]


def ffn_of(tokens, units=64, dtype=torch.bfloat16):
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape in ((tokens, 8), (units, 8))]


def test_few_tokens_of_a_gpu_get_them_and_many_a_reason(monkeypatch):
    monkeypatch.setattr(ffn, "why_unavailable", lambda device: "")
    many = "17 tokens: chunks of ATen calls take less time than Triton above 16"
    with FakeTensorMode():
        assert lowering.ffn_lowering_of("", ffn_of(16)) == ("triton", "")
        assert lowering.ffn_lowering_of("", ffn_of(17)) == ("aten", many)
        assert lowering.ffn_lowering_of("triton", ffn_of(17)) == ("triton", "")
        assert lowering.ffn_lowering_of("", ffn_of(3), kept_in_backward=60) == ("triton", "")
        assert lowering.ffn_lowering_of("", ffn_of(3, units=2**15 + 1)) == (
            "aten",
            "there are 32,769 hidden units; there are kernels for 32,768 at most",
        )


def test_forced_kernels_that_cannot_run_are_an_error_that_says_why():
    input, up, down = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 4), (16, 4), (4, 16)))
    with pytest.raises(LoweringUnavailableError, match="lowering='triton' cannot run: input "):
        torch.ops.topk_fx.ffn(input, up, None, None, None, down, None, "relu", 3, lowering="triton")
