"""Writes a site's top-k op into the graph. Everything was decided when the site was found; this only puts it down."""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from topk_fx.config import Keep, as_ratio, kept_count
from topk_fx.reference import compute
from topk_fx.score.language import SCORES, Binding, Call, Expression, Name, Operand, Score, Statement, Step

from .dialect import Kind, read
from .emit import EmitError, Emitter
from .layout import Layout
from .mutation import mutated_arguments, storage_roots
from .sites import AttentionSite, Factor, FFNSite, LinearLayer, ScoreStep, Term, Units
from .values import dtype_of, is_scalar, rank_of, shape_of, value_of

aten = torch.ops.aten


EVERY_KEY = 2**62
"""k="all" where tracing recorded no shapes: more keys than there can be."""


def rewrite_attention(site: AttentionSite, keep: Keep, lowering: str = "") -> fx.Node:
    """Puts `topk_fx::attention` in the place of a site and returns its node; `lowering` is the one asked for, or "".

    Raises:
        EmitError: the op cannot be written down here, or would not have the shape of what it replaces; the graph is
            as it was.
    """
    emit = Emitter(site.output)
    try:
        output = _emit_attention(emit, site, keep, lowering)
        _check_shape(emit, output, site.output)
        output = _lay_out(emit, output, site.output)
        sizes = [(size, _same_size(size, site)) for size in site.sizes]
    except Exception as error:
        emit.undo()
        raise error if isinstance(error, EmitError) else EmitError(f"{type(error).__name__}: {error}") from error
    op = next(node for node in emit.emitted if node.target is torch.ops.topk_fx.attention.default)
    for size, replacement in sizes:
        size.replace_all_uses_with(replacement)
        size.graph.erase_node(size)
    _replace(site.output, output, site.interior)
    _erase_dead(emit.emitted)
    _erase_replayed(site.replayed)
    return op


def rewrite_ffn(site: FFNSite, keep: Keep, lowering: str = "") -> fx.Node:
    """Puts `topk_fx::ffn` in the place of a site and returns its node; lowering, EmitError: as `rewrite_attention`."""
    emit = Emitter(site.output)
    try:
        layers = [_emit_layer(emit, layer) for layer in (site.up, site.gate, site.down)]
        kept = kept_count(keep, site.hidden_size)
        arguments = (site.input, *layers[0], *layers[1], *layers[2], site.activation, kept)
        dropout = _emit_dropout(emit, site.dropout_p, site.dropout_module)
        kwargs = {"lowering": lowering} if lowering else {}
        output = op = emit.call(torch.ops.topk_fx.ffn.default, *arguments, *dropout, name="ffn", **kwargs)
        if shape_of(site.output) is not None and shape_of(output) is not None:
            output = emit.reshape(output, emit.shape(site.output))
        _check_shape(emit, output, site.output)
    except Exception as error:
        emit.undo()
        raise error if isinstance(error, EmitError) else EmitError(f"{type(error).__name__}: {error}") from error
    _replace(site.output, output, site.interior)
    return op


def _same_size(size: fx.Node, site: AttentionSite) -> fx.Node:
    """A node with the symbolic value of `size`, which reads it off the scores, that stands before it and does not."""
    node = Emitter(size).size_node(value_of(size), site.query.node, avoid=site.interior)
    if node is None:
        raise EmitError(f"no node but the scores holds the symbolic size {size.name}")
    return node


