"""softmax in its spellings: the function, log_softmax().exp(), and exp(x) / exp(x).sum() written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from .dialect import Call, Kind, read
from .mutation import is_mutated


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax over `dim` of `input`; `output` is its result, `interior` every node it is made of.

    `zero_empty_rows`: a row of -inf becomes 0, and not NaN.
    """

    input: fx.Node
    dim: Any
    output: fx.Node
    interior: tuple[fx.Node, ...]
    zero_empty_rows: bool = False


def read_softmax(call: Call) -> Softmax | None:
    """The softmax whose result a call is, in any spelling."""
    match call.kind:
        case Kind.SOFTMAX:
            is_safe = call.node.target in (torch.ops.aten._safe_softmax.default, torch._safe_softmax)
            return Softmax(call["input"], call.get("dim"), call.node, (call.node,), zero_empty_rows=is_safe)
        case Kind.EXP:
            return _exp_of_log_softmax(call) or _exp_minus_logsumexp(call)
        case Kind.DIV:
            return _exp_over_sum(call)
    return None


def _exp_of_log_softmax(exp: Call) -> Softmax | None:
    inner = read(exp["input"])
    if inner is None or inner.kind != Kind.LOG_SOFTMAX:
        return None
    return Softmax(inner["input"], inner.get("dim"), exp.node, (inner.node, exp.node))


def _exp_minus_logsumexp(exp: Call) -> Softmax | None:
    """exp(x - logsumexp(x, dim, keepdim=True))."""
    shift = read(exp["input"])
    if shift is None or shift.kind != Kind.SUB or shift.get("alpha", 1) != 1:
        return None
    total = read(shift.get("other"))
    if (
        total is None
        or total.kind != Kind.LOGSUMEXP
        or total["input"] is not shift["input"]
        or not total.get("keepdim")
    ):
        return None
    dim = _one_dim(total.get("dim"))
    return None if dim is None else Softmax(shift["input"], dim, exp.node, (total.node, shift.node, exp.node))


def _exp_over_sum(div: Call) -> Softmax | None:
    """exp(x) / exp(x).sum(dim, keepdim=True), with or without the row maximum subtracted from x."""
    exp, total = read(div["input"]), read(div.get("other"))
    if exp is None or total is None or exp.kind != Kind.EXP or total.kind != Kind.SUM or div.get("rounding_mode"):
        return None
    if total.get("dtype") is not None:
        return None
    if total["input"] is not exp.node or not total.get("keepdim") or is_mutated(exp.node) or is_mutated(total.node):
        return None
    dim = _one_dim(total.get("dim"))
    if dim is None:
        return None
    interior = [exp.node, total.node, div.node]
    source = exp["input"]
    shift = read(source)
    if shift is not None and shift.kind == Kind.SUB and shift.get("alpha", 1) == 1:
        maximum = row_maximum(shift["input"], shift["other"], dim)
        if maximum is not None:
            interior += [shift.node, *maximum]
            source = shift["input"]
    return Softmax(source, dim, div.node, tuple(interior))


def row_maximum(x: Any, maximum: Any, dim: int) -> list[fx.Node] | None:
    """The nodes that compute the maximum of x over dim, kept as a dimension, if `maximum` is that."""
    found = maximum_over(x, maximum)
    return found[1] if found is not None and found[0] == dim else None


def maximum_over(x: Any, maximum: Any) -> tuple[Any, list[fx.Node]] | None:
    """Over which dimension `maximum` is the maximum of x, kept as a dimension, and the nodes that compute it."""
    nodes: list[fx.Node] = []
    call = read(maximum)
    if isinstance(maximum, fx.Node) and maximum.target in ("detach", torch.ops.aten.detach.default):
        nodes.append(maximum)
        maximum = maximum.args[0]
        call = read(maximum)
    restored = None
    if call is not None and call.kind == Kind.UNSQUEEZE:  # the dimension is kept in two steps
        nodes.append(call.node)
        maximum, restored = call["input"], call.get("dim")
        call = read(maximum)
    if isinstance(maximum, fx.Node) and call is None and maximum.target is getattr and maximum.args[1] == "values":
        nodes.append(maximum)
        call = read(maximum.args[0])
    elif call is not None and call.kind == Kind.GETITEM and call.get("index") == 0:
        nodes.append(call.node)
        call = read(call["input"])
    if call is None or call.kind not in (Kind.AMAX, Kind.MAX) or call["input"] is not x:
        return None
    dim = _one_dim(call.get("dim"))
    is_kept = bool(call.get("keepdim")) if restored is None else not call.get("keepdim") and dim == _one_dim(restored)
    return (dim, [*nodes, call.node]) if is_kept else None


def _one_dim(dim: Any) -> int | None:
    if isinstance(dim, (list, tuple)):
        dim = dim[0] if len(dim) == 1 else None
    return dim if isinstance(dim, int) and not isinstance(dim, bool) else None
