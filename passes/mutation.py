"""Who writes to what: in-place operations, and values that may share memory."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .dialect import Kind, read


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments whose values a node writes to."""
    if node.target in _CHANGES_NO_VALUE:
        return []
    if node.op == "call_method":
        name = str(node.target)
        mutates = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_DUNDERS
        return [x for x in node.args[:1] if mutates and isinstance(x, fx.Node)]
    if node.op == "call_module":
        call = read(node)
        return [call["input"]] if call is not None and call.in_place else []
    if node.op != "call_function":
        return []
    written: list[Any] = [node.kwargs.get("out")]
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        for position, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.append(node.args[position] if position < len(node.args) else node.kwargs.get(argument.name))
    elif target in _IN_PLACE_OPERATORS or target is operator.setitem:
        written.append(node.args[0])
    else:
        name = getattr(target, "__name__", "")
        if (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True:
            written.append(node.args[0] if node.args else node.kwargs.get("input"))
        else:
            call = read(node)
            if call is not None and call.in_place:
                written.append(call["input"])
    nodes = [x for item in written for x in (item if isinstance(item, (list, tuple)) else [item])]
    return [x for x in nodes if isinstance(x, fx.Node)]


_CHANGES_NO_VALUE = {"detach_", "requires_grad_", "retain_grad", torch.ops.aten.detach_.default}
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_IN_PLACE_OPERATORS = {getattr(operator, f"i{name}") for name in _ARITHMETIC}
_IN_PLACE_DUNDERS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "__ipow__"}


def is_mutated(node: fx.Node) -> bool:
    """Whether any node writes to this one."""
    return any(node in mutated_arguments(user) for user in node.users)


# Results that share no memory with an argument, so that a later write to one does not reach the other.
_FRESH = {
    Kind.MATMUL, Kind.BADDBMM, Kind.ADDMM, Kind.EINSUM, Kind.LINEAR, Kind.SOFTMAX, Kind.LOG_SOFTMAX, Kind.ATTENTION,
    Kind.ADD, Kind.ADDCMUL, Kind.SUB, Kind.MUL, Kind.DIV, Kind.NEG, Kind.TANH, Kind.CLAMP, Kind.EXP, Kind.SUM,
    Kind.AMAX, Kind.MASKED_FILL, Kind.WHERE, Kind.RELU, Kind.GELU, Kind.SILU, Kind.POW, Kind.REPEAT_INTERLEAVE,
}  # fmt: skip


def storage_roots(node: fx.Node) -> set[fx.Node]:
    """The nodes whose memory `node` may share: found by walking back through everything that could be a view."""
    roots: set[fx.Node] = set()
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        call = read(current)
        sources: list[fx.Node] = []
        if call is None or call.in_place or call.kind not in _FRESH:
            sources = current.all_input_nodes
        if not sources or current.op in ("placeholder", "get_attr"):
            roots.add(current)
        for source in sources:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return roots