def _emit_attention(emit: Emitter, site: AttentionSite, keep: Keep, lowering: str) -> fx.Node:
    score, weights = site.score_layout, site.weight_layout
    query = _to_softmax(emit, _arrange(emit, site.query), score, site.start_axes)
    key = _to_softmax(emit, _arrange(emit, site.key), score, site.start_axes)
    query, key = _to_one_dtype(emit, query, emit.transpose_last(key))
    value = _to_softmax(emit, _arrange(emit, site.value), weights.inverse(score.axes), weights.axes, score)
    value = emit.transpose_last(value)
    text, operands = _ScoreText(emit, site, query).write()
    scale = site.scale
    if scale is None:  # SDPA's default, where tracing did not record the head size
        scale = emit.call(operator.pow, emit.call(aten.sym_size.int, query, -1), -0.5)
    elif site.scale_divides:
        scale = emit.call(operator.truediv, 1.0, scale)
    arguments: list[Any] = [query, key, value, operands, text, scale, _emit_kept_keys(emit, value, keep)]
    arguments += _emit_dropout(emit, site.dropout_p, site.dropout_module)
    kwargs: dict[str, Any] = {"zero_empty_rows": True} if site.zero_empty_rows else {}
    if lowering:
        kwargs["lowering"] = lowering
    output = emit.call(torch.ops.topk_fx.attention.default, *arguments, name="attention", **kwargs)
    output = _from_last(emit, output, score)
    output, _ = weights.apply(emit, output, score.axes)
    return output if site.output_order is None else emit.permute(output, site.output_order)


def _to_one_dtype(emit: Emitter, *factors: fx.Node) -> Sequence[fx.Node]:
    """The factors of a product in their widest dtype. They differ under autocast alone, which lowers the op's too."""
    dtypes = [dtype for x in factors if (dtype := dtype_of(x)) is not None]
    if len(set(dtypes)) < 2:
        return factors
    widest = functools.reduce(torch.promote_types, dtypes)
    return [x if dtype_of(x) == widest else emit.call(aten.to.dtype, x, widest) for x in factors]


def _arrange(emit: Emitter, factor: Factor) -> fx.Node:
    """A factor with its axes in the order in which its product has them."""
    x = factor.node if factor.order is None else _reorder(emit, factor.node, factor.order)
    return emit.transpose_last(x) if factor.transposed else x


def _reorder(emit: Emitter, x: fx.Node, order: Sequence[int | None]) -> fx.Node:
    """x with axis order[n] at n, or where that is None a new axis of size 1; axes of size 1 may be left out."""
    kept = [axis for axis in order if axis is not None]
    rank = rank_of(x)
    dropped = [] if rank is None else [axis for axis in range(rank) if axis not in kept]
    for axis in reversed(dropped):
        x = emit.call(aten.squeeze.dim, x, axis)
    x = emit.permute(x, [axis - sum(d < axis for d in dropped) for axis in kept])
    for position, source in enumerate(order):
        if source is None:
            x = emit.call(aten.unsqueeze.default, x, position)
    return emit.tell_rank(x, len(order))


def _to_softmax(emit: Emitter, x: fx.Node, layout: Layout, axes: tuple[int, int], end: Layout | None = None) -> fx.Node:
    """x brought along `layout` to the softmax, and its axes i and j put last."""
    end = end or layout
    x, _ = layout.apply(emit, x, axes)
    order = _last_order(end)
    if order is None:
        return x
    if end.rank is None:
        return emit.transpose_last(x)
    return emit.permute(emit.pad(x, end.rank), order)


def _from_last(emit: Emitter, x: fx.Node, layout: Layout) -> fx.Node:
    """x [..., i, j] with its axes where the softmax has them."""
    order = _last_order(layout)
    if order is None:
        return x
    if layout.rank is None:
        return emit.transpose_last(x)
    return emit.permute(x, [order.index(axis) for axis in range(layout.rank)])


def _last_order(layout: Layout) -> list[int] | None:
    """The permutation that puts the axes i and j at the end of a layout last; None if they stand there."""
    if layout.rank is None:
        return None if layout.axes == (-2, -1) else [-1, -2]
    i, j = (axis % layout.rank for axis in layout.axes)
    order = [*(axis for axis in range(layout.rank) if axis not in (i, j)), i, j]
    return None if order == sorted(order) else order


