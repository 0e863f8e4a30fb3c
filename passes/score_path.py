"""The way of the scores: from the softmax back to the product of query and key, and what is done to them on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .axes import EinsumAxes, read_move, same_shape
from .dialect import Call, Kind, read
from .elementwise import read_elementwise
from .index_fill import IndexFill, read_index_fill
from .layout import Layout, Permute, whole_axis
from .meaning import StagedStretch, Stretch, depends_on, find_stretch
from .mutation import mutated_arguments
from .row_shift import Event, keeps_shift, may_overflow
from .score_steps import Operand, read_steps
from .sites import Factor, Refuse, ScoreStep, Term
from .softmax import Softmax, maximum_over
from .trace import MOVES, Trace, first_of, move_of
from .values import constant_of, dtype_of, is_matrix, rank_of, shape_of
from .where import describe

CHAIN = {
    Kind.ADD, Kind.SUB, Kind.MUL, Kind.DIV, Kind.NEG, Kind.TANH, Kind.CLAMP, Kind.MASKED_FILL, Kind.WHERE, Kind.CAST,
    Kind.SAME, Kind.DROPOUT, Kind.ADDCMUL, Kind.SETITEM,
    *MOVES,
}  # fmt: skip
PRODUCTS = {Kind.MATMUL, Kind.BADDBMM, Kind.EINSUM, Kind.ADDMM}
_STRICT_PRODUCTS = {
    torch.mm, torch.bmm, "mm", "bmm", torch.ops.aten.mm.default, torch.ops.aten.bmm.default,
}  # fmt: skip
"""Products that take matrices alone."""

_SCORE_ARGUMENTS = {
    Kind.WHERE: ("input", "other"),
    Kind.ADD: ("input", "other"),
    Kind.SUB: ("input", "other"),
    Kind.MUL: ("input", "other"),
    Kind.ADDCMUL: ("tensor1", "tensor2"),
}


@dataclasses.dataclass
class Product:
    """Q K^T as it was found: its factors in its own axes, and the axes (query, key) of its result."""

    node: fx.Node
    query: Factor
    key: Factor
    axes: tuple[int, int]
    first_moves: tuple[Permute, ...]
    first_steps: tuple[ScoreStep, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sink:
    """A logit beside those of the keys: concatenated to the scores, and cut off the probabilities."""

    node: fx.Node
    is_first: bool


@dataclasses.dataclass
class ScorePath:
    """The walk back from a softmax. After `walk`, `layouts[n]` is where the scores stand after n moves."""

    softmax: Softmax
    trace: Trace
    scores: fx.Node = dataclasses.field(init=False)
    sink: Sink | None = None
    layouts: list[Layout] = dataclasses.field(default_factory=list)
    _shifts: list[tuple[fx.Node, int]] = dataclasses.field(default_factory=list)
    """Where a row maximum is subtracted, and how many events come after."""

    def __post_init__(self) -> None:
        self.scores = self.softmax.input

    def walk(self) -> tuple[Product, tuple[ScoreStep, ...]]:
        """The product, and what becomes of it in order; Refuse at the first fact that cannot be proven."""
        product_node, events, key_axis = self._walk_back(self._softmax_axis())
        product = self._read_product(product_node, key_axis)
        self._check_shifts(product, events)
        return product, self._in_order(product, events)

    @property
    def layout(self) -> Layout:
        """Where the scores stand at the softmax."""
        return self.layouts[-1]

    def _softmax_axis(self) -> int:
        dim = self.softmax.dim
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise Refuse("softmax_dim_unknown", f"{self.softmax.output.name} does not say over which dimension it runs")
        rank = rank_of(self.softmax.input)
        if rank is not None:
            return dim % rank
        if dim >= 0:
            raise Refuse(
                "shape_unknown", f"the rank of {self.softmax.input.name} was not traced, so dim={dim} may be any axis"
            )
        return dim

    def _walk_back(self, key_axis: int) -> tuple[fx.Node, list[Event], int]:
        """From the softmax to the product: its node, what was passed (last first), and the softmax axis there."""
        events: list[Event] = [] if self.softmax.factor == 1 else [("mul", (self.softmax.factor,))]
        self._product_behind(self.softmax.input)  # or else it is no attention, whatever its axes are
        user, node = self._first_user(), self.softmax.input
        while True:
            node = self._current(node, user)
            call = read(node)
            if call is not None and call.kind in PRODUCTS:
                self.trace.interior.add(node)
                return node, events, key_axis
            if call is not None and call.kind == Kind.CAT:
                source = self._cut_sink(call, events, key_axis)
            elif call is not None and call.kind in MOVES:
                if not _may_lead_to_product(node):
                    raise self._no_product(node)
                source = call["input"]
                key_axis = self._move_back(call, key_axis, events)
            else:
                source = self._step_back(node, call, key_axis, events)
            self.trace.interior.add(node)
            user, node = node, source

    def _step_back(self, node: fx.Node, call: Call | None, key_axis: int, events: list[Event]) -> fx.Node:
        """The scores before an elementwise call, which becomes steps or, with what comes before it, a stretch."""
        product = self._product_behind(node)
        source = None if call is None else self._score_source(call)
        if call is None or source is None or self._uses_scores_twice(call, source, product):
            return self._stretch_back(node, product, events)
        if call.kind == Kind.SETITEM:
            events.append(read_index_fill(call))
            return source
        try:
            reading = read_steps(call, source, self._dim(node, key_axis))
        except Refuse as refusal:
            if refusal.reason != "unknown_score_op":
                raise
            return self._stretch_back(node, product, events)
        if reading.absorbed and not all(map(keeps_shift, events)):
            raise Refuse(
                "unknown_score_op", f"{describe(node)} shifts the scores before a step that does not keep a shift"
            )
        if reading.absorbed:
            self._shifts.append((node, len(events)))
        events += reversed(reading.steps)
        self.trace.interior.update(reading.absorbed)
        if reading.takes_dtype_of is not None:
            self.trace.dtypes_taken.append(reading.takes_dtype_of)
        return source

    def _check_shifts(self, product: Product, events: list[Event]) -> None:
        """Refuse where scores whose maximum is not subtracted would overflow."""
        has_term = any(step.name == "add" for step in product.first_steps)
        for node, count in self._shifts:
            after, before = events[:count][::-1], events[count:][::-1]
            if has_term:
                before = [("add", (Operand(product.node),)), *before]
            if may_overflow(before, after, dtype_of(node)):
                raise Refuse(
                    "unknown_score_op", f"{describe(node)} shifts scores that would overflow if it were left out"
                )

    def _stretch_back(self, node: fx.Node, product: fx.Node, events: list[Event]) -> fx.Node:
        stretch = find_stretch(node, product, self.trace.order)
        before, after = shape_of(stretch.start), shape_of(node)
        if before is None or after is None:
            raise Refuse("shape_unknown", f"the shape of {node.name} was not traced")
        if not same_shape(before, after):
            raise Refuse("mask_broadcasts_scores", f"{describe(node)} enlarges the scores from {before} to {after}")
        events.append(stretch)
        self.trace.interior.update(stretch.inside)
        return stretch.start

    def _product_behind(self, node: fx.Node) -> fx.Node:
        """The product that the scores come from, as far as one can tell from their way; Refuse if there is none."""
        start = node
        while True:
            call = read(node)
            if call is not None and call.kind in PRODUCTS:
                return node
            source = None if call is None else self._score_source(call)
            if call is not None and call.kind == Kind.CAT:
                source = next((x for x in call.node.all_input_nodes if leads_to_product(x)), None)
            if source is None and call is not None and call.kind in MOVES and _may_lead_to_product(call["input"]):
                source = call["input"]
            if source is None:
                operation = read_elementwise(node)
                sources = [] if operation is None else [x for x in node.all_input_nodes if _may_lead_to_product(x)]
                source = next((x for x in sources if _is_of_shape(x, node)), next(iter(sources), None))
            if source is None:
                raise self._no_product(node if node is start or not _reaches_product(start) else start)
            node = source

    def _uses_scores_twice(self, call: Call, source: fx.Node, product: fx.Node) -> bool:
        """Whether another argument of a call is computed from the scores too, and is not their row maximum."""
        others = [x for x in call.node.all_input_nodes if x is not source]
        if source not in others and [*call.arguments.values()].count(source) > 1:
            return True
        if not any(depends_on(x, product, self.trace.order) for x in others):
            return False
        return call.kind != Kind.SUB or maximum_over(source, call.get("other")) is None

    def _cut_sink(self, call: Call, events: list[Event], key_axis: int) -> fx.Node:
        """The scores to which a concatenation adds a sink: one column more, which is no key."""
        parts, node = call["input"], call.node
        shapes = [shape_of(part) for part in parts] if isinstance(parts, (list, tuple)) else []
        rank = rank_of(node)
        if len(shapes) != 2 or None in shapes or rank is None or events or self.sink is not None:
            raise Refuse("scores_concatenated", f"{describe(node)} joins scores of several products or steps")
        widths = [shape[key_axis] for shape in shapes if shape is not None]
        is_first = statically_known_true(widths[0] == 1) and not leads_to_product(parts[0])
        if call.get("dim", 0) % rank != key_axis % rank or not statically_known_true(widths[1 - is_first] == 1):
            raise Refuse("scores_concatenated", f"{describe(node)} joins scores of several products or steps")
        self.sink = Sink(parts[1 - is_first], is_first)
        self.scores = parts[int(is_first)]
        return self.scores

    def _first_user(self) -> fx.Node:
        users = (n for n in self.softmax.interior if self.softmax.input in n.all_input_nodes)
        return first_of(users, self.trace.order)

    def _current(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """The value of `node` as `user` sees it: what the last in-place operation before `user` left there."""
        writers = [
            other
            for other in node.users
            if other is not user
            and self.trace.order[other] < self.trace.order[user]
            and node in mutated_arguments(other)
            and (call := read(other)) is not None
            and call.in_place
            and call.get("input") is node
        ]
        return max(writers, key=self.trace.order.__getitem__) if writers else node

    def _no_product(self, node: fx.Node) -> Refuse:
        if _reaches_product(node):
            return Refuse("unknown_score_op", f"{describe(node)} lies between the product and the softmax")
        return Refuse(
            "not_attention", f"no product of query and key leads to {self.softmax.output.name}: {describe(node)}"
        )

    def _score_source(self, call: Call) -> fx.Node | None:
        """The argument that carries the scores; where two could, the one of full size, or the first."""
        if call.kind not in CHAIN:
            return None
        names = _SCORE_ARGUMENTS.get(call.kind, ("input",))
        sources = [x for name in names if isinstance(x := call.get(name), fx.Node) and leads_to_product(x)]
        whole = [x for x in sources if _is_of_shape(x, call.node)]
        chosen = next(iter(whole or sources), None)
        if call.in_place and chosen is not call.get("input"):
            raise Refuse("inputs_written_between", f"{describe(call.node)} writes the scores into another tensor")
        return chosen

    def _dim(self, node: fx.Node, key_axis: int) -> int:
        """The key axis of a node as the model would write it: from the back."""
        shape = shape_of(node)
        return key_axis - len(shape) if shape is not None and key_axis >= 0 else key_axis

    def _move_back(self, call: Call, key_axis: int, events: list[Event]) -> int:
        """The softmax axis before a move."""
        move = read_move(call)
        if move is None:
            return key_axis
        events.append(call)
        self.trace.rank = len(move.dims) if isinstance(move, Permute) else len(move[0])
        if isinstance(move, Permute):
            return move.dims[key_axis]
        return whole_axis(move[1], move[0], key_axis)

    def _read_product(self, node: fx.Node, key_axis: int) -> Product:
        call = read(node)
        assert call is not None
        if call.kind == Kind.EINSUM:
            return self._read_einsum(call, key_axis)
        left, right = (
            (call["input"], call["other"]) if call.kind == Kind.MATMUL else (call.get("left"), call.get("right"))
        )
        rank = rank_of(node) or self.trace.rank
        axis = key_axis - rank if rank is not None and key_axis >= 0 else key_axis
        if axis not in (-1, -2):
            raise Refuse(
                "softmax_not_over_keys", f"{self.softmax.output.name} runs over a batch or head axis of {node.name}"
            )
        query, key = (left, right) if axis == -1 else (right, left)
        shape = shape_of(node)
        is_strict = call.kind != Kind.MATMUL or node.target in _STRICT_PRODUCTS
        if not is_strict and (not is_matrix(key) or (shape is not None and (len(shape) < 2 or not is_matrix(query)))):
            if rank_of(key) is None:
                raise Refuse("shape_unknown", f"whether {key.name} is a matrix was not traced")
            raise Refuse("not_attention", f"{describe(node)} is a product with a vector")
        steps: tuple[ScoreStep, ...] = ()
        if call.kind in (Kind.BADDBMM, Kind.ADDMM):
            alpha, beta = constant_of(call.get("alpha", 1)), constant_of(call.get("beta", 1))
            if alpha is None or beta is None:
                raise Refuse("scale_not_constant", f"alpha or beta of {node.name} is known only at run time")
            steps = () if alpha == 1 else (ScoreStep("mul", (alpha,)),)
            if beta != 0:
                steps += (ScoreStep("add", (Term(call["input"], 0, multiplier=beta),)),)
        return Product(node, Factor(query), Factor(key), (-3 - axis, axis), (), steps)

    def _read_einsum(self, call: Call, key_axis: int) -> Product:
        axes = EinsumAxes.of(call)
        if key_axis < 0:
            key_axis += len(axes.output)
        query, key, moves = axes.scores(key_axis, self.softmax.output.name)
        return Product(call.node, query, key, (-2, -1), moves)

    def _in_order(self, product: Product, events: list[Event]) -> tuple[ScoreStep, ...]:
        """The steps from the product to the softmax, in the order in which the model does them."""
        rank = rank_of(product.node) or self.trace.rank
        if product.first_moves:
            rank = len(product.first_moves[0].dims)
        self.layouts = [Layout((), product.axes, rank)]
        for move in product.first_moves:
            self.layouts.append(self.layout.then(move))
        steps = list(product.first_steps)
        for event in reversed(events):
            stage = len(self.layout.moves)
            if isinstance(event, Call):
                self.layouts.append(self.layout.then(move_of(event, self.layout)))
            elif isinstance(event, Stretch):
                steps.append(ScoreStep("set", (StagedStretch(event, stage),)))
            elif isinstance(event, IndexFill):
                steps.append(event.at(self.layout, stage))
            else:
                name, arguments = event
                steps.append(ScoreStep(name, tuple(a.at(stage) if isinstance(a, Operand) else a for a in arguments)))
        return tuple(steps)


def _is_of_shape(x: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors certainly have the same shape."""
    shape, expected = shape_of(x), shape_of(other)
    return shape is not None and expected is not None and same_shape(shape, expected)


