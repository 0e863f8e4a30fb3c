"""Linear layers x W^T + b in their spellings, with W stored [out, in] or [in, out], and parts of their outputs."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx, nn

from .axes import same_shape
from .dialect import Call, Kind, read
from .sites import LinearLayer, Units
from .values import rank_of, shape_of


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """A linear layer as a graph has it: `product` reads `input`, and `nodes`, of which it is one, give its result."""

    product: fx.Node
    input: fx.Node
    layer: LinearLayer
    nodes: tuple[fx.Node, ...]

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        """What is read besides the input."""
        return tuple(x for x in (self.layer.weight, self.layer.bias) if x is not None)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the outputs of a linear layer, in order, and the nodes that give them.

    `units` is None if the layer's size was not traced.
    """

    linear: LinearCall
    units: Units | None
    nodes: tuple[fx.Node, ...]


def read_product(call: Call | None) -> LinearCall | None:
    """The layer that one call is: F.linear, nn.Linear, x @ W, or addmm of a bias vector and x @ W.

    A factor of a plain product is a weight only if it is a parameter or an input of the graph, through transposes.
    """
    if call is None:
        return None
    match call.kind:
        case Kind.EINSUM:
            return _einsum_with_weight(call)
        case Kind.LINEAR:
            layer = _linear_layer(call)
            return LinearCall(call.node, call["input"], layer, (call.node,))
        case Kind.MATMUL:
            return _product_with_weight(call, call["input"], call.get("other"), None)
        case Kind.ADDMM if call.get("alpha", 1) == 1 and call.get("beta", 1) == 1:
            return _product_with_weight(call, call["left"], call["right"], call["input"])
    return None


def read_linear(node: Any) -> LinearCall | None:
    """The layer whose result a node is: a product, or one to which a bias vector is added."""
    if is_rewritten(node):
        unknown = LinearLayer(None, None, None, None, False)
        return LinearCall(node, node.args[0], unknown, ())
    call = read(node)
    if call is None or call.kind != Kind.ADD:
        return read_product(call)
    if call.in_place or call.get("alpha", 1) != 1:
        return None
    for product_side, bias_side in (("input", "other"), ("other", "input")):
        bias = call.get(bias_side)
        shape = shape_of(bias) if isinstance(bias, fx.Node) else None
        part = read_part(call.get(product_side)) if shape is not None and len(shape) == 1 else None
        if part is None or part.linear.layer.has_bias or part.linear.layer.shape is None:
            continue
        size = part.linear.layer.shape[0]
        if shape == (size,) and part.units == range(size):
            layer = dataclasses.replace(part.linear.layer, bias=bias, has_bias=True)
            return LinearCall(part.linear.product, part.linear.input, layer, (*part.nodes, call.node))
    return None


def is_rewritten(node: Any) -> bool:
    """Whether a node is an FFN already rewritten, whose down projection gives its result."""
    return isinstance(node, fx.Node) and node.target in (_FFN, _FFN.default)


def read_part(node: Any) -> Part | None:
    """The part of a linear layer's outputs that a node is: all, or what chunk, split and slices leave."""
    linear = read_linear(node)
    if linear is not None:
        shape = linear.layer.shape
        is_known = shape is not None and len(shape) == 2 and isinstance(shape[0], int)
        return Part(linear, range(shape[0]) if is_known else None, linear.nodes)  # type: ignore[index]
    call = read(node)
    if call is None or call.in_place or call.kind not in _TAKES_PART:
        return None
    if call.kind == Kind.GETITEM and isinstance(call["index"], int) and (piece := _piece(call)) is not None:
        return piece
    if call.kind in (Kind.GETITEM, Kind.SELECT, Kind.SQUEEZE) and (selected := _selected(call)) is not None:
        return selected
    inner = read_part(call["input"])
    if inner is None or inner.units is None:
        return None
    if call.kind == Kind.SAME or _is_whole(call) or (call.kind in RESHAPES and keeps_rows(call, len(inner.units))):
        return dataclasses.replace(inner, nodes=(*inner.nodes, call.node))
    taken = _slice_of_last_axis(call)
    if taken is None:
        return None
    return Part(inner.linear, inner.units[taken], (*inner.nodes, call.node))


_FFN = torch.ops.topk_fx.ffn
RESHAPES = (Kind.VIEW, Kind.SQUEEZE, Kind.UNSQUEEZE)
_TAKES_PART = (*RESHAPES, Kind.SAME, Kind.GETITEM, Kind.SLICE, Kind.NARROW, Kind.SELECT)


def keeps_rows(view: Call, size: int) -> bool:
    """Whether a view of rows of `size` entries leaves each row as it is, however it arranges them."""
    after = shape_of(view.node)
    if after is not None:
        return len(after) > 0 and after[-1] == size and isinstance(after[-1], int)
    last = _last_size(view.get("size"))
    is_own = isinstance(last, fx.Node) and last.target == "size" and last.args in ((view["input"], -1),)
    return is_own or (isinstance(last, int) and last == size)


