"""The ATen lowering of attention: selection, chunks, memory, and the sparse products."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from inputs import LargestTensor, assert_near, attention_inputs, integers
from topk_fx.lowering import aten
from topk_fx.lowering.aten import attention as module
from topk_fx.lowering.aten.attention import select
from topk_fx.lowering.aten.bags import Bags, as_table
from torch import Tensor, tensor

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

NAN, INF = math.nan, math.inf


# --- select


def scores_of(kind: str) -> Tensor:
    """[64, 33] scores, rows of one kind."""
    match kind:
        case "distinct":
            return torch.randn(64, 33)
        case "many_ties":
            return torch.randint(0, 4, (64, 33)).float()
        case "all_equal":
            return torch.zeros(64, 33)
        case "zeros_of_both_signs":
            return torch.where(torch.rand(64, 33) < 0.5, 0.0, -0.0)
        case "mostly_masked":
            return torch.randint(0, 4, (64, 33)).float().masked_fill(torch.rand(64, 33) < 0.9, -INF)
        case "all_masked":
            return torch.full((64, 33), -INF)
        case "infinities":
            return torch.randint(0, 4, (64, 33)).float().masked_fill(torch.rand(64, 33) < 0.2, INF)
        case "nan":
            return torch.randint(0, 4, (64, 33)).float().masked_fill(torch.rand(64, 33) < 0.1, NAN)
        case "all_nan":
            return torch.full((64, 33), NAN)
    raise AssertionError(kind)


@pytest.mark.parametrize("kept", [1, 2, 7, 32, 33, 40])
@pytest.mark.parametrize(
    "kind",
    [
        *("distinct", "many_ties", "all_equal", "zeros_of_both_signs", "mostly_masked", "all_masked", "infinities"),
        *("nan", "all_nan"),
    ],
)
def test_select_keeps_what_a_stable_sort_does(kind, kept):
    scores = scores_of(kind)
    top, indices = select(scores, kept)
    kept = min(kept, 33)
    expected = scores.argsort(dim=-1, descending=True, stable=True)[:, :kept]
    assert indices.sort().values.equal(expected.sort().values)
    assert torch.equal(top.nan_to_num(nan=9.0), scores.gather(-1, indices).nan_to_num(nan=9.0))


def test_select_works_on_every_leading_shape():
    scores = torch.randint(0, 3, (2, 3, 5, 17)).float()
    top, indices = select(scores, 4)
    flat_top, flat_indices = select(scores.view(30, 17), 4)
    assert indices.view(30, 4).sort().values.equal(flat_indices.sort().values)
    assert top.view(30, 4).sort().values.equal(flat_top.sort().values)


# --- chunks


@pytest.mark.parametrize("rows_a_chunk", [0, 1, 2, 4, 9, 100])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("zero_empty_rows", [False, True])
@pytest.mark.parametrize("score", ["add($0) mul($1) mask($2) causal", "causal add($0) mul($1) mask($2)"])
def test_forward_chunk_size_does_not_change_the_result(score, zero_empty_rows, rows_a_chunk, dropout_p, monkeypatch):
    """Every operand that has a query axis, the causal mask and the dropout draw are cut at the same rows."""
    query, key, value = (x.detach() for x in attention_inputs(heads=4, key_heads=2))
    operands = [integers(2, 4, 9, 11), torch.rand(1, 4, 1, 1), torch.arange(9).view(1, 1, 9, 1) % 4 != 2]
    keep = torch.rand(2, 4, 9, 5) < 0.5 if dropout_p else None

    def run():
        output, indices, weights = aten.attention_forward(
            query, key, value, operands, score, 0.5, 5, keep, dropout_p, zero_empty_rows
        )
        order = indices.argsort(dim=-1, stable=True)
        return output, weights.gather(-1, order), indices.gather(-1, order)

    *expected, expected_indices = run()
    monkeypatch.setattr(module, "SCORE_BUDGET", rows_a_chunk * 2 * 4 * 11)
    *actual, indices = run()
    assert indices.equal(expected_indices)
    for x, y in zip(actual, expected, strict=True):
        assert_near(x, y)


@pytest.mark.parametrize(("key_heads", "value_heads"), [(4, 4), (2, 2), (1, 1), (2, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("heads_a_part", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_backward_part_size_does_not_change_the_result(heads_a_part, dropout_p, key_heads, value_heads):
    """Operands that differ by batch, by head, by both or by neither are cut, or summed over, with the parts."""
    query, key, _ = (x.detach() for x in attention_inputs(batch=(3,), heads=4, key_heads=key_heads))
    value = torch.randn(3, value_heads, 11, 5)
    operands = [integers(3, 1, 9, 11), integers(1, 4, 1, 11), integers(1, 1, 9, 1), torch.rand(3, 4, 1, 1)]
    score = "add($0) add($1) add($2) mul($3) causal"
    keep = torch.rand(3, 4, 9, 5) < 0.5 if dropout_p else None
    output, indices, weights = aten.attention_forward(query, key, value, operands, score, 0.5, 5, keep, dropout_p, True)
    grad = torch.randn_like(output)

    arguments = (grad, query, key, value, operands, score, 0.5, indices, weights, dropout_p, [True] * 4)
    expected = aten.attention_backward(*arguments)
    in_parts = aten.attention_backward(*arguments, kept_budget=heads_a_part * 9 * 5)
    for actual, wanted in zip(in_parts, expected, strict=True):
        assert_near(actual, wanted)


# --- memory

LENGTH = 256
BUDGET = 2048
"""Elements of a chunk: eight rows of scores, and no less than query, key or value has."""


def long_inputs(dtype=torch.float32):
    inputs = attention_inputs((1,), 1, LENGTH, LENGTH, head_size=4, value_size=4, dtype=dtype)
    return tuple(x.detach() for x in inputs)


def operands_of(score):
    """[1, 1, Lq, Lk]: what the op is given is not counted, what it makes of it is."""
    if "$0" not in score:
        return []
    return [torch.rand(1, 1, LENGTH, LENGTH) < 0.5 if "(boolean)" in score else integers(1, 1, LENGTH, LENGTH)]


SCORES = ["", "causal", "add($0)", "mask($0) (boolean)", "keep($0, -9.0) (boolean)", "div(2.0) tanh mul($0) causal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_forward_makes_no_tensor_larger_than_the_budget(score, dtype, monkeypatch):
    inputs, operands, text = long_inputs(dtype), operands_of(score), score.removesuffix(" (boolean)")
    monkeypatch.setattr(module, "SCORE_BUDGET", BUDGET)
    with LargestTensor() as largest:
        aten.attention_forward(*inputs, operands, text, 0.5, 3, None, 0.0, True)
    assert largest.numel == BUDGET, largest.op


def test_forward_of_rows_longer_than_the_budget_takes_one_at_a_time(monkeypatch):
    query, key, value = (x.detach() for x in attention_inputs((1,), 2, 8, 301, head_size=1, value_size=1))
    monkeypatch.setattr(module, "SCORE_BUDGET", 100)
    with LargestTensor() as largest:
        aten.attention_forward(query, key, value, [], "causal", 1.0, 3, None, 0.0, True)
    assert largest.numel <= 2 * 301 + 1, largest.op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_backward_makes_no_tensor_that_grows_with_queries_by_keys(score, dtype):
    inputs, operands, text = long_inputs(dtype), operands_of(score), score.removesuffix(" (boolean)")
    output, indices, weights = aten.attention_forward(*inputs, operands, text, 0.5, 3, None, 0.0, True)
    with LargestTensor() as largest:
        needs_grad = [False] * len(operands)
        aten.attention_backward(output, *inputs, operands, text, 0.5, indices, weights, 0.0, needs_grad)
    assert LENGTH * 4 <= largest.numel <= LENGTH * 8, largest.op


def test_backward_of_a_broadcast_operand_makes_no_tensor_of_queries_by_keys():
    inputs, operands = long_inputs(), [integers(1, 1, 1, LENGTH), integers(1, 1, LENGTH, 1)]
    score = "add($0) mul($1)"
    output, indices, weights = aten.attention_forward(*inputs, operands, score, 0.5, 3, None, 0.0, True)
    with LargestTensor() as largest:
        aten.attention_backward(output, *inputs, operands, score, 0.5, indices, weights, 0.0, [True, True])
    assert largest.numel <= LENGTH * 8, largest.op


def test_backward_makes_its_temporaries_a_part_at_a_time():
    """Of 8 heads with 40 kept keys for each of 64 queries, 2560 entries are one head's; inputs have fewer in all."""
    query, key, value = (x.detach() for x in attention_inputs((2,), 4, 64, 64, head_size=1, value_size=1))
    _, indices, weights = aten.attention_forward(query, key, value, [], "causal", 0.5, 40, None, 0.0, True)
    arguments = (query, query, key, value, [], "causal", 0.5, indices, weights, 0.0, [])
    with LargestTensor() as largest:
        aten.attention_backward(*arguments, kept_budget=64 * 40)
    assert largest.numel == 64 * 40, largest.op


