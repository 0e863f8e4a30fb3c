"""softmax is found in its spellings, and nothing that only resembles it is taken for one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from topk_fx.passes.dialect import read
from topk_fx.passes.softmax import Softmax, read_softmax
from torch import Tensor, fx, nn

import topk_fx


def softmaxes(graph: fx.Graph) -> list[Softmax]:
    calls = [call for node in graph.nodes if (call := read(node)) is not None]
    return [softmax for call in calls if (softmax := read_softmax(call)) is not None]


def found_in(function: Callable[[Tensor], Tensor]) -> list[Softmax]:
    return softmaxes(fx.symbolic_trace(function).graph)


def log_softmax(x: Tensor) -> Tensor:
    return F.log_softmax(x, dim=2).exp()


def over_sum(x: Tensor) -> Tensor:
    exp = torch.exp(x)
    return exp / torch.sum(exp, dim=2, keepdim=True)


def less_maximum(x: Tensor) -> Tensor:
    exp = torch.exp(x - x.max(2, keepdim=True)[0])
    return exp / exp.sum(2, True)


def less_values_of_maximum(x: Tensor) -> Tensor:
    exp = torch.exp(x - torch.max(x, dim=2, keepdim=True).values)
    return exp / exp.sum([2], keepdim=True)


def less_detached_amax(x: Tensor) -> Tensor:
    exp = (x - torch.amax(x, (2,), keepdim=True).detach()).exp()
    return torch.div(exp, exp.sum(dim=(2,), keepdim=True))


def less_logsumexp(x: Tensor) -> Tensor:
    return torch.exp(x - torch.logsumexp(x, 2, keepdim=True))


def exponential_written_twice(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(2, keepdim=True)


def everything_written_twice(x: Tensor) -> Tensor:
    return (x - x.amax(2, keepdim=True)).exp() / (x - x.amax(2, keepdim=True)).exp().sum(2, keepdim=True)


def times_one_over_the_sum(x: Tensor) -> Tensor:
    exp = (x - x.amax(2, keepdim=True)).exp()
    return exp * (1 / exp.sum(2, keepdim=True))


def reciprocal_times(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp.sum(2, keepdim=True).reciprocal() * exp


def times_a_power_of_the_sum(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp * exp.sum(2, keepdim=True).pow(-1)


SPELLED = [
    lambda x: F.softmax(x, dim=2), log_softmax, over_sum, less_maximum, less_values_of_maximum, less_detached_amax,
    less_logsumexp, exponential_written_twice, everything_written_twice,
    times_one_over_the_sum, reciprocal_times, times_a_power_of_the_sum,
]  # fmt: skip


@pytest.mark.parametrize("function", SPELLED, ids=lambda f: f.__name__)
def test_spelling_is_one_softmax_of_the_input(function: Callable[[Tensor], Tensor]) -> None:
    (softmax,) = found_in(function)
    assert softmax.input.op == "placeholder"
    assert softmax.dim == 2
    assert [user.op for user in softmax.output.users] == ["output"]


def test_interior_is_everything_between_input_and_output() -> None:
    """Had it less, the rewrite would leave work behind; had it more, it would erase what others use."""
    (softmax,) = found_in(less_maximum)
    assert [node.name for node in softmax.interior] == ["exp", "sum_1", "truediv", "sub", "getitem", "max_1"]
    assert {node.name for node in softmax.output.graph.nodes} - {node.name for node in softmax.interior} == {
        "x",
        "output",
    }


def over_sum_without_keepdim(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp / exp.sum(-1)


def over_sum_of_everything(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp / exp.sum()


def over_sum_of_two_dimensions(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp / exp.sum((-2, -1), keepdim=True)


def over_sum_and_one(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp / (exp.sum(-1, keepdim=True) + 1)


def sum_over_exp(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp.sum(-1, keepdim=True) / exp


def rounded(x: Tensor) -> Tensor:
    exp = x.exp()
    return torch.div(exp, exp.sum(-1, keepdim=True), rounding_mode="floor")


def over_sum_of_a_written_twin(x: Tensor) -> Tensor:
    twin = x.exp()
    twin.mul_(2)
    return x.exp() / twin.sum(-1, keepdim=True)


def over_sum_of_the_other_base(x: Tensor) -> Tensor:
    return x.exp() / x.exp2().sum(-1, keepdim=True)


def times_two_over_the_sum(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp * (2 / exp.sum(-1, keepdim=True))


def over_sum_of_another(x: Tensor) -> Tensor:
    return x.exp() / (2 * x).exp().sum(-1, keepdim=True)


def over_mean(x: Tensor) -> Tensor:
    exp = x.exp()
    return exp / exp.mean(-1, keepdim=True)


def written_between(x: Tensor) -> Tensor:
    exp = x.exp()
    total = exp.sum(-1, keepdim=True)
    exp.mul_(2)
    return exp / total


def sum_written(x: Tensor) -> Tensor:
    exp = x.exp()
    total = exp.sum(-1, keepdim=True)
    total.add_(1e-6)
    return exp / total


def less_logsumexp_of_another(x: Tensor) -> Tensor:
    return torch.exp(x - torch.logsumexp(2 * x, -1, keepdim=True))


def power_of_softmax(x: Tensor) -> Tensor:
    return torch.exp(2 * x.log_softmax(-1))


LOOK_ALIKES = [
    over_sum_without_keepdim, over_sum_of_everything, over_sum_of_two_dimensions, over_sum_and_one, sum_over_exp,
    rounded, over_sum_of_another, over_mean, written_between, sum_written, less_logsumexp_of_another, power_of_softmax,
    over_sum_of_a_written_twin, over_sum_of_the_other_base, times_two_over_the_sum,
]  # fmt: skip


@pytest.mark.parametrize("function", LOOK_ALIKES, ids=lambda f: f.__name__)
def test_look_alike_is_no_softmax(function: Callable[[Tensor], Tensor]) -> None:
    assert found_in(function) == []


def test_maximum_over_another_dimension_is_no_row_maximum() -> None:
    """exp(x - m) / sum is still a softmax, of x - m: what is subtracted differs between the keys of a row."""

    def function(x: Tensor) -> Tensor:
        exp = (x - x.amax(-2, keepdim=True)).exp()
        return exp / exp.sum(-1, keepdim=True)

    (softmax,) = found_in(function)
    assert softmax.input.name == "sub"


def test_softmaxes_are_found_in_graph_order() -> None:
    found = found_in(lambda x: torch.softmax(log_softmax(F.softmax(x, dim=0)), dim=1))
    assert [softmax.dim for softmax in found] == [0, 2, 1]


def test_softmax_without_dim_says_so() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(F.softmax, (graph.placeholder("x"),)))
    (softmax,) = softmaxes(graph)
    assert softmax.dim is None


def attention_of_bare_exponentials(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    exp = (q @ k.transpose(-2, -1) + mask).exp()
    return exp / exp.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("number", [-1e4, 2000.0, -math.inf], ids=str)
def test_exponential_without_a_maximum_keeps_its_range(number):
    """A row of which nothing is left after the exponential is 0 / 0, and one in which it is infinite inf / inf."""
    inputs = [torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(6, 6, dtype=torch.float64)
    mask[0], mask[1, 2] = number, number
    program = torch.export.export(AsModule(attention_of_bare_exponentials), (*inputs, mask))
    rewritten, report = topk_fx.rewrite(program, k="all")
    assert [site.rewritten for site in report.sites] == [True]
    found, expected = rewritten.module()(*inputs, mask), attention_of_bare_exponentials(*inputs, mask)
    assert expected[:, 0].isnan().all()
    torch.testing.assert_close(found, expected, equal_nan=True)
    for gradient, wanted in zip(
        torch.autograd.grad(found.nansum(), inputs), torch.autograd.grad(expected.nansum(), inputs), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, equal_nan=True)


class AsModule(nn.Module):
    """torch.export takes modules alone."""

    def __init__(self, function):
        super().__init__()
        self.forward = function
