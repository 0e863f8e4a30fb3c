"""Screening in int8: the same selection, weights and output as without it on data made to be hard for it.

Scores are summed in another order. Where float32 knows them exactly, the results are equal in each bit.
"""

from __future__ import annotations

import math

import pytest
import torch
from hard_keys import HARD, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, assert_near, integers
from kernel_checks import scores_of
from topk_fx.lowering import cpu
from topk_fx.lowering.cpu import build, screening
from topk_fx.lowering.cpu.affine import affine_of
from topk_fx.lowering.cpu.score_code import OperandKind

from topk_fx import reference
from topk_fx.score import Score

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(bool(build.why_unavailable()), reason=f"C++ cannot be compiled: {build.why_unavailable()}"),
]
needs_vnni = pytest.mark.skipif(
    "TOPK_AVX512_VNNI" not in build.current_defines(), reason="the processor has no AVX512-VNNI beside AVX512-BF16"
)

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def equal_bits(x, y):
    return torch.equal(torch.nan_to_num(x, 12345.0), torch.nan_to_num(y, 12345.0)) and x.isnan().equal(y.isnan())


def check(
    query, key, value, score="", operands=(), *, scale=0.5, k=7, zero_empty_rows=True, dropout_keep=None, is_exact=False
):
    """Screened is the same as not screened; is_exact: float32 knows the scores exactly. Returns the counts, and output,
    indices and weights."""
    arguments = (query, key, value, list(operands), score, scale, k, dropout_keep, 0.5, zero_empty_rows)
    with screening.forced(False) as none:
        expected = cpu.attention_forward(*arguments)
    with screening.forced(True) as counts:
        actual = cpu.attention_forward(*arguments)
    assert none.screened == none.left == 0
    if is_exact or not counts.screened:
        assert all(equal_bits(x, y) for x, y in zip(actual, expected, strict=True))
    elif not all(equal_bits(x, y) for x, y in zip(actual, expected, strict=True)):
        assert_same_but_for_rounding(actual, expected, query, key, scores_of(query, key, operands, score, scale), scale)
    return counts, actual