def leads_to_product(node: fx.Node, depth: int = 24) -> bool:
    """Whether a chain of calls that a score may pass leads back from node to a product."""
    call = read(node)
    if call is None or depth == 0:
        return False
    if call.kind in PRODUCTS:
        return True
    if call.kind == Kind.CAT:
        arguments = call["input"] if isinstance(call["input"], (list, tuple)) else ()
    elif call.kind in CHAIN:
        arguments = tuple(call.get(name) for name in _SCORE_ARGUMENTS.get(call.kind, ("input",)))
    else:
        return False
    return any(isinstance(x, fx.Node) and leads_to_product(x, depth - 1) for x in arguments)


def _may_lead_to_product(node: fx.Node, depth: int = 24) -> bool:
    """Whether moves and elementwise calls, whatever they compute, lead back from node to a product."""
    if leads_to_product(node):
        return True
    call = read(node)
    sources: Sequence[Any] = ()
    if depth and read_elementwise(node) is not None:
        sources = node.all_input_nodes
    elif depth and call is not None and call.kind in CHAIN:
        sources = [call.get(name) for name in _SCORE_ARGUMENTS.get(call.kind, ("input",))]
    return any(isinstance(x, fx.Node) and _may_lead_to_product(x, depth - 1) for x in sources)


def _reaches_product(node: fx.Node, depth: int = 4) -> bool:
    """Whether a product stands a few nodes back, whatever lies between."""
    call = read(node)
    if call is not None and call.kind in PRODUCTS:
        return True
    return depth > 0 and any(_reaches_product(x, depth - 1) for x in node.all_input_nodes)
