"""Proof that a site's inputs are, where its op will stand, what they were where its dense form read them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import fx

from .dialect import changes_mode
from .mutation import mutated_arguments, storage_roots
from .sites import Refuse
from .where import describe

Order = Mapping[fx.Node, int]


def check_span(
    what: str, inputs: set[fx.Node], interior: Collection[fx.Node], start: int, output: fx.Node, order: Order
) -> None:
    """Refuse if grad mode or autocast changes from position `start` to `output`, or an input is written to once read.

    The op stands where `output` stood. `interior` are the nodes that it replaces, or passes over, which may write to
    each other. An input is read from where the first of them uses it.
    """
    change = find_mode_change(start, output, order)
    if change is not None:
        raise Refuse("mode_changes_inside", f"grad mode or autocast changes at {change.name}, inside the {what}")
    for node in sorted(inputs, key=order.__getitem__):
        writer = find_writer({node}, interior, _first_read(node, interior, start, order), output, order)
        if writer is not None:
            raise Refuse("inputs_written_between", f"{describe(writer)} writes to an input of the {what} inside it")


def _first_read(node: fx.Node, interior: Collection[fx.Node], start: int, order: Order) -> int:
    """The position from which `interior` may read a node: that of the first user, if no other makes a view of it."""
    roots = storage_roots(node)
    if any(storage_roots(user) & roots for user in node.users if user not in interior):
        return start
    return min((order[user] for user in node.users if user in interior), default=start)


def find_mode_change(start: int, end: fx.Node, order: Order) -> fx.Node | None:
    """The first change of grad mode or autocast from position `start` to a node."""
    for node in _between(start, end, order):
        if changes_mode(node):
            return node
    return None


def find_writer(
    inputs: Collection[fx.Node], inside: Collection[fx.Node], start: int, end: fx.Node, order: Order
) -> fx.Node | None:
    """The first node from position `start` to a node, not one of `inside`, that may write to an input."""
    roots: set[fx.Node] | None = None
    for node in _between(start, end, order):
        written = [] if node in inside else mutated_arguments(node)
        if not written:
            continue
        if roots is None:
            roots = set().union(*map(storage_roots, inputs))
        if any(_may_share(storage_roots(x), roots) for x in written):
            return node
    return None


def _between(start: int, end: fx.Node, order: Order) -> Iterator[fx.Node]:
    """The nodes from position `start` up to a node, which is not one of them."""
    node = end.prev
    found = []
    while node.op != "root" and order[node] >= start:
        found.append(node)
        node = node.prev
    return reversed(found)


def _may_share(written: set[fx.Node], read_from: set[fx.Node]) -> bool:
    """Whether two sets of storage roots may share memory: two inputs of a graph, or two of its buffers, may be one."""
    return bool(written & read_from) or (any(map(_is_from_outside, written)) and any(map(_is_from_outside, read_from)))


def _is_from_outside(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")
