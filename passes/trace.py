"""What finding an attention has passed so far: shared by the walk back from the softmax and the walk forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import fx

from .axes import read_move
from .dialect import Call, Kind, read
from .layout import Layout, Permute, View
from .mutation import mutated_arguments

Order = dict[fx.Node, int]
MOVES = {
    Kind.VIEW, Kind.TRANSPOSE, Kind.PERMUTE, Kind.MATRIX_TRANSPOSE, Kind.UNSQUEEZE, Kind.SQUEEZE, Kind.EXPAND,
    Kind.GETITEM,
}  # fmt: skip


@dataclasses.dataclass
class Trace:
    """
    Attributes:
        order: the position of every node in the graph.
        interior: nodes that are part of the site.
        passed: nodes looked through, that others may need: transposes and repeats of K and V.
        dtypes_taken: tensors whose dtype a cast takes, in graphs that do not record dtypes.
        rank: of the scores, as the last move told, in graphs that do not record shapes.
    """

    order: Order
    interior: set[fx.Node] = dataclasses.field(default_factory=set)
    passed: set[fx.Node] = dataclasses.field(default_factory=set)
    dtypes_taken: list[fx.Node] = dataclasses.field(default_factory=list)
    rank: int | None = None


def move_of(call: Call, layout: Layout) -> Permute | View:
    """The move that a call is, where the scores stand at the end of `layout`."""
    move = read_move(call)
    assert move is not None
    if isinstance(move, Permute):
        return move
    before, after = move
    query_axis, key_axis = (axis % len(before) for axis in layout.axes)
    return View.between(before, after, (query_axis, key_axis))


def is_assert(node: fx.Node) -> bool:
    call = read(node)
    return call is not None and call.kind == Kind.ASSERT


_LONGEST_UNREAD = 32


def is_unread(node: fx.Node) -> bool:
    """Whether a node is left over from tracing: neither its result nor what is made of it is seen by anything."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if is_assert(current):
            continue
        if current.op == "output" or current.is_impure() or mutated_arguments(current) or len(seen) > _LONGEST_UNREAD:
            return False
        pending += [user for user in current.users if user not in seen]
        seen.update(current.users)
    return True


def erase_unread(node: fx.Node) -> None:
    """Erases a node that `is_unread`, and what reads it."""
    for user in list(node.users):
        erase_unread(user)
    node.graph.erase_node(node)


def first_of(nodes: Iterable[fx.Node], order: Order) -> fx.Node:
    return min(nodes, key=order.__getitem__)
