"""softmax in its spellings: the function, log_softmax().exp(), exp(x) / exp(x).sum(), and rows of -inf made 0."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from .dialect import Call, Kind, read
from .mutation import is_mutated
from .values import constant_of, filled_like

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax over `dim` of `input`; `output` is its result, `interior` every node it is made of.

    `zero_empty_rows`: a row of -inf becomes 0, and not NaN. `bare_exp` is an exponential from which no maximum was
    taken: large scores are infinite there, and those far below zero are 0 even in a row of nothing else.
    """

    input: fx.Node
    dim: Any
    output: fx.Node
    interior: tuple[fx.Node, ...]
    zero_empty_rows: bool = False
    bare_exp: fx.Node | None = None


def read_softmax(call: Call) -> Softmax | None:
    """The softmax whose result a call is, in any spelling."""
    match call.kind:
        case Kind.SOFTMAX:
            is_safe = call.node.target in (torch.ops.aten._safe_softmax.default, torch._safe_softmax)
            softmax = Softmax(call["input"], call.get("dim"), call.node, (call.node,), zero_empty_rows=is_safe)
            return _with_empty_rows_zeroed(softmax) or softmax
        case Kind.EXP:
            return _exp_of_log_softmax(call) or _exp_minus_logsumexp(call)
        case Kind.DIV:
            return _exp_over_sum(call)
    return None


def _with_empty_rows_zeroed(softmax: Softmax) -> Softmax | None:
    """where(~(x != -inf).any(dim, keepdim=True), 0, softmax(x)), which _safe_softmax decomposes to."""
    for user in softmax.output.users:
        call = read(user)
        if call is None or call.kind != Kind.WHERE or call.get("other") is not softmax.output:
            continue
        zero = call["input"]
        is_zero = constant_of(zero) == 0 or (isinstance(zero, fx.Node) and filled_like(zero, softmax.output) == 0)
        empty = _is_empty(call["condition"], softmax)
        if is_zero and empty is not None:
            filled = [zero] if isinstance(zero, fx.Node) and softmax.output in zero.all_input_nodes else []
            interior = (*softmax.interior, *empty, *filled, user)
            return dataclasses.replace(softmax, output=user, interior=interior, zero_empty_rows=True)
    return None


def _is_empty(condition: Any, softmax: Softmax) -> list[fx.Node] | None:
    """The nodes that compute whether a row of a softmax's input is -inf everywhere, if `condition` is that."""
    nodes: list[fx.Node] = []
    for target in (aten.logical_not.default, aten.any.dim, aten.logical_not.default, aten.eq.Scalar):
        if not isinstance(condition, fx.Node) or condition.target is not target:
            return None
        nodes.append(condition)
        condition = condition.args[0]
    _, row, _, infinite = nodes
    is_row = row.args[1:] == (softmax.dim, True) and infinite.args[1] == -math.inf
    return nodes[::-1] if condition is softmax.input and is_row else None


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
    inner, restored, axis = _before_unsqueeze(shift.get("other"))
    total = None if inner is None else read_logsumexp(shift["input"], inner.node)
    if total is None or total.is_kept != (not restored) or (restored and axis != total.dim):
        return None
    return Softmax(shift["input"], total.dim, exp.node, (*total.nodes, *restored, shift.node, exp.node))


def _before_unsqueeze(x: Any) -> tuple[Call | None, list[fx.Node], int | None]:
    """What gives x, before a dimension that it lacks is put back; the node that does so, and which dimension it is."""
    call = read(x)
    if call is None or call.kind != Kind.UNSQUEEZE or is_mutated(call.node):
        return call, [], None
    return read(call["input"]), [call.node], _one_dim(call.get("dim"))


@dataclasses.dataclass(frozen=True)
class LogSumExp:
    """A logsumexp over `dim`, which is kept with size 1 if `is_kept`; `nodes` are all that it is made of."""

    dim: int
    is_kept: bool
    nodes: tuple[fx.Node, ...]