def assert_same_but_for_rounding(actual, expected, query, key, scores, scale):
    """Kept are keys of the same float64 scores, as far as sums in float32 tell them apart; weights and output are as near.

    scores [B, Hq, Lq, Lk]. The rounding of a score is in proportion to the norms of its query and its key, and that of
    adding terms to the score itself.
    """
    norms = key.double().norm(dim=-1).repeat_interleave(query.size(1) // key.size(1), 1).unsqueeze(-2)
    roundings = 1e-6 * abs(scale) * query.double().norm(dim=-1, keepdim=True) * norms + 1e-36
    roundings = roundings + 5e-7 * scores.abs().nan_to_num(0, posinf=0, neginf=0)
    roundings = roundings.nan_to_num(0).clamp(max=100)

    def sorted_by_score(indices, weights):
        chosen, is_none = indices.long().clamp(min=0), indices < 0
        found = scores.gather(-1, chosen).masked_fill(is_none, -INF)
        order = found.argsort(dim=-1, descending=True, stable=True)
        rounding = roundings.gather(-1, chosen).masked_fill(is_none, 0)
        return [x.gather(-1, order) for x in (found, rounding, weights.abs().double())]

    scores_found, rounding, weights = sorted_by_score(*actual[1:])
    scores_expected, other_rounding, weights_expected = sorted_by_score(*expected[1:])
    rounding = rounding + other_rounding
    assert torch.isnan(scores_found).equal(torch.isnan(scores_expected))
    is_equal = scores_found.eq(scores_expected) | scores_found.isnan()
    assert ((scores_found - scores_expected).abs() <= rounding).logical_or(is_equal).all()
    assert weights.isnan().equal(weights_expected.isnan())
    factor = (2 * rounding.amax(-1, keepdim=True)).exp() * (1 + 1e-5)
    for x, y in ((weights, weights_expected), (weights_expected, weights)):
        assert (x <= y * factor + 1e-7).logical_or(x.isnan()).all()
    is_alike = actual[1].eq(expected[1]).all(-1) & (factor < 1 + 1e-4).all(-1)
    assert_near(actual[0][is_alike], expected[0][is_alike].double())


# --- that it does something, and what


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_few_keys_survive_on_random_data(size, dtype):
    query, key, value = (normal(1, 2, 2048, size, dtype=dtype) for _ in range(3))
    counts, _ = check(query, key, value, scale=size**-0.5, k=64)
    assert (counts.screened, counts.left) == (2 * 2048, 0)
    assert 64 <= counts.survivors / counts.screened < 3.5 * 64


@needs_vnni
def test_columns_of_very_different_size_are_evened_out():
    query, key, value = (normal(1, 1, 1024, 64) for _ in range(3))
    key = key + 20 * normal(64)  # the mean is subtracted
    key[..., 3] *= 8
    query[..., 3] *= 8
    counts, _ = check(query, key, value, scale=0.125, k=32)
    assert counts.left == 0
    assert counts.survivors / counts.screened < 3.5 * 32


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_is_that_of_the_definition(dtype):
    query, key = (integers(2, 4, 130, 33, dtype=dtype) for _ in range(2))
    key, value = integers(2, 2, 700, 33, dtype=dtype), normal(2, 2, 700, 5, dtype=dtype)
    counts, (output, indices, _) = check(query, key, value, "causal", scale=0.25, k=9, is_exact=True)
    expected = reference.attention(query, key, value, k=9, scale=0.25, is_causal=True, enable_gqa=True)
    assert_near(output, expected)
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.25
    scores = scores.masked_fill(torch.ones(130, 700, dtype=torch.bool).triu(1), -INF)
    assert indices.sort(-1).values.long().equal(reference.select(scores, 9, empty_row=0.0)[1].sort(-1).values)
    assert counts.screened + counts.left == 2 * 4 * 130


# --- hard data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HARD)
def test_hard_keys_are_selected_exactly(name, dtype):
    generator = torch.Generator().manual_seed(7)
    query, key, value = (normal(1, 2, length, 40, generator=generator) for length in (100, 1500, 1500))
    key, query, value = (x.to(dtype) for x in (HARD[name](key, generator), query, value))
    for score in ("", "causal"):
        check(query, key, value, score, k=20)
    query = HARD[name](query.float(), generator).to(dtype)
    check(query, key, value, k=20, scale=-0.01)


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 16, 40, 80])
def test_exact_scores_give_the_same_bits(size, dtype):
    query, key, value = integers(1, 4, 150, size, dtype=dtype), *(integers(1, 2, 900, size, dtype=dtype) for _ in "kv")
    for score in ("", "causal"):
        counts, _ = check(query, key, value, score, scale=-0.25, k=20, is_exact=True)
        assert counts.screened + counts.left == 4 * 150
    assert counts.screened > 150 or size == 1


@needs_vnni
def test_best_key_beside_a_large_one_is_kept_although_it_rounds_to_nothing():
    key = torch.linspace(0, 1, 2000).view(1, 1, 2000, 1).clone()
    key[0, 0, -1], key[0, 0, -2] = -1000, 3  # one step of their panel is 7.9
    query = torch.ones(1, 1, 100, 1)
    counts, (_, indices, _) = check(query, key, key, scale=1.0, k=1)
    assert counts.screened == 100
    assert indices.eq(1998).all()


@needs_vnni
def test_best_key_is_kept_although_what_it_meets_of_the_query_rounds_to_nothing():
    key = torch.zeros(1, 1, 2000, 3)
    key[..., :1984, 0] = torch.linspace(-0.01, 0.01, 1984)
    key[0, 0, -1, 1] = 5.0
    query = torch.tensor([1000.0, 3.0, 0.0]).expand(1, 1, 100, 3)  # its step is 7.9
    counts, (_, indices, _) = check(query, key, key, scale=1.0, k=1)
    assert counts.screened == 100
    assert indices.eq(1999).all()


