"""Which call is which elementwise operation of the score language, whoever traced it.

`dialect` reads the calls that have a part in finding attention; here are the many that a mask, a bias or a score may
be computed with, each as an expression over its arguments: `torch.add(x, y, alpha=2)` as add(x, mul(y, 2)).
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from topk_fx.score.language import Call as Operation
from topk_fx.score.operations import CAST_DTYPES

from .dialect import Call, Kind, read, stops_at_bounds
from .values import dtype_of, is_scalar, shape_of

aten = torch.ops.aten

_UNARY: dict[Any, str] = {}
_BINARY: dict[Any, str] = {}


def _spell(table: dict[Any, str], operation: str, *names: str, other: tuple[Any, ...] = ()) -> None:
    """Every target with one of `names`: a function of torch, of torch.nn.functional, a method, an ATen operator."""
    for name in names:
        spellings = [
            *(getattr(module, name, None) for module in (torch, F, torch.special, torch._C._nn)),
            *(getattr(aten, name, None),),
            *(name, f"__{name.rstrip('_')}__"),
        ]
        table.update((target, operation) for target in spellings if target is not None)
    table.update((target, operation) for target in other)


for _name in ("neg", "abs", "square", "reciprocal", "sqrt", "rsqrt", "floor", "ceil", "round", "trunc", "sign", "exp",
              "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinh", "cosh",
              "tanh", "erf", "sigmoid", "silu", "relu", "softsign", "isnan", "isinf", "logical_not"):  # fmt: skip
    _spell(_UNARY, _name, _name)
_spell(_UNARY, "abs", "absolute", other=(operator.abs,))
_spell(_UNARY, "neg", "negative", other=(operator.neg,))
_spell(_UNARY, "sign", "sgn")
_spell(_UNARY, "trunc", "fix")
_spell(_UNARY, "atan", "atan", "arctan")
_spell(_UNARY, "asinh", "asinh", "arcsinh")
_spell(_UNARY, "sigmoid", "expit")
_spell(_UNARY, "log_sigmoid", "logsigmoid", "log_sigmoid")
_spell(_UNARY, "not", "bitwise_not", other=(operator.invert, operator.inv, "__invert__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _spell(_BINARY, _name, _name, other=(getattr(operator, _name),))
_spell(_BINARY, "ne", "not_equal")
_spell(_BINARY, "lt", "less")
_spell(_BINARY, "le", "less_equal")
_spell(_BINARY, "gt", "greater")
_spell(_BINARY, "ge", "greater_equal")
_spell(_BINARY, "maximum", "maximum")
_spell(_BINARY, "minimum", "minimum")
_spell(_BINARY, "and", "bitwise_and", other=(operator.and_, "__and__", "__rand__", aten.__and__))
_spell(_BINARY, "or", "bitwise_or", other=(operator.or_, "__or__", "__ror__", aten.__or__))
_spell(_BINARY, "xor", "bitwise_xor", other=(operator.xor, "__xor__", "__rxor__", aten.__xor__))
_spell(_BINARY, "logical_and", "logical_and")
_spell(_BINARY, "logical_or", "logical_or")
_spell(_BINARY, "logical_xor", "logical_xor")
_spell(_BINARY, "floor_div", "floor_divide", other=(operator.floordiv, "__floordiv__"))
_spell(_BINARY, "remainder", "remainder", other=(operator.mod, "__mod__"))
_spell(_BINARY, "pow", "pow", other=(operator.pow,))
_EXTREMA: dict[Any, str] = {}
_spell(_EXTREMA, "maximum", "max")
_spell(_EXTREMA, "minimum", "min")
_MODULES: dict[type[nn.Module], str] = {
    nn.Sigmoid: "sigmoid", nn.Softsign: "softsign", nn.LogSigmoid: "log_sigmoid", nn.Tanh: "tanh", nn.ReLU: "relu",
    nn.SiLU: "silu",
}  # fmt: skip
_CASTS = {"float": "float32", "half": "float16", "bfloat16": "bfloat16", "double": "float64", "int": "int32",
          "long": "int64", "bool": "bool", "short": "int16"}  # fmt: skip


def read_elementwise(node: fx.Node, in_place: bool = False) -> Operation | None:
    """The operation that a node is, over nodes and numbers; None if it is none, or writes to an argument.

    With `in_place`, a node that writes its result to its argument is read too.
    """
    target = _target(node)
    if node.op == "call_module":
        return _read_module(node) or _read_dialect_of(node, in_place)
    if node.op not in ("call_function", "call_method"):
        return None
    special = _read_parametrised(node, target)
    if special is not None:
        return special
    if node.op == "call_method" and target in _CASTS and len(node.args) == 1:
        return Operation(_CASTS[str(target)], (node.args[0],))
    for table, count in ((_UNARY, 1), (_BINARY, 2)):
        try:
            name = table.get(target)
        except TypeError:
            return None
        if name is not None and _has_arguments(node, count):
            return Operation(name, _arguments(node, count))
    if (name := _EXTREMA.get(target)) is not None:  # of two tensors, and not over a dimension
        both = (*node.args, *node.kwargs.values())
        return Operation(name, both) if len(both) == 2 and all(shape_of(x) is not None for x in both) else None
    return _read_dialect_of(node, in_place)


def read_in_place(call: Call) -> Operation | None:
    """The operation whose result an in-place call leaves in its input, in the input's dtype; None if it is none."""
    return _read_dialect(call) if call.in_place else None


def _target(node: fx.Node) -> Any:
    target = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def _has_arguments(node: fx.Node, count: int) -> bool:
    values = (*node.args, *node.kwargs.values())
    return len(values) == count and all(isinstance(x, fx.Node) or is_scalar(x) or isinstance(x, bool) for x in values)


