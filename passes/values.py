"""What is known about the values in a graph: shapes, dtypes, and which of them are numbers."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import fx

from .dialect import Kind, read
from .mutation import is_mutated

aten = torch.ops.aten


def value_of(node: Any) -> Any:
    """What tracing recorded as the node's value: a fake tensor, a symbolic number, or None."""
    if not isinstance(node, fx.Node):
        return node
    for name in ("val", "example_value"):
        if name in node.meta:
            return node.meta[name]
    if node.op == "get_attr" and node.graph.owning_module is not None:
        return attribute_of(node)
    return None


def attribute_of(node: fx.Node) -> Any:
    """The parameter, buffer or module that a get_attr node fetches."""
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The shape of a tensor node, if tracing recorded it."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a tensor node, if tracing recorded it."""
    value = value_of(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_nested(node: Any) -> bool:
    """Whether a node is known to be a nested tensor, which has rows of several lengths and a size that is no number."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_nested


def rank_of(node: Any) -> int | None:
    """The rank of a tensor node: recorded by tracing, or told by how the node was made."""
    shape = shape_of(node)
    if shape is not None:
        return len(shape)
    call = read(node)
    if call is None:
        return None
    match call.kind:
        case Kind.PERMUTE:
            dims = call["dims"]
            return len(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else len(dims)
        case Kind.VIEW | Kind.EXPAND if isinstance(size := call.get("size"), (list, tuple)):
            if len(size) == 1 and isinstance(size[0], fx.Node):
                return None  # may be a whole size
            return len(size[0]) if len(size) == 1 and isinstance(size[0], (list, tuple)) else len(size)
        case Kind.EINSUM:
            _, arrow, output = str(call["equation"]).replace(" ", "").partition("->")
            return len(output) if arrow and "." not in output else None
        case Kind.UNSQUEEZE:
            inner = rank_of(call["input"])
            return None if inner is None else inner + 1
        case Kind.MATMUL:
            ranks = [rank_of(call["input"]), rank_of(call["other"])]
            return max(ranks) if None not in ranks and min(ranks) >= 2 else None  # type: ignore[type-var, operator]
        case Kind.TRANSPOSE | Kind.MATRIX_TRANSPOSE | Kind.CAST | Kind.SAME | Kind.SOFTMAX | Kind.DROPOUT | Kind.LINEAR:
            return rank_of(call["input"])
    return None


def is_matrix(node: fx.Node) -> bool:
    """Whether a node is known to have at least two axes."""
    rank = rank_of(node)
    if rank is not None:
        return rank >= 2
    call = read(node)
    if call is None:
        return False
    if call.kind == Kind.TRANSPOSE:
        dims = (call.get("dim0"), call.get("dim1"))
        return all(isinstance(d, int) for d in dims) and dims[0] != dims[1] and dims not in ((0, -1), (-1, 0))
    if call.kind in (Kind.CAST, Kind.SAME, Kind.SOFTMAX, Kind.DROPOUT):
        return is_matrix(call["input"])
    return call.kind == Kind.MATRIX_TRANSPOSE


_SCALAR_FUNCTIONS = {
    math.sqrt,
    math.log,
    math.exp,
    math.pow,
    float,
    int,
    torch.sym_float,
    torch.sym_sqrt,
    torch.sym_int,
}
_SCALAR_OPERATORS = {operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.pow,
                     operator.neg}  # fmt: skip


def is_scalar(value: Any) -> bool:
    """Whether a value is a number at run time, and not a tensor."""
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
    recorded = value_of(value)
    if recorded is not None:
        return is_scalar(recorded)
    if value.op == "call_method":
        return value.target == "size" and len(value.args) == 2
    if value.op != "call_function":
        return False
    if value.target in _SCALAR_FUNCTIONS:
        return True
    if value.target in _SCALAR_OPERATORS:
        return all(map(is_scalar, value.args))
    if value.target is operator.getitem:
        source = value.args[0]
        return isinstance(source, fx.Node) and (
            (source.op == "call_method" and source.target == "size" and len(source.args) == 1)
            or (source.target is getattr and source.args[1:2] == ("shape",))
        )
    return False


def constant_of(value: Any) -> float | None:
    """The number that a value is known to be, also when it stands in a tensor built from a number."""
    if isinstance(value, (bool, torch.SymInt, torch.SymFloat)):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    recorded = value_of(value)
    if isinstance(recorded, (int, float)) and not isinstance(recorded, bool):
        return float(recorded)
    if dtype_of(value) not in (None, torch.float32, torch.float64):
        return None  # rounded to what the number does not tell
    call = read(value)
    if call is not None and call.kind in (Kind.SAME, Kind.CAST) and not is_mutated(value):
        is_widest = call.get("dtype") in (None, torch.float32, torch.float64)
        return constant_of(call["input"]) if is_widest else None
    return _filled_constant(value)


def filled_like(value: Any, scores: fx.Node) -> float | None:
    """The number of a tensor that holds one number everywhere, in the shape of the scores."""
    call = read(value)
    if call is not None and call.kind in (Kind.MUL, Kind.NEG) and not call.in_place:
        factors = [call["input"], call.get("other", -1.0)]
        numbers = [constant_of(x) if not isinstance(x, fx.Node) else filled_like(x, scores) for x in factors]
        return math.prod(numbers) if None not in numbers else None  # type: ignore[arg-type]
    if call is None or call.kind != Kind.FILLED_LIKE or call["input"] is not scores or is_mutated(call.node):
        return None
    shape, own = shape_of(call.node), shape_of(scores)
    if "size" in call.arguments and (shape is None or shape not in ((), own)):
        return None  # its shape may take part in broadcasting
    target = call.node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    number = 0.0 if "zeros" in name else 1.0 if "ones" in name else call.get("fill_value")
    return float(number) if isinstance(number, (int, float)) and not isinstance(number, bool) else None


@functools.cache
def _fill_functions() -> dict[Any, int]:
    """Functions whose result is one number everywhere, and the position of that number."""
    return {
        torch.tensor: 0,
        torch.as_tensor: 0,
        torch.full: 1,
        aten.full: 1,
        aten.scalar_tensor: 0,
        torch.scalar_tensor: 0,
    }


def _filled_constant(node: fx.Node) -> float | None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if node.op != "call_function" or target not in _fill_functions() or len(node.users) == 0:
        return None
    position = _fill_functions()[target]
    number = node.args[position] if len(node.args) > position else node.kwargs.get("fill_value")
    if node.kwargs.get("dtype") not in (None, torch.float32, torch.float64):
        return None
    if is_mutated(node) or isinstance(number, (bool, fx.Node)) or not isinstance(number, (int, float)):
        return None
    shape = shape_of(node)
    if shape is not None and any(size != 1 for size in shape):
        return None  # its shape may take part in broadcasting
    return float(number)
