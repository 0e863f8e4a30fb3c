"""Whether the row maximum that a model subtracts from its scores may be left out: softmax does not see it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .dialect import Call
from .index_fill import IndexFill
from .meaning import Stretch
from .score_steps import Operand, Step
from .values import is_scalar, shape_of

Event = Call | Step | Stretch | IndexFill
"""What the scores pass: a move, a step, a stretch that no step describes, or a write to some of them."""

_UNKNOWN = 2.0**32
"""What a product of query and key, or a tensor that scales it, is taken to be at most. A tensor that is added may hold
any number: it may be a mask."""


def keeps_shift(event: Event) -> bool:
    """Whether scores of a row that differ by a constant still do after a step (or a move)."""
    if isinstance(event, Call):
        return True
    if isinstance(event, Stretch):
        return False
    if isinstance(event, IndexFill):
        return event.value == -math.inf
    name, arguments = event
    if name in ("mul", "div"):
        factor = arguments[0]
        if not isinstance(factor, Operand) or is_scalar(factor.node):
            return True
        shape = shape_of(factor.node)
        return shape is not None and (not shape or shape[-1] == 1)
    return name == "add" or (name in ("keep", "fill") and arguments[1] == -math.inf)


def may_overflow(before: Sequence[Event], after: Sequence[Event], dtype: torch.dtype | None) -> bool:
    """Whether scores that were left as large as they are may leave the range of their dtype in what comes after.

    A row that is masked whole by finfo.min is 0 once its maximum is subtracted, and -inf if it is doubled instead.
    `before` and `after` are in the order in which the model does them.
    """
    largest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
    bound = _UNKNOWN
    for event in before:
        bound = min(_bound(event, bound, largest), largest)
    for event in after:
        bound = _bound(event, 0.0 if _is_lost_in(bound, event, largest) else bound, largest)
        if bound > largest:
            return True
    return False


def _is_lost_in(bound: float, event: Event, largest: float) -> bool:
    """Whether scores are too small to change the sum with a tensor that may hold the largest number."""
    is_sum = isinstance(event, tuple) and event[0] == "add" and isinstance(event[1][0], Operand)
    return is_sum and bound < largest * 2.0**-26


def _bound(event: Event, bound: float, largest: float) -> float:
    """How large scores may be after an event, if they were at most `bound`. -inf stays what it is."""
    if isinstance(event, Call):
        return bound
    if isinstance(event, Stretch):
        return largest
    name, arguments = ("fill", (0.0, event.value)) if isinstance(event, IndexFill) else event
    values = [abs(x) if isinstance(x, float) else None for x in arguments]
    match name:
        case "mul" | "div":
            factor = values[0]
            if factor is None:
                return bound * _UNKNOWN
            return bound * factor if name == "mul" else bound / factor if factor else math.inf
        case "add":
            return bound + (largest if values[0] is None else values[0])
        case "fill" | "keep":
            filled = largest if values[1] is None else values[1]
            return bound if filled == math.inf else max(bound, filled)
        case "tanh":
            return min(bound, 1.0)
        case "clamp":
            return min(bound, max(x for x in values if x is not None))
    return largest
