"""Scores that several attentions share: each gets a copy of its own, so that it can be replaced by itself.

LiLT adds the scores of its text to those of its layout, and attends with the sum to the values of both. The op computes
the product of query and key again, which costs less than to keep what it gives.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from .attention import find_attention
from .dialect import read
from .elementwise import read_elementwise
from .mutation import is_mutated, mutated_arguments
from .score_path import CHAIN, PRODUCTS
from .sites import Refusal
from .softmax import Softmax, read_softmax
from .trace import Order, is_unread

_LARGEST = 64
"""Nodes between products and softmax, beyond which they are not copied."""


@dataclasses.dataclass(frozen=True)
class Split:
    """A softmax that reads `copies` of nodes, where it read `original`."""

    softmax: Softmax
    original: fx.Node
    copies: tuple[fx.Node, ...]

    def undo(self) -> None:
        """Puts the graph back as it was; nothing in it may have changed since."""
        for node in self.softmax.interior:
            node.replace_input_with(self.copies[-1], self.original)
        for copy in reversed(self.copies):
            copy.graph.erase_node(copy)


def split_scores(node: fx.Node, order: Order) -> Split | None:
    """Gives a softmax its own scores, if what else reads them are attentions too; None if there is nothing to split."""
    call = read(node)
    softmax = None if call is None else read_softmax(call)
    if softmax is None:
        return None
    path = _path_to(softmax.input, order)
    readers = {user for x in path for user in x.users} - set(path) - set(softmax.interior)
    if not readers or not path or any(is_mutated(x) or mutated_arguments(x) for x in path):
        return None
    if not all(_leads_to_attention(reader, softmax, order) for reader in readers):
        return None
    return _copy(softmax, path)


def _path_to(scores: fx.Node, order: Order) -> list[fx.Node]:
    """The elementwise operations and moves that lead from products to the scores, and these products, in order."""
    found: set[fx.Node] = set()
    pending = [scores]
    while pending and len(found) <= _LARGEST:
        node = pending.pop()
        call = read(node)
        if node in found:
            continue
        if call is not None and call.kind in PRODUCTS:
            found.add(node)
        elif _is_passed(node) and any(_reaches_product(x) for x in node.all_input_nodes):
            found.add(node)
            pending += [x for x in node.all_input_nodes if _reaches_product(x)]
    return sorted(found, key=order.__getitem__) if len(found) <= _LARGEST else []


def _is_passed(node: fx.Node) -> bool:
    call = read(node)
    return read_elementwise(node) is not None or (call is not None and call.kind in CHAIN)


def _reaches_product(node: fx.Node, depth: int = 16) -> bool:
    call = read(node)
    if call is not None and call.kind in PRODUCTS:
        return True
    return depth > 0 and _is_passed(node) and any(_reaches_product(x, depth - 1) for x in node.all_input_nodes)


def _leads_to_attention(reader: fx.Node, own: Softmax, order: Order) -> bool:
    """Whether what reads the scores, directly or through elementwise operations, are softmaxes of attentions alone."""
    pending, seen = [reader], {reader}
    while pending:
        node = pending.pop()
        call = read(node)
        if is_unread(node) or node in own.interior:
            continue
        softmax = None if call is None else read_softmax(call)
        if softmax is not None:
            found = find_attention(softmax, order)
            if isinstance(found, Refusal) and found.reason != "scores_used_elsewhere":
                return False
        elif _is_passed(node) and not mutated_arguments(node) and len(seen) <= _LARGEST:
            pending += [user for user in node.users if user not in seen]
            seen.update(node.users)
        else:
            return False
    return True


def _copy(softmax: Softmax, path: list[fx.Node]) -> Split:
    copies: dict[fx.Node, fx.Node] = {}
    graph = softmax.output.graph
    first = next(node for node in graph.nodes if node in softmax.interior)
    with graph.inserting_before(first):
        for node in path:
            copies[node] = graph.node_copy(node, lambda x: copies.get(x, x))
    for node in softmax.interior:
        node.replace_input_with(softmax.input, copies[softmax.input])
    return Split(softmax, softmax.input, tuple(copies.values()))
