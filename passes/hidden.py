"""Reads what lies between the layers of an FFN as a function of pre-activations, and names its activation by values."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from topk_fx.activation import ACTIVATIONS, Activation
from topk_fx.score.language import Call as Operation
from topk_fx.score.operations import CAST_DTYPES, OPERATIONS

from .axes import same_shape
from .dialect import Call, Kind, read
from .elementwise import read_elementwise
from .linear import RESHAPES, Part, keeps_rows, read_part
from .mutation import mutated_arguments, storage_roots
from .sites import Units
from .values import constant_of, dtype_of, filled_like, is_scalar, shape_of

_LARGEST = 48
"""Operations between two layers, beyond which they are no FFN."""

_STAND_IN = 0.7390851332151607
"""For a number that is known only at run time, in asking whether hidden units are activated at all."""

Variable = tuple[fx.Node, Units | None]
"""The product of a linear layer, and which of its outputs."""


class NotHidden(Exception):
    """A node is no elementwise function of linear layers' outputs."""


@dataclasses.dataclass
class HiddenReader:
    """Reads hidden units [..., F] back to one or two variables.

    `interior` are the nodes that are read; `is_constant` is False if a number among them is known only at run time.
    """

    parts: dict[Variable, Part] = dataclasses.field(default_factory=dict)
    interior: list[fx.Node] = dataclasses.field(default_factory=list)
    has_views: bool = False
    is_constant: bool = True
    constants: set[float] = dataclasses.field(default_factory=set)
    _read: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)

    def read(self, node: fx.Node) -> Any:
        """The expression that a node is, its leaves variables and numbers; NotHidden if it is none."""
        if node not in self._read:
            if len(self._read) > _LARGEST:
                raise NotHidden
            self._read[node] = self._read_node(node)
        return self._read[node]

    def _read_node(self, node: fx.Node) -> Any:
        part = read_part(node)
        if part is not None:
            return self._variable(part)
        call = read(node)
        if call is not None and call.kind == Kind.GLU:
            return self._read_glu(call)
        if call is not None and (source := self._passed(call)) is not None:
            found = self.read(source)
            self.interior.append(node)
            return found
        operation = read_elementwise(node, in_place=True) or read_activation_function(node)
        if operation is None or not _may_write(node):
            raise NotHidden
        self._check_shapes(node, operation)
        found = self._expression(operation)
        self.interior.append(node)
        return found

    def _variable(self, part: Part) -> Variable:
        key = (part.linear.product, part.units)
        if key not in self.parts:
            self.parts[key] = part
        if len(self.parts) > 2:
            raise NotHidden
        self.interior += part.nodes
        self.has_views |= any((call := read(x)) is not None and call.kind in RESHAPES for x in part.nodes)
        return key

    def _read_glu(self, call: Call) -> Operation:
        part, dim = read_part(call["input"]), call.get("dim", -1)
        shape = shape_of(call["input"])
        is_last = dim == -1 or (shape is not None and dim == len(shape) - 1)
        if part is None or part.units is None or not is_last or len(part.units) % 2:
            raise NotHidden
        half = len(part.units) // 2
        halves = [
            self._variable(dataclasses.replace(part, units=part.units[taken]))
            for taken in (slice(half), slice(half, None))
        ]
        self.interior.append(call.node)
        return Operation("mul", (halves[0], Operation("sigmoid", (halves[1],))))

    def _passed(self, call: Call) -> fx.Node | None:
        """What a call hands on as it is, up to rounding and the arrangement of the tokens."""
        match call.kind:
            case Kind.SAME:
                return call["input"]
            case Kind.CAST if is_floating_cast(call):
                return call["input"]
            case Kind.DROPOUT if not call.in_place and (call.get("training", True) is False or call.get("p") == 0):
                return call["input"]
            case Kind.VIEW | Kind.SQUEEZE | Kind.UNSQUEEZE:
                self.read(call["input"])
                if all(units is not None and keeps_rows(call, len(units)) for _, units in self.parts):
                    self.has_views = True
                    return call["input"]
        return None

    def _expression(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            number = constant_of(argument)
            if number is None and (call := read(argument)) is not None and call.kind == Kind.FILLED_LIKE:
                number = filled_like(argument, call["input"])  # as torch.maximum(x, torch.zeros_like(x))
                self.interior.append(argument)
            if number is None and not is_scalar(argument):
                return self.read(argument)
            self.is_constant &= number is not None
            argument = _STAND_IN if number is None else number
        if isinstance(argument, Operation):
            return Operation(argument.name, tuple(map(self._expression, argument.arguments)))
        if not isinstance(argument, (bool, int, float)):
            raise NotHidden
        if math.isfinite(argument):
            self.constants.add(float(argument))
        return argument

    def _check_shapes(self, node: fx.Node, operation: Operation) -> None:
        """Operands that broadcast would pair one token with the units of another."""
        shape = shape_of(node)
        for source in set(_tensors(operation)):
            own = shape_of(source)
            if shape is not None and own is not None and not same_shape(shape, own):
                raise NotHidden


def _tensors(argument: Any) -> list[fx.Node]:
    if isinstance(argument, Operation):
        return [node for inner in argument.arguments for node in _tensors(inner)]
    is_tensor = isinstance(argument, fx.Node) and not is_scalar(argument) and constant_of(argument) is None
    return [argument] if is_tensor else []


def is_floating_cast(call: Call) -> bool:
    """Whether a cast is known to be to a floating-point dtype of 16 bits or more."""
    like = call.get("like")
    dtype = dtype_of(call.node) or call.get("dtype") or (dtype_of(like) if isinstance(like, fx.Node) else None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2


def _may_write(node: fx.Node) -> bool:
    """Whether what a node writes to, if anything, is read by nothing else."""
    for target in mutated_arguments(node):
        while len(target.users) == 1:
            if storage_roots(target) == {target}:
                break
            sources = mutated_arguments(target) or target.all_input_nodes
            if len(sources) != 1:
                return False
            (target,) = sources
        else:
            return False
    return True


_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    spelling: getattr(F, name)
    for name in ("relu6", "hardswish", "hardsigmoid", "mish", "selu", "celu", "softplus", "logsigmoid", "tanhshrink",
                 "softshrink", "hardshrink", "threshold")
    for spelling in (getattr(F, name), getattr(torch, name, None), getattr(torch._C._nn, name, None),
                     getattr(torch.ops.aten, name, None))
    if spelling is not None
}  # fmt: skip
_MODULES = (nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.SELU, nn.CELU, nn.ELU, nn.LeakyReLU, nn.Softplus,
            nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.Hardtanh)  # fmt: skip


def read_activation_function(node: fx.Node) -> Operation | None:
    """An activation of torch that is no operation of the score language, under the function that computes it."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        is_read = isinstance(module, _MODULES) and not module._forward_hooks and len(node.args) == 1
        return Operation(module, tuple(node.args)) if is_read else None  # type: ignore[arg-type]
    target = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
    try:
        function = _FUNCTIONS.get(target) if node.op == "call_function" else None
    except TypeError:
        return None
    numbers = (*node.args[1:], *(x for name, x in node.kwargs.items() if name != "inplace"))
    is_read = function is not None and bool(node.args) and all(isinstance(x, (int, float)) for x in numbers)
    return Operation(function, (node.args[0], *numbers)) if is_read else None  # type: ignore[arg-type]


# What the expression computes.


@dataclasses.dataclass(frozen=True)
class Activated:
    """act(active), or act(active) * linear."""

    name: str
    active: Variable
    linear: Variable | None


def name_activation(hidden: Any, reader: HiddenReader, dtype: torch.dtype | None) -> Activated | None:
    """The activation that an expression of `reader` is, or None.

    Compared with every known one in float64, at points that lie on both sides of each number in the expression, to
    the precision of `dtype`. At 0, where ReLU has its kink, the derivatives are compared, too; and NaN must stay NaN,
    which `where(x > 0, x, 0)` makes 0.
    """
    if not reader.is_constant:
        return None
    epsilon = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    points = _points(reader.constants)
    variables = list(reader.parts)
    for active, *others in itertools.permutations(variables):
        linear = others[0] if others else None
        x = points[:, None]
        y = torch.cat([points[::37], points.new_tensor([1.0, -1.0])])[None, :] if others else x
        found = _evaluate(hidden, {active: x, linear: y} if others else {active: x})
        for name, activation in ACTIVATIONS.items():
            expected = activation.function(x) * (y if others else 1)
            tolerance = 4 * epsilon * (1 + x.abs()) * ((1 + y.abs()) if others else 1)
            if _is_close(found, expected, tolerance) and _is_alike_at_kinks(hidden, activation, active, linear):
                return Activated(name, active, linear)
    return None


def _is_alike_at_kinks(hidden: Any, activation: Activation, active: Variable, linear: Variable | None) -> bool:
    """Whether an expression has the derivative of an activation at 0, and is NaN where that is."""
    others = {} if linear is None else {linear: torch.ones(1, dtype=torch.float64)}
    zero, nan = (torch.tensor([x], dtype=torch.float64) for x in (0.0, math.nan))
    slope = _slope(hidden, {active: zero, **others}, active)
    is_same = _is_close(slope, activation.derivative(zero), 1e-9 + zero)
    return is_same and bool(torch.as_tensor(_evaluate(hidden, {active: nan, **others})).isnan().all())


def is_affine(hidden: Any, reader: HiddenReader) -> bool:
    """Whether an expression is a sum of multiples of its variables."""
    points = _points(reader.constants)
    along = {variable: points * (n + 1) for n, variable in enumerate(reader.parts)}
    found = _evaluate(hidden, along)
    zero = torch.zeros(1, dtype=torch.float64)
    origin = _evaluate(hidden, dict.fromkeys(along, zero))
    slope = _evaluate(hidden, {variable: zero + n + 1 for n, variable in enumerate(along)}) - origin
    return _is_close(found, origin + slope * points, 1e-9 * (1 + points.abs()) * (1 + slope.abs()))


def _is_close(found: Any, expected: Tensor, tolerance: Tensor) -> bool:
    if not isinstance(found, Tensor):
        return False
    return bool(((found.double() - expected).abs() <= tolerance).all())


def _points(constants: set[float]) -> Tensor:
    """Points of the real line: dense around 0, sparse up to 1e4, and around and between all `constants`."""
    near = torch.linspace(-12, 12, 769, dtype=torch.float64)
    far = torch.logspace(1, 4, 25, dtype=torch.float64)
    turns = torch.tensor(sorted({sign * x for x in constants for sign in (-1, 1)} | {0.0}), dtype=torch.float64)
    turns = turns[turns.abs() < 1e30]
    around = [turns * 0.5, turns, turns * 2, turns - 0.1, turns + 0.1, (turns[1:] + turns[:-1]) / 2]
    return torch.cat([near, far, -far, *around])


def _evaluate(x: Any, values: Mapping[Any, Tensor]) -> Any:
    known: dict[int, Any] = {}

    def visit(x: Any) -> Any:
        if isinstance(x, tuple):
            return values[x]
        if not isinstance(x, Operation):
            return x
        if id(x) not in known:
            known[id(x)] = _apply(x, [visit(argument) for argument in x.arguments])
        return known[id(x)]

    try:
        return visit(x)
    except (RuntimeError, TypeError, ValueError) as error:  # an operation of other dtypes than float64
        raise NotHidden from error


def _slope(x: Any, values: Mapping[Any, Tensor], along: Variable) -> Any:
    """The derivative of an expression with respect to a variable."""
    known: dict[int, Any] = {}

    def visit(x: Any) -> Any:
        if not isinstance(x, Operation):
            return 1.0 + 0 * values[x] if x == along else None
        if id(x) not in known:
            known[id(x)] = _slope_of(x, [visit(a) for a in x.arguments], [_evaluate(a, values) for a in x.arguments])
        return known[id(x)]

    return visit(x)


def _slope_of(operation: Operation, slopes: list[Any], arguments: list[Any]) -> Any:
    """The derivative of one operation from those of its arguments; None if none of these has one."""
    name: Any = operation.name
    if all(slope is None for slope in slopes) or (isinstance(name, str) and name in CAST_DTYPES):
        return next((slope for slope in slopes if slope is not None), None)
    if not isinstance(name, str):
        x = arguments[0].detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(name(x.clone(), *arguments[1:]).sum(), x)[0] * slopes[0]
    thunks = [functools.partial(_same, argument) for argument in arguments]
    derivatives = zip(OPERATIONS[name].derivatives, slopes, strict=False)
    parts = [derivative(slope, *thunks) for derivative, slope in derivatives if derivative and slope is not None]
    return sum(parts) if parts else None


def _same(x: Any) -> Any:
    return x


def _apply(operation: Operation, arguments: list[Any]) -> Any:
    name: Any = operation.name
    if not isinstance(name, str):
        return name(*(x.clone() if isinstance(x, Tensor) else x for x in arguments))  # it may work in place
    dtype = CAST_DTYPES.get(name)
    if dtype is not None and dtype.is_floating_point:
        (value,) = arguments
        return value.double() if isinstance(value, Tensor) else float(value)
    if not any(isinstance(argument, Tensor) for argument in arguments):
        arguments = [torch.tensor(argument, dtype=torch.float64) for argument in arguments]
    return OPERATIONS[name].function(*arguments)