def read_logsumexp(x: Any, total: Any) -> LogSumExp | None:
    """The logsumexp of x that `total` is, or None.

    Also as it decomposes: log(sum(exp(x - m))) + m, where m is the maximum, or 0 where that is infinite.
    """
    call = read(total)
    if call is not None and call.kind == Kind.LOGSUMEXP:
        dim = _one_dim(call.get("dim"))
        if dim is None or call["input"] is not x:
            return None
        return LogSumExp(dim, bool(call.get("keepdim")), (call.node,))
    if call is None or call.kind != Kind.ADD or call.get("alpha", 1) != 1:
        return None
    log, maximum = call["input"], read(call.get("other"))
    squeeze = maximum if maximum is not None and maximum.kind == Kind.SQUEEZE else None
    if squeeze is not None:
        maximum = read(squeeze["input"])
    if not isinstance(log, fx.Node) or log.target is not aten.log.default or maximum is None:
        return None
    sums = read(log.args[0])
    is_sum = sums is not None and sums.kind == Kind.SUM and bool(sums.get("keepdim")) == (squeeze is None)
    exp = read(sums["input"]) if sums is not None and is_sum else None
    shift = read(exp["input"]) if exp is not None and exp.kind == Kind.EXP else None
    if sums is None or exp is None or shift is None or shift.kind != Kind.SUB or shift.get("alpha", 1) != 1:
        return None
    found = _finite_maximum(x, maximum)
    dim = _one_dim(sums.get("dim"))
    if found is None or dim is None or found[0] != dim or (shift["input"], shift["other"]) != (x, maximum.node):
        return None
    if squeeze is not None and _one_dim(squeeze.get("dim")) != dim:
        return None
    squeezed = () if squeeze is None else (squeeze.node,)
    nodes = (*found[1], maximum.node, *squeezed, shift.node, exp.node, sums.node, log, call.node)
    return LogSumExp(dim, squeeze is None, nodes)


def _finite_maximum(x: Any, call: Call) -> tuple[Any, list[fx.Node]] | None:
    """As `maximum_over`, of where(abs(maximum) == inf, 0, maximum), without its own node."""
    if call.kind != Kind.WHERE or constant_of(call["input"]) != 0:
        return None
    infinite = call["condition"]
    if not isinstance(infinite, fx.Node) or infinite.target is not aten.eq.Scalar or infinite.args[1] != math.inf:
        return None
    magnitude = infinite.args[0]
    found = maximum_over(x, call.get("other"))
    if found is None or not isinstance(magnitude, fx.Node) or magnitude.target is not aten.abs.default:
        return None
    return (found[0], [*found[1], magnitude, infinite]) if magnitude.args[0] is call.get("other") else None


def _exp_over_sum(div: Call) -> Softmax | None:
    """exp(x) / exp(x).sum(dim, keepdim=True), with or without the row maximum subtracted from x."""
    exp = read(div["input"])
    total, restored, axis = _before_unsqueeze(div.get("other"))
    if exp is None or total is None or exp.kind != Kind.EXP or total.kind != Kind.SUM or div.get("rounding_mode"):
        return None
    if total.get("dtype") is not None:
        return None
    if total["input"] is not exp.node or is_mutated(exp.node) or is_mutated(total.node):
        return None
    dim = _one_dim(total.get("dim"))
    is_kept = bool(total.get("keepdim")) if not restored else not total.get("keepdim") and axis == dim
    if dim is None or not is_kept:
        return None
    interior = [exp.node, total.node, *restored, div.node]
    source, bare_exp = exp["input"], exp.node
    shift = read(source)
    if shift is not None and shift.kind == Kind.SUB and shift.get("alpha", 1) == 1:
        maximum = row_maximum(shift["input"], shift["other"], dim)
        if maximum is not None:
            interior += [shift.node, *maximum]
            source, bare_exp = shift["input"], None
    return Softmax(source, dim, div.node, tuple(interior), bare_exp=bare_exp)


def row_maximum(x: Any, maximum: Any, dim: int) -> list[fx.Node] | None:
    """The nodes that compute the maximum of x over dim, kept as a dimension, if `maximum` is that."""
    found = maximum_over(x, maximum)
    return found[1] if found is not None and found[0] == dim else None


def maximum_over(x: Any, maximum: Any) -> tuple[Any, list[fx.Node]] | None:
    """Over which dimension `maximum` is the maximum of x, kept as a dimension, and the nodes that compute it."""
    nodes: list[fx.Node] = []
    call = read(maximum)
    if isinstance(maximum, fx.Node) and maximum.target in ("detach", aten.detach.default, aten.alias.default):
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
