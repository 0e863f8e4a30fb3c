"""The C++ kernels of attention, on each instruction set of this processor: selection, weights, output and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import LAYOUTS, assert_near, attention_inputs, integers
from kernel_checks import DTYPES, INF, LOWEST, NAN
from kernel_checks import check_attention as check
from topk_fx.lowering import aten, cpu
from topk_fx.lowering.cpu import build
from topk_fx.lowering.cpu.score_code import NoCodeError, OperandKind, source_of

from topk_fx.errors import LoweringUnavailableError
from topk_fx.score import Score

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
@pytest.mark.parametrize(("queries", "keys", "size"), [(1, 700, 80), (3, 129, 64), (111, 263, 33), (200, 200, 96)])
def test_selection_is_exact_on_every_instruction_set(instructions, queries, keys, size, dtype):
    query, key, value = (
        x.detach() for x in attention_inputs((1,), 4, queries, keys, size, 20, key_heads=2, dtype=dtype)
    )
    check(query, key, value, is_exact=True)
    check(query, key, value, "causal", scale=-0.25, k=64, is_exact=True)
    random = (torch.randn(x.shape).to(dtype) for x in (query, key, value))
    check(*random, "causal", k=40)


def test_hard_rows_on_every_instruction_set(instructions):
    """NaN and infinite scores, rows without a key, ties of everything, fewer keys than k, a zero scale."""
    query, key, value = (x.detach() for x in attention_inputs((2,), 2, 40, 150, 16, 24))
    query[0, 0, 3, 2], query[0, 1, 5, 0], key[1, 0, 17, 3] = NAN, INF, NAN
    mask = torch.rand(1, 2, 40, 150) < 0.1
    mask[:, :, 7] = False
    for zero_empty_rows in (False, True):
        check(query, key, value, "mask($0)", [mask], k=30, zero_empty_rows=zero_empty_rows, is_exact=True)
    clean = [torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (query, key, value)]
    check(*clean, scale=0.0, k=9, is_exact=True)
    check(*clean, "add($0)", [torch.where(mask, 0.0, LOWEST)], k=30, is_exact=True)


SCORES = {
    "soft_cap": ("div(2.0) tanh mul(2.0) add($0) causal", lambda: [torch.randn(1, 4, 1, 150)]),
    "window": ("keep(and(le(j, i), gt(j, sub(i, 20))), -inf)", list),
    "finite_causal": (f"add(where(le(j, i), 0.0, {LOWEST}))", list),
    "half_mask": (
        "add($0)",
        lambda: [torch.zeros(1, 1, 150, 150).masked_fill(torch.rand(150, 150) < 0.5, -1e4).bfloat16()],
    ),
    "padding": ("keep(and(le(j, i), $0), -inf)", lambda: [(torch.arange(150) < 90).view(1, 1, 1, 150)]),
    "alibi": ("add(mul($0, float32(sub(j, i)))) causal", lambda: [torch.rand(1, 4, 1, 1)]),
    "documents": ("keep(eq($0, $1), -inf)", lambda: [(torch.arange(150) // 40).view(1, 1, s, -1) for s in (150, 1)]),
    "lookup": ("add(lookup($0, minimum(abs(sub(j, i)), 15)))", lambda: [torch.randn(1, 4, 1, 16)]),
    "strided_bias": ("add($0)", lambda: [torch.randn(1, 4, 150, 150).mT]),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_functions_match_the_definition(name, instructions):
    score, operands = SCORES[name]
    query, key, value = (torch.randn(1, 4, 150, 32) for _ in range(3))
    check(query, key, value, score, operands(), k=11)
    check(query[:, :, :1], key, value, score, [x[:, :, :1] for x in operands()], k=11)


@pytest.mark.parametrize("score", ["sink($0)", "sink($0) softmax mul($1)", "causal softmax mul($1) add($0)"])
def test_sinks_and_steps_after_the_softmax_match_aten(score, instructions):
    query, key, value = (torch.randn(2, 4, 60, 16) for _ in range(3))
    operands = [torch.randn(1, 4, 1, 1), torch.randn(1, 4, 60, 60)][: 1 + score.count("$1")]
    keep = torch.rand(2, 4, 60, 9) < 0.5
    arguments = (query, key, value, operands, score, 0.5, 9)
    for dropout in ((None, 0.0), (keep, 0.5)):
        output, indices, weights = cpu.attention_forward(*arguments, *dropout, True)
        _, expected, probabilities = aten.attention_forward(*arguments, None, 0.0, True)
        order, expected_order = indices.sort(-1), expected.sort(-1)
        assert order.values.equal(expected_order.values)
        torch.testing.assert_close(
            weights.abs().gather(-1, order.indices), probabilities.gather(-1, expected_order.indices)
        )
        if dropout[0] is None:
            assert_near(output, aten.attention_forward(*arguments, None, 0.0, True)[0])
        else:
            assert weights.signbit().equal(~keep & (indices >= 0))


@pytest.mark.parametrize("k", [1, 16, 100, 200])
def test_there_is_room_for_all_candidates_where_masked_blocks_precede_others(instructions, k):
    """The first keys are the best, and are candidates already; the mask masks something in some blocks alone."""
    query, value = torch.ones(1, 1, 40, 16), torch.randn(1, 1, 2000, 16)
    key = (torch.arange(2000.0) / -8).view(1, 1, -1, 1).expand(1, 1, 2000, 16)
    for masked in ([5, 133], [5, 133, 261], [5, 133, 700, 850], range(0, 2000, 300)):
        mask = torch.ones(1, 1, 40, 2000, dtype=torch.bool)
        mask[..., list(masked)] = False
        check(query, key, value, "mask($0)", [mask], k=k, is_exact=True)


@pytest.mark.parametrize(
    ("score", "other", "dtype"),
    [("mask($0)", False, torch.bool), ("add($0)", -INF, torch.float32), ("add($0) causal", -3.0, torch.bfloat16)],
)
def test_operands_read_for_many_blocks_belong_to_their_block(score, other, dtype, instructions):
    """Blocks that are masked, and blocks of which much is known, stand among those of which nothing is."""
    query, key, value = integers(2, 4, 30, 16), integers(2, 2, 3000, 16), torch.randn(2, 2, 3000, 16)
    for batch, heads in ((2, 4), (2, 1), (1, 1)):
        blocks = (
            torch.randint(0, 3, (batch, heads, 3, 24)).repeat_interleave(10, 2).repeat_interleave(128, 3)[..., :3000]
        )
        is_other = (blocks == 0) | ((blocks == 1) & (torch.randint(0, 2, blocks.shape) == 1))
        operand = torch.where(is_other, torch.tensor(other), torch.tensor(True if dtype is torch.bool else 0.0)).to(
            dtype
        )
        if dtype.is_floating_point:
            operand[0, 0, 25, 1400] = NAN
        for layout in (operand, operand.mT.contiguous().mT):
            check(query, key, value, score, [layout], k=9, is_exact=True)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
@pytest.mark.parametrize("k", [1, 64, 500])
def test_skewed_scores_are_selected_exactly(order, k):
    """Each key better than the last is the most work, all equal the most ties."""
    steps = {"rising": torch.arange(1000.0), "falling": -torch.arange(1000.0), "equal": torch.zeros(1000)}[order]
    key = torch.cat([steps.view(1, 1, 1000, 1), torch.ones(1, 1, 1000, 3)], -1)
    query, value = torch.ones(1, 1, 100, 4), torch.randn(1, 1, 1000, 8)
    check(query, key, value, k=k, scale=1.0, is_exact=True)


@pytest.mark.parametrize("size", [32, 80, 96, 256])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3), (8, 12)])
def test_head_sizes_and_counts_match_the_definition(size, batch, heads):
    query, key, value = (torch.randn(batch, heads, 67, size) for _ in range(3))
    check(query, key, value, "causal", scale=size**-0.5, k=16)


def test_a_row_whose_keys_are_all_masked_by_a_finite_number_keeps_the_lowest():
    query, key, value = (torch.randn(1, 1, 400, 16) for _ in range(3))
    mask = torch.zeros(1, 1, 400, 400).masked_fill(torch.ones(400, 400, dtype=torch.bool).triu(1), LOWEST)
    mask[:, :, 100] = LOWEST
    indices = check(query, key, value, "add($0)", [mask], k=16)
    assert indices[0, 0, 100].tolist() == list(range(16))
    output = cpu.attention_forward(query, key, value, [mask], "add($0)", 0.5, 16, None, 0.0, True)[0]
    assert_near(output[0, 0, 100], value[0, 0, :16].mean(0))


def test_zeros_of_both_signs_are_equal(instructions):
    query, key, value = torch.zeros(1, 1, 20, 8), torch.randn(1, 1, 300, 8), torch.randn(1, 1, 300, 8)
    zeros = torch.where(torch.rand(1, 1, 20, 300) < 0.5, 0.0, -0.0)
    indices = check(query, key, value, "add($0)", [zeros], scale=-1.0, k=9, is_exact=True)
    assert indices[0, 0].equal(torch.arange(9, dtype=torch.int32).expand(20, 9))


# --- threads


@pytest.mark.parametrize("queries", [1, 300])
def test_number_of_threads_changes_no_bit(queries):
    query, key, value = torch.randn(1, 2, queries, 32), *(torch.randn(1, 1, 3000, 32) for _ in range(2))
    grad = torch.randn(1, 2, queries, 32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            arguments = (query, key, value, [], "", 0.2)
            output, indices, weights = cpu.attention_forward(*arguments, 40, None, 0.0, True)
            grads = cpu.attention_backward(grad, *arguments, indices, weights, 0.0, [])
            found.append((output, indices, weights, *grads))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(x.equal(y) for x, y in zip(found[0], other, strict=True))


# --- backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key_heads", "value_heads"), [(4, 4), (2, 2), (1, 4)], ids=str)
def test_gradients_match_those_of_aten_in_float64(instructions, key_heads, value_heads, dtype):
    query, key, _ = (x.detach() for x in attention_inputs((2,), 4, 60, 90, 20, 4, key_heads=key_heads, dtype=dtype))
    value, bias = torch.randn(2, value_heads, 90, 12).to(dtype), integers(1, 4, 60, 90)
    arguments, score = (query, key, value, [bias]), "div(4.0) tanh add($0) causal"
    output, indices, weights = cpu.attention_forward(*arguments, score, 0.5, 9, None, 0.0, True)
    grad = torch.randn(output.shape).to(dtype)
    rest = (indices, weights.double(), 0.0, [True])
    actual = cpu.attention_backward(grad, *arguments, score, 0.5, indices, weights, 0.0, [True])
    wide = [x.double() for x in arguments[:3]]
    expected = aten.attention_backward(grad.double(), *wide, [bias.double()], score, 0.5, *rest)
    for x, y in zip(actual, expected, strict=True):
        magnitude = y.abs().max().item()
        torch.testing.assert_close(x.double(), y, rtol=0, atol=(2e-2 if x.dtype != torch.float32 else 2e-5) * magnitude)


# --- what has no code


def test_every_reason_names_what_is_missing():
    query = torch.randn(1, 1, 8, 4)
    assert cpu.why_not(query, query, query, [], "causal") == ""
    assert "dtype torch.float64" in cpu.why_not(*(query.double(),) * 3, [], "")
    assert "the operation elu" in cpu.why_not(query, query, query, [], "elu(1.0)")
    bias = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    assert "operand $0 has dtype torch.float64" in cpu.why_not(query, query, query, [bias], "add($0)")
    with pytest.raises(NoCodeError, match="the operation elu"):
        source_of(Score.parse("elu(1.0)").before, Score.parse("").after, [])
    with (
        pytest.raises(LoweringUnavailableError, match="this processor has no neon"),
        build.instruction_set("neon"),
    ):
        pass


def test_masks_that_mask_nothing_are_left_out_of_a_block():
    kind = OperandKind(torch.bool, "dense")
    code = source_of(Score.parse("keep(and(le(j, i), $0), -inf)").before, Score.parse("").after, [kind])
    assert "? Change::NONE : Change::ANY" in code
    code = source_of(Score.parse("tanh keep(le(j, i), -inf)").before, Score.parse("").after, [])
    assert "? Change::WITHOUT_MASKS : Change::ANY" in code


# --- property


@st.composite
def problems(draw):
    """A call of `check`: inputs, score function, its operands, and options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = {
        "batch": (draw(st.integers(1, 2)),),
        "heads": key_heads * group,
        "key_heads": key_heads,
        "queries": draw(st.sampled_from([1, 2, 4, 8, 9, 16, 17, 30, 130])),
        "keys": draw(st.sampled_from([1, 5, 64, 65, 128, 300, 1100])),
        "head_size": draw(st.sampled_from([1, 7, 16, 33, 40, 64])),
        "value_size": draw(st.sampled_from([1, 15, 16, 37])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "generator": generator,
    }
    inputs = [x.detach() for x in attention_inputs(**sizes)]
    is_exact = draw(st.booleans())
    if not is_exact:
        inputs = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in inputs]
    elif draw(st.booleans()):
        for x in inputs[:2]:
            x.masked_fill_(torch.rand(x.shape, generator=generator) < 1e-3, draw(st.sampled_from([NAN, INF, -INF])))
    layouts = sorted(LAYOUTS)
    inputs = [LAYOUTS[draw(st.sampled_from(layouts))](x) for x in inputs]
    full = (*sizes["batch"], sizes["heads"], sizes["queries"], sizes["keys"])
    shape = [size if draw(st.booleans()) else 1 for size in full]
    masked = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.9]))
    bias = integers(*shape, generator=generator)
    if draw(st.booleans()):
        masked, bias = (x.mT.contiguous().mT for x in (masked, bias))
    width = torch.full((1, 1, 1, 1), draw(st.sampled_from([1, 20, 100])))
    score, operands = draw(
        st.sampled_from(
            [
                ("", []),
                ("causal", []),
                ("mask($0)", [~masked]),
                ("add($0) causal", [bias.masked_fill(masked, -INF)]),
                ("add($0)", [torch.zeros_like(bias).masked_fill(masked, LOWEST)]),
                ("keep(and(le(j, i), gt(j, sub(i, $0))), -inf)", [width]),
            ]
        )
    )
    options = {
        "scale": draw(st.sampled_from([0.125, 1.0, -0.5])),
        "k": draw(st.sampled_from([1, 2, 8, 50, 400])),
        "zero_empty_rows": draw(st.booleans()),
        "is_exact": is_exact,
    }
    return inputs, score, operands, options


@pytest.mark.parametrize("name", build.supported_instruction_sets())
@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(problem=problems())
def test_any_call_matches_the_definition(name, problem):
    inputs, score, operands, options = problem
    with build.instruction_set(name):
        check(*inputs, score, operands, **options)
        assert_threads_change_no_bit(*inputs, score, operands, options)


def assert_threads_change_no_bit(query, key, value, score, operands, options):
    """Forward and backward by one thread and by two."""
    arguments = (query, key, value, operands, score, options["scale"])
    grad = torch.randn(*query.shape[:3], value.size(-1)).to(value.dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            output, *saved = cpu.attention_forward(*arguments, options["k"], None, 0.0, options["zero_empty_rows"])
            gradients = cpu.attention_backward(grad, *arguments, *saved, 0.0, [False] * len(operands))
            found.append((output, *saved, *gradients))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=0, equal_nan=True)
