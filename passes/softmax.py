"""softmax in its spellings: softmax, softmin, log_softmax().exp(), exp(x) / exp(x).sum(), and rows of -inf made 0."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from .dialect import Call, Kind, read
from .mutation import is_mutated
from .values import constant_of, filled_like, rank_of

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax over `dim` of `input`; `output` is its result, `interior` every node it is made of.

    `factor` multiplies the input first. `zero_empty_rows`: a row of -inf becomes 0, and not NaN. `bare_exp` is an
    exponential from which no maximum was taken: large scores are infinite there, and those far below zero are 0 even in
    a row of nothing else.
    """

    input: fx.Node
    dim: Any
    output: fx.Node
    interior: tuple[fx.Node, ...]
    zero_empty_rows: bool = False
    bare_exp: fx.Node | None = None
    factor: float = 1.0


def read_softmax(call: Call) -> Softmax | None:
    """The softmax whose result a call is, in any spelling."""
    match call.kind:
        case Kind.SOFTMAX:
            is_safe = call.node.target in (torch.ops.aten._safe_softmax.default, torch._safe_softmax)
            softmax = Softmax(call["input"], call.get("dim"), call.node, (call.node,), zero_empty_rows=is_safe)
            return _with_empty_rows_zeroed(softmax) or softmax
        case Kind.SOFTMIN:
            return Softmax(call["input"], call.get("dim"), call.node, (call.node,), factor=-1.0)
        case Kind.EXP:
            return _exp_of_log_softmax(call) or _exp_minus_logsumexp(call)
        case Kind.DIV if call.get("rounding_mode") is None:
            return _exp_over_sum(call.node, call["input"], call.get("other"), [])
        case Kind.MUL:
            return _exp_times_reciprocal(call)
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
    if call is None or is_mutated(call.node):
        return call, [], None
    if call.kind == Kind.UNSQUEEZE:
        return read(call["input"]), [call.node], _one_dim(call.get("dim"))
    if call.kind == Kind.GETITEM and call.get("index") == (Ellipsis, None):
        return read(call["input"]), [call.node], -1
    return call, [], None


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


def _exp_times_reciprocal(mul: Call) -> Softmax | None:
    """exp(x) * (1 / exp(x).sum(dim, keepdim=True)), either way round."""
    for exp, reciprocal in ((mul["input"], mul.get("other")), (mul.get("other"), mul["input"])):
        if not isinstance(exp, fx.Node) or _base_of_exp(exp) is None or not isinstance(reciprocal, fx.Node):
            continue
        between = [reciprocal]
        call = read(reciprocal)
        if call is not None and call.kind == Kind.MUL and constant_of(call.get("other")) == 1:  # as 1 / x is exported
            reciprocal = call["input"]
            between.append(reciprocal)
            call = read(reciprocal)
        name = getattr(reciprocal.target, "__name__", str(reciprocal.target))
        if call is not None and call.kind == Kind.DIV and constant_of(call["input"]) == 1:
            total = call.get("other")
        elif call is not None and call.kind == Kind.POW and call.get("exponent") == -1:
            total = call["input"]
        elif name.split(".")[0] == "reciprocal" and len(reciprocal.args) == 1:
            total = reciprocal.args[0]
        else:
            continue
        if not any(map(is_mutated, between)):
            return _exp_over_sum(mul.node, exp, total, between)
    return None


def _exp_over_sum(output: fx.Node, exp: Any, sums: Any, between: list[fx.Node]) -> Softmax | None:
    """exp(x) / exp(x).sum(dim, keepdim=True), with or without the row maximum subtracted from x."""
    base = _base_of_exp(exp)
    total, restored, axis = _before_unsqueeze(sums)
    if base is None or total is None or total.kind != Kind.SUM or total.get("dtype") is not None:
        return None
    if not _is_same(total["input"], exp) or any(map(is_mutated, (exp, total["input"], total.node))):
        return None
    dim = _one_dim(total.get("dim"))
    if dim is not None and restored and axis is not None and axis >= 0 > dim and (rank := rank_of(exp)) is not None:
        axis -= rank
    is_kept = bool(total.get("keepdim")) if not restored else not total.get("keepdim") and axis == dim
    if dim is None or not is_kept:
        return None
    interior = [exp, total["input"], total.node, *restored, *between, output]
    source, bare_exp = exp.all_input_nodes[0], exp
    shift = read(source)
    if shift is not None and shift.kind == Kind.SUB and shift.get("alpha", 1) == 1:
        maximum = row_maximum(shift["input"], shift["other"], dim)
        if maximum is not None:
            interior += [shift.node, *maximum]
            twin = read(total["input"].all_input_nodes[0])  # the same call, unless the exponential is written twice
            if twin is not None:
                interior += [twin.node, *(row_maximum(shift["input"], twin["other"], dim) or ())]
            source, bare_exp = shift["input"], None
    return Softmax(source, dim, output, tuple(dict.fromkeys(interior)), bare_exp=bare_exp, factor=math.log(base))


def _base_of_exp(node: Any) -> float | None:
    """The base of the exponential that a node is, or None."""
    call = read(node)
    if call is not None and call.kind == Kind.EXP:
        return math.e
    is_exp2 = isinstance(node, fx.Node) and node.target in (torch.exp2, torch.special.exp2, "exp2", aten.exp2.default)
    return 2.0 if is_exp2 and len(node.args) == 1 and not node.kwargs else None


def _is_same(x: Any, y: Any, depth: int = 6) -> bool:
    """Whether two nodes are one, or do the same to the same with no effect."""
    if x is y:
        return True
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return not isinstance(x, fx.Node) and not isinstance(y, fx.Node) and type(x) is type(y) and bool(x == y)
    is_read = depth > 0 and x.op == y.op and x.target == y.target and (read(x) is not None or _base_of_exp(x))
    if not is_read or is_mutated(x) or is_mutated(y) or x.kwargs != y.kwargs or len(x.args) != len(y.args):
        return False
    return all(_is_same(a, b, depth - 1) for a, b in zip(x.args, y.args, strict=True))


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
