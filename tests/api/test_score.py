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
from topk_fx.score import OPERATIONS, Binding, Call, Name, Operand, Score, Step, check_operands, differentiate, evaluate
from topk_fx.score.operations import CAST_DTYPES

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


# --- text


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("", ()),
        ("causal", (Step("causal"),)),
        ("add($0)", (Step("add", (Operand(0),)),)),
        ("mul(0.125)", (Step("mul", (0.125,)),)),
        ("mul(-2)", (Step("mul", (-2,)),)),
        ("keep($12, -inf)", (Step("keep", (Operand(12), -math.inf)),)),
        ("fill($0, $1)", (Step("fill", (Operand(0), Operand(1))),)),
        ("div(50.0) tanh mul(50.0)", (Step("div", (50.0,)), Step("tanh"), Step("mul", (50.0,)))),
        ("clamp(-1e-05,1e5)", (Step("clamp", (-1e-5, 1e5)),)),
        ("keep(le(j, i), -inf)", (Step("keep", (Call("le", (Name("j"), Name("i"))), -math.inf)),)),
        ("set(mul(s, sigmoid(s)))", (Step("set", (Call("mul", (Name("s"), Call("sigmoid", (Name("s"),)))),)),)),
        ("fill(eq($0, True), 0)", (Step("fill", (Call("eq", (Operand(0), True)), 0)),)),
        ("sink($0) softmax mul($1)", (Step("sink", (Operand(0),)), Step("softmax"), Step("mul", (Operand(1),)))),
        (
            "%0 = sub(j, i) add(mul($0, %0))",
            (Binding(0, Call("sub", (Name("j"), Name("i")))), Step("add", (Call("mul", (Operand(0), Name("%0"))),))),
        ),
    ],
)
def test_text_is_read_and_written_back(text, statements):
    score = Score.parse(text)
    assert score.statements == statements
    assert Score.parse(str(score)) == score


def test_numbers_keep_their_types():
    """In an expression of positions an integer computes other numbers than a float of the same value."""
    for text in ("add(mul(j, 2))", "add(mul(j, 2.0))", "add(and(True, $0))"):
        assert str(Score.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("squirt", "no step squirt with 0 arguments"),
        ("add", "no step add with 0 arguments"),
        ("add()", "no step add with 0 arguments"),
        ("add($0, $1)", "no step add with 2 arguments"),
        ("tanh(2)", "no step tanh with 1 arguments"),
        ("tanhcausal", "no step tanhcausal"),
        ("add(x)", "'x' is neither a number nor an operand"),
        ("add($x)", r"cannot read it from '\$x\)'"),
        ("add(1) + 2", r"cannot read it from '\+ 2'"),
        ("add(1", "cannot read it"),
        ("add(", "it ends too early|cannot read it"),
        ("keep(1.0, 0.0)", r"keep.*condition"),
        ("fill(1.0, 0.0)", r"fill.*condition"),
        ("mask(le(j, i))", "mask takes an operand"),
        ("add(le(j))", "no operation le of 1 arguments"),
        ("add(nothing(j))", "no operation nothing of 1 arguments"),
        ("add(%0)", "'%0' is neither a number nor an operand"),
        ("%0 = add(i, j) softmax mul(%0)", "'%0' is neither a number nor an operand"),
        ("sink($0) add($1)", "sink is the last step before the softmax"),
        ("sink($0) sink($1)", "sink stands there twice"),
        ("softmax softmax", "softmax stands there twice"),
        ("set(2.0)", "set takes an operation"),
        ("lookup($0)", "no step lookup"),
        ("add(lookup(i, j))", "lookup takes an operand"),
    ],
)
def test_text_that_is_no_score_is_refused(text, message):
    with pytest.raises(ConfigError, match=rf"score=.* is not accepted: .*({message})"):
        Score.parse(text)


# --- values of the steps


