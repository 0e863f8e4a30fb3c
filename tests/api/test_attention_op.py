"""topk_fx.attention and its op against the definition: values, gradients and selection, whatever computes them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import (
    DTYPES,
    LAYOUTS,
    LargestTensor,
    assert_matches,
    assert_near,
    attention_inputs,
    double,
    integers,
    laid_out,
)

import topk_fx
from topk_fx import reference

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

NAN, INF = math.nan, math.inf


def check(query, key, value, **options):
    return assert_matches(topk_fx.attention, reference.attention, query, key, value, **options)


def boolean_mask(*shape, share=0.6):
    return torch.rand(shape) < share


def additive_mask(*shape):
    """Finite steps of a quarter, and some -inf."""
    return (integers(*shape) / 4).masked_fill(torch.rand(shape) < 0.3, -INF).requires_grad_()


# --- against the definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 11, 40, 10**30, 0.3, 1.0, "all"])
def test_output_and_gradients_match_the_definition(k, dtype):
    query, key, value = attention_inputs(dtype=dtype)
    output = check(query, key, value, k=k)
    assert output.dtype == dtype


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 63), (63, 1), (7, 5), (111, 63)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_odd_lengths_match_the_definition(queries, keys, is_causal):
    check(*attention_inputs(queries=queries, keys=keys, batch=(1,), heads=2), k=5, is_causal=is_causal)


@pytest.mark.parametrize(("head_size", "value_size"), [(1, 1), (1, 7), (7, 1), (33, 16)])
def test_odd_head_sizes_match_the_definition(head_size, value_size):
    check(*attention_inputs(head_size=head_size, value_size=value_size), k=3)


@pytest.mark.parametrize("scale", [None, 0.5, 2, -0.25, 0.0, -0.0], ids=str)
def test_scale_decides_the_order(scale):
    check(*attention_inputs(), k=3, scale=scale)


def test_equal_scores_keep_the_lowest_keys():
    query, key, value = attention_inputs(queries=4, keys=9)
    output = topk_fx.attention(query, torch.zeros_like(key), value, k=4)
    assert_near(output, value[..., :4, :].mean(-2, keepdim=True).expand_as(output))


MASKS = {
    "boolean": lambda: boolean_mask(2, 3, 9, 11),
    "boolean_same_for_all_heads": lambda: boolean_mask(2, 1, 9, 11),
    "boolean_same_for_all": lambda: boolean_mask(9, 11),
    "key_padding": lambda: torch.arange(11) < torch.tensor([[[[4]]], [[[11]]]]),
    "query_padding": lambda: boolean_mask(2, 1, 9, 1),
    "fully_masked_rows": lambda: boolean_mask(9, 11, share=0.9) & (torch.arange(9) % 3 > 0).unsqueeze(-1),
    "nothing_left": lambda: torch.zeros(9, 11, dtype=torch.bool),
    "additive": lambda: additive_mask(2, 3, 9, 11),
    "additive_per_head": lambda: additive_mask(3, 1, 11),
    "additive_over_keys": lambda: additive_mask(11),
    "additive_fully_masked_rows": lambda: torch.zeros(9, 11).masked_fill((torch.arange(9) % 3 == 0)[:, None], -INF),
    "minus_a_lot": lambda: torch.zeros(9, 11).masked_fill(~boolean_mask(9, 11, share=0.2), -(2.0**18)),
    "finfo_min": lambda: torch.zeros(9, 11).masked_fill(~boolean_mask(9, 11, share=0.2), torch.finfo().min),
    "one_number": lambda: torch.tensor(0.25),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_mask_decides_what_can_be_kept(mask, is_causal):
    check(*attention_inputs(), k=4, attn_mask=MASKS[mask](), is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_mask_of_the_inputs_dtype_matches_the_definition(dtype):
    mask = additive_mask(2, 1, 9, 11).detach().to(dtype).requires_grad_()
    check(*attention_inputs(dtype=dtype), k=4, attn_mask=mask)


@pytest.mark.parametrize(
    ("heads", "key_heads"), [(4, 4), (4, 2), (6, 3), (4, 1)], ids=["equal", "grouped", "groups_of_two", "multi_query"]
)
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_grouped_heads_match_the_definition(heads, key_heads, mask):
    options = {"none": None, "boolean": boolean_mask(2, heads, 9, 11), "additive": additive_mask(heads, 9, 11)}
    inputs = attention_inputs(heads=heads, key_heads=key_heads)
    check(*inputs, k=4, enable_gqa=True, attn_mask=options[mask], is_causal=mask == "none")


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((9, 4), (11, 4), (11, 5)),
        ((3, 9, 4), (3, 11, 4), (3, 11, 5)),
        ((2, 2, 3, 9, 4), (2, 2, 3, 11, 4), (2, 2, 3, 11, 5)),
        ((2, 3, 9, 4), (1, 3, 11, 4), (1, 3, 11, 5)),
        ((2, 3, 9, 4), (11, 4), (11, 5)),
        ((9, 4), (2, 3, 11, 4), (2, 3, 11, 5)),
        ((2, 1, 3, 9, 4), (5, 1, 11, 4), (1, 5, 3, 11, 5)),
    ],
    ids=["2d", "3d", "5d", "one_key_batch", "keys_without_batch", "queries_without_batch", "every_way_at_once"],
)
def test_leading_sizes_broadcast_as_in_matmul(query, key, value):
    inputs = [integers(*query), integers(*key), torch.randn(value)]
    check(*(x.requires_grad_() for x in inputs), k=4)
    check(*inputs, k=4, attn_mask=boolean_mask(9, 11))


def test_tensors_without_a_batch_are_not_copied_for_each_of_it():
    query = torch.randn(5, 5, 2, 9, 4)
    key, value, mask = torch.randn(5, 5, 1, 11, 4), torch.randn(5, 5, 1, 11, 3), torch.randn(1, 1, 1, 9, 11)
    with LargestTensor() as largest:
        topk_fx.attention(query, key, value, k=3, attn_mask=mask, enable_gqa=True)
    assert largest.numel == query.shape[:-1].numel() * 3, largest.op  # the output


@pytest.mark.parametrize("query_is_vector", [True, False])
@pytest.mark.parametrize("value_is_vector", [True, False])
def test_vectors_are_taken_and_given_as_by_matmul(query_is_vector, value_is_vector):
    query, key, value = (x.detach()[0, 0].requires_grad_() for x in attention_inputs(queries=1, value_size=1))
    query = query.detach()[0].requires_grad_() if query_is_vector else query
    value = value.detach()[:, 0].requires_grad_() if value_is_vector else value

    def op(query, key, value):
        return torch.ops.topk_fx.attention(query, key, value, [], "", 0.5, 4)

    def definition(query, key, value):
        return reference.topk_softmax(query @ key.T * 0.5, 4) @ value

    assert_matches(op, definition, query, key, value)


def test_mask_of_a_5d_batch_matches_the_definition():
    inputs = attention_inputs(batch=(2, 3), heads=2)
    check(*inputs, k=4, attn_mask=boolean_mask(2, 1, 1, 9, 11))
    check(*inputs, k=4, attn_mask=additive_mask(3, 1, 9, 1))


def test_several_operands_match_the_definition():
    """A soft cap, a bias per head, a mask of padding and a causal one, each of another shape."""
    query, key, value = attention_inputs(queries=11)
    slope, padding = torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1).requires_grad_(), boolean_mask(2, 1, 1, 11)
    distance = (torch.arange(11) - torch.arange(11).unsqueeze(-1)).abs().float()

    def op(query, key, value, slope, padding):
        text = "div(4.0) tanh mul(4.0) add($0) mask($1) causal"
        return torch.ops.topk_fx.attention(query, key, value, [slope * distance, padding], text, 0.5, 4, 0.0, True)

    def definition(query, key, value, slope, padding):
        scores = torch.tanh(query @ key.transpose(-2, -1) * 0.5 / 4) * 4 + slope * distance
        scores = scores.masked_fill(~padding | torch.ones(11, 11, dtype=torch.bool).triu(1), -INF)
        return reference.weigh(*reference.select(scores, 4, empty_row=0.0), value)

    assert_matches(op, definition, query, key, value, slope, padding)


# --- NaN and inf


@pytest.mark.parametrize("k", [1, 4, "all"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_rows_of_a_poisoned_query_match_the_definition(poison, k):
    query, key, value = (x.detach() for x in attention_inputs())
    query[0, 1, 5, 2] = poison
    output = check(query, key, value, k=k)
    assert output.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("k", [1, 4])
def test_rows_that_see_a_poisoned_key_are_nan(k):
    query, key, value = (x.detach() for x in attention_inputs(queries=11))
    key[0, 1, 6] = NAN
    output = check(query, key, value, k=k, is_causal=True)
    assert output.isnan().all(-1).nonzero().tolist() == [[0, 1, i] for i in range(6, 11)]


def test_masked_keys_may_hold_anything():
    query, key, value = attention_inputs()
    mask = torch.arange(11) != 4
    expected = topk_fx.attention(query, key, value, k=6, attn_mask=mask)
    for poison in (NAN, INF):
        poisoned = [x.detach().clone() for x in (key, value)]
        for x in poisoned:
            x[..., 4, :] = poison
            x.requires_grad_()
        output = topk_fx.attention(query, *poisoned, k=6, attn_mask=mask)
        assert output.equal(expected)
        grads = torch.autograd.grad(output.sum(), (query, *poisoned))
        clean_grads = torch.autograd.grad(expected.sum(), (query, key, value), retain_graph=True)
        for grad, clean_grad in zip(grads, clean_grads, strict=True):
            assert grad.equal(clean_grad)


def test_value_of_a_key_that_is_not_kept_is_not_read():
    _, _, value = attention_inputs()
    query, key = torch.ones(2, 3, 9, 4), torch.ones(2, 3, 11, 4)
    key[..., 3, :] = -1.0  # the smallest score of every row
    with torch.no_grad():
        value[..., 3, :] = NAN
    output = topk_fx.attention(query, key, value, k=10)
    assert output.isfinite().all()
    (grad,) = torch.autograd.grad(output.sum(), value)
    assert not grad[..., 3, :].any()


def test_infinite_values_reach_only_the_rows_that_keep_them():
    query, key, value = (x.detach() for x in attention_inputs())
    value[0, 0, 2] = INF
    check(query, key, value, k=3)


@pytest.mark.parametrize("score", ["mask($0)", "keep($0, -inf)", "mask($0) causal"])
def test_row_without_a_key_is_nan_where_softmax_would_make_it_so(score):
    query, key, value = attention_inputs()
    mask = boolean_mask(9, 11)
    mask[4] = False

    def op(query, key, value):
        return torch.ops.topk_fx.attention(query, key, value, [mask], score, 0.5, 3)

    def definition(query, key, value):
        scores = (query @ key.transpose(-2, -1) * 0.5).masked_fill(~mask, -INF)
        if "causal" in score:
            scores = scores.masked_fill(torch.ones(9, 11, dtype=torch.bool).triu(1), -INF)
        return reference.weigh(*reference.select(scores, 3), value)

    output = assert_matches(op, definition, query, key, value)
    assert output[:, :, 4].isnan().all()


def test_gradient_of_a_bias_in_a_nan_row_is_nan_at_no_masked_key():
    """The row has more slots than keys. Those left over are no key's, in particular not the first one's."""
    query, key, value = (x.detach() for x in attention_inputs())
    query[0, 1, 5] = NAN
    bias, mask = integers(9, 11).requires_grad_(), torch.arange(11) > 6
    output = torch.ops.topk_fx.attention(query, key, value, [bias, mask], "mask($1) add($0)", 0.5, 9)
    (grad,) = torch.autograd.grad(output.sum(), bias)
    assert grad[5].isnan().equal(mask)
    assert not grad[:, ~mask].any()
    assert grad[torch.arange(9) != 5].isfinite().all()


def test_ties_in_a_nan_row_keep_the_lowest_keys():
    """Which keys the NaN reaches in the backward is part of the definition too."""
    query, key, value = attention_inputs(batch=(1,), heads=1, queries=1, keys=40)
    bias = torch.zeros(40)
    bias[5] = NAN
    zero = torch.zeros_like(key).requires_grad_()
    check(query, zero, value, k=3, attn_mask=bias)


# --- strides


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["query", "key", "value", "all"])
def test_strides_do_not_matter(layout, which):
    names = ("query", "key", "value")
    inputs = attention_inputs()
    inputs = [
        laid_out(x, layout if which in (name, "all") else "contiguous") for name, x in zip(names, inputs, strict=True)
    ]
    check(*inputs, k=4, is_causal=True)


@pytest.mark.parametrize("layout", ["length_before_heads", "head_size_before_length", "every_second_row"])
def test_strides_of_the_mask_do_not_matter(layout):
    mask = laid_out(additive_mask(2, 3, 9, 11), layout)
    check(*attention_inputs(), k=4, attn_mask=mask)


def test_expanded_mask_matches_the_definition():
    check(*attention_inputs(), k=4, attn_mask=boolean_mask(9, 11).expand(2, 3, 9, 11))
    check(*attention_inputs(), k=4, attn_mask=additive_mask(1, 1, 9, 1).expand(2, 3, 9, 11))


@pytest.mark.parametrize("upstream", ["expanded", "transposed"])
def test_strides_of_the_upstream_gradient_do_not_matter(upstream):
    query, key, value = attention_inputs()
    grads = {
        "expanded": torch.tensor(1.5).expand(2, 3, 9, 5),
        "transposed": torch.randn(5, 9, 3, 2).permute(3, 2, 1, 0),
    }
    output = topk_fx.attention(query, key, value, k=4)
    actual = torch.autograd.grad(output, (query, key, value), grads[upstream], retain_graph=True)
    expected = torch.autograd.grad(output, (query, key, value), grads[upstream].contiguous())
    for x, y in zip(actual, expected, strict=True):
        assert_near(x, y)


# --- empty tensors


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("batch", [(2,), (2, 2)], ids=["4d", "5d"])
@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys", "value_size"])
def test_empty_tensors_match_the_definition(empty, batch, is_causal):
    sizes = {"batch": batch, "heads": 2, "queries": 3, "keys": 5, "value_size": 3}
    sizes[empty] = (*batch[1:], 0) if empty == "batch" else 0
    check(*attention_inputs(**sizes), k=2, is_causal=is_causal)


def test_no_keys_give_zero_for_every_k():
    for k in (1, 0.5, "all"):
        output = check(*attention_inputs(keys=0), k=k)
        assert output.shape == (2, 3, 9, 5)
        assert not output.any()


# --- k = all: dense attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_all_keys_give_dense_attention(mask, dtype):
    query, key, value = attention_inputs(dtype=dtype)
    options = {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": boolean_mask(9, 11) & (torch.arange(9) != 4).unsqueeze(-1)},
        "additive": {"attn_mask": torch.randn(2, 1, 9, 11, dtype=dtype)},
    }[mask]

    def dense(query, key, value, k, **options):
        return F.scaled_dot_product_attention(query, key, value, **options)

    assert_matches(topk_fx.attention, dense, query, key, value, k="all", **options)


# --- selection


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_is_that_of_float64_wherever_float32_can_tell(dtype):
    """The margin is the error bound of a float32 dot product of this length; float64 has to tell all keys apart."""
    size, k = 32, 8
    query, key = torch.randn(1, 2, 64, size).to(dtype), torch.randn(1, 2, 256, size).to(dtype)
    _, indices, weights = torch.ops.topk_fx.attention_forward(query, key, key, [], "", 1.0, k, None, 0.0, False)
    scores = query.double() @ key.double().transpose(-2, -1)
    bound = size * torch.finfo(weights.dtype).eps * (query.double().abs() @ key.double().abs().transpose(-2, -1))
    ranked = scores.sort(descending=True).values
    can_tell = ranked[..., k - 1] - ranked[..., k] > 2 * bound.amax(-1)
    assert can_tell.double().mean() > 0.9
    expected = reference.select(scores, k)[1].sort().values
    assert indices.sort().values[can_tell].equal(expected[can_tell].int())

    rounded = reference.select(scores.to(torch.bfloat16), k)[1].sort().values
    assert not rounded[can_tell].equal(expected[can_tell]), "these inputs would not show scores rounded to bfloat16"


def test_forward_op_returns_what_it_kept():
    query, key, value = (x.detach() for x in attention_inputs())
    mask = boolean_mask(2, 1, 9, 11, share=0.3)
    scores = (query @ key.transpose(-2, -1) * 0.5).masked_fill(~mask, -INF)
    for zero_empty_rows, empty_row in ((True, 0.0), (False, NAN)):
        output, indices, weights = torch.ops.topk_fx.attention_forward(
            query, key, value, [mask], "mask($0)", 0.5, 5, None, 0.0, zero_empty_rows
        )
        expected_weights, expected_indices = reference.select(scores, 5, empty_row=empty_row)
        assert (indices.dtype, weights.dtype) == (torch.int32, torch.float32)
        assert indices.sort().values.equal(expected_indices.sort().values.int())
        assert_near(weights.sort().values, expected_weights.sort().values)
        assert_near(output, reference.weigh(expected_weights, expected_indices, value))


# --- dropout


def with_saved(run):
    """What `run` returns, and the tensors that it saved for its backward."""
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return run(), saved


@pytest.mark.parametrize("mask", ["none", "boolean"])
def test_dropout_output_and_gradients_follow_the_saved_weights(mask):
    """A weight saved with a minus sign was dropped. From that, output and gradients are computed by plain autograd."""
    query, key, value = attention_inputs(dtype=torch.float64)
    mask = boolean_mask(9, 11, share=0.4) if mask == "boolean" else torch.ones(9, 11, dtype=torch.bool)
    p = 0.3
    output, saved = with_saved(lambda: topk_fx.attention(query, key, value, k=3, attn_mask=mask, dropout_p=p))
    (indices,) = (x for x in saved if x.dtype == torch.int32)
    (weights,) = (x for x in saved if x.shape == indices.shape and x.is_floating_point())
    keep = ~weights.signbit()
    assert 0 < keep.double().mean() < 1

    q, k, v = (double(x) for x in (query, key, value))
    scores = (q @ k.transpose(-2, -1) * 0.5).gather(-1, indices.clamp(min=0).long()).masked_fill(indices < 0, -INF)
    probabilities = scores.masked_fill((indices < 0).all(-1, keepdim=True), 0).softmax(-1).masked_fill(indices < 0, 0)
    assert_near(weights.abs(), probabilities)
    expected = reference.weigh(probabilities * keep / (1 - p), indices.long(), v)
    assert_near(output, expected)
    grad = torch.randn_like(output)
    actual_grads = torch.autograd.grad(output, (query, key, value), grad)
    for actual_grad, expected_grad in zip(actual_grads, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        assert_near(actual_grad, expected_grad)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_scales_it(p):
    """All scores and all values are 1: an output is (kept weights) / (1 - p), and its mean over many rows is 1."""
    ones = torch.ones(4, 4, 256, 2)
    k = 8
    output = topk_fx.attention(ones, ones, ones, k=k, dropout_p=p)[..., 0]
    kept = output * (1 - p) * k
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    count = ones[..., 0].numel() * k
    deviation = math.sqrt(p * (1 - p) / count)
    assert (kept.sum().item() / count) == pytest.approx(1 - p, abs=5 * deviation)


def test_dropout_draws_for_every_row_and_head_anew():
    query, key, value = attention_inputs(queries=64)
    ones = torch.ones_like(value)
    first, second = (topk_fx.attention(query, key, ones, k=8, dropout_p=0.5)[..., 0] for _ in range(2))
    assert not first.equal(second)
    assert not first[0].equal(first[1])
    assert not first[:, 0].equal(first[:, 1])


def test_dropout_comes_from_torchs_generator():
    inputs = attention_inputs()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(topk_fx.attention(*inputs, k=4, dropout_p=0.5))
    assert outputs[0].equal(outputs[1])
    assert not outputs[0].equal(outputs[2])


def test_dropout_of_everything_is_zero_with_zero_gradients():
    inputs = attention_inputs()
    output = topk_fx.attention(*inputs, k=4, dropout_p=1.0)
    assert not output.any()
    assert not any(grad.any() for grad in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize("k", [1, 3])
def test_nan_row_stays_nan_under_dropout(k):
    """Dropout multiplies by zero, and NaN times zero is NaN: in the definition, in dense attention, and here."""
    query, key, value = attention_inputs(queries=64)
    with torch.no_grad():
        query[:, :, ::2] = NAN
    output = topk_fx.attention(query, key, value, k=k, dropout_p=0.5)
    assert output[:, :, ::2].isnan().all()
    assert output[:, :, 1::2].isfinite().all()


@pytest.mark.parametrize("poison", [NAN, -NAN, INF], ids=["nan", "negative_nan", "inf"])
def test_gradient_of_nan_rows_is_nan_under_dropout(poison):
    """Whatever is drawn, and whatever sign the NaN has: the sign of a weight is also the mark of a dropped one."""
    query, key, value = attention_inputs(queries=1, keys=1)
    with torch.no_grad():
        query.fill_(poison)
        key.fill_(1.0)
    check(query, key, value, k="all", dropout_p=0.5)


# --- the ops as torch sees them


def opcheck_cases():
    query, key, value = attention_inputs(heads=4, key_heads=2, queries=3, keys=5)
    mask, bias = boolean_mask(3, 5), torch.randn(2, 1, 3, 5).requires_grad_()
    return {
        "plain": (query, key, value, [], "", 0.5, 2),
        "fewer_keys_than_k": (query, key, value, [], "causal", 0.5, 9),
        "operands": (query, key, value, [bias, mask], "tanh add($0) mask($1)", 0.5, 2, 0.0, True),
        "half": (*(x.detach().bfloat16() for x in (query, key, value)), [], "", 0.5, 2),
        "two_dimensions": (*(x.detach()[0, 0].requires_grad_() for x in (query, key, value)), [], "", 0.5, 2),
    }


@pytest.mark.parametrize("case", ["plain", "fewer_keys_than_k", "operands", "half", "two_dimensions"])
def test_attention_passes_opcheck(case):
    torch.library.opcheck(torch.ops.topk_fx.attention.default, opcheck_cases()[case])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inner_ops_pass_opcheck(dtype, dropout_p):
    query, key, value = (x.detach() for x in attention_inputs(heads=4, key_heads=2, queries=3, keys=5, dtype=dtype))
    operands = [torch.randn(1, 1, 3, 5).to(dtype), boolean_mask(1, 4, 1, 5), torch.randn(2, 1, 1, 1)]
    score = "add($0) mul($2) mask($1)"
    keep = boolean_mask(2, 4, 3, 2) if dropout_p else None
    forward_args = (query, key, value, operands, score, 0.5, 2, keep, dropout_p, True)
    torch.library.opcheck(torch.ops.topk_fx.attention_forward.default, forward_args)
    output, indices, weights = torch.ops.topk_fx.attention_forward(*forward_args)
    torch.library.opcheck(
        torch.ops.topk_fx.attention_backward.default,
        (output, query, key, value, operands, score, 0.5, indices, weights, dropout_p, [True, False, True]),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_slots_beyond_the_kept_keys_stay_empty(dropout_p):
    """Traces ask for two slots where the number of kept keys is known only at run time."""
    query, key, value = (x.detach() for x in attention_inputs(heads=4, key_heads=2, queries=3, keys=5))
    bias = torch.randn(2, 1, 3, 5)
    keep = boolean_mask(2, 4, 3, 2) if dropout_p else None
    first = None if keep is None else keep[..., :1]
    rest = (dropout_p, False, "")
    args = (query, key, value, [bias], "add($0)", 0.5)
    output, indices, weights = torch.ops.topk_fx.attention_forward(*args, 1, keep, *rest, 2)
    expected, kept, kept_weights = torch.ops.topk_fx.attention_forward(*args, 1, first, *rest)
    assert output.equal(expected)
    assert indices.equal(F.pad(kept, (0, 1), value=-1))
    assert weights.equal(F.pad(kept_weights, (0, 1)))
    grads, expected_grads = (
        torch.ops.topk_fx.attention_backward(output.cos(), *args, *selection, dropout_p, [True])
        for selection in ((indices, weights), (kept, kept_weights))
    )
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert_near(grad, wanted)
    torch.library.opcheck(torch.ops.topk_fx.attention_forward.default, (*args, 1, keep, *rest, 2))


# --- property


@st.composite
def problems(draw):
    """Inputs and options of one call: sizes, group, layouts, dtype, mask, scale and k are drawn; numbers are seeded."""
    sizes = {
        "batch": (draw(st.integers(1, 2)),),
        "queries": draw(st.integers(1, 12)),
        "keys": draw(st.integers(1, 17)),
        "head_size": draw(st.sampled_from([1, 4, 16])),
        "value_size": draw(st.integers(1, 6)),
        "key_heads": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    sizes["heads"] = sizes["key_heads"] * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    inputs = attention_inputs(**sizes, generator=generator)
    inputs = [laid_out(x, draw(st.sampled_from(sorted(LAYOUTS)))) for x in inputs]
    keys = sizes["keys"]
    options = {
        "k": draw(st.one_of(st.integers(1, keys + 2), st.sampled_from([0.1, 0.5, "all"]))),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 1.0, -0.5, 0.0])),
        "enable_gqa": True,
    }
    kind = draw(st.sampled_from(["none", "boolean", "additive", "minus_a_lot"]))
    if kind != "none":
        full = (*sizes["batch"], sizes["heads"], sizes["queries"], keys)
        shape = [size if draw(st.booleans()) else 1 for size in full][draw(st.integers(0, 3)) :]
        masked = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
        fill = -INF if kind == "additive" else torch.finfo(torch.bfloat16).min
        bias = integers(*shape, generator=generator).masked_fill(masked, fill).requires_grad_()
        options["attn_mask"] = ~masked if kind == "boolean" else bias
    return inputs, options


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(problems())
def test_any_call_matches_the_definition(problem):
    inputs, options = problem
    torch.manual_seed(0)
    check(*inputs, **options)
