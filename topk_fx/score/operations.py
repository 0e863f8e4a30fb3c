"""The operations of the score language: what each computes, and its derivatives.

All are elementwise with broadcasting, named as in ATen, and compute what the ATen operation of that name does. Their
first arguments may be the scores; any may be tensors or numbers. `lookup` alone is no elementwise operation: it
reads a table at an index.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Derivative = Callable[..., Any]
"""(grad, x, y, ...) -> the gradient of one argument. x(), y() give the arguments' values; one it does not need has a
name that begins with an underscore."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation. A derivative of None means: zero, or an argument that has none, such as a condition.

    `conditions` are the positions of arguments that must be boolean.
    """

    function: Callable[..., Tensor]
    derivatives: tuple[Derivative | None, ...]
    arities: tuple[int, ...]
    conditions: tuple[int, ...] = ()

    def reads_of(self, position: int) -> tuple[int, ...]:
        """The positions of the arguments whose values the derivative for the argument at `position` reads."""
        derivative = self.derivatives[position]
        if derivative is None:
            return ()
        names = list(inspect.signature(derivative).parameters)[1:]
        return tuple(n for n, name in enumerate(names) if not name.startswith("_"))


def _number(x: Any, like: Tensor) -> Tensor:
    """A number as a tensor of the dtype that it and `like` promote to: beside integers, 0.5 stays 0.5."""
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.result_type(like, x), device=like.device)


def _maximum(a: Any, b: Any) -> Tensor:
    like = a if isinstance(a, Tensor) else b
    return torch.maximum(_number(a, like), _number(b, like))


def _minimum(a: Any, b: Any) -> Tensor:
    like = a if isinstance(a, Tensor) else b
    return torch.minimum(_number(a, like), _number(b, like))


def _share(grad: Tensor, wins: Tensor, ties: Tensor) -> Tensor:
    """The gradient of a maximum: all where its argument wins, half where both are equal."""
    return grad * (wins.to(grad.dtype) + ties.to(grad.dtype) / 2)


def _clamp(x: Tensor, low: Any, high: Any) -> Tensor:
    return torch.minimum(torch.maximum(x, _number(low, x)), _number(high, x))


def _is_high(x: Tensor, low: Any, high: Any) -> Tensor:
    return torch.maximum(x, _number(low, x)) > high


def _is_low(x: Tensor, low: Any, high: Any) -> Tensor:
    return (x < low) & ~_is_high(x, low, high)


def _lookup(table: Tensor, index: Tensor) -> Tensor:
    """table [B|1, H|1, 1, N] at index [B|1, H|1, *, *]."""
    batch, heads = (max(table.size(dim), index.size(dim)) for dim in (0, 1))
    rows = table[:, :, 0].expand(batch, heads, table.size(-1))
    flat = index.expand(batch, heads, *index.shape[2:]).reshape(batch, heads, -1)
    return rows.gather(-1, torch.where(flat < 0, flat + table.size(-1), flat)).view(batch, heads, *index.shape[2:])


def _mask(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, -torch.inf) if mask.dtype == torch.bool else x + mask


def _filled(grad: Tensor, where: Tensor) -> Tensor:
    return grad.masked_fill(where, 0)


def _power_derivative(g: Tensor, x: Any, y: Any) -> Tensor:
    exponent = y()
    if not isinstance(exponent, Tensor):
        return g * exponent * x().pow(exponent - 1) if exponent != 0 else torch.zeros_like(g)
    return torch.where(exponent == 0, 0, g * exponent * torch.pow(x(), exponent - 1))


def _exponent_derivative(g: Tensor, x: Any, y: Any) -> Tensor:
    base = _number(x(), g)
    return torch.where((base == 0) & (y() >= 0), 0, g * torch.pow(base, y()) * base.log())


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_derivative(g: Tensor, x: Any) -> Tensor:
    return g * (0.5 * (1 + torch.erf(x() * math.sqrt(0.5))) + x() * _normal_density(x()))


def _gelu_tanh_derivative(g: Tensor, x: Any) -> Tensor:
    c, a = math.sqrt(2 / math.pi), x()
    t = torch.tanh(c * (a + 0.044715 * a**3))
    return g * (0.5 * (1 + t) + 0.5 * a * (1 - t * t) * c * (1 + 3 * 0.044715 * a * a))


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * (1 - torch.sigmoid(x))


OPERATIONS: dict[str, Operation] = {}


def _define(name: str, function: Callable[..., Any], *derivatives: Derivative | None, **options: Any) -> None:
    arities = options.pop("arities", (len(derivatives),))
    OPERATIONS[name] = Operation(function, derivatives, arities, **options)


def _define_constant(name: str, arity: int, function: Callable[..., Any]) -> None:
    """An operation whose derivative is zero wherever it has one."""
    _define(name, function, *(None,) * arity)


# Arithmetic.
_define("add", operator.add, lambda g, _x, _y: g, lambda g, _x, _y: g)
_define("sub", operator.sub, lambda g, _x, _y: g, lambda g, _x, _y: -g)
_define("mul", operator.mul, lambda g, _x, y: g * y(), lambda g, x, _y: g * x())
_define("div", operator.truediv, lambda g, _x, y: g / y(), lambda g, x, y: -g * x() / (y() * y()))
_define("neg", torch.neg, lambda g, _x: -g)
_define("abs", torch.abs, lambda g, x: g * x().sgn())
_define("square", torch.square, lambda g, x: 2 * g * x())
_define("reciprocal", torch.reciprocal, lambda g, x: -g / (x() * x()))
_define("sqrt", torch.sqrt, lambda g, x: g / (2 * x().sqrt()))
_define("rsqrt", torch.rsqrt, lambda g, x: -0.5 * g * x().rsqrt().pow(3))
_define("pow", operator.pow, _power_derivative, _exponent_derivative)
_define(
    "maximum",
    _maximum,
    lambda g, x, y: _share(g, x() > y(), x() == y()),
    lambda g, x, y: _share(g, y() > x(), x() == y()),
)
_define(
    "minimum",
    _minimum,
    lambda g, x, y: _share(g, x() < y(), x() == y()),
    lambda g, x, y: _share(g, y() < x(), x() == y()),
)
_define(
    "clamp",
    _clamp,
    lambda g, x, a, b: g * ~(_is_low(x(), a(), b()) | _is_high(x(), a(), b())),
    lambda g, x, a, b: g * _is_low(x(), a(), b()),
    lambda g, x, a, b: g * _is_high(x(), a(), b()),
)
_define_constant("floor", 1, torch.floor)
_define_constant("ceil", 1, torch.ceil)
_define_constant("round", 1, torch.round)
_define_constant("trunc", 1, torch.trunc)
_define_constant("sign", 1, torch.sign)
_define_constant("floor_div", 2, lambda x, y: torch.div(x, y, rounding_mode="floor"))
_define_constant("trunc_div", 2, lambda x, y: torch.div(x, y, rounding_mode="trunc"))
_define(
    "remainder",
    operator.mod,
    lambda g, _x, _y: g,
    lambda g, x, y: -g * torch.div(x(), y(), rounding_mode="floor"),
)

# Exponentials and activations.
_define("exp", torch.exp, lambda g, x: g * x().exp())
_define("exp2", torch.exp2, lambda g, x: g * x().exp2() * math.log(2))
_define("expm1", torch.expm1, lambda g, x: g * x().exp())
_define("log", torch.log, lambda g, x: g / x())
_define("log2", torch.log2, lambda g, x: g / (x() * math.log(2)))
_define("log10", torch.log10, lambda g, x: g / (x() * math.log(10)))
_define("log1p", torch.log1p, lambda g, x: g / (x() + 1))
_define("sin", torch.sin, lambda g, x: g * x().cos())
_define("cos", torch.cos, lambda g, x: -g * x().sin())
_define("tan", torch.tan, lambda g, x: g * (1 + x().tan().square()))
_define("atan", torch.atan, lambda g, x: g / (1 + x().square()))
_define("sinh", torch.sinh, lambda g, x: g * x().cosh())
_define("cosh", torch.cosh, lambda g, x: g * x().sinh())
_define("asinh", torch.asinh, lambda g, x: g / (1 + x().square()).sqrt())
_define("tanh", torch.tanh, lambda g, x: g * (1 - x().tanh().square()))
_define("erf", torch.erf, lambda g, x: g * (2 / math.sqrt(math.pi)) * torch.exp(-x().square()))
_define("sigmoid", torch.sigmoid, lambda g, x: g * _sigmoid_slope(x()))
_define("log_sigmoid", F.logsigmoid, lambda g, x: g * torch.sigmoid(-x()))
_define("silu", F.silu, lambda g, x: g * (torch.sigmoid(x()) + x() * _sigmoid_slope(x())))
_define("gelu", F.gelu, _gelu_derivative)
_define("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_derivative)
_define("relu", torch.relu, lambda g, x: g * ~(x() <= 0))  # NaN passes the gradient, as in ATen
_define("softsign", F.softsign, lambda g, x: g / (1 + x().abs()).square())
_define(
    "leaky_relu",
    lambda x, slope: F.leaky_relu(x, slope),
    lambda g, x, slope: torch.where(x() > 0, g, g * slope()),
    None,
)
_define(
    "elu",
    lambda x, alpha: F.elu(x, alpha),
    lambda g, x, alpha: torch.where(x() > 0, g, g * alpha() * x().exp()),
    None,
)
_define(
    "softplus",
    lambda x, beta, threshold: F.softplus(x, beta, threshold),
    lambda g, x, beta, threshold: torch.where(x() * beta() > threshold(), g, g * torch.sigmoid(x() * beta())),
    None,
    None,
)

# Conditions and what depends on them.
for _name, _function in {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}.items():  # fmt: skip
    _define_constant(_name, 2, _function)
# Those of torch take no number, as in logical_and(x, True).
_define_constant("logical_and", 2, lambda x, y: (x != 0) & (y != 0))
_define_constant("logical_or", 2, lambda x, y: (x != 0) | (y != 0))
_define_constant("logical_xor", 2, lambda x, y: (x != 0) ^ (y != 0))
_define_constant("not", 1, torch.bitwise_not)
_define_constant("logical_not", 1, torch.logical_not)
_define_constant("isnan", 1, torch.isnan)
_define_constant("isinf", 1, torch.isinf)
_define(
    "where",
    torch.where,
    None,
    lambda g, c, _x, _y: _filled(g, ~c()),
    lambda g, c, _x, _y: _filled(g, c()),
    conditions=(0,),
)
_define(
    "keep",  # x where the condition holds, else a value
    lambda x, condition, value: torch.where(condition, x, value),
    lambda g, _x, c, _v: _filled(g, ~c()),
    None,
    lambda g, _x, c, _v: _filled(g, c()),
    conditions=(1,),
)
_define(
    "fill",  # a value where the condition holds, else x
    lambda x, condition, value: torch.where(condition, value, x),
    lambda g, _x, c, _v: _filled(g, c()),
    None,
    lambda g, _x, c, _v: _filled(g, ~c()),
    conditions=(1,),
)
_define(
    "mask",  # SDPA's attn_mask: keep(mask, -inf) if it is boolean, else add(mask)
    _mask,
    lambda g, _x, m: _filled(g, ~m()) if m().dtype == torch.bool else g,
    lambda g, _x, _m: g,
)
_define(
    "nan_to_num",
    lambda x, nan, positive, negative: torch.nan_to_num(x, nan, positive, negative),
    lambda g, x, _nan, _positive, _negative: g * x().isfinite(),
    None,
    None,
    None,
)

# Casts of what does not depend on the scores, by the name of the dtype; and a table read at an index.
CAST_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    torch.bfloat16, torch.float16, torch.float32, torch.float64,
)}  # fmt: skip
for _name, _dtype in CAST_DTYPES.items():
    _define(
        _name,
        lambda x, dtype=_dtype: x.to(dtype) if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype),
        (lambda g, _x: g) if _dtype.is_floating_point else None,
    )
OPERATIONS["lookup"] = Operation(_lookup, (None, None), (2,))
