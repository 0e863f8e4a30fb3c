"""How the axes of a score tensor move between Q K^T, the softmax and the product with V.

Scores have a query axis i, a key axis j and other axes (batch, heads, groups). Between the two products a model may
permute them, and may split or join the other axes in a view. A `Layout` is such a path. What belongs to the scores at
its start (the query, the key, a mask) is brought to its end by the same moves, where i or j may have another size: the
query has D in the place of j, a mask has 1 where it broadcasts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .emit import Emitter


class LayoutError(Exception):
    """The axes cannot be followed; the message says why."""


@dataclasses.dataclass(frozen=True)
class Permute:
    """Axis n of the result is axis dims[n] of the input."""

    dims: tuple[int, ...]

    def inverse(self) -> Permute:
        return Permute(tuple(self.dims.index(n) for n in range(len(self.dims))))

    def move_axis(self, axis: int) -> int:
        return self.dims.index(axis)


@dataclasses.dataclass(frozen=True)
class View:
    """A view from one shape to another that keeps the axes i and j whole."""

    before: tuple[Any, ...]
    after: tuple[Any, ...]
    axes_before: tuple[int, int]
    axes_after: tuple[int, int]

    def inverse(self) -> View:
        return View(self.after, self.before, self.axes_after, self.axes_before)

    def move_axis(self, axis: int) -> int:
        return self.axes_after[self.axes_before.index(axis)]

    @classmethod
    def between(cls, before: Sequence[Any], after: Sequence[Any], axes: tuple[int, int]) -> View:
        """The view, if it keeps both `axes` whole; LayoutError if not."""
        found = tuple(whole_axis(before, after, axis) for axis in axes)
        if found[0] == found[1]:
            raise LayoutError(f"a view from {tuple(before)} to {tuple(after)} mixes queries and keys")
        return cls(tuple(before), tuple(after), axes, (found[0], found[1]))


def _known_equal(a: Any, b: Any) -> bool:
    """Equality that is certain, without a guard on symbolic sizes."""
    return statically_known_true(a == b)


def whole_axis(before: Sequence[Any], after: Sequence[Any], axis: int) -> int:
    """Where `axis` of the shape `before` stands in `after`, as an axis of its own."""
    inner = math.prod(before[axis + 1 :])
    for position, size in enumerate(after):
        if _known_equal(size, before[axis]) and _known_equal(math.prod(after[position + 1 :]), inner):
            return position
    raise LayoutError(f"a view from {tuple(before)} to {tuple(after)} splits or joins the queries or keys")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A path of moves, and where the axes i and j stand at its end (from the back where the rank is unknown)."""

    moves: tuple[Permute | View, ...] = ()
    axes: tuple[int, int] = (-2, -1)
    rank: int | None = None

    def then(self, move: Permute | View) -> Layout:
        """The path with one more move, which tells the rank if nothing before did."""
        before = len(move.dims) if isinstance(move, Permute) else len(move.before)
        rank = len(move.dims) if isinstance(move, Permute) else len(move.after)
        i, j = (axis % before for axis in self.axes)
        return Layout((*self.moves, move), (move.move_axis(i), move.move_axis(j)), rank)

    def inverse(self, axes: tuple[int, int]) -> Layout:
        """The way back, to a start at which i and j stood at `axes`."""
        return Layout(tuple(move.inverse() for move in reversed(self.moves)), axes, None)

    def apply(self, emit: Emitter, x: fx.Node, axes: tuple[int, int]) -> tuple[fx.Node, tuple[int, int]]:
        """Emits the moves for `x`, which has the axes of the start (or fewer, to broadcast), with i and j at `axes`.

        The sizes of x at i and j are its own; at the other axes they are those of the scores, or 1.
        """
        for move in self.moves:
            if isinstance(move, Permute):
                x = emit.tell_rank(emit.permute(emit.pad(x, len(move.dims)), move.dims), len(move.dims))
                axes = (move.move_axis(axes[0] % len(move.dims)), move.move_axis(axes[1] % len(move.dims)))
            else:
                x = _apply_view(emit, x, move)
                axes = move.axes_after
        return x, axes


def _apply_view(emit: Emitter, x: fx.Node, view: View) -> fx.Node:
    x = emit.pad(x, len(view.before))
    shape = emit.shape(x)
    own = dict(zip(view.axes_after, (shape[axis] for axis in view.axes_before), strict=True))
    others = [axis for axis in range(len(view.before)) if axis not in view.axes_before]
    if all(_known_equal(shape[axis], 1) for axis in others):
        after = [own.get(axis, 1) for axis in range(len(view.after))]
        return emit.reshape(x, after)
    x = emit.expand(x, [view.before[a] if a in others else shape[a] for a in range(len(view.before))])
    return emit.reshape(x, [own.get(axis, size) for axis, size in enumerate(view.after)])