@needs_vnni
def test_rows_of_which_too_many_keys_survive_are_scanned_and_others_are_not():
    """A query of zeros ties with every key, one with NaN cannot be bounded; the rest of their tile is screened."""
    query, key, value = (normal(1, 1, length, 64) for length in (96, 3000, 3000))
    query[0, 0, 10], query[0, 0, 20, 3], query[0, 0, 30, 0] = 0, NAN, -INF
    counts, (_, indices, _) = check(query, key, value, k=16)
    assert (counts.screened, counts.left) == (93, 3)
    assert indices[0, 0, 10].tolist() == list(range(16))


@needs_vnni
def test_screening_is_given_up_where_most_rows_are_left():
    query, key, value = normal(2, 4, 2000, 16), torch.ones(2, 2, 2000, 16), normal(2, 2, 2000, 16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for score in ("", "causal"):
                counts, _ = check(query, key, value, score, k=16)
                assert counts.left > 15000
                assert counts.screened + counts.left == 2 * 4 * 2000
    finally:
        torch.set_num_threads(before)


@needs_vnni
def test_heads_with_a_key_that_is_no_number_are_not_screened():
    query, key, value = (normal(1, 2, length, 16) for length in (100, 900, 900))
    key[0, 1, 500, 3] = INF
    counts, _ = check(query, key, value, k=8)
    assert (counts.screened, counts.left) == (100, 100)


# --- masks, steps after them, sizes

MASKS = {
    "window": ("keep(and(le(j, i), gt(j, sub(i, 50))), -inf)", list),
    "padding": ("keep(and(le(j, i), $0), -inf)", lambda: [(torch.arange(600) < 450).view(1, 1, 1, 600)]),
    "boolean": ("mask($0)", lambda: [torch.rand(1, 4, 600, 600) < 0.3]),
    "strided_boolean": ("mask($0) causal", lambda: [(torch.rand(1, 1, 600, 600) < 0.3).mT]),
    "empty_rows": ("mask($0)", lambda: [(torch.arange(600) % 3 > 0).view(1, 1, 600, 1).expand(1, 1, 600, 600)]),
    "documents": ("keep(eq($0, $1), -inf)", lambda: [(torch.arange(600) // 70).view(1, 1, s, -1) for s in (600, 1)]),
    "fill": ("fill(gt(j, i), -inf)", list),
    "where": ("set(where(le(j, i), s, -inf))", list),
    "sink": ("causal sink($0)", lambda: [torch.randn(1, 4, 1, 1)]),
    "after": ("causal softmax mul($0) add($1)", lambda: [torch.randn(1, 4, 1, 1), torch.randn(1, 4, 600, 600)]),
}


@needs_vnni
@pytest.mark.parametrize("name", MASKS)
def test_masked_keys_never_survive(name):
    score, operands = MASKS[name]
    query, key, value = normal(1, 4, 600, 48), normal(1, 2, 600, 48), normal(1, 2, 600, 48)
    for zero_empty_rows in (True, False):
        counts, _ = check(query, key, value, score, operands(), scale=0.2, k=11, zero_empty_rows=zero_empty_rows)
        assert (counts.screened, counts.left) == (2400, 0)


def test_steps_that_are_not_affine_are_not_screened():
    query, key, value = (normal(1, 1, 200, 16) for _ in range(3))
    bias = normal(1, 1, 200, 200)
    for score in ("exp", "tanh add($0)", "keep(gt(s, 0.0), -inf)", "mul($0) causal", "mul(-1.0)", "set(sub($0, s))"):
        counts, _ = check(query, key, value, score, [bias][: score.count("$0")])
        assert counts.screened == counts.left == 0


# --- terms

LOWEST = torch.finfo(torch.float32).min


def one_in(n, *shape):
    return torch.rand(shape) < 1 / n


SLOPES = torch.tensor([0.7, 0.25, 0.06, 0.004]).view(1, 4, 1, 1)
TERMS = {
    "additive_mask": (f"add(where(le(j, i), 0.0, {LOWEST}))", list),
    "read_mask": ("mask($0)", lambda: [torch.zeros(1, 1, 600, 600).masked_fill(one_in(2, 600, 600), -INF)]),
    "read_lowest": ("add($0)", lambda: [torch.zeros(1, 1, 600, 600).masked_fill(one_in(2, 600, 600), LOWEST)]),
    "bfloat16": ("add($0)", lambda: [torch.where(one_in(2, 1, 4, 600, 600), 0.0, -1e30).bfloat16()]),
    "filled": (f"keep(le(j, i), {LOWEST})", list),
    "filled_before": ("fill(gt(j, i), -1e9) add($0)", lambda: [torch.randn(1, 4, 600, 600)]),
    "bias": ("add($0)", lambda: [torch.randn(1, 4, 600, 600)]),
    "strided": ("add($0) causal", lambda: [torch.randn(1, 4, 600, 600).mT]),
    "float16": ("add($0)", lambda: [torch.randn(1, 4, 600, 600).half()]),
    "integers": ("add($0)", lambda: [torch.randint(-3, 4, (1, 4, 600, 600))]),
    "large": ("add($0)", lambda: [1e5 + torch.randn(1, 1, 600, 600)]),
    "steep_alibi": ("add(mul($0, float32(sub(j, i)))) causal", lambda: [SLOPES]),
    "rising_alibi": ("add($0) causal", lambda: [torch.arange(600) * SLOPES]),
    "falling": ("sub($0)", lambda: [torch.arange(600).view(1, 1, 1, -1) * 0.25]),
    "table": ("add(lookup($0, minimum(abs(sub(i, j)), 31)))", lambda: [torch.randn(1, 4, 1, 32)]),
    "long_table": ("add(lookup($0, abs(sub(i, j))))", lambda: [torch.randn(1, 4, 1, 600)]),
    "factor": ("mul(4.0) add($0) div(3.0) add($1)", lambda: [torch.randn(1, 4, 600, 600), torch.randn(1, 1, 1, 600)]),
    "row": ("add($0)", lambda: [10 * torch.randn(1, 4, 600, 1)]),
    "sink": ("add($0) sink($1)", lambda: [torch.randn(1, 1, 600, 600), torch.randn(1, 4, 1, 1)]),
    "swapped": ("set(add($0, s))", lambda: [torch.randn(1, 4, 600, 600)]),
}


@needs_vnni
@pytest.mark.parametrize("name", TERMS)
def test_terms_are_added_to_bounds(name):
    score, operands = TERMS[name]
    query, key, value = normal(1, 4, 600, 48), normal(1, 2, 600, 48) + normal(48), normal(1, 2, 600, 48)
    counts, _ = check(query, key, value, score, operands(), scale=0.2, k=11)
    assert counts.screened + counts.left == 2400
    if name != "long_table":  # which is not read to bound a block
        assert counts.left <= 4 * 11  # the rows with fewer keys that are not low
        assert counts.survivors < 5 * 11 * counts.screened


@needs_vnni
@pytest.mark.parametrize(
    "name", ["additive_mask", "read_mask", "read_lowest", "filled", "filled_before", "bias", "swapped"]
)
def test_exact_sums_with_terms_give_the_same_bits(name):
    score, operands = TERMS[name]
    query, key, value = integers(1, 4, 600, 16), integers(1, 2, 600, 16), integers(1, 2, 600, 16)
    counts, _ = check(query, key, value, score, [x.round() for x in operands()], scale=0.25, k=11, is_exact=True)
    assert counts.screened > 2000


@needs_vnni
@pytest.mark.parametrize("score", ["mask($0)", "add($1)", "mask($0) add($1) causal"])
def test_operands_read_for_many_chunks_belong_to_their_chunk(score):
    """More chunks than are bounded at once, of which some are masked for some rows, and some are higher than others."""
    query, key, value = integers(1, 2, 50, 16), integers(1, 2, 17_000, 16), integers(1, 2, 17_000, 16)
    chunks = torch.randint(0, 4, (1, 1, 5, 67)).repeat_interleave(10, 2).repeat_interleave(256, 3)[..., :17_000]
    bias = torch.where(chunks == 0, -INF, chunks.float()) + (0.25 * torch.randint(-4, 5, chunks.shape))
    counts, _ = check(query, key, value, score, [chunks < 2, bias], scale=1.0, k=20, is_exact=True)
    if "causal" not in score:
        assert counts.left < 50


HARD_TERMS = {
    "nan": lambda x: x.masked_fill(one_in(1000, *x.shape), NAN),
    "infinite": lambda x: x.masked_fill(one_in(1000, *x.shape), INF),
    "masked": lambda x: x.masked_fill(~one_in(30, *x.shape), -INF),
    "lowest": lambda x: x.masked_fill(~one_in(30, *x.shape), LOWEST),
    "lowest_rows": lambda x: x.masked_fill(one_in(2, *x.shape[:-1], 1), LOWEST),
    "huge": lambda x: x * 1e30,
    "huge_offset": lambda x: x + 1e9,
    "few_large": lambda x: x.masked_fill(one_in(2000, *x.shape), 1e4),
    "few_values": lambda x: (x * 2).round() * 50,
    "near": lambda x: x - 90 * one_in(2, *x.shape),
    "far": lambda x: x - 130 * ~one_in(50, *x.shape),
    "farther": lambda x: x - 500 * ~one_in(50, *x.shape),
    "all_equal": lambda x: torch.full_like(x, -7.25),
    "heads_apart": lambda x: x + torch.tensor([0.0, 1e5, -1e5, 300]).view(1, 4, 1, 1),
    "rows_apart": lambda x: x + 1000 * torch.randn_like(x[..., :1]),
}


@needs_vnni
@pytest.mark.parametrize("name", HARD_TERMS)
def test_hard_terms_are_selected_exactly(name):
    query, key, value = normal(1, 4, 300, 40), normal(1, 2, 700, 40), normal(1, 2, 700, 40)
    bias = HARD_TERMS[name](torch.randn(1, 4, 300, 700))
    for scale in (1.0, -0.05):
        check(query, key, value, "add($0)", [bias], scale=scale, k=20)
        check(query, key, value, "mul(0.5) sub($0) causal", [bias], scale=scale, k=20)
    query, key = integers(1, 4, 300, 8), integers(1, 2, 700, 8)
    check(query, key, value, "add($0)", [bias.round()], scale=1.0, k=20, is_exact=True)
    check(query, key, value, "causal add($0) add($1)", [bias.round(), bias.mT.mT / 2], scale=1.0, k=20)


@needs_vnni
@pytest.mark.parametrize("low", [-5.0, -60.0, -100.0, -150.0, -1e4])
@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_scores_filled_with_a_number_are_not_taken_for_sums(low, mean):
    query, key, value = normal(1, 2, 200, 16), normal(1, 2, 600, 16) + mean, normal(1, 2, 600, 16)
    for k in (4, 50):
        counts, _ = check(query, key, value, f"keep($0, {low})", [one_in(50, 1, 1, 200, 600)], scale=1.0, k=k)
        assert counts.screened + counts.left == 400


@needs_vnni
@pytest.mark.parametrize("large", [1e2, 1e4, 1e6, 1e7, 2e7, 4e7, 1e8, 1e10])
def test_term_far_above_the_anchor_is_kept(large):
    """Where the bounds promise more, all is masked, so that the anchor is far below the largest term."""
    query, key, value = (normal(1, 1, n, 16) for n in (100, 900, 900))
    bias, allowed = torch.zeros(1, 1, 1, 900), one_in(20, 1, 1, 100, 900)
    bias[..., 100:110], allowed[..., 100:110] = large, False
    bias[..., 600], allowed[..., 600] = large / 2, True
    counts, (_, indices, _) = check(query, key, value, "add($0) mask($1)", [bias, allowed], k=7)
    assert indices.eq(600).any(-1).all()
    assert counts.screened + counts.left == 100


CAPPED = {
    "plain": ("div(50.0) tanh mul(50.0)", list),
    "causal": ("div(50.0) tanh mul(50.0) causal", list),
    "gemma2": (
        f"div(50.0) tanh mul(50.0) add(where(and(le(j, i), $0), 0.0, {LOWEST}))",
        lambda: [one_in(2, 1, 1, 1, 600)],
    ),
    "filled": ("div(50.0) tanh mul(50.0) keep($0, -1e4)", lambda: [one_in(2, 1, 1, 600, 600)]),
    "masked": (
        "div(30.0) tanh mul(30.0) mask($0) sink($1)",
        lambda: [one_in(2, 1, 4, 600, 600), torch.randn(1, 4, 1, 1)],
    ),
    "steep": ("mul(0.1) tanh mul(100.0) div(3.0)", list),
}


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CAPPED)
def test_soft_caps_leave_the_order(name, dtype):
    score, operands = CAPPED[name]
    query, value = normal(1, 4, 600, 48, dtype=dtype), normal(1, 2, 600, 48, dtype=dtype)
    for key in (normal(1, 2, 600, 48), normal(1, 2, 600, 48) + normal(48)):
        counts, _ = check(query, key.to(dtype), value, score, operands(), scale=0.2, k=11)
        assert counts.left <= 160  # rows with fewer keys that are not low, and of large products under a steep cap
        assert counts.screened + counts.left == 2400


@needs_vnni
@pytest.mark.parametrize("cap", [0.01, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("low", [-3.0, -40.0, -300.0])
def test_scores_near_their_cap_are_selected_exactly(cap, low):
    """Where float32 has few numbers below the cap, many keys tie, and the lowest of them are kept."""
    query, key, value = (normal(1, 2, n, 16) for n in (100, 700, 700))
    for scale in (0.1, 1.0, -3.0):
        score = f"div({cap}) tanh mul({cap}) keep($0, {low})"
        check(query, key, value, score, [one_in(3, 1, 1, 100, 700)], scale=scale, k=20)
    query, key = torch.full((1, 2, 100, 1), 8.0), torch.arange(700).remainder(40).view(1, 1, 700, 1).float()
    check(query, key.repeat(1, 2, 1, 1), value, f"div({cap}) tanh mul({cap})", scale=1.0, k=30, is_exact=True)


@needs_vnni
@pytest.mark.parametrize("large", [1e3, 1e8, 1e30])
def test_terms_that_cancel_are_not_taken_for_small(large):
    query, key, value = (normal(1, 1, 300, 16) for _ in range(3))
    operands = [torch.randn(1, 1, 300, 300) + large, torch.full((1, 1, 1, 1), large)]
    for score in ("add($0) sub($1)", "sub($1) add($0)"):
        arguments = (query, key, value, operands, score, 0.5, 7, None, 0.0, True)
        with screening.forced(False):
            expected = cpu.attention_forward(*arguments)
        with screening.forced(True):
            actual = cpu.attention_forward(*arguments)
        products = query @ key.mT * 0.5
        first, second = operands if score[0] == "a" else (-operands[1], -operands[0])
        scores = products + first - second  # in float32, as the kernel rounds them
        kept, other = (scores.gather(-1, x[1].long()).sort(-1).values for x in (actual, expected))
        assert (kept - other).abs().max() <= 2e-7 * large + 1e-5


@needs_vnni
@pytest.mark.parametrize("scale", [1.0, -0.125, 0.0, 1e-12, -1e12, 1e-5])
def test_any_scale_gives_the_same(scale):
    query, key, value = (normal(1, 1, 300, 24) for _ in range(3))
    counts, _ = check(query, key, value, "causal", scale=scale, k=9)
    assert (counts.screened + counts.left == 300) == (1e-6 < abs(scale) < 1e6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 16, 33, 40, 80, 96, 200, 256, 512, 513])
def test_head_sizes_give_the_same(size, dtype):
    query, key, value = (normal(1, 2, 333, size, dtype=dtype) for _ in range(3))
    check(query, key, value, "causal", scale=max(size, 1) ** -0.5, k=8)


@pytest.mark.parametrize("keys", [1, 2, 31, 32, 33, 255, 256, 257, 1000])
@pytest.mark.parametrize("k", [1, 16, 256, 2000])
def test_few_keys_and_large_k_give_the_same(keys, k):
    query, key, value = normal(2, 3, 40, 20), normal(2, 1, keys, 20), normal(2, 3, keys, 4)
    check(query, key, value, k=k)
    check(query, key, value, "causal", k=k)


def test_dropout_and_threads_change_nothing():
    query, key, value = normal(2, 4, 200, 32), *(normal(2, 2, 900, 32) for _ in range(2))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            keep = torch.rand(2, 4, 200, 12, generator=torch.Generator().manual_seed(0)) < 0.5
            found.append(check(query, key, value, k=12, dropout_keep=keep)[1])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(x.equal(y) for x, y in zip(found[0], other, strict=True))


# --- the choice


def affine(score, *dtypes):
    return affine_of(Score.parse(score).before, [OperandKind(x, "dense") for x in dtypes])


def test_programs_are_told_by_what_they_make_of_scores():
    for score in ("", "causal", "causal mask($0) fill($1, -inf)", "set(where($0, -inf, s))"):
        assert affine(score, torch.bool, torch.bool).only_masks
    found = affine("mul(2.0) add($0) div(4.0) sub(1.0)", torch.float32)
    assert (found.factor, found.operations, found.highest_fill, found.only_masks) == (0.5, 4, -INF, False)
    assert sorted((x.sign, x.weight) for x in found.terms) == [(-1, 1.0), (1, 0.25)]
    assert affine("keep($0, -8.0) mul(0.25) causal fill($0, -3.0)", torch.bool).highest_fill == -2.0
    for score in (
        "exp",
        "mul($0)",
        "mul(-2.0)",
        "mul(0.0)",
        "keep(lt(s, 1.0), -inf)",
        "fill(lt(i, j), inf)",
        "add(s)",
    ):
        assert affine(score, torch.float32) is None
    assert affine("add($0) " * 50, torch.float32) is None
    found = affine("div(50.0) tanh mul(30.0) add(where($0, 0.0, -1e9)) keep($0, -1e8) causal", torch.bool)
    assert (found.factor, found.cap, found.highest_fill, found.terms) == (1 / 50, 30.0, -1e8, ())
    for score in ("tanh add($0)", "add($0) tanh", "causal tanh", "tanh tanh", "tanh add(where(le(i, j), 0.0, 1.0))"):
        assert affine(score, torch.float32) is None


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_screening_is_chosen_for_many_keys_of_which_few_are_kept(dtype):
    few, many = (torch.empty(1, 1, n, 64, dtype=dtype) for n in (512, 65536))
    assert not screening.is_used(few, few, 16, affine("causal"))
    assert screening.is_used(many, many, 64, affine("causal"))
    assert not screening.is_used(many, many, 64, None)
    assert not screening.is_used(many, many, 8192, affine("causal"))
    assert not screening.is_used(many[:, :, :1], many, 64, affine("causal"))
    with build.instruction_set("portable"), screening.forced(True):
        assert not screening.is_used(many, many, 64, affine("causal"))


# --- property


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    key_heads, group, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries, keys = draw(st.sampled_from([17, 30, 130])), draw(st.sampled_from([20, 300, 1200]))
    size, value_size = draw(st.sampled_from([1, 7, 16, 40, 64])), draw(st.sampled_from([1, 16, 37]))
    query = normal(batch, key_heads * group, queries, size, generator=generator)
    key = normal(batch, key_heads, keys, size, generator=generator)
    value = normal(batch, key_heads, keys, value_size, generator=generator)
    key = HARD[draw(st.sampled_from(sorted(HARD)))](key, generator) if draw(st.booleans()) else key
    query = HARD[draw(st.sampled_from(sorted(HARD)))](query, generator) if draw(st.booleans()) else query
    layouts = sorted(LAYOUTS)
    inputs = [LAYOUTS[draw(st.sampled_from(layouts))](x.to(dtype)) for x in (query, key, value)]
    shape = [s if draw(st.booleans()) else 1 for s in (batch, key_heads * group, queries, keys)]
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.98]))
    bias = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 3.0, 100.0, 1e5]))
    is_other = torch.rand(shape, generator=generator) < 0.01
    bias = bias.masked_fill(is_other, draw(st.sampled_from([0.0, -INF, LOWEST, 1e9, NAN])))
    score, operands = draw(
        st.sampled_from(
            [
                *(("", []), ("causal", []), ("mask($0)", [mask]), ("mask($0) causal", [mask])),
                *(("add($0)", [bias]), ("add($0) causal", [bias]), ("keep($0, -1e6) add($1)", [mask, bias])),
                *(("div(9.0) tanh mul(9.0) causal", []), ("tanh keep($0, -9.0)", [mask])),
                *(("mul(0.5) sub($0) div(0.3)", [bias]), (f"add(where($0, 0.0, {LOWEST}))", [mask])),
            ]
        )
    )
    options = {
        "scale": draw(st.sampled_from([0.125, 1.0, -0.5])),
        "k": draw(st.sampled_from([1, 8, 50, 400])),
        "zero_empty_rows": draw(st.booleans()),
    }
    return inputs, score, operands, options


