"""Proof that a site's inputs are, where its op will stand, what they were where its dense form read them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import fx

from .dialect import Kind, changes_mode, read
from .mutation import mutated_arguments, storage_roots
from .sites import Refuse
from .trace import MOVES
from .where import describe

Order = Mapping[fx.Node, int]
_PASSES_ON = MOVES | {Kind.CAST, Kind.SAME, Kind.SLICE, Kind.NARROW, Kind.SELECT}
"""Calls through which finding may have gone back to an input, and which may copy it."""


def check_span(
    what: str,
    inputs: set[fx.Node],
    interior: Collection[fx.Node],
    start: int,
    output: fx.Node,
    order: Order,
    product: fx.Node | None = None,
) -> None:
    """Refuse if grad mode or autocast changes from position `start` to `output`, or an input is written to once read.

    The op stands where `output` stood. `interior` are the nodes that it replaces, or passes over, which may write to
    each other. An input is read from where the first of them uses it. If the only other product among them is
    `product`, then autocast may be changed and changed back between the two: it rounds what products read.
    """
    change = find_mode_change(start, output, order)
    if change is not None and not (product is not None and _is_autocast_restored(product, start, output, order)):
        raise Refuse("mode_changes_inside", f"grad mode or autocast changes at {change.name}, inside the {what}")
    for node in sorted(inputs, key=order.__getitem__):
        if find_writer({node}, interior, start, output, order) is None:
            continue
        writer = find_writer({node}, interior, _first_read(node, interior, start, order), output, order)
        if writer is not None:
            raise Refuse("inputs_written_between", f"{describe(writer)} writes to an input of the {what} inside it")


def _first_read(node: fx.Node, interior: Collection[fx.Node], start: int, order: Order) -> int:
    """The position from which `interior` may read what a node holds, through a view or a copy of it too."""
    roots = storage_roots(node)
    readers = [reader for reader in interior if any(storage_roots(x) & roots for x in reader.all_input_nodes)]
    readers += [user for user in node.users if _passes_on(user, interior)]
    return max(start, min(map(order.__getitem__, readers), default=start))


def _passes_on(node: fx.Node, interior: Collection[fx.Node]) -> bool:
    """Whether a node hands what it reads to `interior`, at most moved, cast or cut."""
    call = read(node)
    if call is None or call.kind not in _PASSES_ON:
        return False
    return any(user in interior or _passes_on(user, interior) for user in node.users)


def find_mode_change(start: int, end: fx.Node, order: Order) -> fx.Node | None:
    """The first change of grad mode or autocast from position `start` to a node."""
    for node in _between(start, end, order):
        if changes_mode(node):
            return node
    return None


def _is_autocast_restored(product: fx.Node, start: int, output: fx.Node, order: Order) -> bool:
    """Whether no mode but autocast changes from position `start` to a node, and each change ends after `product`."""
    entered: list[fx.Node] = []
    for node in _between(start, output, order):
        name = getattr(node.target, "__name__", "")
        if node is product and entered:
            return False
        if name == "_enter_autocast":
            entered.append(node)
        elif name == "_exit_autocast" and entered and node.args[0] is entered[-1]:
            entered.pop()
        elif changes_mode(node):
            return False
    return not entered


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
