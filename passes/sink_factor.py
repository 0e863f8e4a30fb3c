"""A sink that is no column of the scores but a factor: softmax(s) * sigmoid(logsumexp(s) - sink).

With Z = sum_j exp(s_j), exp(s_j) / (Z + exp(sink)) is exp(s_j) / Z times Z / (Z + exp(sink)), and the second is
sigmoid(log Z - sink). A model may multiply the probabilities by it, or what comes of them and V.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from topk_fx.score.language import Call as Operation

from .axes import same_shape
from .dialect import Kind, read
from .elementwise import read_elementwise
from .score_path import ScorePath
from .sites import Refuse, ScoreStep, Term, terms_of
from .softmax import read_logsumexp
from .values import dtype_of, shape_of
from .weight_path import WeightPath


@dataclasses.dataclass(frozen=True)
class SinkFactor:
    """The logit, and the nodes between the scores and the factor: all but the product by it."""

    sink: Term
    nodes: tuple[fx.Node, ...]


def take_sink_factor(path: ScorePath, weights: WeightPath) -> tuple[WeightPath, Term | None]:
    """The way of the probabilities without the factor that a sink is, and the sink; unchanged and None without one."""
    for step in weights.steps:
        factor = _read_factor(step.terms[0].node, path) if step.name == "mul" and step.terms else None
        if factor is not None:
            path.trace.interior.update(factor.nodes)
            return dataclasses.replace(weights, steps=tuple(x for x in weights.steps if x is not step)), factor.sink
    if len(weights.output.users) == 1 and not weights.layout.moves and weights.output_order is None:
        (product,) = weights.output.users
        operation = read_elementwise(product)
        others = () if operation is None else tuple(x for x in operation.arguments if x is not weights.output)
        is_product = operation is not None and operation.name == "mul" and len(others) == 1
        factor = _read_factor(others[0], path) if is_product else None
        if factor is not None and dtype_of(product) == dtype_of(weights.output):
            path.trace.interior.update((*factor.nodes, weights.output))
            return dataclasses.replace(weights, output=product), factor.sink
    return weights, None


def check_rows_of_factor(steps: Sequence[ScoreStep], output: fx.Node) -> None:
    """Refuse where a row may be -inf throughout: it is NaN before the factor, and 0 beside a sink that is a column."""
    if not all(_is_finite(argument) for step in steps for argument in step.arguments) or any(
        step.name in ("mask", "causal") for step in steps
    ):
        raise Refuse("sink_of_empty_rows", f"a row that is masked whole is NaN in {output.name}, and 0 with a sink")


def _is_finite(argument: Any) -> bool:
    if isinstance(argument, float):
        return math.isfinite(argument)
    return all(dtype_of(term.node) == torch.bool for term in terms_of(argument)) and (
        not isinstance(argument, Operation) or all(map(_is_finite, argument.arguments))
    )


def _read_factor(column: Any, path: ScorePath) -> SinkFactor | None:
    """Back from a column [..., Lq, 1] to the logsumexp of the scores [..., Lq, Lk]."""
    shape = shape_of(path.scores)
    if shape is None or not isinstance(column, fx.Node) or path.sink is not None:
        return None
    axes = [axis % len(shape) for axis in path.layout.axes]
    own = shape_of(column)
    if axes != [len(shape) - 2, len(shape) - 1] or own is None or not same_shape(own, (*shape[:-1], 1)):
        return None
    nodes: list[fx.Node] = []
    sigmoid = _operation(column, "sigmoid", nodes)
    difference = _operation(sigmoid.arguments[0], "sub", nodes) if sigmoid is not None else None
    if difference is None:
        return None
    reduced = nodes[-1]
    total, sink = _before_casts(difference.arguments[0], nodes), difference.arguments[1]
    found = read_logsumexp(path.scores, total)
    rows = shape_of(reduced)
    if found is None or rows is None or found.dim not in (-1, len(shape) - 1):
        return None
    if not same_shape(rows, (*shape[:-1], 1) if found.is_kept else shape[:-1]):
        return None
    term = _sink_term(sink, len(shape), found.is_kept, len(path.layout.moves))
    return None if term is None else SinkFactor(term, (*nodes, *found.nodes))


def _sink_term(sink: Any, rank: int, is_kept: bool, stage: int) -> Term | None:
    """A logit that meets the logsumexp, which lacks the key axis unless that is kept, as one that meets the scores."""
    shape = shape_of(sink)
    if shape is None:
        return None
    if is_kept:
        return Term(sink, stage) if not shape or statically_known_true(shape[-1] == 1) else None
    missing = rank - 1 - len(shape)
    return Term(sink, stage, order=(*(None,) * missing, *range(len(shape)), None))


def _operation(x: Any, name: str, nodes: list[fx.Node]) -> Operation | None:
    """The operation `name` that x is, behind casts and new axes at the end; `nodes` are what was passed, and it."""
    node = _before_casts(x, nodes)
    operation = read_elementwise(node) if isinstance(node, fx.Node) else None
    if operation is None or operation.name != name:
        return None
    nodes.append(node)
    return operation


def _before_casts(x: Any, nodes: list[fx.Node]) -> Any:
    while (call := read(x)) is not None:
        before, after = shape_of(call.get("input")), shape_of(x)
        if before is None or after is None:
            break
        is_cast = call.kind == Kind.CAST and after == before and (dtype := dtype_of(x)) and dtype.is_floating_point
        adds_axis = call.kind in (Kind.UNSQUEEZE, Kind.VIEW, Kind.GETITEM) and same_shape(after, (*before, 1))
        if not (is_cast or adds_axis or call.kind == Kind.SAME):
            break
        nodes.append(x)
        x = call["input"]
    return x
