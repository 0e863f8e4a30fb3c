"""Reads tensors of queries x keys as expressions of positions and small tensors, so that they need not exist.

A causal mask is `arange(L)[:, None] >= arange(L)`, a padding mask one boolean a key, a T5 bias a table read at a
function of j - i. Walking back from such a tensor through elementwise operations and moves of axes, until what is left
is a position, a number or a tensor that lacks the query or the key axis, gives an expression of the score language that
a lowering evaluates where it stands. The same walk reads a stretch of the scores' own path as an expression of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from topk_fx.score.language import KEY_POSITION, QUERY_POSITION, Call, Expression, reads_scores
from topk_fx.score.operations import CAST_DTYPES, OPERATIONS

from .axes import same_shape
from .constants import Constants
from .dialect import Kind, read
from .elementwise import read_elementwise, read_in_place
from .mutation import is_mutated, storage_roots
from .sites import Term
from .values import dtype_of, is_scalar, shape_of, value_of

aten = torch.ops.aten
Axes = tuple[int | None, ...]
"""For each axis of a tensor, the axis of the scores that it is; None for one of size 1 that is none of them."""

_LARGEST = 96
"""Operations in an expression, beyond which a tensor stays a tensor."""


class NotReadable(Exception):
    """A tensor is no expression of what is small; the message says what was met."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """The axes of the scores at a place on their path: how many, which are i and j, and how many moves come before."""

    rank: int
    query_axis: int
    key_axis: int
    stage: int

    def is_full(self, shape: Sequence[Any], axes: Axes) -> bool:
        """Whether a tensor has both a query and a key axis."""
        spans = [not statically_known_true(size == 1) for size in shape]
        return all(any(spans[n] and axis == own for n, axis in enumerate(axes)) for own in self._axes)

    def name(self, axis: int | None) -> Any:
        """The position that an axis counts, or None."""
        return dict(zip(self._axes, (QUERY_POSITION, KEY_POSITION), strict=True)).get(axis)  # type: ignore[arg-type]

    def aligned(self, rank: int) -> Axes:
        """The axes of a tensor that broadcasts against the scores."""
        return tuple(range(self.rank - rank, self.rank))

    @property
    def _axes(self) -> tuple[int, int]:
        return self.query_axis, self.key_axis


@dataclasses.dataclass
class RegionReader:
    """Reads one tensor. `replayed` collects the nodes that the expression computes again.

    Args:
        frame: the axes to which the tensor broadcasts.
        sources: nodes that have an expression already: the scores.
        overwritten: nodes that an in-place call wrote to after they were read, and that nothing else reads.
        inside: nodes that must be read, since they depend on `sources`.
        tensors_allowed: whether a tensor of queries x keys that cannot be read may be a leaf.
    """

    frame: Frame
    sources: Mapping[fx.Node, Expression] = dataclasses.field(default_factory=dict)
    inside: Collection[fx.Node] = ()
    tensors_allowed: bool = False
    positions_only: bool = False
    constants: Constants = dataclasses.field(default_factory=Constants)
    replayed: set[fx.Node] = dataclasses.field(default_factory=set)
    leaves: set[fx.Node] = dataclasses.field(default_factory=set)
    overwritten: set[fx.Node] = dataclasses.field(default_factory=set)
    _known: dict[tuple[fx.Node, Axes], Expression] = dataclasses.field(default_factory=dict)

    def read(self, node: fx.Node) -> Expression:
        """The expression that a node, which broadcasts against the scores, is; NotReadable if it is none."""
        shape = shape_of(node)
        if shape is None or len(shape) > self.frame.rank:
            raise NotReadable(f"the shape of {node.name} was not traced, or has more axes than the scores")
        return self._read(node, self.frame.aligned(len(shape)))

    def _read(self, x: Any, axes: Axes) -> Expression:
        if not isinstance(x, fx.Node):
            return self._number(x)
        if (x, axes) not in self._known:
            if len(self._known) > _LARGEST:
                raise NotReadable("it takes too many operations")
            self._known[x, axes] = self._read_node(x, axes)
        return self._known[x, axes]

    def _number(self, x: Any) -> Expression:
        if isinstance(x, (bool, int, float)):
            return x
        raise NotReadable(f"{x!r} is neither a number nor a tensor")

    def _read_node(self, x: fx.Node, axes: Axes) -> Expression:
        if x in self.sources:
            return self.sources[x]
        shape = shape_of(x)
        if shape is None:
            if is_scalar(x):
                value = value_of(x)
                return value if isinstance(value, (int, float)) else self._leaf(x, ())
            raise NotReadable(f"the shape of {x.name} was not traced")
        if x in self.inside:
            return self._expand(x, axes)
        if not self.frame.is_full(shape, axes):
            return self._read_small(x, axes)
        if not self.tensors_allowed:
            return self._expand(x, axes)
        reader = RegionReader(self.frame, constants=self.constants, overwritten=self.overwritten)
        try:
            found = reader._read(x, axes)
        except NotReadable:
            return self._leaf(x, axes)
        self.replayed |= reader.replayed
        self.leaves |= reader.leaves
        return found

    def _read_small(self, x: fx.Node, axes: Axes) -> Expression:
        """A position if it is made of nothing else, or else the tensor as it is."""
        if self.positions_only:
            return self._expand(x, axes)
        reader = RegionReader(self.frame, positions_only=True, constants=self.constants, overwritten=self.overwritten)
        try:
            found = reader._expand(x, axes)
        except NotReadable:
            return self._leaf(x, axes)
        self.replayed |= reader.replayed
        self.leaves |= reader.leaves
        return found

    def _leaf(self, x: fx.Node, axes: Axes) -> Term:
        if self.positions_only and not is_scalar(x):
            raise NotReadable(f"{x.name} is no position")
        if x in self.overwritten:
            raise NotReadable(f"{x.name} is written to")
        self.leaves.add(x)
        order = tuple(axes.index(axis) if axis in axes else None for axis in range(self.frame.rank))
        is_aligned = axes == self.frame.aligned(len(axes))
        return Term(x, self.frame.stage, order=None if is_aligned or not axes else order)

    def _expand(self, x: fx.Node, axes: Axes) -> Expression:
        if x not in self.overwritten and is_mutated(x):
            raise NotReadable(f"{x.name} is written to")
        for expand in (
            self._constant,
            self._computed,
            self._arange,
            self._diagonal,
            self._triangle,
            self._lookup,
            self._move,
            self._elementwise,
        ):
            found = expand(x, axes)
            if found is not None:
                self.replayed.add(x)
                return found
        raise NotReadable(f"{x.name} is no elementwise operation")

    def _constant(self, x: fx.Node, axes: Axes) -> Expression | None:
        number = _filled_with(x)
        return None if number is None else _typed(number, dtype_of(x))

    def _computed(self, x: fx.Node, axes: Axes) -> Expression | None:
        """A tensor that depends on the graph alone, if it counts along one axis or is the same everywhere."""
        shape = shape_of(x)
        is_small = shape is not None and not self.frame.is_full(shape, axes)
        value = self.constants.value_of(x) if is_small else None
        if value is None or value.dtype not in (torch.int64, torch.bool) or value.numel() == 0:
            return None
        first = value.flatten()[0].item()
        if bool((value == first).all()):
            return bool(first) if value.dtype == torch.bool else first
        for axis, size in enumerate(value.shape):
            position = self.frame.name(axes[axis])
            counted = torch.arange(size).view([-1 if n == axis else 1 for n in range(value.dim())]) + first
            if position is not None and value.dtype == torch.int64 and bool((value == counted).all()):
                return position if first == 0 else Call("add", (position, first))
        return None

    def _arange(self, x: fx.Node, axes: Axes) -> Expression | None:
        if _packet(x) not in (torch.arange, aten.arange):
            return None
        names = ("start", "end", "step") if len(x.args) > 1 else ("end",)
        given = {**dict(zip(names, x.args, strict=False)), **x.kwargs}
        start, step = given.get("start", 0), given.get("step", 1)
        position = self.frame.name(axes[0])
        if position is None or dtype_of(x) != torch.int64:
            raise NotReadable(f"{x.name} does not count queries or keys")
        if step != 1:
            position = Call("mul", (position, self._read(step, ())))
        return position if start == 0 else Call("add", (position, self._read(start, ())))

    def _diagonal(self, x: fx.Node, axes: Axes) -> Expression | None:
        if _packet(x) not in (torch.eye, aten.eye):
            return None
        row, column = map(self.frame.name, axes)
        if row is None or column is None:
            raise NotReadable(f"{x.name} does not pair queries and keys")
        is_one = Call("eq", (row, column))
        return (
            is_one if dtype_of(x) == torch.bool else Call("where", (is_one, *(_typed(n, dtype_of(x)) for n in (1, 0))))
        )

    def _triangle(self, x: fx.Node, axes: Axes) -> Expression | None:
        is_upper = _packet(x) in (torch.triu, "triu", aten.triu)
        if not is_upper and _packet(x) not in (torch.tril, "tril", aten.tril):
            return None
        diagonal = x.args[1] if len(x.args) > 1 else x.kwargs.get("diagonal", 0)
        row, column = (self.frame.name(axis) for axis in axes[-2:])
        if row is None or column is None:
            raise NotReadable(f"{x.name} does not part queries from keys")
        edge = row if diagonal == 0 else Call("add", (row, self._read(diagonal, ())))
        is_kept = Call("ge" if is_upper else "le", (column, edge))
        inner = self._read(x.args[0], axes)
        if inner is True:
            return is_kept
        return Call("where", (is_kept, inner, _typed(0, dtype_of(x))))

    def _lookup(self, x: fx.Node, axes: Axes) -> Expression | None:
        """A table [N, H] read at indices without the axis of heads, or a table [N]."""
        found = _table_and_index(x)
        if found is None:
            return None
        table, index = found
        table_shape, index_shape = shape_of(table), shape_of(index)
        if table_shape is None or index_shape is None or dtype_of(index) not in (torch.int64, torch.int32):
            return None
        heads = axes[len(index_shape) :]
        if len(table_shape) != 1 + len(heads) or len(heads) > 1 or any(self.frame.name(h) for h in heads):
            return None
        order: list[int | None] = [None] * self.frame.rank
        order[self.frame.key_axis] = 0
        if heads and heads[0] is not None:
            order[heads[0]] = 1
        entries = self._read(index, axes[: len(index_shape)])
        if self.positions_only or not isinstance(entries, Call):
            return None
        self.leaves.add(table)
        return Call("lookup", (Term(table, self.frame.stage, order=tuple(order)), entries))

    def _move(self, x: fx.Node, axes: Axes) -> Expression | None:
        call = read(x)
        if call is None:
            return None
        source = call.get("input")
        before, after = shape_of(source), shape_of(x)
        if before is None or after is None:
            return None
        match call.kind:
            case Kind.SAME:
                return self._read(source, axes)
            case Kind.EXPAND:
                return self._read(source, axes[len(axes) - len(before) :])
            case Kind.TRANSPOSE | Kind.PERMUTE | Kind.MATRIX_TRANSPOSE:
                dims = _permutation(x, before)
                return (
                    None if dims is None else self._read(source, tuple(axes[dims.index(n)] for n in range(len(dims))))
                )
            case Kind.VIEW | Kind.UNSQUEEZE | Kind.SQUEEZE:
                return self._read(source, _axes_before(before, after, axes))
            case Kind.GETITEM | Kind.SLICE if not isinstance(call.get("index"), fx.Node):
                if call.kind == Kind.SLICE or _is_whole(call["index"]):
                    return self._read(source, _axes_before(before, after, axes))
        return None

    def _elementwise(self, x: fx.Node, axes: Axes) -> Expression | None:
        operation = read_elementwise(x) or self._in_place(x)
        if operation is None:
            return None
        source = operation.arguments[0]
        if operation.name in CAST_DTYPES and isinstance(source, fx.Node) and dtype_of(source) == dtype_of(x):
            return self._read(source, axes)
        _check_promotion(x, operation)
        expression = self._operation(operation, axes, dtype_of(x))
        return _typed(expression, dtype_of(x)) if isinstance(expression, (bool, int, float)) else expression

    def _in_place(self, x: fx.Node) -> Call | None:
        """What an in-place call leaves in a tensor that was made for it: one with no other user and its own memory."""
        call = read(x)
        source = call.get("input") if call is not None and call.in_place else None
        if call is None or not isinstance(source, fx.Node) or len(source.users) > 1:
            return None
        if storage_roots(source) != {source} or source.op in ("placeholder", "get_attr"):
            return None
        operation, dtype = read_in_place(call), str(dtype_of(x)).removeprefix("torch.")
        if operation is None or dtype not in CAST_DTYPES:
            return None
        self.overwritten.add(source)
        is_kept = all(dtype_of(argument) == dtype_of(x) for argument in x.all_input_nodes)
        return operation if is_kept else Call(dtype, (operation,))

    def _operation(self, operation: Call, axes: Axes, dtype: torch.dtype | None) -> Expression:
        arguments: list[Expression] = []
        for argument in operation.arguments:
            if isinstance(argument, Call):
                arguments.append(self._operation(argument, axes, dtype))
                continue
            shape = shape_of(argument) if isinstance(argument, fx.Node) else ()
            arguments.append(self._read(argument, axes[len(axes) - len(shape or ()) :]))
        if all(isinstance(x, (bool, int, float)) for x in arguments):
            tensors = [torch.tensor(x) for x in arguments]
            return OPERATIONS[operation.name].function(*tensors).item()
        if (chosen := _chosen_for_good(operation.name, arguments)) is not None:
            return _cast(arguments[chosen], operation.arguments[chosen], dtype)
        return _simplified(Call(operation.name, tuple(arguments)), dtype)


def _chosen_for_good(name: str, arguments: Sequence[Expression]) -> int | None:
    """Which argument an operation with a constant condition always is; None if it has no such condition."""
    order = {"where": (0, 1, 2), "keep": (1, 0, 2), "fill": (1, 2, 0)}.get(name)
    if order is None or not isinstance(arguments[order[0]], bool):
        return None
    return order[1] if arguments[order[0]] else order[2]


def _cast(x: Expression, source: Any, dtype: torch.dtype | None) -> Expression:
    """x, the expression of `source`, in the dtype that a choice between it and another gives."""
    if isinstance(x, (bool, int, float)):
        return _typed(x, dtype)
    own = dtype_of(source) if isinstance(source, fx.Node) else None
    name = str(dtype).removeprefix("torch.")
    return x if own == dtype or reads_scores(x) or name not in CAST_DTYPES else Call(name, (x,))


def _simplified(call: Call, dtype: torch.dtype | None) -> Expression:
    """The same with less: what is joined with True, moved by 0, or compared with what positions always are."""
    name, arguments = call.name, call.arguments
    if name in ("and", "logical_and") and any(x is True for x in arguments):
        return next(x for x in arguments if x is not True)
    if name in ("or", "logical_or") and any(x is False for x in arguments):
        return next(x for x in arguments if x is not False)
    if name in ("add", "sub") and dtype == torch.int64 and _is_zero(arguments[1]):
        return arguments[0]
    if name == "add" and dtype == torch.int64 and _is_zero(arguments[0]):
        return arguments[1]
    if name == "ge" and arguments[1] == 0 and arguments[0] in (QUERY_POSITION, KEY_POSITION):
        return True
    return call


def _is_zero(x: Expression) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x == 0


def _packet(node: fx.Node) -> Any:
    target = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def _typed(number: Any, dtype: torch.dtype | None) -> Expression:
    """A number that stands for a tensor of `dtype`, as a number where that computes the same."""
    if dtype == torch.bool:
        return bool(number)
    if dtype == torch.int64:
        return int(number)
    if dtype == torch.float32:
        return float(torch.tensor(float(number)).item())
    name = str(dtype).removeprefix("torch.")
    if name not in CAST_DTYPES or dtype == torch.float64:
        raise NotReadable(f"a constant has dtype {dtype}")
    return Call(name, (float(number) if dtype is not None and dtype.is_floating_point else int(number),))


_FILLS = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}


def _filled_with(x: fx.Node) -> Any:
    """The number that a tensor holds everywhere, or None."""
    name = x.target if x.op == "call_method" else getattr(_packet(x), "__name__", "")
    if x.op not in ("call_function", "call_method") or not _is_of_torch(x):
        return None
    if name in _FILLS:
        return _FILLS[name]
    if name in ("full", "full_like", "new_full"):
        number = x.args[-1] if len(x.args) in (2, 3) else x.kwargs.get("fill_value")
        if len(x.args) == 3 and name != "new_full":
            return None
        return number if isinstance(number, (bool, int, float)) else None
    if name in ("tensor", "scalar_tensor") and x.args and isinstance(x.args[0], (bool, int, float)):
        return x.args[0]
    return None


def _is_of_torch(x: fx.Node) -> bool:
    if x.op == "call_method" or isinstance(x.target, torch._ops.OpOverload):
        return x.op == "call_method" or x.target.namespace == "aten"  # type: ignore[union-attr]
    return getattr(torch, getattr(x.target, "__name__", ""), None) is x.target


def _table_and_index(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    packet = _packet(x)
    if packet is F.embedding:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        given = {**dict(zip(names, x.args, strict=False)), **x.kwargs}
        plain = given.get("padding_idx") is None and given.get("max_norm") is None
        plain = plain and not given.get("scale_grad_by_freq") and not given.get("sparse")
        found = (given.get("weight"), given.get("input"))
    elif packet is aten.embedding:
        plain = len(x.args) == 2 or bool(x.args[2] == -1 and not any(x.args[3:]))
        found = (x.args[0], x.args[1])
    else:
        call = read(x)
        index = call.get("index") if call is not None and call.kind == Kind.GETITEM else None
        if packet is aten.index and isinstance(x.args[1], (list, tuple)):
            index = x.args[1]
        if isinstance(index, (list, tuple)):
            index = index[0] if len(index) == 1 else None
        plain = isinstance(index, fx.Node)
        found = (x.args[0] if x.args else None, index)
    both_nodes = all(isinstance(node, fx.Node) for node in found)
    return found if plain and both_nodes else None  # type: ignore[return-value]


def _permutation(x: fx.Node, before: Sequence[Any]) -> tuple[int, ...] | None:
    """Axis n of the result is axis dims[n] of the source."""
    from .axes import read_move
    from .layout import Permute

    call = read(x)
    move = None if call is None else read_move(call)
    return move.dims if isinstance(move, Permute) else None


def _axes_before(before: Sequence[Any], after: Sequence[Any], axes: Axes) -> Axes:
    """The axes of the source of a view that does no more than add or drop axes of size 1."""
    if same_shape(before, after):
        return axes
    rows = [n for n, size in enumerate(before) if not statically_known_true(size == 1)]
    columns = [n for n, size in enumerate(after) if not statically_known_true(size == 1)]
    if len(rows) != len(columns) or not same_shape([before[n] for n in rows], [after[n] for n in columns]):
        raise NotReadable(f"a view from {tuple(before)} to {tuple(after)} splits or joins axes")
    found: list[int | None] = [None] * len(before)
    for row, column in zip(rows, columns, strict=True):
        found[row] = axes[column]
    return tuple(found)


def _is_whole(index: Any) -> bool:
    """Whether an index takes no part of an axis but, perhaps, all of it from the start on."""
    items = index if isinstance(index, tuple) else (index,)
    return all(
        item is None
        or item is Ellipsis
        or (isinstance(item, slice) and item.start in (None, 0) and item.step in (None, 1))
        for item in items
    )


_CONDITIONS = {"where": 0, "keep": 1, "fill": 1}
"""The argument that chooses, whose dtype the result does not take."""


def _check_promotion(x: fx.Node, operation: Call) -> None:
    """NotReadable where a tensor without axes would promote to another dtype once it has some."""
    dtypes: dict[bool, list[torch.dtype]] = {True: [], False: []}
    pending = [operation]
    while pending:
        call = pending.pop()
        for position, argument in enumerate(call.arguments):
            if isinstance(argument, Call):
                pending.append(argument)
            elif isinstance(argument, fx.Node) and position != _CONDITIONS.get(call.name):
                dtype = dtype_of(argument)
                dtypes[bool(shape_of(argument))] += [] if dtype is None else [dtype]
    if not dtypes[True] or not dtypes[False]:
        return
    wide, narrow = (functools.reduce(torch.promote_types, dtypes[has_axes]) for has_axes in (True, False))
    if torch.result_type(torch.empty(1, dtype=wide), torch.empty((), dtype=narrow)) != torch.promote_types(
        wide, narrow
    ):
        raise NotReadable(f"{x.name} mixes dtypes with a tensor that has no axes")
