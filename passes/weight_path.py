"""The way of the probabilities: from the softmax forward to the product with the value, and what is done to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from topk_fx.score.language import SCORES
from topk_fx.score.language import Call as Operation

from .axes import EinsumAxes, read_move, same_shape, softmax_over_queries
from .dialect import Call, Kind, read
from .elementwise import read_elementwise, read_in_place
from .layout import Layout
from .score_path import Sink
from .score_steps import NO_DROPOUT, check_cast, merge_dropout
from .sites import Factor, Refuse, ScoreStep, Term
from .trace import MOVES, Trace, is_unread, move_of
from .values import constant_of, dtype_of, filled_like, shape_of
from .where import describe

_NAN_FILLED = ScoreStep("fill", (Operation("ne", (SCORES, SCORES)), 0.0))
_UNARY = {"neg", "abs", "relu", "square", "sqrt", "tanh", "sin", "nan_to_num", "softsign", "silu", "gelu", "gelu_tanh"}
"""Operations that leave 0 as it is, so that what is done to the kept probabilities is done to all of them."""


@dataclasses.dataclass(frozen=True)
class WeightPath:
    """What the probabilities pass. `layouts[n]` is where they stand after n moves; `output` the product with V."""

    layouts: tuple[Layout, ...]
    steps: tuple[ScoreStep, ...]
    dropout_p: Any
    dropout_module: fx.Node | None
    output: fx.Node
    value: Factor
    output_order: tuple[int, ...] | None

    @property
    def layout(self) -> Layout:
        return self.layouts[-1]


def follow_weights(softmax_output: fx.Node, score_layout: Layout, sink: Sink | None, trace: Trace) -> WeightPath:
    """Walks from the softmax to the product with V; Refuse at the first fact that cannot be proven."""
    layouts = [Layout((), score_layout.axes, score_layout.rank)]
    steps: list[ScoreStep] = []
    dropout = NO_DROPOUT
    names = [softmax_output]
    while True:
        filling = _read_nan_filling(names, trace)
        if filling is not None:
            steps.append(_NAN_FILLED)
            trace.interior.update((*filling.read_for_it, filling.node))
            names = [*names, filling.node] if filling.is_in_place else [filling.node]
            continue
        user = _next_user(names, trace)
        node = next(x for x in names if x in user.all_input_nodes)
        call = read(user)
        kind = None if call is None else call.kind
        if sink is not None and call is not None and _cuts_sink(call, node, layouts[-1], sink):
            sink = None
        elif call is not None and kind in (Kind.MATMUL, Kind.EINSUM):
            if sink is not None:
                raise Refuse(
                    "sink_not_cut_off", f"{describe(user)} multiplies the sink of {softmax_output.name} with V"
                )
            value, output_order = _read_value(call, node, layouts[-1])
            return WeightPath(tuple(layouts), tuple(steps), *dropout, user, value, output_order)
        elif call is not None and kind == Kind.CAST and call["input"] is node:
            like = check_cast(call)
            if like is not None:
                trace.dtypes_taken.append(like)
        elif call is not None and kind == Kind.DROPOUT and call["input"] is node:
            dropout = merge_dropout(dropout, call)
        elif call is not None and kind in MOVES and call["input"] is node and sink is None:
            if read_move(call) is not None:
                layouts.append(layouts[-1].then(move_of(call, layouts[-1])))
        elif call is None or kind != Kind.SAME or call.in_place:
            steps.append(_read_step(user, node, len(layouts) - 1))
        trace.interior.add(user)
        names = [*names, user] if call is not None and call.in_place else [user]


def _next_user(names: list[fx.Node], trace: Trace) -> fx.Node:
    """What alone reads the probabilities, or writes to them before all others; `names` are nodes that hold them."""
    users = {user for node in names for user in node.users if user not in trace.interior and not is_unread(user)}
    first = min(users, key=trace.order.__getitem__, default=None)
    call = read(first)
    is_writer = call is not None and call.in_place and call.get("input") in names
    if first is None or first.op == "output" or (len(users) > 1 and not is_writer):
        if not users:
            raise Refuse("result_unused", f"nothing reads the probabilities {names[0].name}")
        found = sorted(users, key=trace.order.__getitem__)
        told = ", ".join("the output" if user.op == "output" else user.name for user in found)
        raise Refuse("probabilities_used_elsewhere", f"the probabilities {names[0].name} are used by {told}")
    return first


@dataclasses.dataclass(frozen=True)
class _NanFilling:
    """The call that puts 0 where the probabilities are NaN, and what it alone reads for that."""

    node: fx.Node
    is_in_place: bool
    read_for_it: tuple[fx.Node, ...]


def _read_nan_filling(names: list[fx.Node], trace: Trace) -> _NanFilling | None:
    """What puts 0 where the probabilities are NaN, and what it reads for that, if they are used for nothing else.

    As `torch.where(torch.isnan(p), torch.zeros_like(p), p)`, as `p.masked_fill(p != p, 0)`, as `p[p.isnan()] = 0`.
    """
    for user in (user for node in names for user in node.users if user not in trace.interior):
        call = read(user)
        if call is None:
            continue
        match call.kind:
            case Kind.WHERE:
                condition, zero, weights = call["condition"], call["input"], call.get("other")
            case Kind.MASKED_FILL:
                condition, zero, weights = call["mask"], call["value"], call["input"]
            case Kind.SETITEM:
                condition, zero, weights = call.get("index"), call["value"], call["input"]
                if isinstance(condition, tuple) and len(condition) == 1:
                    (condition,) = condition
            case _:
                continue
        if weights not in names or not _tells_nan(condition, names) or dtype_of(weights) != dtype_of(names[0]):
            continue
        read_for_it = {condition}
        if isinstance(zero, fx.Node) and filled_like(zero, weights) == 0:
            read_for_it.add(zero)
        elif constant_of(zero) != 0:
            continue
        users = {x for node in names for x in node.users if x not in trace.interior and not is_unread(x)}
        others = {x for x in users - {user} if not call.in_place or trace.order[x] < trace.order[user]}
        if others <= read_for_it and all(node.users.keys() == {user} for node in read_for_it):
            return _NanFilling(user, call.in_place, tuple(read_for_it))
    return None


def _tells_nan(condition: Any, names: list[fx.Node]) -> bool:
    """Whether a condition holds where the probabilities are NaN, and there alone."""
    operation = read_elementwise(condition) if isinstance(condition, fx.Node) else None
    if operation is None or not set(operation.arguments) <= set(names):
        return False
    return operation.name == "isnan" or (operation.name == "ne" and len(set(operation.arguments)) == 1)


def _cuts_sink(call: Call, node: fx.Node, layout: Layout, sink: Sink) -> bool:
    """Whether a call takes the probabilities without the column of the sink."""
    if call.kind not in (Kind.GETITEM, Kind.SLICE, Kind.NARROW) or call.get("input") is not node:
        return False
    before, after = shape_of(node), shape_of(call.node)
    if before is None or after is None or len(before) != len(after):
        return False
    key_axis = layout.axes[1] % len(before)
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if not statically_known_true(new == (old - 1 if axis == key_axis else old)):
            return False
    return _start_of(call, key_axis, len(before)) == int(sink.is_first)


def _start_of(call: Call, axis: int, rank: int) -> Any:
    """Where a slice begins on an axis; None if that is not certain, or if it takes another order."""
    if call.kind == Kind.GETITEM:
        items = call["index"] if isinstance(call["index"], tuple) else (call["index"],)
        if any(item is None or not (item is Ellipsis or isinstance(item, slice)) for item in items):
            return None
        if Ellipsis in items:
            gap = items.index(Ellipsis)
            items = (*items[:gap], *(slice(None),) * (rank - len(items) + 1), *items[gap + 1 :])
        items = (*items, *(slice(None),) * (rank - len(items)))
        if any(item.step not in (None, 1) for item in items):
            return None
        return items[axis].start or 0
    if call.get("step", 1) != 1:
        return None
    return (call.get("start") or 0) if call.get("dim", 0) % rank == axis else None


def _read_step(user: fx.Node, weights: fx.Node, stage: int) -> ScoreStep:
    """What an elementwise call does to the probabilities, if it leaves those that are 0 at 0."""
    call = read(user)
    operation = read_elementwise(user) or (None if call is None else read_in_place(call))
    own, before = shape_of(user), shape_of(weights)
    if operation is None or (own is not None and before is not None and not same_shape(own, before)):
        raise Refuse("probabilities_changed", f"{describe(user)} uses the probabilities before any product with V")
    step = _as_step(operation, weights, stage)
    if step is None:
        raise Refuse("probabilities_changed", f"{describe(user)} changes the probabilities before the product with V")
    return step


def _as_step(operation: Operation, weights: fx.Node, stage: int) -> ScoreStep | None:
    first, *rest = operation.arguments
    if any(isinstance(x, Operation) for x in operation.arguments):
        return None
    if operation.name == "mul" and first is not weights:
        first, rest = rest[0], [first]
    if operation.name == "where":
        condition, x, other = operation.arguments
        if x is weights and other is not weights:
            return _conditional("keep", condition, other, stage)
        return _conditional("fill", condition, x, stage) if other is weights and x is not weights else None
    if first is not weights or weights in rest:
        return None
    if operation.name in ("mul", "div") or operation.name in _UNARY:
        return ScoreStep(operation.name, tuple(_argument(x, stage) for x in rest))
    if operation.name in ("keep", "fill"):
        condition, value = rest
        return _conditional(operation.name, condition, value, stage)
    return None


def _conditional(name: str, condition: Any, value: Any, stage: int) -> ScoreStep | None:
    if constant_of(value) != 0 or not isinstance(condition, fx.Node) or dtype_of(condition) not in (None, torch.bool):
        return None
    return ScoreStep(name, (Term(condition, stage), 0.0))


def _argument(x: Any, stage: int) -> Any:
    number = float(x) if isinstance(x, bool) else constant_of(x)
    return Term(x, stage) if number is None else number


def _read_value(call: Call, weights: fx.Node, layout: Layout) -> tuple[Factor, tuple[int, ...] | None]:
    """V in the axes of the weights, with Dv in the place of the query axis, and how the product orders its axes."""
    if call.kind == Kind.EINSUM:
        axes = EinsumAxes.of(call)
        return axes.value(weights, layout, call.node.name)
    left, right = call["input"], call["other"]
    if left is right:
        raise Refuse("not_attention", f"{call.node.name} multiplies the probabilities with themselves")
    is_left = left is weights
    value = right if is_left else left
    shape = shape_of(value)
    if shape is not None and len(shape) < 2:
        raise Refuse("value_is_vector", f"{call.node.name} multiplies the probabilities with a vector")
    rank = layout.rank
    query_axis, key_axis = (axis - rank if rank is not None and axis >= 0 else axis for axis in layout.axes)
    summed = -1 if is_left else -2
    if query_axis == summed:
        raise softmax_over_queries(call.node.name)
    if (query_axis, key_axis) != (-3 - summed, summed):
        raise Refuse("product_not_over_keys", f"{call.node.name} does not sum over the axis of the softmax")
    return Factor(value, transposed=True), None
