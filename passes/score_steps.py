"""Reads one elementwise call between the product and the softmax as steps of the score language."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from topk_fx.score.language import SCORES
from topk_fx.score.language import Call as Operation

from .axes import same_shape
from .dialect import Call, Kind, read, stops_at_bounds
from .sites import Refuse, Term
from .softmax import row_maximum
from .values import constant_of, dtype_of, filled_like, is_scalar, shape_of
from .where import describe


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor, or a number known only at run time, that a step reads; `shape`: what it is reshaped to first."""

    node: fx.Node
    negated: bool = False
    multiplier: Any = 1
    shape: tuple[Any, ...] | None = None

    def at(self, stage: int) -> Term:
        """The operand of a step before which the scores have moved `stage` times."""
        return Term(self.node, stage, self.negated, self.multiplier, shape=self.shape)


Step = tuple[str, tuple[float | Operand | Operation, ...]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a call does to the scores: steps in order, nodes that are part of it, and a tensor whose dtype it takes."""

    steps: tuple[Step, ...] = ()
    absorbed: tuple[fx.Node, ...] = ()
    takes_dtype_of: fx.Node | None = None


def read_steps(call: Call, scores: fx.Node, key_dim: int) -> Reading:
    """The steps of a call whose argument `scores` carries the scores; `key_dim` is the key axis, as a model writes it.

    Raises:
        Refuse: the call does something else, or something that the score language cannot say.
    """
    reading = _read(call, scores, key_dim)
    after, before = shape_of(call.node), shape_of(scores)
    if after is not None and before is not None and not same_shape(after, before):
        raise Refuse("mask_broadcasts_scores", f"{describe(call.node)} enlarges the scores from {before} to {after}")
    return reading


def _read(call: Call, scores: fx.Node, key_dim: int) -> Reading:
    def operand(name: str, negated: bool = False, multiplier: Any = 1) -> float | Operand:
        return _number_or_operand(call[name], scores, negated, multiplier)

    is_first = call.get("input") is scores
    alpha = call.get("alpha", 1)
    match call.kind:
        case Kind.ADD if is_first:
            return Reading((("add", (operand("other", multiplier=alpha),)),))
        case Kind.ADD:
            return Reading((*_times(alpha), ("add", (operand("input"),))))
        case Kind.SUB:
            maximum = row_maximum(call["input"], call.get("other"), key_dim)
            if maximum is not None and alpha == 1:  # softmax does not see what all keys of a row have in common
                return Reading(absorbed=tuple(maximum))
            if is_first:
                return Reading((("add", (operand("other", negated=True, multiplier=alpha),)),))
            return Reading((*_times(alpha), ("mul", (-1.0,)), ("add", (operand("input"),))))
        case Kind.MUL:
            return Reading((("mul", (operand("other" if is_first else "input"),)),))
        case Kind.DIV if call.get("rounding_mode") is None:
            return Reading((("div", (operand("other"),)),))
        case Kind.ADDCMUL:
            factor = operand("tensor2" if call["tensor1"] is scores else "tensor1")
            return Reading((*_times(call.get("value", 1)), ("mul", (factor,)), ("add", (operand("input"),))))
        case Kind.NEG:
            return Reading((("mul", (-1.0,)),))
        case Kind.TANH:
            return Reading((("tanh", ()),))
        case Kind.CLAMP:
            low, high = _bounds(call)
            if not stops_at_bounds(call):
                return Reading((("clamp", (low, high)),))
            bounds = [(name, bound) for name, bound in (("le", low), ("ge", high)) if math.isfinite(bound)]
            return Reading(tuple(("fill", (Operation(name, (SCORES, bound)), bound)) for name, bound in bounds))
        case Kind.MASKED_FILL:
            return Reading((("fill", (_condition(call["mask"], scores), operand("value"))),))
        case Kind.WHERE:
            name, other = ("keep", "other") if is_first else ("fill", "input")
            return Reading(((name, (_condition(call["condition"], scores), operand(other))),))
        case Kind.CAST:
            return Reading(takes_dtype_of=check_cast(call))
        case Kind.DROPOUT:
            if dropout_of(call) != NO_DROPOUT:
                raise Refuse("dropout_on_scores", f"{describe(call.node)} drops scores before the softmax")
            return Reading()
        case Kind.SAME:
            return Reading()
    raise Refuse("unknown_score_op", f"{describe(call.node)} lies between the product and the softmax")


def _times(factor: Any) -> tuple[Step, ...]:
    """The step that multiplies by an alpha of a sum, if it is not 1."""
    number = constant_of(factor)
    if number == 1:
        return ()
    return (("mul", (Operand(factor) if number is None else number,)),)


def _number_or_operand(x: Any, scores: fx.Node, negated: bool, multiplier: Any) -> float | Operand:
    filled = filled_like(x, scores)
    x = _unexpanded(x, scores) if filled is None else filled
    number, factor = constant_of(x), constant_of(multiplier)
    if number is not None and factor is not None:
        return -number * factor if negated else number * factor
    if isinstance(x, bool) or (not isinstance(x, fx.Node) and not is_scalar(x)):
        raise Refuse("unknown_score_op", f"the scores meet {x!r}, which is neither a number nor a tensor")
    dtype = dtype_of(x)
    if dtype is not None and dtype.is_complex:
        raise Refuse("unknown_score_op", f"the scores meet the complex tensor {x.name}")
    node, shape = _before_view(x)
    return Operand(node, negated, multiplier, shape)


def _before_view(x: fx.Node) -> tuple[fx.Node, tuple[Any, ...] | None]:
    """What a tensor was before it was viewed as another, such as the scores, and the shape that it was given."""
    call, shape = read(x), shape_of(x)
    is_viewed = call is not None and call.kind == Kind.VIEW and call.get("other") is not None and shape is not None
    return (call["input"], shape) if call is not None and is_viewed else (x, None)


def _unexpanded(x: Any, scores: fx.Node) -> Any:
    """What a tensor was before it was expanded to the shape of the scores: operands broadcast by themselves."""
    call = read(x)
    if call is None or call.kind != Kind.EXPAND:
        return x
    shape, own = shape_of(x), shape_of(scores)
    is_whole = call.get("other") is scores or (shape is not None and own is not None and same_shape(shape, own))
    return call["input"] if is_whole else x


def _condition(x: Any, scores: fx.Node) -> Operand:
    x = _unexpanded(x, scores)
    if not isinstance(x, fx.Node) or dtype_of(x) not in (None, torch.bool):
        raise Refuse("condition_not_boolean", f"the mask {x} is not a boolean tensor, but {dtype_of(x)}")
    node, shape = _before_view(x)
    return Operand(node, shape=shape)


def _bounds(call: Call) -> tuple[float, float]:
    bounds = []
    for name, missing in (("min", -math.inf), ("max", math.inf)):
        value = call.get(name)
        number = missing if value is None else constant_of(value)
        if number is None:
            raise Refuse("unknown_score_op", f"{describe(call.node)} clamps the scores to a tensor")
        bounds.append(number)
    return bounds[0], bounds[1]


def check_cast(call: Call) -> fx.Node | None:
    """Refuse a cast to what is no floating-point dtype; returns the tensor that tells the dtype if tracing did not."""
    dtype = dtype_of(call.node) or call.get("dtype")
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise Refuse("cast_not_floating", f"{describe(call.node)} casts to {dtype}")
        return None
    like = call.get("like")
    if not isinstance(like, fx.Node):
        raise Refuse("shape_unknown", f"what {describe(call.node)} casts to was not traced")
    return like


Dropout = tuple[float | fx.Node, fx.Node | None]
"""The probability of a dropout, and the call of the module that can switch it off at run time, if it is a module."""

NO_DROPOUT: Dropout = (0.0, None)


def dropout_of(call: Call) -> Dropout:
    """The dropout that a call is; Refuse if only run time tells whether it is active."""
    p = call.get("p", 0.5)
    if "module" in call.arguments:
        return (p, call.node) if p > 0 else NO_DROPOUT
    training = call.get("training", True)
    if training is False or p == 0:
        return NO_DROPOUT
    if training is not True or not (isinstance(p, (int, float)) or is_scalar(p)):
        raise Refuse("dropout_mode_not_static", f"whether {describe(call.node)} is active is known only at run time")
    return (p if isinstance(p, fx.Node) else float(p)), None


def merge_dropout(first: Dropout, call: Call) -> Dropout:
    """The dropout that two in a row are; Refuse if both are active."""
    second = dropout_of(call)
    if NO_DROPOUT in (first, second):
        return first if second == NO_DROPOUT else second
    raise Refuse("two_dropouts", f"{describe(call.node)} is a second dropout on the same values")