def _last_size(sizes: Any) -> Any:
    """The last of the sizes that a view is given: a number, a node or, if it cannot be told, None."""
    if isinstance(sizes, (list, tuple)):
        return _last_size(sizes[-1]) if sizes else None
    is_sum = isinstance(sizes, fx.Node) and sizes.target is operator.add
    if is_sum and isinstance(sizes.args[1], (list, tuple)):  # x.size()[:-1] + (size,)
        return _last_size(sizes.args[1])
    return sizes


def token_source(node: fx.Node) -> fx.Node:
    """The tensor of which a node is a view that only arranges the tokens anew."""
    call = read(node)
    while call is not None and not call.in_place and call.kind in (*RESHAPES, Kind.SAME):
        shape = shape_of(call["input"])
        if shape is None or not shape or not isinstance(shape[-1], int) or not keeps_rows(call, shape[-1]):
            break
        node = call["input"]
        call = read(node)
    return node


def _linear_layer(call: Call) -> LinearLayer:
    module = call.get("module")
    if isinstance(module, nn.Linear):
        return LinearLayer(None, None, call.node, tuple(module.weight.shape), module.bias is not None)
    weight, bias = call["weight"], call.get("bias")
    return LinearLayer(weight, bias, None, shape_of(weight), bias is not None)


def _einsum_with_weight(call: Call) -> LinearCall | None:
    """An einsum such as "...d,df->...f" or "btd,fd->btf"."""
    equation, operands = call["equation"], call["operands"]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    x, _, weight = inputs.partition(",")
    tokens, summed = x[:-1], x[-1:]
    result = output[-1:]
    letters = tokens.replace("...", "") + summed + result
    if output[:-1] != tokens or "." in summed + result or len(set(letters)) != len(letters):
        return None
    if weight not in (summed + result, result + summed):
        return None
    found = _product_with_weight(call, operands[0], operands[1], None)
    if found is None or weight == summed + result:
        return found
    layer = found.layer
    shape = None if layer.shape is None else (layer.shape[1], layer.shape[0])
    return dataclasses.replace(found, layer=dataclasses.replace(layer, shape=shape, transposed=not layer.transposed))


def _product_with_weight(call: Call, x: Any, factor: Any, bias: Any) -> LinearCall | None:
    """x @ factor + bias, if the factor is a matrix that was not computed from data, and the bias a vector."""
    weight, transposed = factor, True
    while isinstance(weight, fx.Node) and weight.op not in ("placeholder", "get_attr"):
        source = _transposed_matrix(weight)
        if source is None:
            return None
        weight, transposed = source, not transposed
    shape = shape_of(weight)
    if not isinstance(x, fx.Node) or shape is None or len(shape) != 2:
        return None
    shape = (shape[1], shape[0]) if transposed else shape
    if bias is not None and shape_of(bias) != (shape[0],):
        return None
    layer = LinearLayer(weight, bias, None, shape, bias is not None, transposed)
    return LinearCall(call.node, x, layer, (call.node,))


def _transposed_matrix(node: fx.Node) -> fx.Node | None:
    """The matrix of which a node is the transpose."""
    call = read(node)
    if call is None or rank_of(call.get("input")) != 2:
        return None
    match call.kind:
        case Kind.MATRIX_TRANSPOSE | Kind.REVERSE_AXES:
            return call["input"]
        case Kind.TRANSPOSE:
            dims = (call.get("dim0", 0), call.get("dim1", 1))
        case Kind.PERMUTE:
            dims = call["dims"]
            dims = dims[0] if len(dims) == 1 else dims
        case _:
            return None
    is_swap = all(isinstance(d, int) for d in dims) and sorted(d % 2 for d in dims) == [0, 1]
    if call.kind == Kind.PERMUTE and is_swap:
        is_swap = dims[0] % 2 == 1
    return call["input"] if is_swap else None


def _piece(item: Call) -> Part | None:
    """One of the pieces into which a chunk or split cuts the last axis."""
    cut = read(item["input"])
    if cut is None or cut.kind not in (Kind.CHUNK, Kind.SPLIT, Kind.TENSOR_SPLIT):
        return None
    inner = read_part(cut["input"])
    if inner is None or inner.units is None or not _is_last_axis(cut.get("dim", 0), cut["input"]):
        return None
    starts = _starts_of_pieces(cut, len(inner.units))
    if starts is None:
        return None
    number = item["index"] % (len(starts) - 1)
    units = inner.units[starts[number] : starts[number + 1]]
    return Part(inner.linear, units, (*inner.nodes, cut.node, item.node))


