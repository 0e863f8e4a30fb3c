"""Gradients: finite differences, what is saved, recomputation, second backward, and only what was asked for."""

from __future__ import annotations

import pytest
import torch
from inputs import assert_matches, assert_near, attention_inputs, integers, separated_inputs
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import topk_fx
from topk_fx import reference
from topk_fx.activation import ACTIVATIONS
from topk_fx.errors import UnsupportedDerivativeError

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def ffn_inputs(gated=True, hidden=7, dtype=torch.float64):
    """The tensors of an FFN by name, as leaves that require a gradient."""
    sizes = {"input": (3, 4), "up_weight": (hidden, 4), "down_weight": (2, hidden), "up_bias": (hidden,)}
    if gated:
        sizes |= {"gate_weight": (hidden, 4), "gate_bias": (hidden,)}
    sizes["down_bias"] = (2,)
    return {name: torch.randn(size, dtype=dtype).requires_grad_() for name, size in sizes.items()}


# --- finite differences


@pytest.mark.parametrize("k", [1, 3, 6, "all"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_passes_gradcheck(k, is_causal):
    def op(query, key, value):
        return topk_fx.attention(query, key, value, k=k, is_causal=is_causal)

    gradcheck(op, separated_inputs())


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_grouped_attention_passes_gradcheck(key_heads):
    def op(query, key, value):
        return topk_fx.attention(query, key, value, k=2, enable_gqa=True)

    gradcheck(op, separated_inputs(keys=5, heads=4, key_heads=key_heads, queries=2), fast_mode=True)


def test_masked_attention_passes_gradcheck():
    query, key, value = separated_inputs()
    bias = (0.001 * torch.randn(1, 2, 4, 6, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(4, 6) < 0.6
    mask[2] = False  # zero output, zero gradient

    def op(query, key, value, bias):
        return torch.ops.topk_fx.attention(query, key, value, [bias, mask], "add($0) mask($1)", 1.0, 3, 0.0, True)

    gradcheck(op, (query, key, value, bias), fast_mode=True)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_term_is_not_kept_and_may_be_written_to_after(inner):
    """As in a dense sum; a loop over layers may make the next one's mask in the memory of this one's."""
    query, key, value = separated_inputs()
    value.requires_grad_()

    def model(query, key, value, mask):
        output = torch.softmax(query @ key.mT + mask, dim=-1) @ value
        mask.mul_(2.0)
        return output

    mask = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.autograd.grad(model(query, key, value, mask.clone()).sum(), (query, key, value))
    compiled = torch.compile(model, backend="topk", options={"k": "all", "inner": inner})
    found = torch.autograd.grad(compiled(query, key, value, mask.clone()).sum(), (query, key, value))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ffn_passes_gradcheck(activation, gated):
    tensors = ffn_inputs(gated)
    with torch.no_grad():
        x, b = tensors["input"], tensors["up_bias"]
        up = x @ tensors["up_weight"].T + b
        units = ACTIVATIONS[activation].function(up)
        if gated:
            units = ACTIVATIONS[activation].function(x @ tensors["gate_weight"].T + tensors["gate_bias"]) * up
        gap = units.abs().sort().values.diff()[:, -3]  # between what k = 3 keeps and what not
    assert ((gap > 1e-4) | (gap == 0)).all(), "finite differences would change the selection"

    def op(*values):
        return topk_fx.ffn(k=3, activation=activation, **dict(zip(tensors, values, strict=True)))

    gradcheck(op, tuple(tensors.values()), fast_mode=True)


# --- shapes and dtypes of the gradients


@pytest.mark.parametrize(
    "shape",
    [
        *((), (11,), (9, 11), (9, 1), (3, 1, 1), (3, 9, 11)),
        *((2, 1, 1, 1), (2, 1, 1, 11), (1, 3, 9, 1), (2, 3, 1, 11), (2, 3, 9, 11)),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [4, "all"])
def test_gradient_of_a_mask_has_its_shape(shape, k):
    mask = integers(*shape).div(4).requires_grad_()
    assert_matches(topk_fx.attention, reference.attention, *attention_inputs(), attn_mask=mask, k=k, is_causal=True)


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_a_mask_has_its_dtype(mask_dtype):
    mask = integers(9, 11).div(4).to(mask_dtype).requires_grad_()
    query, key, value = attention_inputs(dtype=torch.bfloat16)
    topk_fx.attention(query, key, value, attn_mask=mask, k=4).sum().backward()
    assert mask.grad.dtype == mask_dtype
    assert query.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask"])
def test_gradient_is_given_to_the_one_that_asks(which):
    query, key, value = (x.detach() for x in attention_inputs())
    tensors = {"query": query, "key": key, "value": value, "attn_mask": integers(9, 11)}
    tensors[which].requires_grad_()
    assert_matches(topk_fx.attention, reference.attention, query, key, value, attn_mask=tensors["attn_mask"], k=4)


@pytest.mark.parametrize(
    "which", ["input", "up_weight", "up_bias", "gate_weight", "gate_bias", "down_weight", "down_bias"]
)
def test_ffn_gradient_is_given_to_the_one_that_asks(which):
    tensors = {name: x.detach() for name, x in ffn_inputs().items()}
    tensors[which].requires_grad_()
    input, up_weight, down_weight = (tensors.pop(name) for name in ("input", "up_weight", "down_weight"))
    assert_matches(topk_fx.ffn, reference.ffn, input, up_weight, down_weight, k=3, activation="gelu", **tensors)


class Calls(TorchDispatchMode):
    """The arguments of each call of one op."""

    def __init__(self, op):
        super().__init__()
        self.op, self.arguments = op, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))


def test_backward_is_asked_for_the_operands_that_need_a_gradient():
    """That of a mask would have queries x keys elements."""
    query, key, value = attention_inputs()
    operands = [integers(9, 11), integers(9, 1).requires_grad_(), torch.rand(9, 11) < 0.5]
    output = torch.ops.topk_fx.attention(query, key, value, operands, "add($0) add($1) mask($2)", 0.5, 4, 0.0, True)
    with Calls(torch.ops.topk_fx.attention_backward.default) as calls:
        output.sum().backward()
    ((*_, operand_needs_grad),) = calls.arguments
    assert operand_needs_grad == [False, True, False]


def test_no_gradient_is_recorded_where_none_is_wanted():
    query, key, value = attention_inputs()
    with torch.no_grad():
        assert not topk_fx.attention(query, key, value, k=4).requires_grad
    with torch.inference_mode():
        assert topk_fx.attention(query, key, value, k=4).is_inference()
    assert not topk_fx.attention(query.detach(), key.detach(), value.detach(), k=4).requires_grad


def test_one_tensor_in_three_roles_gathers_all_gradients():
    x = attention_inputs(heads=2, queries=7)[0]

    def op(x):
        return topk_fx.attention(x, x, x, k=3)

    def definition(x):
        return reference.attention(x, x, x, k=3)

    assert_matches(op, definition, x)


# --- backward again


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_second_backward_of_a_retained_graph_is_the_same(dropout_p):
    inputs = attention_inputs()
    output = topk_fx.attention(*inputs, k=4, dropout_p=dropout_p)
    grad = torch.randn_like(output)
    first = torch.autograd.grad(output, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(output, inputs, grad)
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))


def _attention(query, key, value):
    return topk_fx.attention(query, key, value, k=3)


def _ffn(input, up_weight, down_weight):
    return topk_fx.ffn(input, up_weight, down_weight, k=3)


def _small(function):
    if function is _attention:
        return attention_inputs(dtype=torch.float64)
    tensors = ffn_inputs()
    return tuple(tensors[name] for name in ("input", "up_weight", "down_weight"))


@pytest.mark.parametrize("function", [_attention, _ffn])
def test_double_backward_raises(function):
    inputs = _small(function)
    grads = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    for grad in grads:
        with pytest.raises(UnsupportedDerivativeError, match=r"no second derivative \(double backward\)"):
            torch.autograd.grad(grad.sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("function", [_attention, _ffn])
def test_create_graph_without_a_second_backward_is_harmless(function):
    inputs = _small(function)
    output = function(*inputs)
    grads = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    for x, y in zip(grads, torch.autograd.grad(output.sum(), inputs), strict=True):
        assert x.equal(y)


# --- what is saved


def saved_by(run):
    """What a call saves for its backward, each storage once."""
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = run()
    return output, list(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_attention_saves_its_inputs_and_two_tensors_of_k(dtype, dropout_p):
    query, key, value = attention_inputs(queries=21, keys=31, dtype=dtype)
    _, saved = saved_by(lambda: topk_fx.attention(query, key, value, k=3, is_causal=True, dropout_p=dropout_p))
    rest = [x for x in saved if all(x.data_ptr() != given.data_ptr() for given in (query, key, value))]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert sorted((x.shape, str(x.dtype)) for x in rest) == sorted(
        [((2, 3, 21, 3), "torch.int32"), ((2, 3, 21, 3), str(compute))]
    )


def test_attention_does_not_copy_grouped_or_broadcast_keys_to_save_them():
    query, key, value = attention_inputs(heads=6, key_heads=2, queries=21, keys=31)
    _, saved = saved_by(lambda: topk_fx.attention(query, key, value, k=3, enable_gqa=True))
    assert {x.data_ptr() for x in (query, key, value)} <= {x.data_ptr() for x in saved}
    assert len(saved) == 5


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_ffn_saves_its_inputs_and_tensors_of_k(gated):
    tensors = ffn_inputs(gated, dtype=torch.float32)
    _, saved = saved_by(lambda: topk_fx.ffn(k=2, **tensors))
    given = {x.data_ptr() for x in tensors.values()}
    rest = sorted(str(x.dtype) for x in saved if x.data_ptr() not in given and x.numel())
    assert rest == ["torch.float32"] * (2 if gated else 1) + ["torch.int32"]
    assert all(x.shape == (3, 2) for x in saved if x.data_ptr() not in given and x.numel())


# --- recomputation


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("function", [topk_fx.attention, topk_fx.ffn], ids=["attention", "ffn"])
def test_checkpoint_recomputes_the_same(function, dropout_p, use_reentrant):
    inputs = _small(_attention if function is topk_fx.attention else _ffn)

    def run(*inputs):
        return function(*inputs, k=3, dropout_p=dropout_p)

    torch.manual_seed(1)
    expected = run(*inputs)
    expected_grads = torch.autograd.grad(expected.sum(), inputs)
    torch.manual_seed(1)
    output = checkpoint(run, *inputs, use_reentrant=use_reentrant)
    output.sum().backward()
    assert output.equal(expected)
    for x, grad in zip(inputs, expected_grads, strict=True):
        assert x.grad.equal(grad)


# --- through a model


def test_training_lowers_the_loss_through_attention_and_ffn():
    """Ten steps on one batch, with k of a third: gradients of the wrong sign or scale would not get there."""
    x, target = torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    weights = [(torch.randn(shape) / 3).requires_grad_() for shape in ((8, 24), (32, 8), (8, 32))]
    optimizer = torch.optim.Adam(weights, lr=0.03)
    losses = []
    for _ in range(40):
        query, key, value = (x @ weights[0]).chunk(3, -1)
        hidden = x + topk_fx.attention(query, key, value, k=4, is_causal=True)
        loss = (hidden + topk_fx.ffn(hidden, *weights[1:], k=12) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_half_precision_gradients_are_summed_in_float32():
    """4096 gradients of 1/4096 each: in bfloat16 a running sum of them would stop at 1/16 or before."""
    queries = 4096
    value = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    ones = torch.ones(1, 1, queries, 1, dtype=torch.bfloat16)
    output = topk_fx.attention(ones, ones[:, :, :1], value, k=1)
    output.backward(torch.full_like(output, 1 / queries))
    assert_near(value.grad, torch.ones(1, 1, 1, 1))
