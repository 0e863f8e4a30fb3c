"""The definition, against cases worked by hand and against torch's dense attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from inputs import assert_near, attention_inputs
from torch import tensor

from topk_fx import reference

NAN, INF = math.nan, math.inf


def row(*values):
    """One query's or several keys' scores, head size 1: [1, 1, len, 1]."""
    return tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


def selection(scores, k, **options):
    weights, indices = reference.select(tensor(scores, dtype=torch.float64), k, **options)
    return weights, indices.tolist()


# --- select


@pytest.mark.parametrize(
    ("scores", "k", "weights", "indices"),
    [
        ([1.0, 3.0, 2.0, 0.0], 2, [0.7310585786, 0.2689414214], [1, 2]),
        ([1.0, 3.0, 2.0, 0.0], 1, [1.0], [1]),
        ([2.0, 5.0, 2.0, 2.0, 5.0], 3, [0.4878555511, 0.4878555511, 0.0242888977], [1, 4, 0]),
        ([7.0, 7.0, 7.0, 7.0], 3, [1 / 3, 1 / 3, 1 / 3], [0, 1, 2]),
        ([0.0, -0.0, 0.0], 2, [0.5, 0.5], [0, 1]),
        ([0.0, math.log(3.0)], 5, [0.75, 0.25], [1, 0]),
        ([-1e9, -1e9, -2e9], 2, [0.5, 0.5], [0, 1]),
        ([-1.7976931348623157e308] * 3, 2, [0.5, 0.5], [0, 1]),
    ],
    ids=[
        "two_of_four",
        "one",
        "tie_at_the_cut",
        "all_equal",
        "zeros_of_both_signs",
        "k_above_key_count",
        "minus_a_lot_is_a_score",
        "finfo_min_is_a_score",
    ],
)
def test_select_keeps_the_largest_scores(scores, k, weights, indices):
    actual, chosen = selection(scores, k)
    assert chosen == indices
    torch.testing.assert_close(actual, tensor(weights, dtype=torch.float64), rtol=0, atol=1e-9)


def test_select_never_keeps_a_masked_key():
    weights, indices = selection([-INF, 1.0, -INF, 1.0], 3)
    assert indices == [1, 3, -1]
    assert weights.tolist() == [0.5, 0.5, 0.0]


def test_select_gives_an_empty_row_what_the_dense_form_gives():
    weights, indices = selection([-INF, -INF, -INF], 2)
    assert weights.isnan().all()
    assert indices == [0, 1]
    weights, indices = selection([-INF, -INF, -INF], 2, empty_row=0.0)
    assert weights.tolist() == [0.0, 0.0]
    assert indices == [-1, -1]


@pytest.mark.parametrize("scores", [[1.0, NAN, 2.0], [NAN, NAN, NAN], [-INF, NAN, -INF]])
def test_select_makes_a_row_with_nan_all_nan(scores):
    for empty_row in (0.0, NAN):
        weights, _ = selection([scores, [0.0, 0.0, 1.0]], 2, empty_row=empty_row)
        assert weights[0].isnan().all()
        assert weights[1].isfinite().all()


def test_select_keeps_a_share_rounded_up():
    assert selection([1.0, 2.0, 3.0, 4.0, 5.0], 0.3)[1] == [4, 3]
    assert selection([1.0, 2.0, 3.0, 4.0, 5.0], 1.0)[1] == [4, 3, 2, 1, 0]
    assert selection([1.0, 2.0, 3.0, 4.0, 5.0], "all")[1] == [4, 3, 2, 1, 0]


def test_topk_softmax_is_zero_where_nothing_is_kept():
    scores = tensor([[1.0, 3.0, 2.0, 0.0], [-INF, 4.0, -INF, -INF]])
    expected = tensor([[0.0, 0.7310585786, 0.2689414214, 0.0], [0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(reference.topk_softmax(scores, 2), expected)
    assert reference.topk_softmax(scores.bfloat16(), 2).dtype == torch.float32


def test_weigh_reads_only_kept_keys():
    value = tensor([[10.0], [NAN], [30.0], [INF]])
    weights, indices = tensor([[0.25, 0.75], [1.0, 0.0]]), tensor([[0, 2], [2, -1]])
    assert reference.weigh(weights, indices, value).tolist() == [[25.0], [30.0]]


# --- attention


def test_attention_weighs_the_values_of_the_kept_keys():
    key, value = row(1, 3, 2, 0), row(10, 20, 30, 40)
    output = reference.attention(row(1), key, value, k=2)
    assert_near(output, row(20 * 0.7310585786300049 + 30 * 0.2689414213699951))
    output = reference.attention(row(-1), key, value, k=2)  # scores -1, -3, -2, 0
    assert_near(output, row(40 * 0.7310585786300049 + 10 * 0.2689414213699951))


def test_attention_scales_by_the_root_of_the_head_size():
    query, key = tensor([[2.0, 0.0, 0.0, 0.0]]), tensor([[math.log(9.0), 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    value = tensor([[1.0], [0.0]])
    torch.testing.assert_close(reference.attention(query, key, value, k=2), tensor([[0.9]]))  # log 9 * 2 / sqrt 4
    torch.testing.assert_close(reference.attention(query, key, value, k=2, scale=0.25), tensor([[0.75]]))
    torch.testing.assert_close(reference.attention(query, key, value, k=2, scale=-0.25), tensor([[0.25]]))


@pytest.mark.parametrize(("queries", "keys"), [(3, 2), (2, 4), (3, 3)])
def test_causal_attention_is_aligned_top_left(queries, keys):
    """Query i sees the keys up to i. All scores are equal, so that the mean of the kept values tells which they are."""
    value = row(*[float(2**j) for j in range(keys)])
    output = reference.attention(row(*[0.0] * queries), row(*[0.0] * keys), value, k=2, is_causal=True).flatten()
    assert output.tolist() == [1.0, 1.5, 1.5][:queries]


def test_boolean_and_causal_mask_apply_together():
    mask = tensor([[True, True, True], [False, True, True], [True, False, True]])
    output = reference.attention(row(0, 0, 0), row(0, 0, 0), row(1, 2, 4), k=3, attn_mask=mask, is_causal=True)
    assert output.flatten().tolist() == [1.0, 2.0, 2.5]


def test_additive_mask_takes_part_in_the_selection():
    mask = tensor([0.0, 5.0, -INF])
    output = reference.attention(row(1), row(3, 1, 9), row(1, 2, 4), k=1, attn_mask=mask)
    assert output.item() == 2.0


@pytest.mark.parametrize("mask", [tensor([[False], [True]]), tensor([[-INF], [0.0]])], ids=["boolean", "additive"])
def test_fully_masked_row_is_zero_and_passes_no_gradient(mask):
    query, key, value = (x.requires_grad_() for x in (row(1, 1), row(1, 2, 3), row(1, 2, 4)))
    output = reference.attention(query, key, value, k=2, attn_mask=mask)
    assert output[0, 0, 0].item() == 0.0
    assert output[0, 0, 1].item() == pytest.approx(4 * 0.7310585786 + 2 * 0.2689414214)
    output.sum().backward()
    assert query.grad[0, 0, 0].item() == 0.0
    assert all(x.grad.isfinite().all() for x in (query, key, value))


def test_nan_in_a_query_makes_its_row_nan_and_no_other():
    output = reference.attention(row(1, NAN, 1), row(1, 2, 3), row(1, 2, 4), k=2).flatten()
    assert output.isnan().tolist() == [False, True, False]


def test_grouped_queries_read_the_heads_of_their_group():
    query = torch.zeros(1, 4, 1, 1)
    key, value = torch.zeros(1, 2, 3, 1), tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]).view(1, 2, 3, 1)
    output = reference.attention(query, key, value, k=2, enable_gqa=True)
    assert output.flatten().tolist() == [1.5, 1.5, 15.0, 15.0]


def test_half_precision_scores_are_compared_in_float32():
    """Scores 256 and 257: in bfloat16 both are 256, and the tie would keep key 0."""
    query, key = tensor([[1.0, 1.0]]), tensor([[256.0, 0.0], [256.0, 1.0]])
    value = tensor([[3.0], [5.0]])
    output = reference.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), k=1, scale=1.0)
    assert output.item() == 5.0
    assert output.dtype == torch.bfloat16


def test_gradient_holds_the_selection_constant():
    query, key, value = (x.requires_grad_() for x in (row(1), row(0, 9, 0, -1), row(1, 2, 4, 8)))
    mask = tensor([0.0, -9.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    reference.attention(query, key, value, k=2, attn_mask=mask).sum().backward()  # keeps keys 0 and 1, p = 1/2 each
    assert value.grad.flatten().tolist() == [0.5, 0.5, 0.0, 0.0]
    assert mask.grad.tolist() == [-0.25, 0.25, 0.0, 0.0]  # p_j (v_j - output), output = 1.5
    assert key.grad.flatten().tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert query.grad.item() == 2.25


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "causal"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_all_keys_give_dense_attention(mask, key_heads):
    query, key, value = attention_inputs(heads=4, key_heads=key_heads)
    options = {"enable_gqa": True, "is_causal": mask == "causal"}
    if mask == "boolean":
        options["attn_mask"] = torch.rand(2, 1, 9, 11) < 0.4
        options["attn_mask"][0, 0, 3] = False
    elif mask == "additive":
        options["attn_mask"] = torch.randn(9, 11)
    dense = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), **_doubled(options))
    assert_near(reference.attention(query, key, value, k="all", **options), dense)


def _doubled(options):
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in options.items()}


def test_dropout_of_everything_is_zero():
    query, key, value = attention_inputs()
    assert not reference.attention(query, key, value, k=3, dropout_p=1.0).any()


# --- ffn


def test_ffn_keeps_the_units_of_largest_activation():
    up = tensor([[1.0, 0.0], [0.0, -1.0], [1.0, 1.0], [3.0, 1.0]])  # at x = (1, -2): 1, 2, -1, 1
    down = tensor([[1.0, 10.0, 100.0, 1000.0]])
    x = tensor([1.0, -2.0])
    assert reference.ffn(x, up, down, k=1).tolist() == [20.0]
    assert reference.ffn(x, up, down, k=2).tolist() == [21.0]  # units 0 and 3 tie at 1
    assert reference.ffn(x, up, down, k=3).tolist() == [1021.0]
    assert reference.ffn(x, up, down, k=0.5, down_bias=tensor([0.5])).tolist() == [21.5]
    assert reference.ffn(x, up, down, k=1, up_bias=tensor([0.0, 0.0, 4.0, 0.0])).tolist() == [300.0]


def test_ffn_selects_by_magnitude_of_the_gated_unit():
    """gate 1, 2, 5, -4 and up -7, 1, 1, 9: hidden -7, 2, 5, 0. By the gate alone units 2 and 1 would be kept."""
    x, down = tensor([[1.0]]), tensor([[1.0, 10.0, 100.0, 1000.0]])
    up, gate = tensor([[-7.0], [1.0], [1.0], [9.0]]), tensor([[1.0], [2.0], [5.0], [-4.0]])
    assert reference.ffn(x, up, down, k=2, gate_weight=gate).tolist() == [[493.0]]
    assert reference.ffn(x, up, down, k=1, gate_weight=gate).tolist() == [[-7.0]]
    biased = reference.ffn(x, up, down, k=1, gate_weight=gate, gate_bias=tensor([0.0, 0.0, 0.0, 5.0]))
    assert biased.tolist() == [[9000.0]]


@pytest.mark.parametrize(
    ("activation", "hidden"),
    [("relu", 2.0), ("relu2", 4.0), ("gelu", 1.9544997), ("gelu_tanh", 1.9545977), ("silu", 1.7615942)],
)
def test_ffn_activation_of_two(activation, hidden):
    one = tensor([[1.0]])
    assert reference.ffn(2 * one, one, one, k=1, activation=activation).item() == pytest.approx(hidden, abs=1e-6)


def test_quick_gelu_of_two():
    one = tensor([[1.0]])
    output = reference.ffn(2 * one, one, one, k=1, activation="quick_gelu")
    assert output.item() == pytest.approx(2 / (1 + math.exp(-3.404)), abs=1e-6)


def test_ffn_dropout_of_everything_leaves_the_bias():
    ones = torch.ones(3, 3)
    output = reference.ffn(ones, ones, ones, k=2, down_bias=tensor([1.0, 2.0, 3.0]), dropout_p=1.0)
    assert output.tolist() == [[1.0, 2.0, 3.0]] * 3
