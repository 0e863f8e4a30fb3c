"""Finds attention: anchors on a softmax or an SDPA call, walks to both products by meaning, and proves each fact.

Walking back from the softmax: steps of the score (scale, bias, mask, soft cap), casts, and moves of axes, until the
product of query and key. Walking forward: casts, dropout and moves, until the product with the value. The softmax axis
must be the one that the first product takes from one factor alone (the key) and the second sums over; whatever lies
between must be used by nothing else. What does not fit is refused with the first reason found.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from .axes import EinsumAxes, read_move
from .dialect import Call, Kind, read
from .grouped_heads import look_through
from .layout import Layout, LayoutError, Permute, View, whole_axis
from .mutation import mutated_arguments
from .score_steps import NO_DROPOUT, Operand, Step, check_cast, merge_dropout, read_steps
from .sites import AttentionSite, Factor, Refusal, Refuse, ScoreStep, Term
from .softmax import Softmax
from .span import check_span
from .values import constant_of, is_matrix, is_scalar, rank_of, shape_of, value_of
from .where import describe

Order = dict[fx.Node, int]
_CHAIN = {
    Kind.ADD, Kind.SUB, Kind.MUL, Kind.DIV, Kind.NEG, Kind.TANH, Kind.CLAMP, Kind.MASKED_FILL, Kind.WHERE, Kind.CAST,
    Kind.SAME, Kind.DROPOUT, Kind.VIEW, Kind.EXPAND, Kind.TRANSPOSE, Kind.PERMUTE, Kind.MATRIX_TRANSPOSE,
    Kind.UNSQUEEZE, Kind.SQUEEZE, Kind.GETITEM, Kind.ADDCMUL,
}  # fmt: skip
_PRODUCTS = {Kind.MATMUL, Kind.BADDBMM, Kind.EINSUM, Kind.ADDMM}
_MOVES = {
    Kind.VIEW, Kind.TRANSPOSE, Kind.PERMUTE, Kind.MATRIX_TRANSPOSE, Kind.UNSQUEEZE, Kind.SQUEEZE, Kind.EXPAND,
    Kind.GETITEM,
}  # fmt: skip


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


def find_attention(softmax: Softmax, order: Order) -> AttentionSite | Refusal:
    """The attention around a softmax, or why there is none."""
    try:
        return _Reader(softmax, order).read()
    except (Refuse, LayoutError) as error:
        reason = error.reason if isinstance(error, Refuse) else "axes_not_followed"
        detail = error.detail if isinstance(error, Refuse) else str(error)
        return Refusal(reason, detail, softmax.output)


def find_sdpa(call: Call, order: Order) -> AttentionSite | Refusal:
    """The attention that a call of scaled_dot_product_attention is."""
    steps: list[ScoreStep] = []
    mask = call.get("attn_mask")
    is_causal = call.get("is_causal", False)
    if not isinstance(is_causal, bool):
        return Refusal("causal_not_static", f"is_causal of {call.node.name} is known only at run time", call.node)
    if not all(isinstance(call.get(name), fx.Node) for name in ("query", "key", "value")):
        return Refusal("not_tensors", f"an input of {call.node.name} is no tensor", call.node)
    if mask is not None:
        steps.append(ScoreStep("mask", (Term(mask, stage=0),)))
    if is_causal:
        steps.append(ScoreStep("causal"))
    scale: Any = call.get("scale")
    shape, key_shape = shape_of(call["query"]), shape_of(call["key"])
    if scale is None and shape is not None and isinstance(shape[-1], int):
        scale = 1 / math.sqrt(shape[-1]) if shape[-1] else 1.0
    dropout_p = call.get("dropout_p", 0.0)
    layout = Layout(rank=None if shape is None else len(shape))
    key, value = (Factor(call[name], transposed=True) for name in ("key", "value"))
    return AttentionSite(
        anchor=call.node,
        output=call.node,
        query=Factor(call["query"]),
        key=key,
        value=value,
        start_axes=(-2, -1),
        score_layout=layout,
        weight_layout=layout,
        output_order=None,
        scale=scale,
        scale_divides=False,
        steps=tuple(steps),
        dropout_p=dropout_p,
        dropout_module=None,
        zero_empty_rows=True,
        interior=(call.node,),
        sizes=(),
        scores_shape=None if shape is None or key_shape is None else (*shape[:-1], key_shape[-2]),
        head_size=None if shape is None else shape[-1],
        value_size=_last_size(call["value"]),
    )


@dataclasses.dataclass
class _Product:
    """Q K^T as it was found: its factors in its own axes, and the axes (query, key) of its result."""

    node: fx.Node
    query: Factor
    key: Factor
    axes: tuple[int, int]
    first_moves: tuple[Permute, ...]
    first_steps: tuple[ScoreStep, ...] = ()


class _Reader:
    """Reads one candidate. Raises Refuse at the first fact that cannot be proven."""

    def __init__(self, softmax: Softmax, order: Order) -> None:
        self.softmax = softmax
        self.order = order
        self.interior: set[fx.Node] = set(softmax.interior)
        self.sizes: list[fx.Node] = []  # symbolic sizes that the graph takes from the scores
        self.dtypes_taken: list[fx.Node] = []  # tensors whose dtype a cast takes, in graphs that do not record dtypes
        self.rank: int | None = None  # of the scores, as the last move told, in graphs that do not record shapes
        self.passed: set[fx.Node] = set()  # looked through, but not part of the site: transposes and repeats of K, V

    def read(self) -> AttentionSite:
        key_axis = self._softmax_axis()
        product_node, events, key_axis = self._walk_back(key_axis)
        product = self._read_product(product_node, key_axis)
        score_layout, steps = self._forward_order(product, events)
        if not product.first_moves and not score_layout.moves:
            product.query, product.key = (
                look_through(product.query, self.passed),
                look_through(product.key, self.passed),
            )
        weight_layout, dropout_p, dropout_module, output, value, output_order = self._walk_forward(score_layout)
        if not weight_layout.moves and output_order is None:
            value = look_through(value, self.passed)
        self._check_dtypes((product.query.node, product.key.node, value.node))
        self._check_interior(output)
        scale, scale_divides, steps = _leading_scale(steps)
        site = AttentionSite(
            anchor=self.softmax.output,
            output=output,
            query=product.query,
            key=product.key,
            value=value,
            start_axes=product.axes,
            score_layout=score_layout,
            weight_layout=weight_layout,
            output_order=output_order,
            scale=scale,
            scale_divides=scale_divides,
            steps=steps,
            dropout_p=dropout_p,
            dropout_module=dropout_module,
            zero_empty_rows=self.softmax.zero_empty_rows,
            interior=tuple(sorted(self.interior, key=self.order.__getitem__)),
            sizes=tuple(self.sizes),
            scores_shape=_scores_shape(shape_of(self.softmax.input), score_layout),
            head_size=_summed_size(product),
            value_size=_value_size(value),
        )
        self._check_inputs(site)
        return site

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

    def _walk_back(self, key_axis: int) -> tuple[fx.Node, list[Call | Step], int]:
        """From the softmax to the product: its node, what was passed (last first), and the softmax axis there."""
        events: list[Call | Step] = []
        user, node = self._first_user(), self.softmax.input
        while True:
            node = self._current(node, user)
            call = read(node)
            if call is None:
                raise self._no_product(node)
            if call.kind in _PRODUCTS:
                self.interior.add(node)
                return node, events, key_axis
            source = self._score_source(call)
            if source is None:
                raise self._no_product(node)
            if call.kind in _MOVES:
                key_axis = self._move_back(call, key_axis, events)
            else:
                reading = read_steps(call, source, self._dim(node, key_axis))
                if reading.absorbed and not all(map(_keeps_shift, events)):
                    raise Refuse(
                        "unknown_score_op",
                        f"{describe(node)} shifts the scores before a step that does not keep a shift",
                    )
                events += reversed(reading.steps)
                self.interior.update(reading.absorbed)
                if reading.takes_dtype_of is not None:
                    self.dtypes_taken.append(reading.takes_dtype_of)
            self.interior.add(node)
            user, node = node, source

    def _first_user(self) -> fx.Node:
        return min(
            (n for n in self.softmax.interior if self.softmax.input in n.all_input_nodes), key=self.order.__getitem__
        )

    def _current(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """The value of `node` as `user` sees it: what the last in-place operation before `user` left there."""
        writers = [
            other
            for other in node.users
            if other is not user
            and self.order[other] < self.order[user]
            and node in mutated_arguments(other)
            and (call := read(other)) is not None
            and call.in_place
            and call.get("input") is node
        ]
        return max(writers, key=self.order.__getitem__) if writers else node

    def _no_product(self, node: fx.Node) -> Refuse:
        if _reaches_product(node):
            return Refuse("unknown_score_op", f"{describe(node)} lies between the product and the softmax")
        return Refuse(
            "not_attention", f"no product of query and key leads to {self.softmax.output.name}: {describe(node)}"
        )

    def _score_source(self, call: Call) -> fx.Node | None:
        """The argument that carries the scores; where two could, the one of full size, or the first."""
        if call.kind not in _CHAIN:
            return None
        names = _SCORE_ARGUMENTS.get(call.kind, ("input",))
        sources = [x for name in names if isinstance(x := call.get(name), fx.Node) and _leads_to_product(x)]
        if len(sources) == 2 and sources[0] is sources[1]:
            raise Refuse("unknown_score_op", f"{describe(call.node)} uses the scores twice")
        own = shape_of(call.node)
        whole = [x for x in sources if own is not None and shape_of(x) == own]
        chosen = next(iter(whole or sources), None)
        if call.in_place and chosen is not call.get("input"):
            raise Refuse("inputs_written_between", f"{describe(call.node)} writes the scores into another tensor")
        return chosen

    def _check_dtypes(self, factors: tuple[fx.Node, ...]) -> None:
        """A dtype taken from a factor of the products, or from what it was computed of, is a floating-point one."""
        floating = set(factors) | self.interior
        pending = list(factors)
        while pending:
            call = read(pending.pop())
            keeps_dtype = call is not None and call.kind in _MOVES | {Kind.MUL, Kind.DIV, Kind.SAME, Kind.LINEAR}
            if call is not None and keeps_dtype and isinstance(call.get("input"), fx.Node):
                floating.add(call["input"])
                pending.append(call["input"])
        for like in self.dtypes_taken:
            if like not in floating:
                raise Refuse("shape_unknown", f"the dtype of {like.name}, to which the scores are cast, was not traced")

    def _dim(self, node: fx.Node, key_axis: int) -> int:
        """The key axis of a node as the model would write it: from the back."""
        shape = shape_of(node)
        return key_axis - len(shape) if shape is not None and key_axis >= 0 else key_axis

    def _move_back(self, call: Call, key_axis: int, events: list[Call | Step]) -> int:
        """The softmax axis before a move."""
        move = read_move(call)
        if move is None:
            return key_axis
        events.append(call)
        self.rank = len(move.dims) if isinstance(move, Permute) else len(move[0])
        if isinstance(move, Permute):
            return move.dims[key_axis]
        return whole_axis(move[1], move[0], key_axis)

    def _read_product(self, node: fx.Node, key_axis: int) -> _Product:
        call = read(node)
        assert call is not None
        if call.kind == Kind.EINSUM:
            return self._read_einsum(call, key_axis)
        left, right = (
            (call["input"], call["other"]) if call.kind == Kind.MATMUL else (call.get("left"), call.get("right"))
        )
        rank = rank_of(node) or self.rank
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
        return _Product(node, Factor(query), Factor(key), (-3 - axis, axis), (), steps)

    def _read_einsum(self, call: Call, key_axis: int) -> _Product:
        axes = EinsumAxes.of(call)
        if key_axis < 0:
            key_axis += len(axes.output)
        query, key, moves = axes.scores(key_axis, self.softmax.output.name)
        return _Product(call.node, query, key, (-2, -1), moves)

    def _forward_order(self, product: _Product, events: list[Call | Step]) -> tuple[Layout, tuple[ScoreStep, ...]]:
        """The moves and steps from the product to the softmax, in the order in which the model does them."""
        rank = rank_of(product.node) or self.rank
        if product.first_moves:
            rank = len(product.first_moves[0].dims)
        layout = Layout((), product.axes, rank)
        for move in product.first_moves:
            layout = layout.then(move)
        steps = list(product.first_steps)
        for event in reversed(events):
            if isinstance(event, Call):
                layout = layout.then(_move(event, layout))
            else:
                name, arguments = event
                stage = len(layout.moves)
                steps.append(ScoreStep(name, tuple(a.at(stage) if isinstance(a, Operand) else a for a in arguments)))
        return layout, tuple(steps)

    def _walk_forward(
        self, score_layout: Layout
    ) -> tuple[Layout, Any, fx.Node | None, fx.Node, Factor, tuple[int, ...] | None]:
        layout = Layout((), score_layout.axes, score_layout.rank)
        dropout = NO_DROPOUT
        node = self.softmax.output
        while True:
            user = self._only_user(node)
            call = read(user)
            kind = None if call is None else call.kind
            if call is not None and kind in (Kind.MATMUL, Kind.EINSUM):
                value, output_order = self._read_value(call, node, layout)
                return layout, *dropout, user, value, output_order
            if call is None or kind not in _CHAIN or call.get("input") is not node:
                raise Refuse(
                    "probabilities_changed", f"{describe(user)} uses the probabilities before any product with V"
                )
            if kind == Kind.CAST:
                like = check_cast(call)
                if like is not None:
                    self.dtypes_taken.append(like)
            elif kind == Kind.DROPOUT:
                dropout = merge_dropout(dropout, call)
            elif kind in _MOVES:
                if read_move(call) is not None:
                    layout = layout.then(_move(call, layout))
            elif kind != Kind.SAME:
                raise Refuse(
                    "probabilities_changed", f"{describe(user)} changes the probabilities before the product with V"
                )
            self.interior.add(user)
            node = user

    def _only_user(self, node: fx.Node) -> fx.Node:
        users = [user for user in node.users if not _is_assert(user)]
        if len(users) != 1 or users[0].op == "output":
            names = ", ".join("the output" if user.op == "output" else user.name for user in users) or "nothing"
            raise Refuse("probabilities_used_elsewhere", f"the probabilities {node.name} are used by {names}")
        return users[0]

    def _read_value(self, call: Call, weights: fx.Node, layout: Layout) -> tuple[Factor, tuple[int, ...] | None]:
        """V in the axes of the weights, with Dv in the place of the query axis, and how the product orders its axes."""
        if call.kind == Kind.EINSUM:
            axes = EinsumAxes.of(call)
            return axes.value(weights, layout, call.node.name)
        left, right = call["input"], call["other"]
        if left is right:
            raise Refuse("not_attention", f"{call.node.name} multiplies the probabilities with themselves")
        is_left = left is weights
        value = right if is_left else left
        shape = shape_of(value)
        if shape is not None and len(shape) < 2:
            raise Refuse("value_is_vector", f"{call.node.name} multiplies the probabilities with a vector")
        rank = layout.rank
        query_axis, key_axis = (axis - rank if rank is not None and axis >= 0 else axis for axis in layout.axes)
        if (query_axis, key_axis) != ((-2, -1) if is_left else (-1, -2)):
            raise Refuse("product_not_over_keys", f"{call.node.name} does not sum over the axis of the softmax")
        return Factor(value, transposed=True), None

    def _check_interior(self, output: fx.Node) -> None:
        """Nothing else may use the scores and probabilities; what only tells their shape dies with them."""
        self.interior.add(output)
        pending = [user for node in self.interior - {output} for user in node.users if user not in self.interior]
        while pending:
            user = pending.pop()
            if user in self.interior or user in self.sizes:
                continue
            if isinstance(value_of(user), torch.SymInt):
                self.sizes.append(user)
                continue
            if user.op == "output" or user.is_impure() or mutated_arguments(user):
                if not _is_assert(user):
                    source = next(x for x in user.all_input_nodes if x in self.interior)
                    name = "the output" if user.op == "output" else user.name
                    raise Refuse("scores_used_elsewhere", f"{source.name} is also used by {name}")
                continue
            self.interior.add(user)
            pending += user.users

    def _check_inputs(self, site: AttentionSite) -> None:
        """What the op will read is not made of the scores, and does not change before the op reads it."""
        inputs = {site.query.node, site.key.node, site.value.node}
        inputs |= {a.node for step in site.steps for a in step.arguments if isinstance(a, Term)}
        if isinstance(site.scale, fx.Node):
            inputs.add(site.scale)
        needed = inputs & self.interior
        if needed:
            names = ", ".join(sorted(node.name for node in needed))
            raise Refuse(
                "scores_used_elsewhere", f"{names}, which the attention reads, is computed from its own scores"
            )
        start = min(self.order[node] for node in self.interior | self.passed)
        check_span("attention", inputs, self.interior, start, site.output, self.order)


def _leading_scale(steps: tuple[ScoreStep, ...]) -> tuple[Any, bool, tuple[ScoreStep, ...]]:
    """The scale that the first steps amount to, whether it divides, and the steps that are left."""
    scale: Any = 1.0
    divides = False
    for position, step in enumerate(steps):
        argument = step.arguments[0] if step.arguments else None
        if step.name in ("mul", "div") and isinstance(argument, float) and not isinstance(scale, fx.Node):
            if step.name == "div" and argument == 0:
                return scale, divides, steps[position:]
            scale = scale * argument if step.name == "mul" else scale / argument
        elif (
            step.name in ("mul", "div")
            and isinstance(argument, Term)
            and is_scalar(argument.node)
            and not argument.negated
            and argument.multiplier == 1
            and scale == 1.0
        ):
            scale, divides = argument.node, step.name == "div"
        else:
            return scale, divides, steps[position:]
    return scale, divides, ()


def _keeps_shift(event: Call | Step) -> bool:
    """Whether scores of a row that differ by a constant still do after a step (or a move)."""
    if isinstance(event, Call):
        return True
    name, arguments = event
    if name in ("mul", "div"):
        factor = arguments[0]
        if not isinstance(factor, Operand) or is_scalar(factor.node):
            return True
        shape = shape_of(factor.node)
        return shape is not None and (not shape or shape[-1] == 1)
    return name == "add" or (name in ("keep", "fill") and arguments[1] == -math.inf)


def _move(call: Call, layout: Layout) -> Permute | View:
    move = read_move(call)
    assert move is not None
    if isinstance(move, Permute):
        return move
    before, after = move
    assert layout.rank is not None
    query_axis, key_axis = (axis % layout.rank for axis in layout.axes)
    return View.between(before, after, (query_axis, key_axis))


def _leads_to_product(node: fx.Node, depth: int = 24) -> bool:
    """Whether a chain of calls that a score may pass leads back from node to a product."""
    call = read(node)
    if call is None or depth == 0:
        return False
    if call.kind in _PRODUCTS:
        return True
    if call.kind not in _CHAIN:
        return False
    arguments = (call.get(name) for name in _SCORE_ARGUMENTS.get(call.kind, ("input",)))
    return any(isinstance(x, fx.Node) and _leads_to_product(x, depth - 1) for x in arguments)


def _reaches_product(node: fx.Node, depth: int = 4) -> bool:
    """Whether a product stands a few nodes back, whatever lies between."""
    call = read(node)
    if call is not None and call.kind in _PRODUCTS:
        return True
    return depth > 0 and any(_reaches_product(x, depth - 1) for x in node.all_input_nodes)


def _scores_shape(shape: tuple[Any, ...] | None, layout: Layout) -> tuple[Any, ...] | None:
    if shape is None:
        return None
    i, j = (axis % len(shape) for axis in layout.axes)
    return (*(size for axis, size in enumerate(shape) if axis not in (i, j)), shape[i], shape[j])


def _last_size(node: fx.Node) -> Any:
    shape = shape_of(node)
    return None if shape is None else shape[-1]


def _summed_size(product: _Product) -> Any:
    """D, which the query has in the place of the key axis."""
    shape, order = shape_of(product.query.node), product.query.order
    if shape is None:
        return None
    axis = order[product.axes[1]] if order is not None else product.axes[1]
    return None if axis is None else shape[axis]


def _value_size(value: Factor) -> Any:
    """Dv: the last axis of a value that a matmul reads; an einsum may have it anywhere, and its node tells less."""
    return _last_size(value.node) if value.order is None and value.transposed else None


def _is_assert(node: fx.Node) -> bool:
    call = read(node)
    return call is not None and call.kind == Kind.ASSERT
