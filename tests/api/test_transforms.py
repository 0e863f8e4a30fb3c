"""functorch's transforms, nested ones too, and autocast: the right result, or an error; never zeros in silence."""

from __future__ import annotations

import pytest
import torch
from inputs import assert_near, attention_inputs, integers
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import topk_fx
from topk_fx.errors import UnsupportedDerivativeError

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of torch's fallback, which the FFN ops use
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

SAMPLES = 3


def attention(query, key, value, mask=None, **options):
    return topk_fx.attention(query, key, value, attn_mask=mask, **{"k": 3, **options})


def ffn(input, up_weight, down_weight, **options):
    return topk_fx.ffn(input, up_weight, down_weight, **{"k": 3, **options})


def drawn(*shapes):
    """Detached tensors: integers, but for the value."""
    *others, last = shapes
    return [*(integers(*shape) for shape in others), torch.randn(last)]


def looped(function, in_dims, *args):
    """What vmap means."""
    slices = [
        [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)] for i in range(SAMPLES)
    ]
    return torch.stack([function(*sample) for sample in slices])


# --- vmap

N = SAMPLES
VMAPS = {
    "all": ([(N, 2, 5, 4), (N, 2, 7, 4), (N, 2, 7, 3)], (0, 0, 0), {}),
    "all_4d": ([(N, 2, 2, 5, 4), (N, 2, 2, 7, 4), (N, 2, 2, 7, 3)], (0, 0, 0), {}),
    "query_alone": ([(N, 2, 5, 4), (2, 7, 4), (2, 7, 3)], (0, None, None), {}),
    "key_and_value": ([(2, 5, 4), (N, 2, 7, 4), (N, 2, 7, 3)], (None, 0, 0), {}),
    "value_alone": ([(2, 5, 4), (2, 7, 4), (N, 2, 7, 3)], (None, None, 0), {}),
    "other_dimensions": ([(2, N, 5, 4), (2, 7, N, 4), (2, 7, 3, N)], (1, 2, 3), {}),
    "without_heads": ([(N, 5, 4), (7, 4), (N, 7, 3)], (0, None, 0), {}),
    "samples_of_different_rank": ([(N, 5, 4), (2, 7, 4), (2, 2, 7, 3)], (0, None, None), {}),
    "grouped": ([(N, 4, 5, 4), (N, 2, 7, 4), (N, 2, 7, 3)], (0, 0, 0), {"enable_gqa": True}),
    "causal": ([(N, 2, 5, 4), (N, 2, 7, 4), (N, 2, 7, 3)], (0, 0, 0), {"is_causal": True}),
    "as_many_samples_as_heads": ([(N, 3, 5, 4), (3, 7, 4), (3, 7, 3)], (0, None, None), {}),
    "no_queries": ([(N, 2, 0, 4), (N, 2, 7, 4), (N, 2, 7, 3)], (0, 0, 0), {}),
}


@pytest.mark.parametrize("case", VMAPS)
def test_vmap_is_a_loop(case):
    shapes, in_dims, options = VMAPS[case]
    args = drawn(*shapes)

    def function(query, key, value):
        return attention(query, key, value, **options)

    assert_near(vmap(function, in_dims)(*args), looped(function, in_dims, *args))


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((N, 5, 7), 0), ((N, 2, 5, 7), 0), ((5, 7, N), 2), ((N, 2, 1, 1), 0), ((N, 7), 0)],
    ids=str,
)
@pytest.mark.parametrize("query_is_mapped", [True, False])
def test_vmap_over_a_mask_is_a_loop(query_is_mapped, shape, dim, boolean):
    query, key, value = drawn((N, 2, 5, 4), (2, 7, 4), (2, 7, 3))
    mask = torch.rand(shape) < 0.6 if boolean else integers(*shape) / 4
    query, query_dim = (query, 0) if query_is_mapped else (query[0], None)
    in_dims, args = (query_dim, None, None, dim), (query, key, value, mask)
    assert_near(vmap(attention, in_dims)(*args), looped(attention, in_dims, *args))


def test_nested_vmap_is_a_loop():
    query, key, value = drawn((N, 2, 4, 5, 4), (2, N, 4, 7, 4), (4, 7, 3))
    output = vmap(vmap(attention, (0, 0, None)), (0, 1, None))(query, key, value)
    for i in range(N):
        for j in range(2):
            assert_near(output[i, j], attention(query[i, j], key[j, i], value))


def test_vmap_with_in_chunks_is_the_same():
    args = drawn((N, 2, 5, 4), (N, 2, 7, 4), (N, 2, 7, 3))
    assert_near(vmap(attention, chunk_size=2)(*args), vmap(attention)(*args))


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, 0, 0), (None, 0, None), (1, None, None)], ids=str)
def test_vmap_of_ffn_is_a_loop(in_dims):
    shapes = [(4, 6), (11, 6), (5, 11)]
    shapes = [(*s[:d], N, *s[d:]) if d is not None else s for s, d in zip(shapes, in_dims, strict=True)]
    args = drawn(*shapes)
    assert_near(vmap(ffn, in_dims)(*args), looped(ffn, in_dims, *args))