@dataclasses.dataclass
class At:
    """Positions of scores [queries, keys], with operands that are given whole."""

    operands: list[Tensor]
    queries: int = 1
    keys: int = 3

    def operand(self, index: int) -> Tensor:
        return self.operands[index]

    def table(self, index: int) -> Tensor:
        return self.operands[index]

    def query_positions(self) -> Tensor:
        return torch.arange(self.queries).unsqueeze(-1)

    def key_positions(self) -> Tensor:
        return torch.arange(self.keys)


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
        ("causal", [-2.0, -math.inf, -math.inf]),
        ("keep(and(le(j, add(i, 1)), $1), -inf)", [-2.0, -math.inf, -math.inf]),
        ("add(mul(sub(j, i), 0.5))", [-2.0, 1.0, 4.0]),
        ("add(floor_div(j, 2))", [-2.0, 0.5, 4.0]),
        ("%0 = add(j, 1) add(mul(%0, %0))", [-1.0, 4.5, 12.0]),
        ("relu", [0.0, 0.5, 3.0]),
        ("set(mul(s, gt(s, 1)))", [-0.0, 0.0, 3.0]),
        ("set(where(lt(s, 0), mul(s, 0.5), s)) add(1)", [0.0, 1.5, 4.0]),
        ("mul(2) add(1)", [-3.0, 2.0, 7.0]),
        ("add(1) mul(2)", [-2.0, 3.0, 8.0]),
    ],
)
def test_steps_apply_from_left_to_right(text, expected):
    operands = [tensor([10.0, 20.0, 30.0], dtype=torch.float64), tensor([True, False, True])]
    scores = tensor([[-2.0, 0.5, 3.0]], dtype=torch.float64)
    actual = evaluate(Score.parse(text).before, scores, At(operands))
    torch.testing.assert_close(actual, tensor([expected], dtype=torch.float64), rtol=0, atol=1e-10)


def test_numeric_operand_takes_the_dtype_of_the_scores():
    scores = torch.zeros(1, 2, dtype=torch.float32)
    for dtype in (torch.int64, torch.bool, torch.float64, torch.bfloat16):
        actual = evaluate(Score.parse("add($0)").before, scores, At([tensor([1, 0], dtype=dtype)]))
        assert actual.dtype == torch.float32
        assert actual.tolist() == [[1.0, 0.0]]


def test_what_does_not_read_the_scores_keeps_its_own_dtype():
    """ALiBi in bfloat16 rounds slope * distance to bfloat16, in the model and in the op."""
    slope = tensor([0.30078125], dtype=torch.bfloat16)
    actual = evaluate(Score.parse("add(mul($0, j))").before, torch.zeros(1, 300), At([slope], keys=300))
    assert torch.equal(actual[0], (slope * torch.arange(300)).float())


def test_lookup_reads_a_table_of_each_head():
    table = torch.randn(1, 2, 1, 5)
    index = torch.randint(-5, 5, (3, 2, 4, 6))
    actual = evaluate(Score.parse("add(lookup($0, $1))").before, torch.zeros(3, 2, 4, 6), At([table, index]))
    expected = torch.stack([table[0, head, 0][index[:, head]] for head in range(2)], 1)
    assert torch.equal(actual, expected)


# --- derivatives


ARGUMENTS: dict[str, tuple[object, ...]] = {
    "leaky_relu": (0.1,),
    "elu": (1.5,),
    "softplus": (2.0, 1.0),
    "nan_to_num": (0.0, 1.0, -1.0),
    "clamp": (-0.5, 0.7),
    "mask": (Operand(0),),
    "keep": (Operand(1), Operand(0)),
    "fill": (Operand(1), Operand(0)),
}
ON_CONDITIONS = {"and", "or", "xor", "not", "logical_and", "logical_or", "logical_xor", "logical_not"}
NUMERIC = sorted(set(OPERATIONS) - ON_CONDITIONS - set(CAST_DTYPES) - {"lookup", "where"})


@pytest.mark.parametrize("name", NUMERIC)
def test_derivative_of_an_operation_is_that_of_autograd(name):
    arity = OPERATIONS[name].arities[0]
    step = Step(name, ARGUMENTS.get(name, (Operand(0),) * (arity - 1)))
    is_of_positive = name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "pow")
    scores = torch.rand(1, 64, dtype=torch.float64) * 3 + (0.1 if is_of_positive else -1.4)
    operand = torch.rand(1, 64, dtype=torch.float64) * 3 + 0.2
    _assert_differentiates(Score((step,)), scores, [operand, torch.rand(1, 64) < 0.5])


