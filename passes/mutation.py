"""Who writes to what: in-place operations, and values that may share memory."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from topk_fx.compat import is_wrapped

from .dialect import Kind, read


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments whose values a node writes to, or may write to."""
    if node.op in ("placeholder", "get_attr", "output") or node.target in _CHANGES_NO_VALUE:
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
    elif getattr(target, "__module__", None) == "_operator":  # whose and_ and or_ are no in-place operations
        written += node.args[:1] if target in _IN_PLACE_OPERATORS else []
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


_CHANGES_NO_VALUE = {"detach_", "requires_grad_", "retain_grad", torch.ops.aten.detach_.default}
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift",
               "rshift")  # fmt: skip
_IN_PLACE_OPERATORS = {operator.setitem, *(getattr(operator, f"i{name}") for name in _ARITHMETIC)}
_IN_PLACE_DUNDERS = {*(f"__i{name}__" for name in _ARITHMETIC), "__setitem__"}


def is_mutated(node: fx.Node, depth: int = 4) -> bool:
    """Whether any node writes to this one, or to what may be a view of it."""
    for user in node.users:
        if node in mutated_arguments(user):
            return True
        call = read(user)
        may_be_view = user.op in ("call_function", "call_method") and (call is None or call.kind not in _FRESH)
        if may_be_view and depth and is_mutated(user, depth - 1):
            return True
    return False


# Results that share no memory with an argument, so that a later write to one does not reach the other.
_FRESH = {
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
        is_fresh = call is not None and not call.in_place and call.kind in _FRESH
        if not is_fresh and not _has_own_storage(current):
            sources = current.all_input_nodes
        if not sources or current.op in ("placeholder", "get_attr"):
            roots.add(current)
        for source in sources:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return roots


def _has_own_storage(node: fx.Node) -> bool:
    """Whether tracing, which ran the same function of torch on fake tensors, saw a storage that no argument has."""
    target: Any = node.target
    is_known = node.op == "call_method"
    if node.op == "call_function":
        is_overload = isinstance(target, torch._ops.OpOverload)
        is_known = target.namespace == "aten" if is_overload else _is_torch_function(target)
    own = _storages(node)
    if not is_known or not own:
        return False
    others = [_storages(x) for x in node.all_input_nodes]
    return all(other is not None and own.isdisjoint(other) for other in others)


def _storages(node: fx.Node) -> set[int] | None:
    """The storages of the tensors that tracing recorded as a node's value; None if it recorded none, or none to see."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if value is None:
        return None
    tensors = [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
    if any(x.layout != torch.strided or is_wrapped(x) for x in tensors):
        return None
    return {x.untyped_storage()._cdata for x in tensors}
