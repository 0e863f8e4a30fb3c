"""The score language: text, values, derivatives, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from inputs import assert_matches, separated_inputs
from torch import Tensor, tensor

from topk_fx import reference
from topk_fx.errors import ConfigError, DTypeError
from topk_fx.score import Operand, Score, Step, apply, check_operands, differentiate_step

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


# --- text


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", ()),
        ("causal", (Step("causal"),)),
        ("add($0)", (Step("add", (Operand(0),)),)),
        ("mul(0.125)", (Step("mul", (0.125,)),)),
        ("mul(-2)", (Step("mul", (-2.0,)),)),
        ("keep($12, -inf)", (Step("keep", (Operand(12), -math.inf)),)),
        ("fill($0, $1)", (Step("fill", (Operand(0), Operand(1))),)),
        ("div(50.0) tanh mul(50.0)", (Step("div", (50.0,)), Step("tanh"), Step("mul", (50.0,)))),
        ("clamp(-1e-05,1e5)", (Step("clamp", (-1e-5, 1e5)),)),
    ],
)
def test_text_is_read_and_written_back(text, steps):
    score = Score.parse(text)
    assert score.steps == steps
    assert Score.parse(str(score)) == score


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sqrt", "no step sqrt with 0 arguments"),
        ("add", "no step add with 0 arguments"),
        ("add()", "no step add with 0 arguments"),
        ("add($0, $1)", "no step add with 2 arguments"),
        ("tanh(2)", "no step tanh with 1 arguments"),
        ("tanhcausal", "no step tanhcausal"),
        ("add(x)", "'x' is neither a number nor an operand"),
        ("add($x)", r"'\$x' is neither a number nor an operand"),
        ("add(1) + 2", r"cannot read it from '\+ 2'"),
        ("add(1", "no step add with 0 arguments|cannot read it"),
        (" tanh", "cannot read it from ' tanh'"),
        ("keep(1.0, 0.0)", r"keep.*condition"),
        ("fill(1.0, 0.0)", r"fill.*condition"),
    ],
)
def test_text_that_is_no_score_is_refused(text, message):
    with pytest.raises(ConfigError, match=rf"score=.* is not accepted: .*({message})"):
        Score.parse(text)


# --- values of the steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [-2.0, 0.5, 3.0]),
        ("add(1.5)", [-0.5, 2.0, 4.5]),
        ("add($0)", [8.0, 20.5, 33.0]),
        ("mul(-2)", [4.0, -1.0, -6.0]),
        ("mul($0)", [-20.0, 10.0, 90.0]),
        ("div(4)", [-0.5, 0.125, 0.75]),
        ("div($0)", [-0.2, 0.025, 0.1]),
        ("tanh", [-0.9640275801, 0.4621171573, 0.9950547537]),
        ("clamp(-1, 2)", [-1.0, 0.5, 2.0]),
        ("mask($0)", [8.0, 20.5, 33.0]),
        ("mask($1)", [-2.0, -math.inf, 3.0]),
        ("keep($1, -inf)", [-2.0, -math.inf, 3.0]),
        ("keep($1, $0)", [-2.0, 20.0, 3.0]),
        ("fill($1, 7)", [7.0, 0.5, 7.0]),
        ("fill($1, $0)", [10.0, 0.5, 30.0]),
        ("causal", [-2.0, 0.5, -math.inf]),
        ("mul(2) add(1)", [-3.0, 2.0, 7.0]),
        ("add(1) mul(2)", [-2.0, 3.0, 8.0]),
    ],
)
def test_steps_apply_from_left_to_right(text, expected):
    operands = [tensor([10.0, 20.0, 30.0], dtype=torch.float64), tensor([True, False, True])]
    scores = tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    is_future = tensor([False, False, True])
    actual = apply(Score.parse(text), scores, lambda operand: operands[operand.index], lambda: is_future)
    torch.testing.assert_close(actual, tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_numeric_operand_takes_the_dtype_of_the_scores():
    scores = torch.zeros(2, dtype=torch.float32)
    for dtype in (torch.int64, torch.bool, torch.float64, torch.bfloat16):
        operand = tensor([1, 0], dtype=dtype)
        actual = apply(Score.parse("add($0)"), scores, lambda _, x=operand: x, lambda: None)
        assert actual.dtype == torch.float32
        assert actual.tolist() == [1.0, 0.0]


# --- derivatives of the steps


@pytest.mark.parametrize(
    "text",
    [
        *("add(1.5)", "add($0)", "mul(-2)", "mul($0)", "div(4)", "div($0)", "tanh", "clamp(-1, 0.5)"),
        *("clamp($0, 0.5)", "clamp(-1, $0)", "mask($0)", "mask($1)"),
        *("keep($1, 7)", "keep($1, $0)", "fill($1, 7)", "fill($1, $0)"),
    ],
)
def test_derivative_of_a_step_is_that_of_autograd(text):
    (step,) = Score.parse(text).steps
    before = torch.randn(64, dtype=torch.float64).requires_grad_()
    operand = torch.randn(64, dtype=torch.float64).requires_grad_()
    operands = [operand, torch.rand(64) < 0.5]
    grad = torch.randn(64, dtype=torch.float64)

    def read(x: Operand) -> Tensor:
        return operands[x.index]

    if text == "clamp($0, 0.5)":
        after = torch.minimum(torch.maximum(before, operand), tensor(0.5, dtype=torch.float64))
    elif text == "clamp(-1, $0)":
        after = torch.minimum(before.clamp(min=-1.0), operand)
    else:
        after = apply(Score((step,)), before, read, lambda: None)
    expected, expected_operand = torch.autograd.grad(after, (before, operand), grad, allow_unused=True)
    with torch.no_grad():
        actual, actual_operands = differentiate_step(step, before, grad, read)
    torch.testing.assert_close(actual, expected)
    assert (expected_operand is None) == (0 not in actual_operands)
    if expected_operand is not None:
        torch.testing.assert_close(actual_operands[0], expected_operand)


@pytest.mark.parametrize(
    "text", ["", "add($0)", "mask($0)", "mul(2.0)", "div(2.0)", "keep($0, -inf)", "fill($0, 0.0)", "causal"]
)
def test_backward_needs_no_scores(text):
    assert not Score.parse(text).needs_scores_in_backward


@pytest.mark.parametrize("text", ["tanh", "clamp(0, 1)", "mul($0)", "div($0)", "add($0) tanh causal"])
def test_backward_needs_scores(text):
    assert Score.parse(text).needs_scores_in_backward


@pytest.mark.parametrize(
    ("text", "ends"),
    [("causal", True), ("add($0) causal", True), ("causal add($0)", False), ("tanh", False), ("", False)],
)
def test_no_key_beyond_the_query_counts_where_causal_is_last(text, ends):
    """A step after it may bring a masked key back, as `causal mul(-1)` does."""
    assert Score.parse(text).ends_causal == ends


# --- operands


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("add($0)", 0, r"names operands \[0\], but 0 were given"),
        ("tanh", 1, r"names operands \[\], but 1 were given"),
        ("add($1)", 1, r"names operands \[1\], but 1 were given"),
        ("add($0) add($2)", 3, r"names operands \[0, 2\], but 3 were given"),
    ],
)
def test_operands_that_the_text_does_not_name_are_refused(text, count, message):
    with pytest.raises(ConfigError, match=message):
        check_operands(Score.parse(text), [torch.zeros(1)] * count)


@pytest.mark.parametrize(
    ("text", "operand", "message"),
    [
        (
            "keep($0, 1)",
            tensor([1.0]),
            r"operand \$0 of keep\(\$0, 1.0\) has dtype torch.float32; accepted: torch.bool",
        ),
        ("fill($0, 1)", tensor([1]), r"operand \$0 of fill\(\$0, 1.0\) has dtype torch.int64; accepted: torch.bool"),
        ("add($0)", tensor([1j]), r"operand \$0 of add\(\$0\) has dtype torch.complex64; accepted: a real dtype"),
    ],
)
def test_operand_of_another_dtype_is_refused(text, operand, message):
    with pytest.raises(DTypeError, match=message):
        check_operands(Score.parse(text), [operand])


# --- the steps in the op


@dataclasses.dataclass(frozen=True)
class Case:
    """A score function, its operands' shapes ("?" for boolean ones) and the same in plain PyTorch."""

    text: str
    dense: Callable[..., Tensor]
    operands: tuple[tuple[int, ...] | str, ...] = ()


