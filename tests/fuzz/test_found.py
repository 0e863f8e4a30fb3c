"""Programs that fuzzing has found to be rewritten wrongly, each reduced to what mattered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import guards_of
from models import Calling, ExportTrace, values_and_gradients
from torch import Tensor, fx
from torch.export import Dim

import topk_fx


def check(model: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """k="all" computes the same, to the rounding of float64. Returns the reasons of the sites that stay dense."""
    rewritten, report, _ = ExportTrace(model, inputs).rewrite(k="all")
    expected = values_and_gradients(model, inputs)
    torch.testing.assert_close(values_and_gradients(rewritten, inputs), expected, rtol=0, atol=1e-12, equal_nan=True)
    return [site.reason for site in report]


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def test_bias_of_float64_looked_up_and_scaled_is_not_rounded_to_float32() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        distance = torch.arange(5)[:, None] - torch.arange(4)
        return torch.add(q @ k.mT, table[distance.clamp(0, 3)], alpha=2).softmax(-1) @ v

    assert check(model, *drawn((5, 2), (4, 2), (4, 3), (4,))) == [""]


@pytest.mark.parametrize("alpha", [2, -1])
def test_multiple_of_a_bias_of_float64_is_not_rounded_where_dtypes_are_unknown(alpha: int) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.add(q @ k.mT, bias, alpha=alpha).softmax(-1) @ v

    inputs = drawn((3, 2), (4, 2), (4, 3), (4,))
    rewritten, report = topk_fx.rewrite(fx.symbolic_trace(model), k="all")
    assert [site.rewritten for site in report] == [True]
    torch.testing.assert_close(rewritten(*inputs), model(*inputs), rtol=0, atol=1e-12)


def test_choice_by_a_condition_that_always_holds_is_no_choice() -> None:
    """One query, and a mask that is True for it: `where(True, ...)` is no function of torch."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        keeps = torch.ones(1, 5, dtype=torch.bool).triu(0)
        halved = torch.where(keeps, torch.where(keeps, s, 1.0), s * 0.5)
        return torch.where(torch.arange(1)[:, None] > torch.arange(5), halved, halved * 2).softmax(-1) @ v

    assert check(model, *drawn((1, 3), (5, 3), (5, 3))) == [""]


def test_root_of_probabilities_has_no_gradient_where_no_key_is_kept() -> None:
    """A row with one key of the two that are asked for: the derivative of the root is infinite in the other slot."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(torch.arange(4) > torch.arange(3)[:, None], -math.inf).softmax(-1).sqrt() @ v

    inputs = drawn((3, 2), (4, 2), (4, 3))
    rewritten, report, _ = ExportTrace(model, inputs).rewrite(k=2)
    assert [site.rewritten for site in report] == [True]
    _, gradients = values_and_gradients(rewritten, inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(gradients[0][0], torch.zeros(2, dtype=torch.float64))


def test_root_of_scores_has_no_gradient_where_no_key_is_kept() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT).masked_fill(torch.arange(5) > torch.arange(3)[:, None], -math.inf)
        return (s.sign() * s.abs().sqrt()).softmax(-1) @ v

    assert check(model, *drawn((3, 4), (5, 4), (5, 4))) == [""]


def test_cast_to_integers_has_no_gradient() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return (scores + scores.long()).softmax(-1) @ v

    assert check(model, *drawn((3, 2), (4, 2), (4, 3))) == [""]


def test_scales_of_elu_are_not_dropped() -> None:
    """SELU is what it decomposes to."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten.elu(q @ k.mT, 1.5, 2.0, 0.5).softmax(-1) @ v

    assert check(model, *drawn((3, 2), (4, 2), (4, 3))) == ["unknown_score_op"]


def test_dropout_whose_probability_is_symbolic_is_rewritten() -> None:
    """dynamic=True makes a symbol of every number of Python."""
    model = torch.nn.Dropout(0.4)
    q, k, v = drawn((6, 3), (6, 3), (6, 3))
    compiled = torch.compile(
        lambda q, k, v: model((q @ k.mT).softmax(-1)) @ v, backend="topk", options={"k": "all"}, dynamic=True
    )
    torch.manual_seed(0)
    output = compiled(q.float(), k.float(), v.float().abs())
    assert [site.reason for site in topk_fx.reports()[-1]] == [""]
    dense = (q @ k.mT).softmax(-1).float() @ v.float().abs()
    assert not torch.allclose(output, dense)
    assert (output <= dense / 0.6 + 1e-5).all()


def test_differences_of_bytes_wrap_around() -> None:
    """In C++ they were differences of integers of 32 bits."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = (torch.arange(5, dtype=torch.uint8) for _ in range(2))
        return (q @ k.mT).masked_fill(j - i[:, None] > 0, -1e4).softmax(-1) @ v

    inputs = [x.float() for x in drawn((5, 3), (5, 3), (5, 3))]
    rewritten, _, _ = ExportTrace(model, inputs).rewrite(k="all")
    torch.testing.assert_close(rewritten(*inputs), model(*inputs))


def test_boolean_that_is_clamped_counts() -> None:
    """clamp of booleans to a number gives integers, and one of integers to 0.5 no integers."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.arange(4) > torch.arange(3)[:, None]
        near = (torch.arange(4) - torch.arange(3)[:, None]).clamp(max=1.5)
        return ((q @ k.mT) + later.clamp(max=3) * 0.5 + near).softmax(-1) @ v

    assert check(model, *drawn((3, 2), (4, 2), (4, 3))) == [""]