def _starts_of_pieces(cut: Call, total: int) -> list[int] | None:
    """Where the pieces of an axis begin, and where the last one ends; None if they are not told."""
    sizes = cut.get("chunks") if cut.kind == Kind.CHUNK else cut.get("sections")
    is_list = isinstance(sizes, (list, tuple)) and all(isinstance(size, int) for size in sizes)
    if cut.kind == Kind.TENSOR_SPLIT:
        if isinstance(sizes, int) and sizes > 0 and total % sizes == 0:
            return [*range(0, total, total // sizes), total]
        places = [0, *sizes, total] if is_list else []
        return places if places and places == sorted(places) and places[1] >= 0 else None
    if isinstance(sizes, int):
        length = -(-total // sizes) if cut.kind == Kind.CHUNK else sizes
        return [*range(0, total, length), total] if length > 0 else None
    return [sum(sizes[:n]) for n in range(len(sizes) + 1)] if is_list and sum(sizes) == total else None


def _selected(call: Call) -> Part | None:
    """The units at one place of an axis of what a view arranges as [..., places, size] or [..., size, places]."""
    source, between = call["input"], []
    outer = read(source)
    if outer is not None and outer.kind in (Kind.UNBIND, Kind.SLICE) and isinstance(outer.get("input"), fx.Node):
        source, between = outer["input"], [outer.node]
    view, shape = read(source), shape_of(source)
    if view is None or view.kind != Kind.VIEW or shape is None or len(shape) < 2:
        return None
    axis, number = _selected_index(call, outer if between else None, len(shape))
    inner, before = read_part(view["input"]), shape_of(view["input"])
    if inner is None or inner.units is None or before is None or not all(isinstance(n, int) for n in (axis, number)):
        return None
    axis %= len(shape)
    count = shape[axis]
    is_split = same_shape(before[:-1], shape[:-2]) and shape[-2] * shape[-1] == len(inner.units)
    if axis < len(shape) - 2 or not is_split or not -count <= number < count:
        return None
    number %= count
    size = len(inner.units) // count
    is_last = axis == len(shape) - 1
    units = inner.units[number::count] if is_last else inner.units[number * size : (number + 1) * size]
    return Part(inner.linear, units, (*inner.nodes, view.node, *between, call.node))


def _selected_index(call: Call, outer: Call | None, rank: int) -> tuple[Any, Any]:
    """The one axis of which a call takes one place, and which; all others are left whole. None if it does not.

    `outer` is the unbind that it takes a piece of, or the slice of one place that it squeezes.
    """
    if call.kind == Kind.SELECT and outer is None:
        return call["dim"], call["index"]
    if outer is not None and outer.kind == Kind.UNBIND:
        return outer.get("dim", 0), call.get("index")
    if call.kind == Kind.SQUEEZE and outer is not None:
        dims, axis, start = call.get("dim"), outer.get("dim", 0), outer.get("start")
        is_one = isinstance(start, int) and outer.get("end") == start + 1 and outer.get("step", 1) == 1
        return (axis, start) if is_one and dims in (axis, [axis], (axis,)) else (None, None)
    index = call.get("index")
    if outer is not None or not isinstance(index, tuple) or index.count(Ellipsis) > 1:
        return None, None
    taken = [n - len(index) for n, item in enumerate(index) if type(item) is int]  # True adds an axis
    is_whole = all(item == slice(None) or item is Ellipsis or type(item) is int for item in index)
    is_complete = Ellipsis in index or len(index) == rank
    if not is_whole or not is_complete or len(taken) != 1 or Ellipsis in index[taken[0] :]:
        return None, None
    return taken[0], index[taken[0]]


def _is_whole(call: Call) -> bool:
    """Whether a slice leaves everything."""
    before, after = shape_of(call["input"]), shape_of(call.node)
    is_slice = call.kind in (Kind.SLICE, Kind.NARROW)
    return is_slice and before is not None and after is not None and same_shape(before, after)


def _slice_of_last_axis(call: Call) -> slice | None:
    """The slice that a call takes of its input's last axis, leaving the others whole."""
    source = call["input"]
    match call.kind:
        case Kind.SLICE if _is_last_axis(call.get("dim", 0), source):
            bounds = (call.get("start"), call.get("end"), call.get("step", 1))
        case Kind.NARROW if _is_last_axis(call["dim"], source):
            start, length = call["start"], call["length"]
            if not isinstance(start, int) or not isinstance(length, int) or start < 0:
                return None
            bounds = (start, start + length, 1)
        case Kind.GETITEM if isinstance(call["index"], tuple) and call["index"]:
            *others, last = call["index"]
            is_whole = [n for n in others if n is not Ellipsis]
            if not isinstance(last, slice) or any(n != slice(None) for n in is_whole):
                return None
            if others.count(Ellipsis) != 1 and rank_of(source) != len(call["index"]):
                return None
            bounds = (last.start, last.stop, last.step)
        case _:
            return None
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    taken = slice(*bounds)
    return taken if taken.step is None or taken.step > 0 else None


def _is_last_axis(dim: Any, node: fx.Node) -> bool:
    rank = rank_of(node)
    return isinstance(dim, int) and (dim == -1 or (rank is not None and dim == rank - 1))