def _arguments(node: fx.Node, count: int) -> tuple[Any, ...]:
    values = (*node.args, *node.kwargs.values())
    if node.op == "call_method" and str(node.target).startswith("__r"):
        values = values[::-1]
    return values[:count]


def _read_dialect_of(node: fx.Node, in_place: bool) -> Operation | None:
    call = read(node)
    is_written = call is not None and call.in_place and isinstance(call.get("input"), fx.Node)
    return None if call is None or (is_written and not in_place) else _read_dialect(call)


def _read_dialect(call: Call) -> Operation | None:
    """The calls of the dialect that are operations."""
    x = call.get("input")
    alpha = call.get("alpha", 1)
    match call.kind:
        case Kind.ADD | Kind.SUB:
            name = "add" if call.kind == Kind.ADD else "sub"
            if "other" not in call.arguments:
                return None
            other = call["other"] if alpha == 1 else Operation("mul", (call["other"], alpha))
            if call.node.target == "__radd__":
                return Operation(name, (other, x))
            return Operation(name, (x, other))
        case Kind.MUL:
            return Operation("mul", (x, call["other"]))
        case Kind.DIV:
            name = {None: "div", "floor": "floor_div", "trunc": "trunc_div"}.get(call.get("rounding_mode"), "")
            return Operation(name, (x, call["other"])) if name else None
        case Kind.NEG:
            return Operation("neg", (x,))
        case Kind.TANH | Kind.EXP:
            return Operation(call.kind.value, (x,))
        case Kind.CLAMP:
            low, high = call.get("min"), call.get("max")
            bounds = (-math.inf if low is None else low, math.inf if high is None else high)
            dtype = dtype_of(call.node)
            if dtype is not None and not dtype.is_floating_point:  # a bound that is missing is no number of integers
                x = x if low is None else Operation("maximum", (x, low))
                return Operation("minimum", (x, high)) if high is not None else x if low is not None else None
            if not stops_at_bounds(call):
                return Operation("clamp", (x, *bounds))
            for bound, compare, nearer in ((low, "le", "maximum"), (high, "ge", "minimum")):
                if isinstance(bound, fx.Node) and not is_scalar(bound):
                    x = Operation(nearer, (x, bound))
                elif bound is not None:
                    x = Operation("fill", (x, Operation(compare, (x, bound)), bound))
            return x
        case Kind.MASKED_FILL:
            return Operation("fill", (x, call["mask"], call["value"]))
        case Kind.WHERE if "other" in call.arguments:
            return Operation("where", (call["condition"], x, call["other"]))
        case Kind.ADDCMUL:
            product = Operation("mul", (call["tensor1"], call["tensor2"]))
            scaled = product if call.get("value", 1) == 1 else Operation("mul", (product, call["value"]))
            return Operation("add", (x, scaled))
        case Kind.POW:
            return Operation("pow", (x, call.get("exponent", 2)))
        case Kind.RELU | Kind.SILU:
            return Operation(call.kind.value.lower(), (x,))
        case Kind.GELU:
            name = {"none": "gelu", "tanh": "gelu_tanh"}.get(call.get("approximate", "none"), "")
            return Operation(name, (x,)) if name else None
        case Kind.CAST:
            dtype = dtype_of(call.node) or call.get("dtype")
            name = str(dtype).removeprefix("torch.")
            return Operation(name, (x,)) if name in CAST_DTYPES else None
    return None


def _read_parametrised(node: fx.Node, target: Any) -> Operation | None:
    """Operations with numbers for parameters."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if not isinstance(target, str) and target not in _parametrised():
        return None
    defaults = _PARAMETERS.get(name)
    if defaults is None:
        return None
    values = dict(defaults)
    is_ours = all(isinstance(x, bool) == (name == "inplace") for name, x in zip(values, node.args[1:], strict=False))
    if len(node.args) - 1 > len(values) or not is_ours:  # aten.elu has two scales more
        return None
    positional = dict(zip(values, node.args[1:], strict=False))
    given = {**positional, **node.kwargs}
    if given.pop("inplace", False) is True or not set(given) <= set(values) or not node.args:
        return None
    values.update(given)
    values.pop("inplace", None)
    if not all(isinstance(x, (int, float)) or x is None for x in values.values()):
        return None
    if name == "nan_to_num":
        dtype = dtype_of(node) or torch.float32
        info = torch.finfo(dtype)
        nan, high, low = values["nan"], values["posinf"], values["neginf"]
        numbers = (nan or 0.0, info.max if high is None else high, info.min if low is None else low)
        return Operation("nan_to_num", (node.args[0], *map(float, numbers)))
    return Operation(name, (node.args[0], *map(float, values.values())))


_PARAMETERS: dict[str, dict[str, Any]] = {
    "leaky_relu": {"negative_slope": 0.01, "inplace": False},
    "elu": {"alpha": 1.0, "inplace": False},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "nan_to_num": {"nan": None, "posinf": None, "neginf": None},
}


def _parametrised() -> set[Any]:
    functions = {getattr(m, name, None) for m in (torch, F, torch._C._nn, aten) for name in _PARAMETERS}
    return functions - {None}


def _read_module(node: fx.Node) -> Operation | None:
    owner = node.graph.owning_module
    module = owner.get_submodule(str(node.target)) if owner is not None else None
    if module is None:
        return None
    name = _MODULES.get(type(module))
    is_plain = len(node.args) == 1 and not node.kwargs and not module._forward_hooks
    if name is None or not is_plain or getattr(module, "inplace", False):
        return None
    return Operation(name, (node.args[0],))
