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

    scores [B, Hq, Lq, Lk]. The rounding of a score is in proportion to the norms of its query and its key.
    """
    norms = key.double().norm(dim=-1).repeat_interleave(query.size(1) // key.size(1), 1).unsqueeze(-2)
    roundings = 1e-6 * abs(scale) * query.double().norm(dim=-1, keepdim=True) * norms + 1e-36
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


def test_other_steps_are_not_screened():
    query, key, value = (normal(1, 1, 200, 16) for _ in range(3))
    bias = normal(1, 1, 200, 200)
    for score in (
        "add($0)",
        "mask($0)",
        "tanh",
        "keep(le(j, i), -10000.0)",
        "keep(gt(s, 0.0), -inf)",
        "mul($0) causal",
    ):
        counts, _ = check(query, key, value, score, [bias][: score.count("$0")])
        assert counts.screened == counts.left == 0


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


def test_only_programs_that_mask_are_screened():
    def only_masks(score, *dtypes):
        return screening.only_masks(Score.parse(score).before, [OperandKind(x, "dense") for x in dtypes])

    assert only_masks("")
    assert only_masks("causal mask($0) fill($1, -inf)", torch.bool, torch.bool)
    assert not only_masks("mask($0)", torch.float32)
    assert not only_masks("causal mul(2.0)")
    assert not only_masks("keep(le(j, i), 0.0)")
    assert not only_masks("keep(lt(s, 1.0), -inf)")


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_screening_is_chosen_for_many_keys_of_which_few_are_kept(dtype):
    few, many = (torch.empty(1, 1, n, 64, dtype=dtype) for n in (512, 65536))
    program = Score.parse("causal").before
    assert not screening.is_used(few, few, 16, program, [])
    assert screening.is_used(many, many, 64, program, [])
    assert not screening.is_used(many, many, 8192, program, [])
    assert not screening.is_used(many[:, :, :1], many, 64, program, [])
    with build.instruction_set("portable"), screening.forced(True):
        assert not screening.is_used(many, many, 64, program, [])


# --- property


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    key_heads, group, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries, keys = draw(st.sampled_from([9, 30, 130])), draw(st.sampled_from([20, 300, 1200]))
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
    score, operands = draw(
        st.sampled_from([("", []), ("causal", []), ("mask($0)", [mask]), ("mask($0) causal", [mask])])
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