class _ScoreText:
    """Writes a site's score function as text, and the operands that it names as nodes."""

    def __init__(self, emit: Emitter, site: AttentionSite, query: fx.Node) -> None:
        self.emit, self.site, self.query = emit, site, query
        self.operands: list[fx.Node] = []
        self.statements: list[Statement] = []

    def write(self) -> tuple[str, list[fx.Node]]:
        for step in self.site.steps:
            self._write_step(step, self._place_of_score)
        if self.site.sink is not None:
            self.statements.append(Step("sink", (self._operand(self.site.sink, self._place_of_score),)))
        if self.site.weight_steps:
            self.statements.append(Step("softmax"))
        for step in self.site.weight_steps:
            self._write_step(step, self._place_of_weight)
        return str(Score(tuple(self.statements))), self.operands

    def _write_step(self, step: ScoreStep, place: Place) -> None:
        """A step, and before it a binding for each expression without scores that stands in it more than once."""
        arguments = [self._lower(argument, place) for argument in step.arguments]
        names: dict[str, Name] = {}
        for text, expression in _repeated(arguments).items():
            bound = Binding(self._bindings(), _substitute(expression, names, keep_whole=True))
            names[text] = Name(f"%{bound.index}")
            self.statements.append(bound)
        self.statements.append(Step(step.name, tuple(_substitute(x, names) for x in arguments)))

    def _bindings(self) -> int:
        return sum(isinstance(statement, Binding) for statement in self.statements)

    def _lower(self, argument: Expression, place: Place) -> Expression:
        if isinstance(argument, Term):
            return self._operand(argument, place)
        if isinstance(argument, Call):
            return Call(argument.name, tuple(self._lower(x, place) for x in argument.arguments))
        return argument

    def _operand(self, term: Term, place: Place) -> Operand:
        node = place(_emit_term(self.emit, term, self.query), term)
        if node not in self.operands:
            self.operands.append(node)
        return Operand(self.operands.index(node))

    def _place_of_score(self, node: fx.Node, term: Term) -> fx.Node:
        """A term of the scores, its axes i and j put last."""
        layout = self.site.score_layout
        if term.stage == len(layout.moves) and _last_order(layout) is None:
            return node
        start = Layout((), self.site.start_axes, _start_rank(layout))
        for move in layout.moves[: term.stage]:
            start = start.then(move)
        remaining = Layout(layout.moves[term.stage :], start.axes, start.rank)
        node = self.emit.pad(node, start.rank or 2)
        return _to_softmax(self.emit, node, remaining, start.axes, layout)

    def _place_of_weight(self, node: fx.Node, term: Term) -> fx.Node:
        """A term of the probabilities, brought back to the softmax, its axes i and j put last."""
        score, weights = self.site.score_layout, self.site.weight_layout
        passed = Layout((), score.axes, score.rank)
        for move in weights.moves[: term.stage]:
            passed = passed.then(move)
        if not passed.moves and _last_order(score) is None:
            return node
        node = self.emit.pad(node, passed.rank or 2)
        return _to_softmax(self.emit, node, passed.inverse(score.axes), passed.axes, score)


Place = Callable[[fx.Node, Term], fx.Node]
_LONG = 12
"""Characters from which on an expression that occurs twice is given a name."""


def _repeated(expressions: Sequence[Expression]) -> dict[str, Call]:
    """The longer calls that do not read the scores and occur more than once, by text, inner ones first."""
    counts: Counter[str] = Counter()
    calls: dict[str, Call] = {}

    def visit(x: Expression) -> bool:
        """Counts the calls in x; whether it reads the scores."""
        if not isinstance(x, Call):
            return x == SCORES
        text = str(x)
        counts[text] += 1
        if counts[text] > 1:
            return text not in calls
        found = [visit(argument) for argument in x.arguments]  # all of them, to count
        reads_scores = any(found)
        if not reads_scores:
            calls[text] = x
        return reads_scores

    for expression in expressions:
        visit(expression)
    return {text: call for text, call in calls.items() if counts[text] > 1 and len(text) >= _LONG}


def _substitute(x: Expression, names: Mapping[str, Name], keep_whole: bool = False) -> Expression:
    """x with names for the expressions that have one, but not for all of x if `keep_whole`."""
    if not isinstance(x, Call):
        return x
    if not keep_whole and str(x) in names:
        return names[str(x)]
    return Call(x.name, tuple(_substitute(argument, names) for argument in x.arguments))


