"""A number written to places of the scores: `scores[..., mask] = -inf`, `scores[:, :, :, n:] = x`, the diagonal."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import fx

from topk_fx.score.language import KEY_POSITION, QUERY_POSITION, Expression
from topk_fx.score.language import Call as Operation

from .constants import Constants
from .dialect import Call
from .layout import Layout
from .sites import Refuse, ScoreStep, Term
from .values import constant_of, dtype_of, shape_of
from .where import describe


@dataclasses.dataclass(frozen=True)
class AxisPosition:
    """The position along an axis of the scores, of which it is not known yet whether it is the query's or the key's."""

    axis: int


@dataclasses.dataclass(frozen=True)
class IndexFill:
    """`node` writes `value` where all `conditions` hold: masks, and comparisons of positions."""

    node: fx.Node
    value: float | Term
    conditions: tuple[Any, ...]

    def at(self, layout: Layout, stage: int) -> ScoreStep:
        """The step where the scores stand at the end of `layout`, after `stage` moves.

        Raises:
            Refuse: places are chosen along a batch or head axis.
        """
        assert layout.rank is not None
        i, j = (axis % layout.rank for axis in layout.axes)
        names = {i: QUERY_POSITION, j: KEY_POSITION}

        def lower(x: Any) -> Expression:
            if isinstance(x, Operation):
                return Operation(x.name, tuple(map(lower, x.arguments)))
            if isinstance(x, Term):
                return dataclasses.replace(x, stage=stage)
            if not isinstance(x, AxisPosition):
                return x
            if x.axis not in names:
                raise Refuse("unknown_score_op", f"{describe(self.node)} writes to some batches or heads of the scores")
            return names[x.axis]

        condition = functools.reduce(lambda a, b: Operation("and", (a, b)), map(lower, self.conditions))
        return ScoreStep("fill", (condition, lower(self.value)))


def read_index_fill(call: Call) -> IndexFill:
    """What a write by index does to the scores; Refuse if it is not a number, or the places are not understood."""
    node, shape = call.node, shape_of(call["input"])
    refused = Refuse("unknown_score_op", f"{describe(node)} writes to places of the scores that were not understood")
    value: Any = constant_of(call["value"])
    if value is None and shape_of(call["value"]) == ():
        value = Term(call["value"], 0)
    if shape is None:
        raise Refuse("shape_unknown", f"the shape of {call['input'].name} was not traced")
    if value is None or call.get("accumulate"):
        raise Refuse("unknown_score_op", f"{describe(node)} writes other values than one number into the scores")
    items = _one_for_each_axis(call.get("index"), len(shape))
    if items is None:
        raise refused
    conditions: list[Any] = []
    positions: list[tuple[int, fx.Node]] = []
    axis = 0
    for item in items:
        if isinstance(item, fx.Node) and dtype_of(item) == torch.bool:
            own = shape_of(item) or ()
            place = (*(1,) * axis, *own, *(1,) * (len(shape) - axis - len(own)))
            conditions.append(Term(item, 0, shape=None if place == own else place))
            axis += len(own)
            continue
        if isinstance(item, fx.Node) and shape_of(item) is not None:
            positions.append((axis, item))
        else:
            found = _compare(item, axis, shape[axis])
            if found is None:
                raise refused
            conditions += found
        axis += 1
    if positions:
        # Several tensors are read side by side, and one beside a mask, too.
        if not _is_diagonal(positions, shape) or any(isinstance(x, Term) for x in conditions):
            raise refused
        conditions.append(Operation("eq", tuple(AxisPosition(axis) for axis, _ in positions)))
    elif sum(isinstance(x, Term) for x in conditions) > 1:
        raise refused
    if not conditions:
        raise refused
    return IndexFill(node, value, tuple(conditions))


def _one_for_each_axis(index: Any, rank: int) -> list[Any] | None:
    """The items of an index with the axes that it leaves out written as whole slices; None if it adds an axis."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(item is None or isinstance(item, (bool, list, tuple)) for item in items):
        return None
    taken = sum(
        len(shape_of(x) or ()) if isinstance(x, fx.Node) and dtype_of(x) == torch.bool else x is not Ellipsis
        for x in items
    )
    if taken > rank or sum(x is Ellipsis for x in items) > 1:
        return None
    whole = [slice(None)] * (rank - taken)
    place = next((n for n, x in enumerate(items) if x is Ellipsis), None)
    return [*items, *whole] if place is None else [*items[:place], *whole, *items[place + 1 :]]


def _compare(item: Any, axis: int, size: Any) -> list[Operation] | None:
    """The comparisons that tell which places of an axis a number or a slice takes; None if that is not certain."""
    here = AxisPosition(axis)
    if isinstance(item, int):
        if item < 0:
            item = item + size if isinstance(size, int) else None
        return None if item is None else [Operation("eq", (here, item))]
    if not isinstance(item, slice) or item.step not in (None, 1):
        return None
    found = []
    for name, bound in (("ge", item.start), ("lt", item.stop)):
        if bound is None:
            continue
        if not isinstance(bound, int) or (bound < 0 and not isinstance(size, int)):
            return None
        found.append(Operation(name, (here, max(bound + size, 0) if bound < 0 else bound)))
    return found


def _is_diagonal(positions: list[tuple[int, fx.Node]], shape: tuple[Any, ...]) -> bool:
    """Whether two axes are read at 0, 1, 2, ... up to the end of the shorter one."""
    if len(positions) != 2 or not all(isinstance(shape[axis], int) for axis, _ in positions):
        return False
    count = min(shape[axis] for axis, _ in positions)
    found = [Constants().value_of(node) for _, node in positions]
    return all(x is not None and torch.equal(x, torch.arange(count, dtype=x.dtype)) for x in found)
