"""Exponentials of scores divided by their sum in a form that `softmax` does not read, so that the report names them."""

from __future__ import annotations

from typing import Any

from torch import fx

from .dialect import Call, Kind, read
from .mutation import mutated_arguments
from .score_path import leads_to_product
from .sites import Refusal
from .where import describe

_DEPTH = 6
_OF_WEIGHTS = {Kind.MUL, Kind.MASKED_FILL, Kind.WHERE, Kind.CAST, Kind.SAME}
_OF_SUMS = {Kind.ADD, Kind.CLAMP, Kind.CAST, Kind.SAME, Kind.UNSQUEEZE, Kind.GETITEM}


def refuse_unread_softmax(division: Call) -> Refusal | None:
    """The refusal of exp(scores) * mask / (exp(scores) * mask).sum(dim), or with a term in the sum; None if no such."""
    if division.kind != Kind.DIV or not isinstance(division.get("input"), fx.Node):
        return None
    exp = _exponential(division["input"])
    if exp is None or _exponential_summed(division.get("other")) is not exp:
        return None
    detail = f"{describe(division.node)} divides exponentials of scores by more, or less, than their sum"
    return Refusal("softmax_not_read", detail, division.node)


def _exponential(x: Any, depth: int = _DEPTH) -> fx.Node | None:
    """The exponential of scores that a tensor is, but for masks and factors."""
    if not isinstance(x, fx.Node) or not depth:
        return None
    call = read(x)
    writer = next((u for u in x.users if x in mutated_arguments(u) and (c := read(u)) and c.kind == Kind.EXP), None)
    if writer is not None or (call is not None and call.kind == Kind.EXP):
        exp = x if writer is None else writer
        return exp if leads_to_product(exp.all_input_nodes[0]) else None
    if call is None or call.kind not in _OF_WEIGHTS:
        return None
    found = (_exponential(source, depth - 1) for source in x.all_input_nodes)
    return next((exp for exp in found if exp is not None), None)


def _exponential_summed(x: Any, depth: int = _DEPTH) -> fx.Node | None:
    """The exponential of scores of which a tensor is a sum over keys, but for a term and the shape."""
    call = read(x) if depth else None
    if call is not None and call.kind == Kind.SUM and call.get("dim") is not None:
        return _exponential(call["input"])
    if call is None or call.kind not in _OF_SUMS:
        return None
    found = (_exponential_summed(source, depth - 1) for source in call.node.all_input_nodes)
    return next((exp for exp in found if exp is not None), None)
