"""Finds attention: anchors on a softmax or an SDPA call, walks to both products by meaning, and proves each fact.

Back from the softmax (`score_path`): steps of the score and moves of axes, until the product of query and key. Forward
(`weight_path`): casts, dropout, steps and moves, until the product with the value. The softmax axis must be the one
that the first product takes from one factor alone (the key) and the second sums over; whatever lies between must be
used by nothing else. What does not fit is refused with the first reason found.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from topk_fx.score import language

from .dialect import Call, Kind, read
from .grouped_heads import look_through
from .layout import Layout, LayoutError
from .meaning import Meaning
from .mutation import mutated_arguments
from .score_path import Product, ScorePath, Sink, leads_to_product
from .sink_factor import check_rows_of_factor, take_sink_factor
from .sites import AttentionSite, Factor, Refusal, Refuse, ScoreStep, Term
from .softmax import Softmax
from .span import check_span
from .trace import MOVES, Order, Trace, is_assert
from .values import dtype_of, is_nested, is_scalar, shape_of, value_of
from .weight_path import follow_weights
from .where import describe


def find_attention(softmax: Softmax, order: Order) -> AttentionSite | Refusal:
    """The attention around a softmax, or why there is none."""
    try:
        return _read(softmax, Trace(order, set(softmax.interior)))
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
    if any(is_nested(call[name]) for name in ("query", "key", "value")):
        return Refusal("nested_tensor", f"{call.node.name} attends within sequences of several lengths", call.node)
    output = _sdpa_output(call)
    if output is None:
        return Refusal(
            "scores_used_elsewhere", f"the logarithm of the sums that {call.node.name} gives is used", call.node
        )
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
    meaning = Meaning(order, call.node)
    steps = list(meaning.of(steps, [layout]))
    return AttentionSite(
        anchor=call.node,
        output=output,
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
        sink=None,
        weight_steps=(),
        dropout_p=dropout_p,
        dropout_module=None,
        zero_empty_rows=True,
        interior=(call.node,) if output is call.node else (call.node, *call.node.users),
        replayed=tuple(sorted(meaning.replayed, key=order.__getitem__)),
        sizes=(),
        looked_through=tuple(meaning.replayed),
        scores_shape=None if shape is None or key_shape is None else (*shape[:-1], key_shape[-2]),
        head_size=None if shape is None else shape[-1],
        value_size=_last_size(call["value"]),
    )


def _sdpa_output(call: Call) -> fx.Node | None:
    """The node of what an SDPA call computes; None if its kernel's other result, of each row, is used too."""
    if call.node.target is not torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
        return call.node
    used = [user for user in call.node.users if user.users]
    return used[0] if len(used) == 1 and used[0].target is operator.getitem and used[0].args[1] == 0 else None


def _read(softmax: Softmax, trace: Trace) -> AttentionSite:
    if is_nested(softmax.input):
        raise Refuse("nested_tensor", f"{softmax.output.name} runs over sequences of several lengths")
    path = ScorePath(softmax, trace)
    product, steps = path.walk()
    if not product.first_moves and not path.layout.moves:
        product.query, product.key = (look_through(x, trace.passed) for x in (product.query, product.key))
    try:
        weights = follow_weights(softmax.output, path.layout, path.sink, trace)
    except Refuse as refusal:
        raise _as_mixed_heads(product) or refusal from refusal
    weights, sink = take_sink_factor(path, weights)
    value = weights.value
    if not weights.layout.moves and weights.output_order is None:
        value = look_through(value, trace.passed)
    _check_dtypes(trace, (product.query.node, product.key.node, value.node))
    sizes = _check_interior(trace, weights.output)
    meaning = Meaning(trace.order, weights.output)
    steps = meaning.of(steps, path.layouts)
    if sink is not None:
        check_rows_of_factor(steps, weights.output)
    elif path.sink is not None:
        sink = _sink_term(path.sink, path.layout)
    scale, scale_divides, steps = _leading_scale(steps)
    steps += _range_of_exp(softmax.bare_exp)
    weight_steps = meaning.of(weights.steps, weights.layouts)
    site = AttentionSite(
        anchor=softmax.output,
        output=weights.output,
        query=product.query,
        key=product.key,
        value=value,
        start_axes=product.axes,
        score_layout=path.layout,
        weight_layout=weights.layout,
        output_order=weights.output_order,
        scale=scale,
        scale_divides=scale_divides,
        steps=steps,
        sink=sink,
        weight_steps=weight_steps,
        dropout_p=weights.dropout_p,
        dropout_module=weights.dropout_module,
        zero_empty_rows=softmax.zero_empty_rows,
        interior=tuple(sorted(trace.interior, key=trace.order.__getitem__)),
        replayed=tuple(sorted(meaning.replayed, key=trace.order.__getitem__)),
        sizes=tuple(sizes),
        looked_through=tuple((trace.passed | meaning.replayed) - trace.interior),
        scores_shape=_scores_shape(shape_of(path.scores), path.layout),
        head_size=_summed_size(product),
        value_size=_value_size(value),
    )
    _check_inputs(site, product.node, trace)
    return site


