"""topk_fx.ffn and its op against the definition: values, gradients and selection, whatever computes them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, assert_matches, assert_near, integers
from torch import nn

import topk_fx
from topk_fx import reference
from topk_fx.activation import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

TOKENS, MODEL, HIDDEN, OUTPUT = 9, 6, 17, 5


def check(input, up_weight, down_weight, **options):
    return assert_matches(topk_fx.ffn, reference.ffn, input, up_weight, down_weight, **options)


def ffn_inputs(
    *lead,
    gated=False,
    biased=False,
    dtype=torch.float32,
    draw=integers,
    sizes=(MODEL, HIDDEN, OUTPUT),
    generator=None,
):
    """input, up_weight and down_weight, and the other tensors by name: leaves that require a gradient.

    What makes the hidden units is of integers, so that those of ReLU-like FFNs are exact and have many ties.
    """
    model, hidden, output = sizes
    input, up_weight = draw(*lead, model, generator=generator), draw(hidden, model, generator=generator)
    named = {}
    if gated:
        named["gate_weight"] = draw(hidden, model, generator=generator)
    if biased:
        named["up_bias"] = draw(hidden, generator=generator)
        named["down_bias"] = torch.randn(output, generator=generator)
    if gated and biased:
        named["gate_bias"] = draw(hidden, generator=generator)
    down_weight = torch.randn(output, hidden, generator=generator)
    tensors = (x.to(dtype).requires_grad_() for x in (input, up_weight, down_weight))
    return tuple(tensors), {name: x.to(dtype).requires_grad_() for name, x in named.items()}


def normal(*shape, generator=None):
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("k", [1, 5, 17, 40, 10**30, 0.3, "all"])
def test_output_and_gradients_match_the_definition(k, gated, dtype):
    inputs, named = ffn_inputs(TOKENS, gated=gated, biased=True, dtype=dtype)
    output = check(*inputs, k=k, **named)
    assert output.dtype == dtype


def test_gradient_of_a_row_of_nan_is_that_of_dense():
    (input, up_weight, down_weight), _ = ffn_inputs(TOKENS, dtype=torch.float64)
    with torch.no_grad():
        input[2, 1] = math.nan
    for k in ("all", 5):
        check(input, up_weight, down_weight, k=k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 0.3, "all"])
def test_without_an_up_projection_the_input_is_what_is_activated(k, dtype):
    (_, _, down_weight), named = ffn_inputs(TOKENS, biased=True, dtype=dtype)
    input = integers(2, TOKENS, HIDDEN).to(dtype).requires_grad_()
    for activation in ("relu", "gelu"):
        output = check(input, None, down_weight, k=k, activation=activation, down_bias=named["down_bias"])
    assert output.shape == (2, TOKENS, OUTPUT)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_matches_the_definition(activation, gated):
    inputs, named = ffn_inputs(TOKENS, gated=gated, biased=True, dtype=torch.float64, draw=normal)
    check(*inputs, k=5, activation=activation, **named)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative_of_the_activation_is_that_of_autograd(activation):
    x = torch.cat([torch.linspace(-8, 8, 101, dtype=torch.float64), torch.tensor([-60.0, 0.0, 60.0])]).requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation].function(x).sum(), x)
    torch.testing.assert_close(ACTIVATIONS[activation].derivative(x.detach()), expected)


@pytest.mark.parametrize(
    "given", [(), ("up_bias",), ("gate_bias",), ("down_bias",), ("up_bias", "down_bias")], ids="+".join
)
def test_each_bias_may_be_given_alone(given):
    inputs, named = ffn_inputs(TOKENS, gated=True, biased=True)
    named = {name: x for name, x in named.items() if name in {*given, "gate_weight"}}
    check(*inputs, k=5, **named)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0, 3), (0,)], ids=str)
def test_leading_sizes_are_those_of_the_input(lead):
    inputs, named = ffn_inputs(*lead, gated=True, biased=True)
    assert check(*inputs, k=5, **named).shape == (*lead, OUTPUT)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 63, 2), (33, 7, 1)], ids=str)
def test_odd_sizes_match_the_definition(sizes):
    inputs, named = ffn_inputs(7, gated=True, biased=True, sizes=sizes)
    check(*inputs, k=3, **named)


@pytest.mark.parametrize("layout", ["transposed", "slice_of_a_larger_one", "expanded"])
def test_strides_do_not_matter(layout):
    (input, up_weight, down_weight), named = ffn_inputs(TOKENS, gated=True, biased=True)
    larger = torch.full((TOKENS * 2, MODEL + 3), math.nan)
    with torch.no_grad():
        larger[::2, 2 : 2 + MODEL] = input
        strided = {
            "transposed": input.T.contiguous().T,
            "slice_of_a_larger_one": larger[::2, 2 : 2 + MODEL],
            "expanded": input[:1].expand(TOKENS, -1),
        }[layout].detach()
        up_weight, down_weight = (x.T.contiguous().T.detach().requires_grad_() for x in (up_weight, down_weight))
    assert not strided.is_contiguous()
    check(strided.requires_grad_(), up_weight, down_weight, k=5, **named)


def test_strides_of_the_upstream_gradient_do_not_matter():
    inputs, _ = ffn_inputs(TOKENS)
    output = topk_fx.ffn(*inputs, k=5)
    for grad in (torch.tensor(1.5).expand_as(output), torch.randn(OUTPUT, TOKENS).T):
        actual = torch.autograd.grad(output, inputs, grad, retain_graph=True)
        expected = torch.autograd.grad(output, inputs, grad.contiguous(), retain_graph=True)
        for x, y in zip(actual, expected, strict=True):
            assert_near(x, y)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_reaches_only_the_rows_that_hold_it(poison):
    (input, *weights), named = ffn_inputs(TOKENS, gated=True, biased=True)
    with torch.no_grad():
        clean = topk_fx.ffn(input, *weights, k=5, **named)
        input[3, 2] = poison
        output = topk_fx.ffn(input, *weights, k=5, **named)
    assert output[3].isnan().any()
    others = torch.arange(TOKENS) != 3
    assert output[others].equal(clean[others])


def test_equal_units_keep_the_lowest():
    """All units are 1; down_weight counts in powers of two, so that the output names the kept ones."""
    input, up_weight = torch.ones(3, 1), torch.ones(20, 1)
    down_weight = (2.0 ** torch.arange(20)).unsqueeze(0)
    assert topk_fx.ffn(input, up_weight, down_weight, k=6).flatten().tolist() == [63.0] * 3


def test_forward_op_returns_what_it_kept():
    inputs, named = ffn_inputs(TOKENS, gated=True)
    input, up_weight, down_weight = (x.detach() for x in inputs)
    gate_weight = named["gate_weight"].detach()
    output, indices, up, gate = torch.ops.topk_fx.ffn_forward(
        input, up_weight, None, gate_weight, None, down_weight, "relu", 5, None, 0.0
    )
    all_up, all_gate = input @ up_weight.T, input @ gate_weight.T
    hidden = all_gate.relu() * all_up
    expected = hidden.abs().argsort(descending=True, stable=True)[:, :5]
    assert indices.dtype == torch.int32
    assert indices.sort().values.equal(expected.sort().values.int())
    assert up.equal(all_up.gather(-1, indices.long()))
    assert gate.equal(all_gate.gather(-1, indices.long()))
    assert_near(output, torch.zeros_like(hidden).scatter(-1, expected, hidden.gather(-1, expected)) @ down_weight.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_is_that_of_float64_wherever_float32_can_tell(dtype):
    size, hidden, k = 32, 256, 16
    input, up_weight = torch.randn(64, size).to(dtype), torch.randn(hidden, size).to(dtype)
    down_weight = torch.zeros(1, hidden, dtype=dtype)
    _, indices, up, _ = torch.ops.topk_fx.ffn_forward(
        input, up_weight, None, None, None, down_weight, "relu", k, None, 0.0
    )
    exact = (input.double() @ up_weight.double().T).relu()
    bound = size * torch.finfo(up.dtype).eps * (input.double().abs() @ up_weight.double().abs().T)
    ranked, order = exact.sort(descending=True)
    can_tell = ranked[:, k - 1] - ranked[:, k] > 2 * bound.amax(-1)
    assert can_tell.double().mean() > 0.9
    assert indices.sort().values[can_tell].equal(order[:, :k].sort().values[can_tell].int())


def test_all_units_give_the_dense_ffn():
    up, down = nn.Linear(MODEL, HIDDEN), nn.Linear(HIDDEN, OUTPUT)
    dense = nn.Sequential(up, nn.GELU(), down)
    x = torch.randn(TOKENS, MODEL)
    output = topk_fx.ffn(x, up.weight, down.weight, k="all", activation="gelu", up_bias=up.bias, down_bias=down.bias)
    assert_near(output, dense(x))


# --- dropout


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_dropout_output_and_gradients_follow_one_mask(gated):
    """Every kept unit has its own output, which tells whether it was dropped; plain autograd then computes the rest."""
    k, p, hidden = 4, 0.3, 8
    input = torch.randn(TOKENS, MODEL, dtype=torch.float64, requires_grad=True)
    up_weight, gate_weight = (torch.randn(hidden, MODEL, dtype=torch.float64).requires_grad_() for _ in range(2))
    down_weight = torch.eye(hidden, dtype=torch.float64, requires_grad=True)
    options = {"activation": "gelu", "gate_weight": gate_weight if gated else None}
    output = topk_fx.ffn(input, up_weight, down_weight, k=k, dropout_p=p, **options)

    up = input @ up_weight.T
    units = nn.functional.gelu(input @ gate_weight.T) * up if gated else nn.functional.gelu(up)
    kept = torch.zeros_like(units, dtype=torch.bool).scatter(-1, units.abs().topk(k).indices, True)
    survived = output != 0
    assert not (survived & ~kept).any()
    assert 0 < survived.sum() < kept.sum()
    expected = torch.where(survived, units / (1 - p), 0) @ down_weight.T
    assert_near(output, expected)
    leaves = [x for x in (input, up_weight, down_weight, options["gate_weight"]) if x is not None]
    grad = torch.randn_like(output)
    actual_grads = torch.autograd.grad(output, leaves, grad)
    for actual_grad, expected_grad in zip(actual_grads, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert_near(actual_grad, expected_grad)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_scales_it(p):
    k, tokens = 8, 4096
    output = topk_fx.ffn(torch.ones(tokens, 1), torch.ones(16, 1), torch.ones(1, 16), k=k, dropout_p=p)
    kept = output * (1 - p)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    count = tokens * k
    assert (kept.sum().item() / count) == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / count))


def test_dropout_of_everything_leaves_the_bias_and_zero_gradients():
    inputs, named = ffn_inputs(TOKENS, gated=True, biased=True)
    output = topk_fx.ffn(*inputs, k=5, dropout_p=1.0, **named)
    assert output.equal(named["down_bias"].expand_as(output))
    leaves = (*inputs, named["up_bias"], named["gate_weight"], named["gate_bias"])
    assert not any(grad.any() for grad in torch.autograd.grad(output.sum(), leaves))


def test_dropout_comes_from_torchs_generator():
    inputs, _ = ffn_inputs(TOKENS)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(topk_fx.ffn(*inputs, k=8, dropout_p=0.5))
    assert outputs[0].equal(outputs[1])
    assert not outputs[0].equal(outputs[2])


# --- the ops as torch sees them


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ffn_passes_opcheck(dtype, gated):
    (input, up_weight, down_weight), named = ffn_inputs(2, 3, gated=gated, biased=not gated, dtype=dtype)
    args = (
        *(input, up_weight, named.get("up_bias"), named.get("gate_weight"), named.get("gate_bias")),
        *(down_weight, named.get("down_bias"), "silu", 5),
    )
    torch.library.opcheck(torch.ops.topk_fx.ffn.default, args)
    if not gated:
        args = (torch.randn(2, 3, HIDDEN).to(dtype), None, None, None, None, down_weight, None, "silu", 5)
        torch.library.opcheck(torch.ops.topk_fx.ffn.default, args)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_inner_ops_pass_opcheck(dropout_p, gated):
    inputs, named = ffn_inputs(3, gated=gated, biased=True, dtype=torch.bfloat16)
    input, up_weight, down_weight = (x.detach() for x in inputs)
    up_bias, gate_weight, gate_bias = (
        named[name].detach() if name in named else None for name in ("up_bias", "gate_weight", "gate_bias")
    )
    keep = torch.rand(3, 5) < 0.5 if dropout_p else None
    args = (input, up_weight, up_bias, gate_weight, gate_bias, down_weight, "gelu", 5, keep, dropout_p)
    torch.library.opcheck(torch.ops.topk_fx.ffn_forward.default, args)
    output, indices, up, gate = torch.ops.topk_fx.ffn_forward(*args)
    args = (output, input, up_weight, gate_weight, down_weight, indices, up, gate, keep, "gelu", dropout_p)
    torch.library.opcheck(torch.ops.topk_fx.ffn_backward.default, args)


# --- property


@st.composite
def problems(draw):
    """Inputs and options of one call: sizes, dtype, tensors given, activation and k are drawn; numbers are seeded."""
    hidden = draw(st.integers(1, 20))
    inputs, named = ffn_inputs(
        *draw(st.sampled_from([(), (1,), (5,), (2, 3)])),
        gated=draw(st.booleans()),
        biased=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        sizes=(draw(st.integers(1, 7)), hidden, draw(st.integers(1, 5))),
        generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))),
    )
    named["activation"] = draw(st.sampled_from(["relu", "relu2"]))
    named["k"] = draw(st.one_of(st.integers(1, hidden + 2), st.sampled_from([0.1, 0.5, "all"])))
    return inputs, named


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(problems())
def test_any_call_matches_the_definition(problem):
    inputs, options = problem
    torch.manual_seed(0)
    check(*inputs, **options)
