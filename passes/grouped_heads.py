"""Looks through what a model does to K and V only to multiply them: transposes, copies, heads repeated for groups."""

from __future__ import annotations

from typing import Any

from torch import fx

from .axes import read_move, same_shape
from .dialect import Call, Kind, read
from .layout import Permute
from .mutation import is_mutated
from .sites import Factor
from .values import shape_of


def look_through(factor: Factor, passed: set[fx.Node]) -> Factor:
    """The factor before transposes, copies and repeated heads, none of which the op needs; `passed` takes the nodes."""
    while factor.order is None:
        call = read(factor.node)
        if call is None or call.in_place or is_mutated(factor.node):
            break
        if call.kind == Kind.SAME:
            source, transposed = call["input"], factor.transposed
        elif _swaps_last_two(call):
            source, transposed = call["input"], not factor.transposed
        else:
            repeated = _source_of_repeat(call) if factor.transposed else None
            if repeated is None or any(map(is_mutated, repeated[1:])):
                break
            source, transposed = repeated[0], factor.transposed
            passed.update(repeated[1:])
        passed.add(factor.node)
        factor = Factor(source, None, transposed)
    return factor


def _swaps_last_two(call: Call) -> bool:
    if call.kind == Kind.MATRIX_TRANSPOSE:
        return True
    shape = shape_of(call["input"]) if isinstance(call.get("input"), fx.Node) else None
    if call.kind == Kind.TRANSPOSE:
        dims = (call.get("dim0", 0), call.get("dim1", 1))
        if not all(isinstance(d, int) for d in dims):
            return False
        if shape is not None:
            dims = (dims[0] % len(shape) - len(shape), dims[1] % len(shape) - len(shape))
        return set(dims) == {-1, -2}
    if call.kind == Kind.PERMUTE:
        move = read_move(call)
        if not isinstance(move, Permute) or len(move.dims) < 2:
            return False
        rank = len(move.dims)
        return move.dims == (*range(rank - 2), rank - 1, rank - 2)
    return False


def _source_of_repeat(call: Call) -> tuple[fx.Node, ...] | None:
    """K or V with its own heads, and the nodes passed, if a call repeats each head of [B, H, L, D] in its place."""
    shape = shape_of(call.node)
    if shape is None or len(shape) != 4:
        return None
    if call.kind == Kind.REPEAT_INTERLEAVE:
        source = call["input"]
        is_heads = isinstance(call.get("repeats"), int) and call.get("dim") in (1, -3)
        return (source,) if is_heads and len(shape_of(source) or ()) == 4 else None
    if call.kind != Kind.VIEW:
        return None
    expand = read(call["input"])
    if expand is None or expand.kind != Kind.EXPAND:
        return None
    unsqueezed = read(expand["input"])
    wide = shape_of(expand.node)
    if (
        unsqueezed is None
        or wide is None
        or len(wide) != 5
        or unsqueezed.kind not in (Kind.UNSQUEEZE, Kind.GETITEM, Kind.VIEW)
    ):
        return None
    source = unsqueezed["input"]
    own, narrow = shape_of(source), shape_of(unsqueezed.node)
    if own is None or narrow is None or len(own) != 4:
        return None
    if unsqueezed.kind == Kind.GETITEM and not _inserts_axis(unsqueezed.get("index"), 2):
        return None
    if unsqueezed.kind == Kind.UNSQUEEZE and unsqueezed.get("dim") not in (2, -3):
        return None
    batch, heads, length, size = own
    repeats = wide[2]
    is_repeat = (
        same_shape(narrow, (batch, heads, 1, length, size))
        and same_shape(wide, (batch, heads, repeats, length, size))
        and same_shape(shape, (batch, heads * repeats, length, size))
    )
    return (source, expand.node, unsqueezed.node) if is_repeat else None


def _inserts_axis(index: Any, position: int) -> bool:
    """Whether an index is x[:, :, None, ...]: a new axis at `position` and everything else whole."""
    if not isinstance(index, tuple):
        index = (index,)
    return list(index[: position + 1]) == [slice(None)] * position + [None] and all(
        item == slice(None) or item is Ellipsis for item in index[position + 1 :]
    )