def test_number_of_probabilities_that_a_mask_would_enlarge_is_an_error() -> None:
    """Without shapes the pass cannot tell that there is one key, and a product with a matrix makes five of it."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k[:1].mT).softmax(-1) * torch.ones(3, 4)) @ v

    inputs = drawn((3, 2), (4, 2), (4, 3))
    rewritten, report = topk_fx.rewrite(fx.symbolic_trace(model), k="all")
    assert [site.rewritten for site in report] == [True]
    with pytest.raises(topk_fx.errors.ShapeError, match="would enlarge the 1 probabilities"):
        rewritten(*inputs)


def test_symbolic_size_equal_to_the_head_size_stays_symbolic() -> None:
    """Four queries, whose features come first, and values of size four: reporting the sizes compared the two."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.mT @ k.mT).softmax(-1) @ v

    def inputs(queries: int) -> list[Tensor]:
        return drawn((2, 3, queries), (2, 5, 3), (2, 5, 4))

    program = torch.export.export(Calling(model), tuple(inputs(4)), dynamic_shapes=(({2: Dim.AUTO}, {}, {}),))
    rewritten, report = topk_fx.rewrite(program, k="all")
    assert report.sites[0].shapes["D"] == "3"
    longer = inputs(6)
    torch.testing.assert_close(rewritten.module()(*longer), model(*longer))


def test_symbolic_sizes_of_two_products_are_not_compared() -> None:
    """Three batches of four queries, and a bias that is a product too: that 3 is not 4 is not assumed."""

    def model(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        return (q @ k.mT + position @ position.mT).softmax(-1) @ v

    def inputs(batch: int, length: int) -> list[Tensor]:
        return drawn((batch, length, 3), (batch, length, 3), (batch, length, 2), (length, 5))

    free = {0: Dim.AUTO, 1: Dim.AUTO}
    program = torch.export.export(
        Calling(model), tuple(inputs(3, 4)), dynamic_shapes=((free, free, free, {0: Dim.AUTO}),)
    )
    rewritten, report = topk_fx.rewrite(program, k="all")
    assert [site.rewritten for site in report] == [True]
    same = inputs(4, 4)
    torch.testing.assert_close(rewritten.module()(*same), model(*same))


def test_lengths_that_dense_leaves_to_run_time_are_not_assumed_equal() -> None:
    """SDPA of keys and values whose lengths are symbols of their own: checking the op's inputs guarded them equal."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def inputs(keys: int) -> list[Tensor]:
        return drawn((2, 3, 3, 3), (2, 3, keys, 3), (2, 3, keys, 3))

    free = {2: Dim.AUTO}
    program = torch.export.export(Calling(model), tuple(inputs(4)), dynamic_shapes=(({}, free, free),))
    before = str(program.graph_module.code), len(guards_of(program))
    rewritten, report = topk_fx.rewrite(program, k="all")
    assert [site.rewritten for site in report] == [True]
    assert (str(program.graph_module.code), len(guards_of(program))) == before
    longer = inputs(6)
    torch.testing.assert_close(rewritten.module()(*longer), model(*longer))
    with pytest.raises(Exception, match="length"):
        rewritten.module()(*longer[:2], inputs(7)[2])


def test_symbolic_sizes_of_a_product_of_scores_are_compared() -> None:
    """The product is refused; whether it mixes heads counted its sizes, which are no keys of a dictionary."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("dj,bhid->bijh", k, q).softmax(2)
        return weights.permute(0, 3, 1, 2) @ v

    inputs = drawn((2, 3, 3, 5), (5, 4), (2, 1, 4, 5))
    for x in inputs[:1]:
        torch._dynamo.mark_dynamic(x, 2)
    compiled = torch.compile(model, backend="topk", options={"k": 2, "inner": "eager"}, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    (report,) = topk_fx.reports()
    assert [site.reason for site in report] == ["product_not_over_keys"]


def test_permuted_probabilities_of_unknown_rank_are_refused() -> None:
    """To symbolic_trace, the permute after the softmax is the first that tells how many axes the scores have."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.softmax(q @ k.permute(0, 1, 3, 2), dim=-1)
        return weights.permute(0, 2, 3, 1).permute(0, 3, 1, 2) @ v

    rewritten, report = topk_fx.rewrite(fx.symbolic_trace(model), k="all")
    assert [(site.reason, site.detail[:11]) for site in report] == [("not_expressible", "the rank of")]
    inputs = drawn((3, 3, 3, 3), (3, 1, 5, 3), (3, 3, 5, 3))
    torch.testing.assert_close(rewritten(*inputs), model(*inputs), rtol=0, atol=0)
