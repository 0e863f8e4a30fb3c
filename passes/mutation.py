"""Who writes to what: in-place operations, and values that may share memory."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
from torch import fx

from .dialect import Kind, read


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments whose values a node writes to, or may write to."""
    if node.op in ("placeholder", "get_attr", "output") or node.target in _CHANGE_NO_VALUE:
        return []
    if node.op == "call_method":
        name = str(node.target)
        mutates = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_DUNDERS
        return [x for x in node.args[:1] if mutates and isinstance(x, fx.Node)]
    if node.op == "call_module":
        return node.all_input_nodes if _module_may_write(node) else []
    written: list[Any] = [node.kwargs.get("out")]
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        written += _written_by_schema(node, target._schema)
    elif isinstance(target, torch._ops.OpOverloadPacket):
        for overload in target.overloads():
            written += _written_by_schema(node, getattr(target, overload)._schema)
    elif target in _IN_PLACE_OPERATORS or target is operator.setitem:
        written.append(node.args[0])
    elif getattr(target, "__module__", "") == operator.add.__module__:
        pass  # operator.and_ and operator.or_ have their names because Python keeps the plain ones for itself
    elif isinstance(target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes if _body_may_write(node) else []
    elif not _is_torch_function(target):
        return node.all_input_nodes  # a function that nothing is known of
    else:
        name = getattr(target, "__name__", "")
        position = _inplace_position(target)
        is_told = node.kwargs.get("inplace") is True or (
            position is not None and len(node.args) > position and node.args[position] is True
        )
        if (name.endswith("_") and not name.endswith("__")) or is_told:
            written.append(node.args[0] if node.args else node.kwargs.get("input"))
    nodes = [x for item in written for x in (item if isinstance(item, (list, tuple)) else [item])]
    return [x for x in nodes if isinstance(x, fx.Node)]


def _written_by_schema(node: fx.Node, schema: Any) -> list[Any]:
    found = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(node.args[position] if position < len(node.args) else node.kwargs.get(argument.name))
    return found


def _body_may_write(node: fx.Node) -> bool:
    """Whether a graph inside a higher-order call writes to what it is given, or nothing is known of one."""
    owner = node.graph.owning_module
    bodies = [x for x in node.all_input_nodes if x.op == "get_attr"]
    found = False
    for body in bodies:
        module: Any = owner
        for name in str(body.target).split("."):
            module = getattr(module, name, None)
        if isinstance(module, fx.GraphModule):
            found = True
            if any(is_mutated(x) for x in module.graph.find_nodes(op="placeholder")):
                return True
    return not found


def _module_may_write(node: fx.Node) -> bool:
    """Whether a called module may write to its inputs: it is told to, or nothing is known of it."""
    owner = node.graph.owning_module
    module = owner.get_submodule(str(node.target)) if owner is not None else None
    if getattr(module, "inplace", False) is True:
        return True
    return not type(module).__module__.startswith("torch.nn")


def _is_torch_function(target: Any) -> bool:
    """Whether a function is one of torch or of Python itself, so that its name tells whether it writes."""
    module = getattr(target, "__module__", None) or getattr(getattr(target, "__objclass__", None), "__module__", "")
    return module is None or module.split(".")[0] in ("torch", "_operator", "operator", "builtins", "math", "")


@functools.cache
def _inplace_position(target: Any) -> int | None:
    """The position of a parameter `inplace`, as many functions of torch.nn.functional have one."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # built in
        return None
    return names.index("inplace") if "inplace" in names else None


_CHANGE_NO_VALUE = {"detach_", "requires_grad_", "retain_grad", torch.ops.aten.detach_.default}
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_IN_PLACE_OPERATORS = {getattr(operator, f"i{name}") for name in _ARITHMETIC}
_IN_PLACE_DUNDERS = {*(f"__i{name}__" for name in _ARITHMETIC), "__setitem__"}


def is_mutated(node: fx.Node, depth: int = 4) -> bool:
    """Whether any node writes to this one, or to what may be a view of it."""
    for user in node.users:
        if node in mutated_arguments(user):
            return True
        call = read(user)
        may_be_view = user.op in ("call_function", "call_method") and (call is None or call.kind not in FRESH)
        if may_be_view and depth and is_mutated(user, depth - 1):
            return True
    return False


def is_taken_over(node: fx.Node) -> bool:
    """Whether the only use of a new tensor is an in-place operation on it, whose result is used in its place."""
    call, users = read(node), list(node.users)
    if call is None or call.kind not in FRESH or (call.in_place and isinstance(call.get("input"), fx.Node)):
        return False
    user = read(users[0]) if len(users) == 1 else None
    return user is not None and user.in_place and user.get("input") is node and not is_mutated(user.node)


# Results that share no memory with an argument, so that a later write to one does not reach the other.
FRESH = {
    Kind.MATMUL, Kind.BADDBMM, Kind.ADDMM, Kind.EINSUM, Kind.LINEAR, Kind.SOFTMAX, Kind.LOG_SOFTMAX, Kind.ATTENTION,
    Kind.ADD, Kind.ADDCMUL, Kind.SUB, Kind.MUL, Kind.DIV, Kind.NEG, Kind.TANH, Kind.CLAMP, Kind.EXP, Kind.SUM,
    Kind.AMAX, Kind.MASKED_FILL, Kind.WHERE, Kind.RELU, Kind.GELU, Kind.SILU, Kind.POW, Kind.REPEAT_INTERLEAVE,
    Kind.CAT,
}  # fmt: skip


def storage_roots(node: fx.Node) -> set[fx.Node]:
    """The nodes whose memory `node` may share: found by walking back through everything that could be a view."""
    roots: set[fx.Node] = set()
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        call = read(current)
        sources: list[fx.Node] = []
        if call is None or call.in_place or call.kind not in FRESH:
            sources = current.all_input_nodes
        if not sources or current.op in ("placeholder", "get_attr"):
            roots.add(current)
        for source in sources:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return roots