def _emit_term(emit: Emitter, term: Term, query: fx.Node) -> fx.Node:
    """A term as a tensor, with its axes in their order."""
    node = term.node
    value, recorded = value_of(query), value_of(node)
    dtype = torch.float32 if value is None else compute(value).dtype
    if is_scalar(node):
        own = torch.int64 if isinstance(recorded, torch.SymInt) else dtype
        where = {"dtype": own, "device": value.device} if value is not None else {}
        node = emit.call(aten.scalar_tensor.default, node, **where)
    if term.shape is not None:
        node = emit.reshape(node, term.shape)
    if term.order is not None:
        node = _reorder(emit, node, term.order)
    if term.negated or term.multiplier != 1:
        # A narrower dtype could overflow, or wrap around; where tracing recorded none, the scores may be float64.
        wide = torch.float64 if value is None else dtype
        if dtype_of(node) != wide:
            node = emit.call(aten.to.dtype, node, wide)
        factor = term.multiplier
        if term.negated:
            factor = emit.call(operator.neg, factor) if isinstance(factor, fx.Node) else -factor
        node = emit.call(aten.mul.Scalar, node, factor)
    return node


def _start_rank(layout: Layout) -> int | None:
    if not layout.moves:
        return layout.rank
    first = layout.moves[0]
    return len(first.before) if hasattr(first, "before") else len(first.dims)


def _emit_kept_keys(emit: Emitter, value: fx.Node, keep: Keep) -> Any:
    """k as the op takes it: a number, or nodes that compute it from the key count, which V has even if K broadcasts."""
    if isinstance(keep, int):
        return keep
    shape = shape_of(value)
    if shape is not None and isinstance(shape[-2], int):
        return max(1, kept_count(keep, shape[-2]))
    if keep == "all":
        return EVERY_KEY if shape is None else emit.call(aten.sym_size.int, value, -2)
    count = emit.call(aten.sym_size.int, value, -2)
    assert isinstance(keep, float)
    numerator, denominator = as_ratio(keep)
    scaled = count if numerator == 1 else emit.call(operator.mul, count, numerator)
    return emit.call(operator.floordiv, emit.call(operator.add, scaled, denominator - 1), denominator)


def _emit_dropout(emit: Emitter, p: Any, module: fx.Node | None) -> list[Any]:
    """The dropout argument, if there is one; a dropout module is asked at run time whether it is training."""
    if module is None:
        return [p] if p else []
    root = emit.graph.owning_module
    assert root is not None
    name = f"{module.target}_probability"
    root.add_submodule(name, DropoutProbability(cast(nn.Dropout, root.get_submodule(str(module.target)))))
    with emit.graph.inserting_before(emit.before):
        probability = emit.graph.create_node("call_module", name)
    emit.emitted.append(probability)
    return [probability]


class DropoutProbability(nn.Module):
    """The probability with which a dropout module drops now: 0 while it is not training."""

    def __init__(self, dropout: nn.Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self) -> float:
        return self.dropout.p if self.dropout.training else 0.0


def _emit_layer(emit: Emitter, layer: LinearLayer | None) -> tuple[fx.Node | None, fx.Node | None]:
    """The weight [out, in] and bias of a layer, of the units that the site uses."""
    if layer is None:
        return None, None
    weight, bias = layer.weight, layer.bias
    if layer.module_call is not None:
        weight = _emit_parameter(emit, layer.module_call, "weight")
        bias = _emit_parameter(emit, layer.module_call, "bias") if layer.has_bias else None
    assert weight is not None
    if layer.units is not None and layer.shape is not None and layer.units != range(layer.shape[0]):
        weight = _emit_units(emit, weight, 1 if layer.transposed else 0, layer.units)
        bias = None if bias is None else _emit_units(emit, bias, 0, layer.units)
    return emit.transpose_last(weight) if layer.transposed else weight, bias


def _emit_parameter(emit: Emitter, call: fx.Node, name: str) -> fx.Node:
    with emit.graph.inserting_before(emit.before):
        node = emit.graph.create_node("get_attr", f"{call.target}.{name}")
    emit.emitted.append(node)
    return node