def _as_mixed_heads(product: Product) -> Refuse | None:
    """What is wrong with a product that mixes the scores of several heads, as talking heads do, if it is one."""
    mixed = shape_of(product.node)
    for factor in (product.query, product.key):
        if _have_same_sizes(mixed, shape_of(factor.node)) and leads_to_product(factor.node):
            return Refuse("heads_mixed", f"{describe(product.node)} mixes the scores of several heads")
    return None


def _have_same_sizes(shape: Sequence[Any] | None, other: Sequence[Any] | None) -> bool:
    """Whether two known shapes have the same sizes in some order. Symbolic ones are compared as they are written."""
    return shape is not None and other is not None and sorted(map(str, shape)) == sorted(map(str, other))


def _range_of_exp(exp: fx.Node | None) -> tuple[ScoreStep, ...]:
    """What an exponential without a shift does to scores beyond its range: they become infinite, and so NaN, or 0."""
    dtype = None if exp is None else dtype_of(exp)
    if dtype is None:
        return ()
    limits = torch.finfo(dtype)
    overflow = math.log(limits.max)
    underflow = math.log(limits.smallest_normal) + math.log(limits.eps / 2)

    def beyond(comparison: str, limit: float, value: float) -> ScoreStep:
        is_beyond = language.Call(comparison, (language.SCORES, limit))
        return ScoreStep("add", (language.Call("where", (is_beyond, value, 0.0)),))  # added: the gradient is NaN, too

    return beyond("gt", overflow, math.nan), beyond("lt", underflow, -math.inf)


def _sink_term(sink: Sink, layout: Layout) -> Term:
    """The logit as it was before it was expanded to a column of the scores."""
    node = sink.node
    while (call := read(node)) is not None and call.kind in (Kind.EXPAND, Kind.CAST, Kind.SAME):
        node = call["input"]
    return Term(node, len(layout.moves))


def _check_dtypes(trace: Trace, factors: tuple[fx.Node, ...]) -> None:
    """A dtype taken from a factor of the products, or from what it was computed of, is a floating-point one."""
    floating = set(factors) | trace.interior
    pending = list(factors)
    while pending:
        call = read(pending.pop())
        keeps_dtype = call is not None and call.kind in MOVES | {Kind.MUL, Kind.DIV, Kind.SAME, Kind.LINEAR}
        if call is not None and keeps_dtype and isinstance(call.get("input"), fx.Node):
            floating.add(call["input"])
            pending.append(call["input"])
    for like in trace.dtypes_taken:
        if like not in floating:
            raise Refuse("shape_unknown", f"the dtype of {like.name}, to which the scores are cast, was not traced")


def _check_interior(trace: Trace, output: fx.Node) -> list[fx.Node]:
    """Nothing else may use the scores and probabilities; what only tells their shape dies with them.

    Returns the nodes that read a symbolic size off them, which may be needed elsewhere.
    """
    sizes: list[fx.Node] = []
    trace.interior.add(output)
    pending = [user for node in trace.interior - {output} for user in node.users if user not in trace.interior]
    while pending:
        user = pending.pop()
        if user in trace.interior or user in sizes:
            continue
        if isinstance(value_of(user), torch.SymInt):
            sizes.append(user)
            continue
        if user.op == "output" or user.is_impure() or mutated_arguments(user):
            if not is_assert(user):
                source = next(x for x in user.all_input_nodes if x in trace.interior)
                name = "the output" if user.op == "output" else user.name
                raise Refuse("scores_used_elsewhere", f"{source.name} is also used by {name}")
            continue
        trace.interior.add(user)
        pending += user.users
    return sizes


def _check_inputs(site: AttentionSite, product: fx.Node, trace: Trace) -> None:
    """What the op will read is not made of the scores, and does not change before the op reads it."""
    inputs = {site.query.node, site.key.node, site.value.node}
    inputs |= {term.node for step in (*site.steps, *site.weight_steps) for term in step.terms}
    if site.sink is not None:
        inputs.add(site.sink.node)
    if isinstance(site.scale, fx.Node):
        inputs.add(site.scale)
    needed = inputs & trace.interior
    if needed:
        names = ", ".join(sorted(node.name for node in needed))
        raise Refuse("scores_used_elsewhere", f"{names}, which the attention reads, is computed from its own scores")
    nodes = trace.interior | trace.passed
    start = min(map(trace.order.__getitem__, nodes))
    check_span("attention", inputs, nodes, start, site.output, trace.order, product)


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


def _scores_shape(shape: tuple[Any, ...] | None, layout: Layout) -> tuple[Any, ...] | None:
    if shape is None:
        return None
    i, j = (axis % len(shape) for axis in layout.axes)
    return (*(size for axis, size in enumerate(shape) if axis not in (i, j)), shape[i], shape[j])


def _last_size(node: fx.Node) -> Any:
    shape = shape_of(node)
    return None if shape is None else shape[-1]


def _summed_size(product: Product) -> Any:
    """D, which the query has in the place of the key axis."""
    shape, order = shape_of(product.query.node), product.query.order
    if shape is None:
        return None
    axis: int | None = product.axes[1]
    if order is not None:
        axis = order[product.axes[1]]
    elif product.query.transposed:
        axis = product.axes[0]
    return None if axis is None else shape[axis]


def _value_size(value: Factor) -> Any:
    """Dv: the last axis of a value that a matmul reads; an einsum may have it anywhere, and its node tells less."""
    return _last_size(value.node) if value.order is None and value.transposed else None
