"""The C++ kernel of the FFN, on each instruction set of this processor: selection, output and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, assert_near, double, integers
from kernel_checks import DTYPES, INF, NAN, hidden_units, normal
from kernel_checks import check_ffn as check
from kernel_checks import ffn_arguments as forward_args
from topk_fx.lowering import aten, cpu
from topk_fx.lowering.cpu import build, ffn

import topk_fx
from topk_fx import reference
from topk_fx.activation import ACTIVATIONS

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(bool(build.why_unavailable()), reason=f"C++ cannot be compiled: {build.why_unavailable()}"),
]


@pytest.fixture(params=build.supported_instruction_sets())
def instructions(request):
    with build.instruction_set(request.param):
        yield request.param


# --- every instruction set


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 9])
def test_selection_is_exact_on_every_instruction_set(instructions, tokens, gated, dtype):
    for sizes in ((37, 131, 29), (1, 1, 1), (64, 200, 70)):
        args = forward_args(tokens, sizes, gated=gated, dtype=dtype)
        for k in (1, 17, 131, 1000):
            check(args, k, is_exact=True)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_the_definition(activation, gated, instructions):
    args = forward_args(3, (16, 300, 20), gated=gated, draw=normal)
    check(args, 40, activation)


@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "biased"])
def test_layouts_do_not_matter(biased, instructions):
    """Weights by rows, by columns, and by neither; inputs of any strides."""
    for tokens in (1, 3, 8):
        args = forward_args(tokens, biased=biased)
        _, indices = check(args, 17, is_exact=True)
        by_columns = {name: x.T.contiguous().T for name, x in args.items() if "weight" in name}
        wider = {
            name: torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2)[:, ::2]
            for name, x in args.items()
            if "weight" in name
        }
        larger = torch.full((2 * tokens, 45), NAN)
        larger[::2, 3:40] = args["input"]
        for changed in (
            by_columns,
            wider,
            {"down_weight": by_columns["down_weight"]},
            {"up_weight": by_columns["up_weight"]},
            {"input": larger[::2, 3:40]},
            {"input": args["input"].T.contiguous().T},
        ):
            assert check({**args, **changed}, 17, is_exact=True)[1].equal(indices)


def test_equal_units_keep_the_lowest(instructions):
    args = forward_args(2, (3, 500, 4), gated=False, biased=False)
    args["input"], args["up_weight"] = torch.ones(2, 3), torch.ones(500, 3)
    args["up_weight"][100] = 2
    _, indices = check(args, 6, is_exact=True)
    assert indices.tolist() == [[0, 1, 2, 3, 4, 100]] * 2


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_nan_is_the_largest_and_stays_in_its_row(poison, instructions):
    clean = forward_args(3)
    without, _ = check(clean, 9, is_exact=True)
    args = {**clean, "input": clean["input"].clone()}
    args["input"][1, 2] = poison
    output, indices, _, _ = cpu.ffn_forward(**args, activation="relu", k=9, dropout_keep=None, dropout_p=0.0)
    *_, hidden = hidden_units(args, "relu")
    expected = hidden.abs().argsort(dim=-1, descending=True, stable=True)[:, :9].sort(-1).values
    assert indices.long().equal(expected)
    assert output[1].isnan().all()
    assert output[[0, 2]].equal(without[[0, 2]])


def test_a_nan_weight_makes_its_unit_the_first_to_be_kept(instructions):
    args = forward_args(2)
    args["up_weight"][77, 5] = NAN
    _, indices, up, _ = cpu.ffn_forward(**args, activation="relu", k=1, dropout_keep=None, dropout_p=0.0)
    assert indices.tolist() == [[77], [77]]
    assert up.isnan().all()


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
def test_dropout_scales_what_it_keeps(by_columns, instructions):
    args = forward_args(5)
    if by_columns:
        args["down_weight"] = args["down_weight"].T.contiguous().T
    keep = torch.rand(5, 17) < 0.5
    options = {"activation": "relu", "k": 17, "dropout_keep": keep, "dropout_p": 0.75}
    output, indices, *_ = cpu.ffn_forward(**args, **options)
    *_, hidden = hidden_units(args, "relu")
    kept = hidden.gather(-1, indices.long()) * keep * 4
    expected = torch.zeros_like(hidden).scatter(-1, indices.long(), kept) @ args["down_weight"].double().T
    assert_near(output, expected.float())


@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 5, 0), (4, 0, 3)], ids=str)
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
def test_empty_sizes_match_the_definition(sizes, by_columns):
    args = forward_args(2, sizes)
    if by_columns:
        args["down_weight"] = args["down_weight"].T.contiguous().T
    check(args, 2, is_exact=True)
    assert [
        x.numel() for x in cpu.ffn_forward(**forward_args(0), activation="relu", k=2, dropout_keep=None, dropout_p=0.0)
    ] == [0] * 4


@pytest.mark.parametrize("sizes", [(4, 0, 3), (0, 5, 3), (4, 5, 0)], ids=str)
def test_sparse_backward_of_empty_sizes_is_zero(sizes):
    args = forward_args(200, sizes)
    output, *saved = cpu.ffn_forward(**args, activation="relu", k=2, dropout_keep=None, dropout_p=0.0)
    gradients = backward(cpu, args, torch.ones_like(output), *saved, "relu")
    expected = backward(aten, args, torch.ones_like(output), *saved, "relu")
    for x, y in zip(gradients, expected, strict=True):
        assert_near(x, y)


def test_order_of_the_activations_is_that_of_the_kernel():
    assert set(ffn.KERNELS) == {x.values_of or name for name, x in ACTIVATIONS.items()}


# --- threads


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_number_of_threads_changes_no_bit(tokens, by_columns):
    args = forward_args(tokens, (100, 1000, 700), draw=normal)
    if by_columns:
        args = {name: x.T.contiguous().T if "weight" in name else x for name, x in args.items()}
    grad = torch.randn(tokens, 700)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output, *saved = cpu.ffn_forward(**args, activation="silu", k=50, dropout_keep=None, dropout_p=0.0)
            found.append((output, *saved, *backward(cpu, args, grad, *saved, "silu")))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(x.equal(y) for x, y in zip(found[0], other, strict=True))


# --- backward


def backward(lowering, args, grad, indices, up, gate, activation, dropout_keep=None, dropout_p=0.0):
    weights = (args[name] for name in ("input", "up_weight", "gate_weight", "down_weight"))
    return lowering.ffn_backward(grad, *weights, indices, up, gate, dropout_keep, activation, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_match_those_of_aten_in_float64(instructions, dtype, gated, dropout_p):
    args = forward_args(23, gated=gated, dtype=dtype, draw=normal)
    keep = torch.rand(23, 17) < 0.5 if dropout_p else None
    options = {"activation": "gelu", "dropout_keep": keep, "dropout_p": dropout_p}
    output, indices, up, gate = cpu.ffn_forward(**args, k=17, **options)
    grad = torch.randn(output.shape).to(dtype)
    actual = backward(cpu, args, grad, indices, up, gate, **options)
    wide = {name: double(x) for name, x in args.items()}
    expected = backward(aten, wide, grad.double(), indices, up.double(), gate.double(), **options)
    given = (args["input"], args["up_weight"], up, args["up_weight"], up, args["down_weight"])
    for x, y, like in zip(actual, expected, given, strict=True):
        assert (x.shape, x.dtype) == (y.shape, like.dtype)
        assert x.is_contiguous()
        assert_near(x, y)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_output_and_gradients_of_the_op_match_the_definition(gated):
    tensors = forward_args(6, gated=gated, draw=normal)
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x is not None}
    args = [leaves.get(name) for name in ("input", "up_weight", "up_bias", "gate_weight", "gate_bias", "down_weight")]
    output = torch.ops.topk_fx.ffn(*args, None, "silu", 17, lowering="cpu")
    named = {name: x for name, x in leaves.items() if name not in ("input", "up_weight", "down_weight")}
    expected = reference.ffn(
        leaves["input"], leaves["up_weight"], leaves["down_weight"], k=17, activation="silu", **named
    )
    assert_near(output, expected)
    grad = torch.randn_like(output)
    grads, wanted = (torch.autograd.grad(y, list(leaves.values()), grad) for y in (output, expected))
    for x, y in zip(grads, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# --- compiled


def ffn_of_relu(model=8, hidden=2048):
    return torch.nn.Sequential(torch.nn.Linear(model, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, model))


def test_compiled_ffn_of_few_tokens_runs_the_kernel_and_reports_it():
    module = ffn_of_relu()
    x = torch.randn(2, 8, requires_grad=True)
    output = torch.compile(module, backend="topk", options={"ffn_k": 100}, fullgraph=True)(x)
    assert [(site.kind, site.lowering, site.detail) for site in topk_fx.reports()[-1]] == [("ffn", "cpu", "")]
    up, _, down = module
    named = {"up_bias": up.bias, "down_bias": down.bias}
    expected = reference.ffn(x, up.weight, down.weight, k=100, **named)
    assert_near(output, expected)
    for y, z in zip(*(torch.autograd.grad(v.sum(), (x, down.weight)) for v in (output, expected)), strict=True):
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 200], ids=["aten_backward", "sparse_backward"])
def test_weights_by_columns_compile_and_train(tokens):
    module = ffn_of_relu(hidden=64)
    for layer in (module[0], module[2]):
        layer.weight.data = layer.weight.data.T.contiguous().T
    x = torch.randn(tokens, 8, requires_grad=True)
    up, _, down = module
    output = torch.compile(module, backend="topk", options={"ffn_k": 4})(x)
    expected = reference.ffn(x, up.weight, down.weight, k=4, up_bias=up.bias, down_bias=down.bias)
    leaves = (x, *module.parameters())
    for y, z in zip(*(torch.autograd.grad(v.sum(), leaves) for v in (output, expected)), strict=True):
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)


def test_number_of_tokens_known_only_at_run_time_decides_there():
    module = ffn_of_relu(hidden=64)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(3, 8),), dynamic_shapes=({0: tokens},))
    program, report = topk_fx.rewrite(program, ffn_k=9)
    assert [(site.lowering, site.detail) for site in report] == [("cpu", "for up to 16 tokens; ATen computes more")]
    up, _, down = module
    for count in (2, 100):
        x = torch.randn(count, 8)
        expected = reference.ffn(x, up.weight, down.weight, k=9, up_bias=up.bias, down_bias=down.bias)
        assert_near(program.module()(x), expected)


@pytest.mark.parametrize(("tokens", "reason"), [(1, ""), (64, "dense_is_faster")])
def test_by_default_a_relu_ffn_is_rewritten_where_that_pays(tokens, reason):
    program = torch.export.export(ffn_of_relu(), (torch.randn(tokens, 8),))
    assert [site.reason for site in topk_fx.rewrite(program)[1]] == [reason]


# --- property


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    is_exact = draw(st.booleans())
    sizes = tuple(draw(st.sampled_from([1, 2, 15, 16, 33, 64, 65, 130])) for _ in range(3))
    args = forward_args(
        draw(st.integers(1, 20)),
        sizes,
        gated=draw(st.booleans()),
        biased=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        draw=integers if is_exact else normal,
        generator=generator,
    )
    if is_exact and draw(st.booleans()):
        poison = draw(st.sampled_from([NAN, INF, -INF]))
        args["input"].masked_fill_(torch.rand(args["input"].shape, generator=generator) < 0.01, poison)
    layouts = ["contiguous", "head_size_before_length", "every_second_row", "columns_of_wider_rows"]
    for name, x in args.items():
        if x is not None and x.dim() == 2:
            args[name] = LAYOUTS[draw(st.sampled_from(layouts))](x)
    activation = "relu" if is_exact else draw(st.sampled_from(sorted(ACTIVATIONS)))
    return args, draw(st.sampled_from([1, 2, 8, 50, 400])), activation, is_exact


@pytest.mark.parametrize("name", build.supported_instruction_sets())
@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(problem=problems())
def test_any_call_matches_the_definition(name, problem):
    args, k, activation, is_exact = problem
    with build.instruction_set(name):
        check(args, k, activation, is_exact=is_exact)
        assert_threads_change_no_bit(args, k, activation)


def assert_threads_change_no_bit(args, k, activation):
    """Forward and backward by one thread and by two."""
    grad = torch.randn(args["input"].size(0), args["down_weight"].size(0)).to(args["input"].dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            output, *saved = cpu.ffn_forward(**args, activation=activation, k=k, dropout_keep=None, dropout_p=0.0)
            found.append((output, *saved, *backward(cpu, args, grad, *saved, activation)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=0, equal_nan=True)