def test_vmap_draws_dropout_as_its_randomness_says():
    query, key, value = drawn((N, 2, 5, 4), (2, 7, 4), (2, 7, 3))
    same = query[:1].expand_as(query)

    def dropped(query):
        return attention(query, key, value, dropout_p=0.5)

    output = vmap(dropped, randomness="different")(same)
    assert not output[0].equal(output[1])
    for randomness in ("error", "same"):
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(dropped, randomness=randomness)(same)


# --- func.grad, vjp, jacrev


def attention_loss(query, key, value, mask):
    return (attention(query, key, value, mask) * torch.arange(3.0)).sum()


def ffn_loss(input, up_weight, down_weight):
    return (ffn(input, up_weight, down_weight) * torch.arange(5.0)).sum()


LOSSES = {
    "attention": (attention_loss, [(2, 5, 4), (2, 7, 4), (2, 7, 3), (5, 7)]),
    "ffn": (ffn_loss, [(4, 6), (11, 6), (5, 11)]),
}


def loss_and_args(name, *lead):
    loss, shapes = LOSSES[name]
    return loss, [integers(*lead, *shape) for shape in shapes]


def plain_grads(loss, args):
    leaves = [x.detach().clone().requires_grad_() for x in args]
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_func_grad_is_that_of_autograd(name):
    loss, args = loss_and_args(name)
    everything = tuple(range(len(args)))
    for actual, expected in zip(grad(loss, everything)(*args), plain_grads(loss, args), strict=True):
        assert_near(actual, expected)
    _, pull = vjp(loss, *args)
    for actual, expected in zip(pull(torch.tensor(2.0)), plain_grads(loss, args), strict=True):
        assert_near(actual, 2 * expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shared", [0, 1, 2, None])
def test_vmap_of_grad_is_the_gradient_of_each_sample(name, shared):
    """Per-sample gradients, also of an argument that all samples share."""
    loss, args = loss_and_args(name, N)
    in_dims = [None if position == shared else 0 for position in range(len(args))]
    args = [x[0] if dim is None else x for x, dim in zip(args, in_dims, strict=True)]
    everything = tuple(range(len(args)))
    actual = vmap(grad(loss, everything), tuple(in_dims))(*args)
    for i in range(N):
        sample = [x if dim is None else x[i] for x, dim in zip(args, in_dims, strict=True)]
        for x, expected in zip(actual, plain_grads(loss, sample), strict=True):
            assert_near(x[i], expected)


@pytest.mark.parametrize(
    "mask_shape", [(), (7,), (5, 7), (4, 1, 1), (4, 5, 7), (1, 1, 5, 1), (2, 1, 1, 7), (2, 4, 5, 7)], ids=str
)
def test_vmap_of_grad_of_a_broadcast_mask_has_its_shape(mask_shape):
    query, key, value = drawn((N, 2, 4, 5, 4), (2, 4, 7, 4), (2, 4, 7, 3))
    mask = integers(*mask_shape) / 4
    actual = vmap(grad(attention_loss, 3), (0, None, None, None))(query, key, value, mask)
    assert actual.shape == (N, *mask_shape)
    for i in range(N):
        assert_near(actual[i], plain_grads(attention_loss, [query[i], key, value, mask])[3])


@pytest.mark.parametrize("name", LOSSES)
def test_grad_of_vmap_is_the_sum_over_samples(name):
    loss, args = loss_and_args(name, N)
    everything = tuple(range(len(args)))
    actual = grad(lambda *args: vmap(loss)(*args).sum(), everything)(*args)
    for i in range(N):
        for x, expected in zip(actual, plain_grads(loss, [x[i] for x in args]), strict=True):
            assert_near(x[i], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_inside_autograd_gives_gradients(name):
    loss, args = loss_and_args(name, N)
    actual = plain_grads(lambda *args: vmap(loss)(*args).sum(), args)
    expected = plain_grads(lambda *args: sum(loss(*(x[i] for x in args)) for i in range(N)), args)
    for x, y in zip(actual, expected, strict=True):
        assert_near(x, y)


def test_jacrev_is_the_jacobian():
    query, key, value = drawn((1, 2, 4), (1, 5, 4), (1, 5, 3))
    actual = jacrev(attention, (0, 1, 2))(query, key, value)
    expected = torch.autograd.functional.jacobian(attention, (query, key, value))
    for x, y in zip(actual, expected, strict=True):
        assert_near(x, y)


# --- nested levels: the op must be seen by each of them


@pytest.mark.parametrize("name", LOSSES)
def test_inner_grad_of_something_else_leaves_the_outer_gradient(name):
    """d/ds of s * loss(x) is loss(x), whose gradient is the loss's own: the inner level does not concern the op."""
    loss, args = loss_and_args(name)

    def inner(*args):
        return grad(lambda s: s * loss(*args))(torch.tensor(1.0))

    everything = tuple(range(len(args)))
    expected = plain_grads(loss, args)
    for actual, wanted in zip(grad(inner, everything)(*args), expected, strict=True):
        assert_near(actual, wanted)
    for actual, wanted in zip(plain_grads(inner, args), expected, strict=True):
        assert_near(actual, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_no_grad_inside_a_transform_is_respected(name):
    loss, args = loss_and_args(name)

    def constant(x, s):
        with torch.no_grad():
            factor = loss(x, *args[1:])
        return s * factor + x.sum()

    assert grad(constant)(args[0], torch.tensor(1.0)).equal(torch.ones_like(args[0]))
    inner = grad(constant, 1)
    assert not grad(lambda x: inner(x, torch.tensor(1.0)) + 0 * x.sum())(args[0]).any()


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative_raises_at_every_level(name):
    loss, args = loss_and_args(name)
    with pytest.raises(UnsupportedDerivativeError, match=r"no second derivative \(double backward\)"):
        grad(lambda x: grad(loss)(x, *args[1:]).square().sum())(args[0])
    with pytest.raises(UnsupportedDerivativeError, match=r"no second derivative \(double backward\)"):
        jacrev(jacrev(loss))(*args)
    leaf = args[0].clone().requires_grad_()
    with pytest.raises(UnsupportedDerivativeError, match=r"no second derivative \(double backward\)"):
        grad(loss)(leaf, *args[1:]).sum().backward()


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_raises_at_every_level(name):
    loss, args = loss_and_args(name)
    for position in range(len(args)):

        def of_one(x, position=position):
            return loss(*args[:position], x, *args[position + 1 :])

        with pytest.raises(UnsupportedDerivativeError, match=rf"topk_fx::{name}.* no forward-mode derivative \(jvp\)"):
            jvp(of_one, (args[position],), (args[position],))
    with pytest.raises(UnsupportedDerivativeError, match="forward-mode"):
        jacfwd(loss)(*args)
    with pytest.raises(UnsupportedDerivativeError, match="forward-mode"):
        hessian(loss)(*args)
    with pytest.raises(UnsupportedDerivativeError, match="forward-mode"):
        jvp(grad(loss), tuple(args), tuple(args))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(UnsupportedDerivativeError, match="forward-mode"):
        loss(torch.autograd.forward_ad.make_dual(args[0], args[0]), *args[1:])


# --- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_the_inputs_of_attention(dtype):
    query, key, value = attention_inputs()
    with torch.autocast("cpu", dtype):
        output = attention(query, key, value)
    assert output.dtype == dtype
    assert output.equal(attention(*(x.to(dtype) for x in (query, key, value))))
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(x.dtype == torch.float32 for x in grads)


def test_autocast_lets_a_mask_keep_its_precision():
    """1 and 1 + 2^-10 are the same number in bfloat16; the tie would keep key 0."""
    ones = torch.ones(1, 1, 1, 1)
    value, mask = torch.tensor([3.0, 5.0]).view(1, 1, 2, 1), torch.tensor([1.0, 1.0 + 2**-10])
    with torch.autocast("cpu", torch.bfloat16):
        output = topk_fx.attention(ones, torch.ones_like(value), value, k=1, attn_mask=mask)
    assert output.item() == 5.0


def test_autocast_selects_in_float32():
    query, key = torch.tensor([[1.0, 1.0]]), torch.tensor([[256.0, 0.0], [256.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        output = topk_fx.attention(query, key, torch.tensor([[3.0], [5.0]]), k=1, scale=1.0)
    assert output.item() == 5.0


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_autocast_lowers_the_inputs_of_ffn(gated):
    shapes = {"input": (4, 6), "up_weight": (11, 6), "down_weight": (5, 11), "up_bias": (11,), "down_bias": (5,)}
    if gated:
        shapes |= {"gate_weight": (11, 6), "gate_bias": (11,)}
    tensors = {name: integers(*shape).requires_grad_() for name, shape in shapes.items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = topk_fx.ffn(k=3, **tensors)
    assert output.dtype == torch.bfloat16
    assert output.equal(topk_fx.ffn(k=3, **{name: x.bfloat16() for name, x in tensors.items()}))
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(output.sum(), tuple(tensors.values())))


def test_autocast_leaves_float64_alone():
    query, key, value = attention_inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(query, key, value)
    assert output.equal(attention(query, key, value))


def test_autocast_of_mixed_inputs_makes_them_one_dtype():
    query, key, value = attention_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        output = torch.ops.topk_fx.attention(query.bfloat16(), key, value.half(), [], "", 0.5, 3)
    assert output.dtype == torch.bfloat16


def test_autocast_that_is_off_changes_nothing():
    query, key, value = attention_inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert attention(query, key, value).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert attention(query, key, value).dtype == torch.float32