@needs_vnni
@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(problems())
def test_any_call_gives_the_same(problem):
    inputs, score, operands, options = problem
    counts, _ = check(*inputs, score, operands, **options)
    assert counts.screened + counts.left in (0, inputs[0].shape[:3].numel())


STEPS = (
    "add($f)",
    "sub($f)",
    "mask($f)",
    "mask($b)",
    "mul(2.0)",
    "div(4.0)",
    f"keep($b, {LOWEST})",
    "keep($b, -30000.0)",
    "keep($b, -8.0)",
    "fill($b, -1e9)",
    "fill($b, -inf)",
    "causal",
    f"add(where(le(j, i), 0.0, {LOWEST}))",
    "add(where(le(j, i), 0.0, -64.0))",
    "add(mul(-0.5, float32(sub(j, i))))",
    "keep(gt(j, sub(i, 100)), -inf)",
)
"""Each with an operand of floats $f or of booleans $b."""


@st.composite
def exact_problems(draw):
    """Integers and quarters, whose scores float32 knows exactly but for a few that are far too low to be kept."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.sampled_from([17, 50, 130])), draw(st.sampled_from([40, 256, 300, 1300]))
    size = draw(st.sampled_from([1, 4, 16, 33]))

    def whole(most, *shape):
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    query, value = whole(4, batch, key_heads * group, queries, size), torch.randn(batch, key_heads, keys, 3)
    key = whole(4, batch, key_heads, keys, size) + whole(draw(st.sampled_from([0, 20])), size)
    query[:, :, :: draw(st.sampled_from([3, 1000]))] = 0

    def operand(kind):
        shape = [s if draw(st.booleans()) else 1 for s in (batch, key_heads * group, queries, keys)]
        chance = torch.rand(shape, generator=generator)
        if kind == "b":
            return chance < draw(st.sampled_from([0.02, 0.3, 0.98]))
        x = (torch.randn(shape, generator=generator) * draw(st.sampled_from([4, 400, 1e5]))).round() / 4
        other = draw(st.sampled_from([0.0, -INF, LOWEST, -1e9, -300.0, 65536.0, INF, NAN]))
        return x.masked_fill(chance < draw(st.sampled_from([0.0, 0.01, 0.95])), other)

    steps, operands = draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4)), []
    for number, step in enumerate(steps):
        for kind in ("f", "b"):
            if f"${kind}" in step:
                operands.append(operand(kind))
                steps[number] = step.replace(f"${kind}", f"${len(operands) - 1}")
    options = {"scale": draw(st.sampled_from([1.0, 0.25, -0.5])), "k": draw(st.sampled_from([1, 3, 16, 60]))}
    return (query, key, value, " ".join(steps), operands), options


@needs_vnni
@settings(derandomize=True, max_examples=80, deadline=None, database=None)
@given(exact_problems())
def test_any_affine_program_gives_the_same_bits(problem):
    arguments, options = problem
    counts, _ = check(*arguments, **options, is_exact=True)
    assert counts.screened + counts.left == arguments[0].shape[:3].numel()
