"""In-place traps: what is written while an attention is computed is seen by the rewritten one as by the dense one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TRACERS, SymbolicTrace, Trace, assert_same
from spellings import INF, tensors
from topk_fx.passes.mutation import mutated_arguments, storage_roots
from torch import Tensor, fx, nn


@dataclasses.dataclass(frozen=True)
class Trap:
    """A model that writes in place, and why Dynamo's graph of it stays dense; "" if it is rewritten."""

    function: Callable[..., Tensor]
    reason: str


TRAPS: list[Trap] = []


def trap(reason: str = "") -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        TRAPS.append(Trap(function, reason))
        return function

    return register


# What is written is a copy first, so that a model can be called twice with the same inputs.


@trap()
def result_of_masked_fill_is_not_used(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores.masked_fill_(~keep, -INF)
    return scores.softmax(-1) @ v


@trap()
def scores_written_several_times(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores.mul_(0.5)
    scores += bias
    scores.masked_fill_(~keep, -INF)
    return scores.softmax(-1) @ v


@trap("inputs_written_between")
def key_written_whose_einsum_is_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    scores = q @ torch.einsum("bhjd->bhdj", k)
    k.mul_(0.5)
    return scores.softmax(-1) @ v


@trap()
def query_scaled_before_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    q.mul_(3.0)
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


@trap()
def key_written_before_it_is_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    k += 1.0
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


@trap()
def value_written_after_the_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    output = (q @ k.transpose(-2, -1)).softmax(-1) @ v
    v.zero_()
    return output


@trap()
def probabilities_dropped_out_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.4, training=False, inplace=True)
    return weights @ v


@trap()
def scores_indexed_and_assigned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores[..., 0] = -INF
    return scores.softmax(-1) @ v


@trap("unknown_score_op")
def scores_of_one_head_assigned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores[:, 0] = 0.5
    return scores.softmax(-1) @ v


@trap("unknown_score_op")
def scores_assigned_where_they_are_small(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores[scores < 0] = -INF
    return scores.softmax(-1) @ v


@trap()
def mask_written_after_the_product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    mask = bias.clone()
    mask.masked_fill_(bias > 1, -9.0)
    return (scores + mask).softmax(-1) @ v


@trap("inputs_written_between")
def mask_viewed_then_written_then_read(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    mask = bias.clone()
    scores = q @ k.transpose(-2, -1) + mask.view(mask.shape)
    mask.mul_(2.0)
    return (scores + mask).softmax(-1) @ v


@trap("inputs_written_between")
def mask_written_after_a_copy_of_it(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    mask = bias.clone()
    copied = mask.mT.reshape(-1).view(mask.shape)
    scores = q @ k.transpose(-2, -1)
    mask.mul_(2.0)
    return (scores + copied + mask).softmax(-1) @ v


@trap("scores_used_elsewhere")
def scores_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores.transpose(-2, -1).mul_(3.0)
    return scores.softmax(-1) @ v


@trap("scores_used_elsewhere")
def scores_written_after_they_were_viewed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    same_memory = scores.view(2, 3, 7, 9)
    scores.add_(bias)
    return same_memory.softmax(-1) @ v


@trap("scores_used_elsewhere")
def scores_written_by_the_result_of_a_write(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    result = scores.mul_(0.5)
    result.add_(bias)
    return scores.softmax(-1) @ v


@trap("scores_used_elsewhere")
def scores_written_after_the_softmax_and_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    output = scores.softmax(-1) @ v
    return output + scores.zero_().sum()


@trap("inputs_written_between")
def scores_added_into_the_mask(q: Tensor, k: Tensor, v: Tensor, bias_joined: Tensor) -> Tensor:
    mask = bias_joined.view(2, 3, 7, 9).clone()
    mask += q @ k.transpose(-2, -1)
    return mask.softmax(-1) @ v


@trap("inputs_written_between")
def query_written_between_the_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    q.zero_()
    return weights @ v


@trap("inputs_written_between")
def key_written_between_the_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    k.add_(q[:, :, :1])
    return weights @ v


@trap()
def value_written_between_the_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    v.mul_(2.0)
    return weights @ v


@trap("inputs_written_between")
def mask_written_between_the_products(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    hidden = ~keep
    weights = (q @ k.transpose(-2, -1)).masked_fill(hidden, -INF).softmax(-1)
    hidden.logical_not_()
    return weights @ v


@trap("inputs_written_between")
def key_written_after_it_was_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The transpose shows the written key."""
    k = k.clone()
    transposed = k.transpose(-2, -1)
    k.mul_(2.0)
    return (q @ transposed).softmax(-1) @ v


@trap("inputs_written_between")
def key_written_after_it_was_copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The copy shows the key as it was."""
    k = k.clone()
    transposed = k.transpose(-2, -1).contiguous()
    k.mul_(2.0)
    return (q @ transposed).softmax(-1) @ v


@trap("inputs_written_between")
def key_written_after_its_heads_were_repeated(q_grouped: Tensor, k_grouped: Tensor, v_grouped: Tensor) -> Tensor:
    k_grouped = k_grouped.clone()
    k = k_grouped.repeat_interleave(3, 1)
    k_grouped.zero_()
    return (q_grouped @ k.transpose(-2, -1)).softmax(-1) @ v_grouped.repeat_interleave(3, 1)


@trap("inputs_written_between")
def key_written_through_its_base(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    both = torch.stack([k, k])
    weights = (q @ both[0].transpose(-2, -1)).softmax(-1)
    both.view(-1)[::2].mul_(0.0)
    return weights @ v


@trap("inputs_written_between")
def key_and_value_written_as_a_list(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.clone(), v.clone()
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    torch._foreach_mul_([k, v], 2.0)
    return weights @ v


@trap("inputs_written_between")
def bias_written_as_output(q: Tensor, k: Tensor, v: Tensor, bias_keys: Tensor) -> Tensor:
    bias = bias_keys.clone()
    weights = (q @ k.transpose(-2, -1) + bias).softmax(-1)
    torch.mul(bias, 5.0, out=bias)
    return weights @ v


@trap()
def probabilities_written(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    weights.masked_fill_(~keep, 0.0)
    return weights @ v


@trap("probabilities_used_elsewhere")
def probabilities_written_and_read_before(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    before = weights.sum()
    weights.masked_fill_(~keep, 0.0)
    return weights @ v + before


@trap("probabilities_used_elsewhere")
def probabilities_written_through_a_view(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    weights[:, 0].masked_fill_(~keep, 0.0)
    return weights @ v


@trap("inputs_written_between")
def mask_written_between_two_readings(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    hidden = ~keep
    scores = q @ k.transpose(-2, -1)
    scores = scores.masked_fill(hidden.expand_as(scores), -1.0)
    hidden.logical_not_()
    return scores.masked_fill(hidden, -2.0).softmax(-1) @ v


def inputs_of(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    available = tensors()
    return tuple(available[name] for name in function.__code__.co_varnames[: function.__code__.co_argcount])


def check_sees_what_dense_sees(trace: Trace, trap: Trap) -> None:
    inputs = inputs_of(trap.function)
    model, report, text = trace.rewrite(k="all")
    assert_same(model(*inputs), trap.function(*inputs))
    if not any(site.rewritten for site in report):
        assert text == trace.text


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.function.__name__)
@pytest.mark.parametrize("tracer", TRACERS)
def test_write_is_seen_as_by_dense(trap: Trap, tracer: str) -> None:
    check_sees_what_dense_sees(TRACERS[tracer](trap.function, inputs_of(trap.function)), trap)


# symbolic_trace has no assignment to items.
SYMBOLIC_TRAPS = [trap for trap in TRAPS if not trap.function.__name__.endswith(("_assigned", "_are_small"))]


@pytest.mark.parametrize("trap", SYMBOLIC_TRAPS, ids=lambda trap: trap.function.__name__)
def test_write_is_seen_as_by_dense_without_metadata(trap: Trap) -> None:
    check_sees_what_dense_sees(SymbolicTrace(trap.function), trap)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.function.__name__)
def test_write_between_is_the_reason_given(trap: Trap) -> None:
    """Where nothing in between is written, the attention is rewritten; where something is, the report says so."""
    _, report, _ = TRACERS["dynamo"](trap.function, inputs_of(trap.function)).rewrite(k=3)
    assert report.sites[-1].reason == trap.reason


class WritesItsBuffer(nn.Module):
    """symbolic_trace fetches the buffer anew, by another node, to write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(9))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-2, -1) + self.bias).softmax(-1)
        self.bias.add_(torch.arange(9) * q.mean().exp())
        return weights @ v


def test_buffer_written_between_is_seen_as_by_dense() -> None:
    inputs = inputs_of(value_written_between_the_products)
    expected = WritesItsBuffer()(*inputs)
    model, _, _ = SymbolicTrace(WritesItsBuffer()).rewrite(k="all")
    assert_same(model(*inputs), expected)


class ActivatesTheValueInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v + 0
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        self.relu(v)
        return weights @ v


def test_module_that_writes_between_is_seen_as_by_dense() -> None:
    inputs = inputs_of(value_written_between_the_products)
    model, report, _ = SymbolicTrace(ActivatesTheValueInPlace()).rewrite(k="all")
    assert_same(model(*inputs), ActivatesTheValueInPlace()(*inputs))
    assert [site.rewritten for site in report] == [
        True
    ]  # the product with V reads it after the write, and so does the op


@pytest.fixture(scope="module")
def overwrite() -> Iterator[Any]:
    """An operator of the user's own that writes to its argument, as its schema says and its name does not."""
    library = torch.library.Library("topk_fx_tests", "DEF")
    library.define("overwrite(Tensor(a!) x) -> ()")

    def fill(x: Tensor) -> None:
        x.fill_(3.0)

    library.impl("overwrite", fill, "CompositeExplicitAutograd")
    torch.library.register_fake("topk_fx_tests::overwrite", lambda x: None, lib=library)
    yield torch.ops.topk_fx_tests.overwrite
    library._destroy()


@pytest.mark.parametrize("called", ["packet", "overload"])
@pytest.mark.parametrize("written", ["key", "scores"])
def test_write_by_custom_operator_is_seen_as_by_dense(overwrite: Any, called: str, written: str) -> None:
    """Dynamo's graphs hold what was called: torch.ops.library.operator, or its overload."""
    write = overwrite if called == "packet" else overwrite.default

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = 1 * k
        scores = q @ k.transpose(-2, -1)
        if written == "scores":
            write(scores)
        weights = scores.softmax(-1)
        write(k)
        return weights @ v

    inputs = inputs_of(value_written_between_the_products)
    model, report, _ = TRACERS["dynamo"](function, inputs).rewrite(k="all")
    assert_same(model(*inputs), function(*inputs))
    assert [site.rewritten for site in report] == [False]


WRITES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "method": (lambda x, y: x.add_(y), ["x"]),
    "augmented_assignment": (lambda x, y: x.__imul__(y), ["x"]),
    "item": (lambda x, y: x.__setitem__(0, y), ["x"]),
    "output": (lambda x, y: torch.add(x, 1, out=y), ["y"]),
    "outputs": (lambda x, y: torch.max(x, 0, out=(x, y)), ["x", "y"]),
    "underscored_function": (lambda x, y: torch.relu_(y), ["y"]),
    "inplace_argument": (lambda x, y: F.leaky_relu(y, 0.1, inplace=True), ["y"]),
    "inplace_by_position": (lambda x, y: F.dropout(y, 0.5, True, True), ["y"]),
    "overload": (lambda x, y: torch.ops.aten.copy_.default(x, y), ["x"]),
    "nothing": (lambda x, y: x + y, []),
    "conjunction": (lambda x, y: x & y | x, []),
    "comparison": (lambda x, y: x.__eq__(y), []),
    "contiguous": (lambda x, y: x.contiguous(), []),
}


@pytest.mark.parametrize("write", WRITES)
def test_written_arguments_are_found(write: str) -> None:
    function, expected = WRITES[write]
    graph = fx.Tracer().trace(function)
    written = [argument.name for node in graph.nodes for argument in mutated_arguments(node)]
    assert written == expected


def test_storage_roots_lead_through_views_and_stop_at_fresh_results() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        view = x.transpose(0, 1)[1:].unknown_method()
        written = (x + y).mul_(2)
        return view, written, torch.matmul(x, y)

    graph = fx.Tracer().trace(function)
    output = next(iter(reversed(graph.nodes)))
    roots = [{node.name for node in storage_roots(x)} for x in output.args[0]]
    assert roots == [{"x"}, {"add"}, {"matmul"}]