# --- bags


@dataclasses.dataclass(frozen=True)
class Sparse:
    """indices [2, 4, 5, 3] over 7 keys of 2 heads with some empty slots, and the same as a dense 0/1 tensor."""

    indices: Tensor
    chosen: Tensor  # [2, 4, 5, 3, 7]


@pytest.fixture
def sparse() -> Sparse:
    indices = torch.rand(2, 4, 5, 7).argsort(-1)[..., :3].int()
    indices[0, 0, 0] = -1
    indices[:, 1, :, 2] = -1
    chosen = torch.nn.functional.one_hot(indices.clamp(min=0).long(), 7) * (indices >= 0).unsqueeze(-1)
    return Sparse(indices, chosen.double())


@pytest.fixture(params=[torch.int32, torch.int64], ids=str)
def index_dtype(request, monkeypatch):
    """Bags are int64 from 2^31 entries on; here they are made so at any size."""
    narrow = Bags.of
    if request.param == torch.int64:

        def wide(*args):
            bags = narrow(*args)
            return dataclasses.replace(bags, flat=bags.flat.long())

        monkeypatch.setattr(Bags, "of", wide)
    return request.param


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bags_are_the_three_sparse_products(sparse, heads, dtype, index_dtype):
    """The key that only empty slots could point to holds NaN, and the rows of an empty bag are read by nobody."""
    table, rows = torch.randn(2, heads, 7, 6, dtype=dtype), torch.randn(2, 4, 5, 6, dtype=dtype)
    weights = torch.randn(2, 4, 5, 3, dtype=dtype)
    keys = table.double().repeat_interleave(4 // heads, 1)  # [2, 4, 7, 6]
    bags = Bags.of(sparse.indices, heads, 7)
    assert bags.flat.dtype == index_dtype

    summed = bags.weighted_sum(as_table(table, dtype), weights)
    matrix = (weights.double().unsqueeze(-1) * sparse.chosen).sum(-2)  # [2, 4, 5, 7]
    assert_near(summed.view(2, 4, 5, 6), matrix @ keys)

    products = bags.dot_products(rows.view(-1, 6), as_table(table, dtype))
    assert_near(products.view(2, 4, 5, 3), torch.einsum("bhikj,bhid,bhjd->bhik", sparse.chosen, rows.double(), keys))

    scattered = bags.scatter_rows(rows.view(-1, 6), weights)
    per_query_head = matrix.transpose(-2, -1) @ rows.double()
    assert_near(scattered.view(2, heads, 7, 6), per_query_head.view(2, heads, 4 // heads, 7, 6).sum(2))


def test_empty_slots_read_and_write_nothing_even_of_nan():
    indices = tensor([[[[1, -1], [-1, -1]]]], dtype=torch.int32)
    bags = Bags.of(indices, 1, 3)
    table = tensor([[NAN], [5.0], [INF]]).view(1, 1, 3, 1)
    assert bags.weighted_sum(as_table(table, torch.float32), torch.ones(4)).flatten().tolist() == [5.0, 0.0]
    rows = tensor([[2.0], [3.0]])
    assert bags.dot_products(rows, as_table(table, torch.float32)).tolist() == [[10.0, 0.0], [0.0, 0.0]]
    assert bags.scatter_rows(rows, torch.ones(4)).flatten().tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("score", ["", "div(2.0) tanh add($0) causal"])
def test_int64_bags_give_what_int32_ones_do(score, monkeypatch):
    query, key, value = (x.detach() for x in attention_inputs(heads=4, key_heads=2))
    operands = [integers(2, 1, 9, 11)] if "$0" in score else []

    def run():
        output, indices, weights = aten.attention_forward(query, key, value, operands, score, 0.5, 4, None, 0.0, True)
        needs_grad = [True] * len(operands)
        return output, *aten.attention_backward(
            torch.ones_like(output), query, key, value, operands, score, 0.5, indices, weights, 0.0, needs_grad
        )

    expected, narrow, dtypes = run(), Bags.of, set()

    def wide(*args):
        bags = narrow(*args)
        bags = dataclasses.replace(bags, flat=bags.flat.long())
        dtypes.add(bags.flat.dtype)
        return bags

    monkeypatch.setattr(Bags, "of", wide)
    for actual, wanted in zip(run(), expected, strict=True):
        assert actual.equal(wanted)
    assert dtypes == {torch.int64}


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (2, 4, 0, 3), (2, 4, 5, 0)], ids=str)
def test_bags_of_nothing_are_zero(shape):
    bags = Bags.of(torch.zeros(shape, dtype=torch.int32), 2, 7)
    rows = math.prod(shape[:-1])
    table = as_table(torch.randn(shape[0], 2, 7, 6), torch.float32)
    assert bags.weighted_sum(table, torch.ones(math.prod(shape))).equal(torch.zeros(rows, 6))
    assert bags.dot_products(torch.ones(rows, 6), table).equal(torch.zeros(rows, shape[-1]))
    assert bags.scatter_rows(torch.ones(rows, 6), torch.ones(math.prod(shape))).equal(torch.zeros(shape[0] * 14, 6))


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "transposed"])
def test_table_has_a_zero_row_at_its_end(layout):
    x = torch.randn(2, 3, 5, 4)
    x = {"contiguous": x, "expanded": x[:, :1].expand(2, 3, 5, 4), "transposed": x.mT.contiguous().mT}[layout]
    table = as_table(x.bfloat16(), torch.float32)
    assert table.dtype == torch.float32
    assert table[:-1].equal(x.bfloat16().float().reshape(30, 4))
    assert not table[-1].any()