@pytest.mark.parametrize(
    "text",
    [
        *("add(1.5)", "mul(-2)", "div(4)", "clamp($0, 0.5)", "clamp(-1, $0)", "mask($1)", "keep($1, 7)"),
        *("set(where($1, mul(s, s), $0))", "add($0) tanh mul($0)", "set(mul(s, sigmoid(s)))"),
        *("add(mul($0, sub(j, i)))", "%0 = exp(mul($0, 0.5)) mul(%0) add(%0)", "set(maximum(s, mul(s, 0.1)))"),
        *("set(pow(abs(s), $0))", "set(div($0, add(square(s), 1.0)))", "set(minimum(s, $0))"),
    ],
)
def test_derivative_of_steps_is_that_of_autograd(text):
    scores = torch.randn(1, 64, dtype=torch.float64)
    operand = torch.rand(1, 64, dtype=torch.float64) + 0.2
    _assert_differentiates(Score.parse(text), scores, [operand, torch.rand(1, 64) < 0.5])


def _assert_differentiates(score: Score, scores: Tensor, operands: list[Tensor]) -> None:
    positions = At(operands, keys=scores.size(-1))
    scores.requires_grad_()
    operands[0].requires_grad_()
    after = evaluate(score.before, scores, positions)
    grad = torch.randn_like(after)
    if not after.requires_grad:
        after = after + 0 * scores
    expected, expected_operand = torch.autograd.grad(after, (scores, operands[0]), grad, allow_unused=True)
    with torch.no_grad():
        needed = scores if score.before.needs_scores_in_backward else None
        # An operand that is not read is not kept, and may hold anything by then.
        is_read = score.before.read_in_backward
        kept = [x if n in is_read else x.new_full(x.shape, True if n else torch.nan) for n, x in enumerate(operands)]
        actual, found = differentiate(score.before, needed, grad, At(kept, keys=scores.size(-1)), [0])
    torch.testing.assert_close(actual, torch.zeros_like(scores) if expected is None else expected)
    total = sum((x.grad for x in found), torch.zeros_like(operands[0]))
    if expected_operand is not None:
        torch.testing.assert_close(total, expected_operand)
    else:
        assert not total.any()


def test_derivative_of_a_table_names_its_entries():
    table = torch.randn(1, 1, 1, 5, dtype=torch.float64)
    index = torch.randint(-5, 5, (1, 1, 4, 6))
    grad = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    program = Score.parse("add(mul(lookup($0, $1), 2.0))").before
    _, (found,) = differentiate(program, None, grad, At([table, index]), [0])
    assert found.index == 0
    assert torch.equal(found.entries, index % 5)
    torch.testing.assert_close(found.grad, 2 * grad)


def test_only_wanted_operands_are_differentiated():
    scores = torch.randn(1, 3)
    positions = At([torch.randn(1, 3), torch.randn(1, 3)])
    _, found = differentiate(Score.parse("add($0) mul($1)").before, scores, torch.ones(1, 3), positions, [1])
    assert {x.index for x in found} == {1}


@pytest.mark.parametrize(
    "text",
    [
        *("", "add($0)", "mask($0)", "mul(2.0)", "div(2.0)", "keep($0, -inf)", "fill($0, 0.0)", "causal"),
        *("keep(and(le(j, i), $0), -inf)", "add(mul($0, sub(j, i)))", "add(lookup($0, sub(j, i)))"),
    ],
)
def test_backward_needs_no_scores(text):
    assert not Score.parse(text).before.needs_scores_in_backward


@pytest.mark.parametrize("text", ["tanh", "clamp(0, 1)", "mul($0)", "div($0)", "add($0) tanh causal", "set(mul(s, s))"])
def test_backward_needs_scores(text):
    assert Score.parse(text).before.needs_scores_in_backward


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("add($0)", set()),
        ("mul(0.5) add($0) causal", set()),
        ("add($0) tanh", {0}),
        ("tanh add($0)", set()),
        ("mul($0) add($1)", {0}),
        ("keep($0, -inf) add($1)", {0}),
        ("%0 = mul($0, $1) add(%0)", {0, 1}),
        ("add(lookup($0, sub(j, $1)))", {1}),
        ("softmax mul($0)", {0}),
        ("add($0) sink($1)", set()),
    ],
)
def test_backward_reads_only_what_a_derivative_does(text, read):
    assert Score.parse(text).read_in_backward == read


