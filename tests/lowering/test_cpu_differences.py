"""What reads differences of positions is computed once for each, and is what it is for each query and key."""

from __future__ import annotations

import pytest
import torch
from inputs import integers
from topk_fx.lowering import aten, cpu
from topk_fx.lowering.cpu import build, screening
from topk_fx.lowering.cpu.differences import by_operands, evaluate_differences

from topk_fx.score import Score

needs_compiler = pytest.mark.skipif(
    bool(build.why_unavailable()), reason=f"C++ cannot be compiled: {build.why_unavailable()}"
)

T5 = (
    "%0 = neg(minimum(sub(j, i), 0)) add(lookup($0, where(lt(%0, 16), %0, minimum(add(16, "
    "int64(mul(div(log(div(float32(%0), 16)), 2.0794415416798357), 16))), 31)))) causal"
)
FOUND = {
    T5: ["lookup"],
    "add(lookup($0, add(sub(j, i), 3)))": ["lookup"],
    "add(lookup($0, abs(sub(add(j, 5), i))))": ["lookup"],
    "keep(eq(remainder(sub(i, j), 3), 0), -inf)": ["eq"],
    "add(where(le(j, i), div(float32(sub(j, i)), 7.0), 0.5)) mul(2.0)": ["where"],
    "keep(lt(sqrt(float32(abs(sub(neg(i), neg(j))))), 4.5), -inf) add(lookup($0, abs(sub(i, j))))": ["lt", "lookup"],
}
NOT_FOUND = [
    "causal",  # costs nothing
    "add(mul($0, float32(sub(j, i)))) causal",
    "add(lookup($0, j))",
    "add(lookup($0, add(i, j)))",
    "add(lookup($0, sub(j, minimum(i, 5))))",
    "keep(eq(floor_div(i, 4), floor_div(j, 4)), -inf)",
    "add(div(float32(j), float32(add(i, 1))))",
    "add(div(mul($0, float32(sub(j, i))), 2.0))",  # an operand has positions of its own
    "keep(lt(log(float32(add(j, 1))), float32(i)), -inf)",
    "add(div(s, float32(add(sub(j, i), 100))))",
    "add(lookup($0, 3))",  # one number
]


@pytest.mark.parametrize("score", FOUND)
def test_values_of_differences_are_found(score):
    program = Score.parse(score).before
    changed, names = by_operands(program, 5)
    assert [program.operations[int(x.text[1:])].name for x in names] == FOUND[score]
    assert {x.index for call in changed.operations for x in call.operands} >= {5, 5 + len(names) - 1}


@pytest.mark.parametrize("score", NOT_FOUND)
def test_other_values_are_left(score):
    program = Score.parse(score).before
    assert by_operands(program, 1) == (program, ())


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (9, 1), (5, 8)])
def test_each_difference_stands_once(queries, keys):
    program = Score.parse("add(div(float32(sub(j, i)), 4))").before
    query, key = torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, keys, 4)
    (found,) = evaluate_differences(program, by_operands(program, 0)[1], [], query, key)
    assert found.flatten().tolist() == [d / 4 for d in range(1 - queries, keys)]


@needs_compiler
@pytest.mark.parametrize("is_screened", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 200), (3, 200), (200, 200), (150, 300), (300, 150)])
@pytest.mark.parametrize("score", FOUND)
def test_result_is_that_of_aten(score, queries, keys, is_screened):
    query, key, value = (integers(2, heads, n, 8) for heads, n in ((4, queries), (2, keys), (2, keys)))
    size = 32 if score == T5 else 600
    for table in (torch.randn(1, 4, 1, size), torch.randn(2, 1, 1, size), torch.randn(1, 4, 1, 2 * size)[..., ::2]):
        operands = [table.mul(8).round()][: score.count("$0")]
        with screening.forced(is_screened):
            actual = cpu.attention_forward(query, key, value, operands, score, 0.25, 9, None, 0.0, True)
        expected = aten.attention_forward(query, key, value, operands, score, 0.25, 9, None, 0.0, True)
        order = [x[1].long().sort(-1) for x in (actual, expected)]
        assert order[0].values.equal(order[1].values)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_of_a_table_is_kept(dtype):
    query, key, value = (integers(1, 2, 100, 8, dtype=dtype) for _ in range(3))
    table = torch.randn(1, 2, 1, 32).mul(4).round().to(dtype)
    actual = cpu.attention_forward(query, key, value, [table], T5, 0.25, 9, None, 0.0, True)
    expected = aten.attention_forward(query, key, value, [table], T5, 0.25, 9, None, 0.0, True)
    assert actual[1].sort(-1).values.long().equal(expected[1].sort(-1).values.long())


@needs_compiler
def test_compiled_model_with_buckets_is_that_of_aten():
    def model(query, key, value, table):
        past = (torch.arange(query.size(-2)).view(-1, 1) - torch.arange(key.size(-2))).clamp(min=0)
        far = 16 + (torch.log(past.float() / 16) / 2.0794415416798357 * 16).long()
        bias = table[torch.where(past < 16, past, far.clamp(max=31))].permute(2, 0, 1).unsqueeze(0)
        return ((query @ key.mT + bias).softmax(-1)) @ value

    query, key, value = (torch.randn(1, 2, 120, 8) for _ in range(3))
    table = torch.randn(32, 2)
    found = [
        torch.compile(model, backend="topk", fullgraph=True, options={"k": 9, "lowering": lowering})(
            query, key, value, table
        )
        for lowering in ("cpu", "aten")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