def _emit_units(emit: Emitter, x: fx.Node, dim: int, units: Units) -> fx.Node:
    return emit.call(aten.slice.Tensor, x, dim, units.start, units.stop, units.step)


def _check_shape(emit: Emitter, new: fx.Node, old: fx.Node) -> None:
    before, after = shape_of(old), shape_of(new)
    if before is None or after is None:
        return
    if len(before) != len(after) or not all(statically_known_true(a == b) for a, b in zip(before, after, strict=True)):
        raise EmitError(f"the top-k op would have the shape {tuple(after)}, and {old.name} has {tuple(before)}")


def _lay_out(emit: Emitter, new: fx.Node, old: fx.Node) -> fx.Node:
    """`new` in memory as `old` was, if `old` was dense in another order of its axes and a view may be taken of it.

    Tracing leaves a call of `contiguous` out where it has nothing to do, as for SDPA's output with its heads put last.
    """
    before, after = value_of(old), value_of(new)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or not _is_viewed(old):
        return new
    for order in itertools.permutations(range(before.dim())):
        if _is_dense(before, order):
            if _is_dense(after, order):
                return new
            dense = emit.call(aten.clone.default, emit.permute(new, order), memory_format=torch.contiguous_format)
            return emit.permute(dense, [order.index(axis) for axis in range(len(order))])
    return new


def _is_viewed(node: fx.Node) -> bool:
    """Whether a view of another shape is taken of a node, or of it with its axes moved; its strides must allow that.

    What leaves the graph may be viewed by what comes after it.
    """
    for user in node.users:
        if user.op == "output" or user.target in (torch.as_strided, "as_strided", aten.as_strided.default):
            return True
        call = read(user)
        if call is None or call.get("input") is not node:
            continue
        if user.target in (aten.view.default, "view"):
            return True
        if call.kind in (Kind.PERMUTE, Kind.TRANSPOSE, Kind.MATRIX_TRANSPOSE) and _is_viewed(user):
            return True
    return False


def _is_dense(x: torch.Tensor, order: Iterable[int]) -> bool:
    """Whether x is contiguous when its axes are put in an order."""
    expected: Any = 1
    for axis in reversed(list(order)):
        is_one = statically_known_true(x.size(axis) == 1)
        if not is_one and not statically_known_true(x.stride(axis) == expected):
            return False
        expected = expected * x.size(axis)
    return True


def _replace(old: fx.Node, new: fx.Node, interior: tuple[fx.Node, ...]) -> None:
    """Puts `new` in the place of `old` and erases what only the dense form needed."""
    new.meta["replaces"] = old.name
    for key, value in old.meta.items():
        if key not in ("source_fn_stack", "torch_fn", "from_node"):
            new.meta[key] = value
    old.replace_all_uses_with(new)
    inputs = [x for node in interior for x in node.all_input_nodes if x not in interior]
    for node in reversed(interior):
        for user in list(node.users):
            call = read(user)
            if call is not None and call.kind == Kind.ASSERT:
                user.graph.erase_node(user)
        node.graph.erase_node(node)
    _erase_dead(inputs)


def _erase_replayed(replayed: Sequence[fx.Node]) -> None:
    """Erases the nodes that nothing uses any more but assertions on them; later ones come last."""
    for node in reversed(replayed):
        if node._erased:
            continue
        asserts = [user for user in node.users if (call := read(user)) is not None and call.kind == Kind.ASSERT]
        if len(asserts) == len(node.users):
            for user in asserts:
                user.graph.erase_node(user)
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            _erase_dead(sources)


def _erase_dead(nodes: Sequence[fx.Node]) -> None:
    """Erases those of `nodes` that nothing uses any more, and then what only they used."""
    pending = list(nodes)
    erased: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in erased or node.users or node.op in ("placeholder", "output") or node.is_impure():
            continue
        if any(x.users.keys() != {node} or storage_roots(x) != {x} for x in mutated_arguments(node)):
            continue  # what it writes is seen
        pending += node.all_input_nodes
        node.graph.erase_node(node)
        erased.add(node)
