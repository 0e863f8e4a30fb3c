"""Proof that a site's inputs are, where its op will stand, what they were where its dense form read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from .dialect import Kind, read
from .mutation import mutated_arguments, storage_roots
from .sites import Refuse
from .where import describe


def check_span(
    what: str,
    inputs: set[fx.Node],
    interior: Iterable[fx.Node],
    start: int,
    output: fx.Node,
    order: Mapping[fx.Node, int],
) -> None:
    """Refuse if, from position `start` to `output`, grad mode or autocast changes or an input may be written to.

    The op stands where `output` stood. `interior` are the nodes that it replaces, which may write to each other.
    """
    inside = set(interior)
    roots: set[fx.Node] | None = None
    for node in output.graph.nodes:
        if not start <= order[node] < order[output] or node in inside:
            continue
        call = read(node)
        if call is not None and call.kind == Kind.MODE:
            raise Refuse("mode_changes_inside", f"grad mode or autocast changes at {node.name}, inside the {what}")
        written = mutated_arguments(node)
        if not written:
            continue
        if roots is None:
            roots = set().union(*map(storage_roots, inputs))
        if any(_may_share(storage_roots(x), roots) for x in written):
            raise Refuse("inputs_written_between", f"{describe(node)} writes to an input of the {what} inside it")


def _may_share(written: set[fx.Node], read_from: set[fx.Node]) -> bool:
    """Whether two sets of storage roots may share memory: two inputs of a graph, or two of its buffers, may be one."""
    return bool(written & read_from) or (any(map(_is_from_outside, written)) and any(map(_is_from_outside, read_from)))


def _is_from_outside(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")