FUTURE = torch.ones(4, 6, dtype=torch.bool).triu(1)
CASES = {
    "add_number": Case("add(0.5)", lambda s: s + 0.5),
    "add_bias_per_head": Case("add($0)", lambda s, b: s + b, ((1, 2, 4, 6),)),
    "mul_number": Case("mul(-1.5)", lambda s: s * -1.5),
    "mul_per_head": Case("mul($0)", lambda s, x: s * x, ((2, 1, 1),)),
    "div_per_query": Case("div($0)", lambda s, x: s / x, ((1, 1, 4, 1),)),
    "tanh": Case("tanh", torch.tanh),
    "soft_cap_then_bias": Case(
        "div(2.0) tanh mul(2.0) add($0)", lambda s, b: 2.0 * torch.tanh(s / 2.0) + b, ((1, 1, 1, 6),)
    ),
    "clamp": Case("clamp(-1.0, 1.5) add($0)", lambda s, b: s.clamp(-1.0, 1.5) + b, ((1, 2, 4, 6),)),
    "boolean_mask": Case("mask($0)", lambda s, m: s.masked_fill(~m, -math.inf), ("?",)),
    "additive_mask_then_causal": Case(
        "mask($0) causal", lambda s, b: (s + b).masked_fill(FUTURE, -math.inf), ((1, 1, 4, 6),)
    ),
    "keep_or_minus_infinity": Case("keep($0, -inf)", lambda s, m: s.masked_fill(~m, -math.inf), ("?",)),
    "keep_or_number": Case("keep($0, -3.0) add($1)", lambda s, m, b: torch.where(m, s, -3.0) + b, ("?", (4, 6))),
    "keep_or_operand": Case("keep($1, $0)", lambda s, x, m: torch.where(m, s, x), ((1, 2, 4, 6), "?")),
    "fill_with_operand": Case("fill($0, $1)", lambda s, m, x: torch.where(m, x, s), ("?", (2, 4, 6))),
    "causal": Case("causal", lambda s: s.masked_fill(FUTURE, -math.inf)),
    "causal_then_bias": Case("causal add($0)", lambda s, b: s.masked_fill(FUTURE, -math.inf) + b, ((6,),)),
    "several_operands": Case(
        "add($0) mul($1) keep($2, -inf) add($3)",
        lambda s, a, x, m, b: ((s + a) * x).masked_fill(~m, -math.inf) + b,
        ((4, 6), (1, 2, 1, 1), "?", (1, 1, 1, 6)),
    ),
    "operand_used_twice": Case("add($0) mul($0)", lambda s, a: (s + a) * a, ((1, 2, 4, 6),)),
}