@pytest.mark.parametrize(
    ("text", "is_causal"),
    [
        ("causal", True),
        ("add($0) causal", True),
        ("keep(le(j, i), -inf)", True),
        ("keep(and($0, le(j, i)), -inf)", True),
        ("keep(and($0, ge(i, j)), -inf) keep($1, -inf)", True),
        ("keep(or($0, le(j, i)), -inf)", False),
        ("keep(le(j, i), -1e9)", False),
        ("keep(le(i, j), -inf)", False),
        ("causal add($0)", False),
        ("tanh", False),
        ("", False),
    ],
)
def test_no_key_beyond_the_query_counts_where_causal_is_last(text, is_causal):
    """A step after it may bring a masked key back, as `causal mul(-1)` does."""
    assert Score.parse(text).is_causal == is_causal


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
            r"operand \$0 of keep\(\$0, 1\) has dtype torch.float32; accepted: torch.bool",
        ),
        ("fill($0, 1)", tensor([1]), r"operand \$0 of fill\(\$0, 1\) has dtype torch.int64; accepted: torch.bool"),
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
DISTANCE = torch.arange(6) - torch.arange(4).unsqueeze(-1)
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
    "causal_by_positions": Case("keep(le(j, i), -inf)", lambda s: s.masked_fill(FUTURE, -math.inf)),
    "alibi": Case("add(mul($0, sub(j, i)))", lambda s, x: s + x * DISTANCE, ((1, 2, 1, 1),)),
    "table": Case(
        "add(lookup($0, add(sub(j, i), 3)))", lambda s, t: s + t[..., 0, :][..., DISTANCE + 3], ((1, 2, 1, 9),)
    ),
    "gated_by_itself": Case("set(mul(s, sigmoid(mul(s, $0))))", lambda s, x: s * (s * x).sigmoid(), ((1, 2, 4, 6),)),
    "relu_times_decay": Case(
        "relu mul(exp(mul($0, abs(sub(j, i))))) add($1)",
        lambda s, x, b: s.relu() * (x * DISTANCE.abs()).exp() + b,
        ((1, 2, 1, 1), (1, 2, 4, 6)),
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


# --- what comes after the softmax, and beside it

AFTER = {
    "sink": ("sink($0)", lambda p, t, x: _with_sink(p, t, x), ((1, 2, 1, 1),)),
    "head_mask": ("softmax mul($0)", lambda p, t, x: p * x, ((1, 2, 1, 1),)),
    "filled_after": ("softmax fill(gt(j, i), 0.0)", lambda p, t: p.masked_fill(FUTURE, 0), ()),
    "per_key": ("softmax mul($0)", lambda p, t, x: p * x, ((1, 1, 1, 6),)),
    "squared": ("softmax square", lambda p, t: p.square(), ()),
    "sink_then_head_mask": (
        "add($0) sink($1) softmax mul($2)",
        lambda p, t, b, x, h: _with_sink(p, t, x) * h,
        ((1, 2, 4, 6), (1, 2, 1, 1), (1, 2, 1, 1)),
    ),
}


def _with_sink(weights: Tensor, scores: Tensor, sink: Tensor) -> Tensor:
    """softmax with one logit more in the denominator."""
    total = scores.logsumexp(-1, keepdim=True)
    return weights * torch.sigmoid(total - sink)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("name", AFTER)
def test_what_follows_the_softmax_matches_plain_pytorch(name, k):
    text, after, shapes = AFTER[name]

    def dense(query: Tensor, key: Tensor, value: Tensor, *operands: Tensor, text: str, k: int) -> Tensor:
        scores = 0.7 * query @ key.transpose(-2, -1)
        if text.startswith("add"):
            scores = scores + operands[0]
        _, indices = reference.select(scores, k)
        is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
        kept = scores.masked_fill(~is_kept, -math.inf)
        return after(kept.softmax(-1), kept, *operands) @ value

    operands = [(torch.rand(shape, dtype=torch.float64) + 0.5).requires_grad_() for shape in shapes]
    assert_matches(_op, dense, *separated_inputs(), *operands, text=text, k=k)


def test_sink_keeps_a_row_without_keys_at_zero():
    query, key, value = torch.randn(3, 1, 1, 2, 4).unbind(0)
    mask = torch.tensor([[True, True], [False, False]])
    output = torch.ops.topk_fx.attention(query, key, value, [mask, torch.zeros(1)], "keep($0, -inf) sink($1)", 1.0, 2)
    assert output[0, 0, 0].isfinite().all()
    assert torch.equal(output[0, 0, 1], torch.zeros(4))
