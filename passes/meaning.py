"""Gives the steps of a score their meaning: what a tensor of queries x keys is computed from, if that is small."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from topk_fx.score.language import SCORES, Call, Expression, reads_scores

from .dialect import Kind, read
from .elementwise import read_elementwise
from .layout import Layout
from .regions import Frame, NotReadable, RegionReader
from .sites import Refuse, ScoreStep, Term
from .span import find_mode_change, find_writer
from .trace import Order
from .values import dtype_of, shape_of
from .where import describe


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A stretch of the scores' path that no single step describes: from `start`, its one way in, to `end`."""

    start: fx.Node
    end: fx.Node
    inside: frozenset[fx.Node]


def find_stretch(end: fx.Node, product: fx.Node, order: Order) -> Stretch:
    """The shortest stretch of elementwise operations that ends at a node and through whose start all scores come.

    Raises:
        Refuse: something on the way from `product` to the end is not elementwise.
    """
    inside: set[fx.Node] = set()
    frontier = {end}
    while True:
        node = max(frontier, key=order.__getitem__)
        if inside and len(frontier) == 1:
            return Stretch(node, end, frozenset(inside))
        operation = read_elementwise(node)
        call = read(node)
        if operation is None and not (call is not None and call.kind == Kind.SAME):
            raise Refuse("unknown_score_op", f"{describe(node)} lies between the product and the softmax")
        frontier.remove(node)
        frontier.update(x for x in node.all_input_nodes if depends_on(x, product, order))
        inside.add(node)


def depends_on(node: fx.Node, source: fx.Node, order: Order) -> bool:
    """Whether a node is computed from the values of `source`, and not of its shape or dtype alone, or is it."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is source:
            return True
        for x in _read_values(current):
            if x not in seen and order[x] >= order[source]:
                seen.add(x)
                pending.append(x)
    return False


def _read_values(node: fx.Node) -> list[fx.Node]:
    """The arguments of which a node reads more than shape and dtype."""
    call = read(node)
    if call is not None and call.kind == Kind.FILLED_LIKE:
        return []
    if call is not None and call.kind in (Kind.EXPAND, Kind.VIEW, Kind.CAST):  # as expand_as, view_as, type_as
        return [call["input"]]
    return node.all_input_nodes


@dataclasses.dataclass
class Meaning:
    """Resolves steps once the site's extent is known. `replayed` collects nodes whose work the op does again."""

    order: Order
    output: fx.Node
    replayed: set[fx.Node] = dataclasses.field(default_factory=set)

    def of(self, steps: Sequence[ScoreStep], layouts: Sequence[Layout]) -> tuple[ScoreStep, ...]:
        """The steps with expressions for stretches, and for tensors of queries x keys where these can be read.

        `layouts[n]` is where the scores stand after n moves.
        """
        return tuple(found for step in steps if (found := self._step(step, layouts)) is not None)

    def _step(self, step: ScoreStep, layouts: Sequence[Layout]) -> ScoreStep | None:
        """None for one that changes nothing: the mask of SDPA that keeps every key, a choice that is made for good."""
        arguments: list[Any] = []
        for argument in step.arguments:
            if isinstance(argument, Term) and isinstance(argument.node, fx.Node):
                argument = self._term(argument, frame_at(layouts, argument.stage), step.name == "mask")
            elif isinstance(argument, StagedStretch):
                argument = self._stretch(argument.stretch, frame_at(layouts, argument.stage))
            arguments.append(argument)
        if (step.name, *arguments) in (("mask", True), ("set", SCORES)):
            return None
        if step.name == "mask" and isinstance(arguments[0], Call):
            is_boolean = dtype_of(step.arguments[0].node) == torch.bool
            return ScoreStep("keep", (arguments[0], float("-inf"))) if is_boolean else ScoreStep("add", (arguments[0],))
        return dataclasses.replace(step, arguments=tuple(arguments))

    def _term(self, term: Term, frame: Frame | None, may_be_true: bool) -> Expression:
        shape = shape_of(term.node)
        if frame is None or shape is None or (term.order, term.shape) != (None, None) or len(shape) > frame.rank:
            return term
        if not frame.is_full(shape, frame.aligned(len(shape))):
            return term
        reader = RegionReader(frame)
        try:
            found = reader.read(term.node)
        except NotReadable:
            return term
        is_number = isinstance(found, (int, float)) and (not isinstance(found, bool) or (may_be_true and found))
        if not (is_number or isinstance(found, (Call, Term))) or not self._may_replay(reader, term.node):
            return term
        self.replayed |= reader.replayed
        if isinstance(found, Term):
            return dataclasses.replace(found, negated=term.negated, multiplier=term.multiplier)
        if not term.negated and term.multiplier == 1:
            return found
        if isinstance(term.multiplier, fx.Node):
            return term
        compute = "float64" if dtype_of(self.output) == torch.float64 else "float32"
        return Call("mul", (Call(compute, (found,)), float(-term.multiplier if term.negated else term.multiplier)))

    def _stretch(self, stretch: Stretch, frame: Frame | None) -> Expression:
        if frame is None:
            raise Refuse("shape_unknown", f"the rank of {stretch.end.name} was not traced")
        reader = RegionReader(frame, {stretch.start: SCORES}, stretch.inside, tensors_allowed=True)
        try:
            found = reader.read(stretch.end)
        except NotReadable as error:
            raise Refuse("unknown_score_op", f"{describe(stretch.end)} could not be read: {error}") from error
        if not reads_scores(found):
            raise Refuse("unknown_score_op", f"{describe(stretch.end)} does not depend on the scores")
        masks = reader.replayed - stretch.inside
        if masks and not self._may_replay(dataclasses.replace(reader, replayed=masks), stretch.end):
            raise Refuse(
                "inputs_written_between", f"what {describe(stretch.end)} reads changes before the product with V"
            )
        self.replayed |= masks
        return found

    def _may_replay(self, reader: RegionReader, result: fx.Node) -> bool:
        """Whether the nodes that a reader read can be computed again where the op stands, with the same gradients."""
        start = min(map(self.order.__getitem__, reader.replayed))
        has_gradient = any((dtype := dtype_of(leaf)) is None or dtype.is_floating_point for leaf in reader.leaves)
        return (
            find_writer(reader.leaves, reader.replayed, start, self.output, self.order) is None
            and find_mode_change(start, self.output if has_gradient else result, self.order) is None
        )


@dataclasses.dataclass(frozen=True)
class StagedStretch:
    """A stretch that begins after `stage` moves of the scores."""

    stretch: Stretch
    stage: int


def frame_at(layouts: Sequence[Layout], stage: int) -> Frame | None:
    """The axes of the scores after `stage` moves; None where tracing did not record them."""
    layout = layouts[stage]
    if layout.rank is None:
        return None
    i, j = (axis % layout.rank for axis in layout.axes)
    return Frame(layout.rank, i, j, stage)