def _operands(case: Case) -> list[Tensor]:
    drawn = []
    for shape in case.operands:
        if shape == "?":
            mask = torch.rand(1, 1, 4, 6) < 0.7
            mask[..., 0] = True  # no row without a key: its gradient is NaN in the dense form
            drawn.append(mask)
        else:
            drawn.append((torch.rand(shape, dtype=torch.float64) + 0.5).requires_grad_())
    return drawn


def _op(query: Tensor, key: Tensor, value: Tensor, *operands: Tensor, text: str, k: int) -> Tensor:
    return torch.ops.topk_fx.attention(query, key, value, operands, text, 0.7, k)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("name", CASES)
def test_score_in_the_op_matches_plain_pytorch(name, k):
    case = CASES[name]

    def dense(query: Tensor, key: Tensor, value: Tensor, *operands: Tensor, text: str, k: int) -> Tensor:
        scores = case.dense(0.7 * query @ key.transpose(-2, -1), *operands)
        return reference.weigh(*reference.select(scores, k), value)

    assert_matches(_op, dense, *separated_inputs(), *_operands(case), text=case.text, k=k)


@pytest.mark.parametrize("name", CASES)
def test_score_in_the_op_passes_gradcheck(name):
    case = CASES[name]
    inputs = separated_inputs(), _operands(case)
    flat = [x for group in inputs for x in group]
    scores = case.dense(0.7 * flat[0] @ flat[1].transpose(-2, -1), *flat[3:])
    gaps = scores.sort().values.diff()
    assert (gaps[gaps.isfinite() & (gaps != 0)] > 1e-4).all(), "finite differences would change the selection"
    torch.autograd.gradcheck(lambda *x: _op(*x, text=case.text, k=3), flat, fast_mode=True)
