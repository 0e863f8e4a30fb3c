"""Which function, method, module or ATen overload means what.

The same operation is spelled `torch.softmax`, `F.softmax`, `x.softmax(-1)`, `nn.Softmax` or `aten.softmax.int`,
depending on who traced the graph. `read(node)` gives a `Call` with one kind and one set of argument names for all of
them, and None for what no pass needs to understand. Arguments outside the table make a call unknown, never half
understood.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from topk_fx.compat import CLAMP_PASSES_AT_BOUNDS

aten = torch.ops.aten


class Kind(enum.Enum):
    """What an operation means to the passes."""

    MATMUL = "matrix product"
    BADDBMM = "matrix product plus a term"
    EINSUM = "einsum"
    LINEAR = "linear layer"
    ADDMM = "term plus matrix product"
    SOFTMAX = "softmax"
    SOFTMIN = "softmax of the negated values"
    ATTENTION = "scaled_dot_product_attention"
    ADD = "sum"
    SUB = "difference"
    MUL = "product"
    DIV = "quotient"
    NEG = "negation"
    TANH = "tanh"
    CLAMP = "clamp"
    EXP = "exp"
    SUM = "sum over dimensions"
    AMAX = "maximum over dimensions"
    MAX = "maximum and its index over a dimension"
    LOG_SOFTMAX = "log-softmax"
    MASKED_FILL = "masked_fill"
    WHERE = "where"
    DROPOUT = "dropout"
    CAST = "cast"
    SAME = "the same values"
    VIEW = "view"
    EXPAND = "expand"
    TRANSPOSE = "transpose"
    PERMUTE = "permute"
    MATRIX_TRANSPOSE = "transpose of the last two dimensions"
    REVERSE_AXES = "all axes in reverse order"
    UNSQUEEZE = "unsqueeze"
    SQUEEZE = "squeeze"
    GETITEM = "indexing"
    SETITEM = "writing by index"
    REPEAT_INTERLEAVE = "repeat_interleave"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    POW = "power"
    ASSERT = "assertion"
    MODE = "change of grad mode or autocast"
    ADDCMUL = "term plus scaled product of tensors"
    LOGSUMEXP = "log of the sum of exp over dimensions"
    FILLED_LIKE = "a number in the shape of a tensor"
    CAT = "concatenation"
    SLICE = "part of an axis"
    NARROW = "part of an axis of a given length"
    SELECT = "one place of an axis"
    CHUNK = "an axis in a number of pieces"
    SPLIT = "an axis in pieces of given sizes"
    TENSOR_SPLIT = "an axis in pieces of a given number, or between given places"
    UNBIND = "every place of an axis"
    GLU = "the first half of an axis times the sigmoid of the second"
    GROUPED_MATMUL = "a matrix product for each group of rows"
    OPAQUE = "attention inside one call"


@dataclasses.dataclass(frozen=True)
class Call:
    """A node read by meaning."""

    kind: Kind
    node: fx.Node
    arguments: dict[str, Any]
    in_place: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)


@dataclasses.dataclass(frozen=True)
class _Row:
    kind: Kind
    parameters: tuple[str, ...]
    in_place: bool = False


_FUNCTIONS: dict[Any, _Row] = {}
_METHODS: dict[str, _Row] = {}
_SAME_NAMES = {
    "self": "input", "tensor": "input", "x": "input", "axis": "dim", "mat2": "other", "tensor2": "other",
    "min_val": "min", "max_val": "max", "tensors": "input", "attn_bias": "attn_mask", "train": "training",
    "batch1": "left", "batch2": "right", "mat1": "left", "shape": "size", "keepdims": "keepdim", "mat_a": "input",
    "mat_b": "other", "values": "value", "split_size_or_sections": "sections", "split_size": "sections",
    "split_sizes": "sections", "indices_or_sections": "sections",
}  # fmt: skip
_IGNORED = {"_stacklevel", "memory_format", "non_blocking", "copy", "layout", "device", "pin_memory", "implicit"}


def _row(kind: Kind, parameters: str, *targets: Any, in_place: tuple[Any, ...] = ()) -> None:
    for group, mutates in ((targets, False), (in_place, True)):
        for target in group:
            table = _METHODS if isinstance(target, str) else _FUNCTIONS
            table[target] = _Row(kind, tuple(parameters.split()), mutates)


_row(Kind.MATMUL, "input other", torch.matmul, torch.bmm, torch.mm, operator.matmul, "matmul", "bmm", "mm",
     "__matmul__",
     aten.matmul, aten.bmm, aten.mm)  # fmt: skip
_row(Kind.BADDBMM, "input left right beta alpha", torch.baddbmm, "baddbmm", aten.baddbmm)
_row(Kind.ADDMM, "input left right beta alpha", torch.addmm, "addmm", aten.addmm)
_row(Kind.EINSUM, "equation operands", torch.einsum, torch.functional.einsum, aten.einsum)
_row(Kind.LINEAR, "input weight bias", F.linear, torch._C._nn.linear, aten.linear)
_row(Kind.SOFTMAX, "input dim dtype", torch.softmax, "softmax", aten.softmax, torch.special.softmax,
     aten.special_softmax)  # fmt: skip
_row(Kind.SOFTMAX, "input dim _stacklevel dtype", F.softmax)
_row(Kind.SOFTMAX, "input dim half_to_float", aten._softmax, torch._softmax)
_row(Kind.SOFTMAX, "input dim dtype", aten._safe_softmax, torch._safe_softmax)
_row(Kind.LOG_SOFTMAX, "input dim dtype", torch.log_softmax, "log_softmax", aten.log_softmax,
     torch.special.log_softmax, aten.special_log_softmax)  # fmt: skip
_row(Kind.LOG_SOFTMAX, "input dim _stacklevel dtype", F.log_softmax)
_row(Kind.LOG_SOFTMAX, "input dim half_to_float", aten._log_softmax)
_row(Kind.ATTENTION, "query key value attn_mask dropout_p is_causal scale enable_gqa", F.scaled_dot_product_attention,
     aten.scaled_dot_product_attention)  # fmt: skip
_row(Kind.ADD, "input other alpha", torch.add, operator.add, "add", "__add__", "__radd__", aten.add,
     in_place=(operator.iadd, "add_", "__iadd__", aten.add_))  # fmt: skip
_row(Kind.SUB, "input other alpha", torch.sub, torch.subtract, operator.sub, "sub", "subtract", "__sub__", aten.sub,
     in_place=(operator.isub, "sub_", "__isub__", aten.sub_))  # fmt: skip
_row(Kind.MUL, "input other", torch.mul, torch.multiply, operator.mul, "mul", "multiply", "__mul__", "__rmul__",
     aten.mul, in_place=(operator.imul, "mul_", "__imul__", aten.mul_))  # fmt: skip
_row(Kind.DIV, "input other rounding_mode", torch.div, torch.divide, torch.true_divide, operator.truediv, "div",
     "divide", "true_divide", "__truediv__", aten.div, aten.divide, aten.true_divide,
     in_place=(operator.itruediv, "div_", "__itruediv__", aten.div_))  # fmt: skip
_row(
    Kind.NEG, "input", torch.neg, torch.negative, operator.neg, "neg", "__neg__", aten.neg, in_place=("neg_", aten.neg_)
)
_row(Kind.TANH, "input", torch.tanh, F.tanh, "tanh", aten.tanh, in_place=("tanh_", aten.tanh_))
_row(Kind.CLAMP, "input min max", torch.clamp, torch.clip, "clamp", "clip", aten.clamp,
     in_place=("clamp_", "clip_", aten.clamp_))  # fmt: skip
_row(Kind.CLAMP, "input min max inplace", F.hardtanh, aten.hardtanh)
_row(Kind.CLAMP, "input min", torch.clamp_min, "clamp_min", aten.clamp_min)
_row(Kind.CLAMP, "input max", torch.clamp_max, "clamp_max", aten.clamp_max)
_row(Kind.EXP, "input", torch.exp, "exp", aten.exp, in_place=("exp_", aten.exp_))
_row(Kind.SUM, "input dim keepdim dtype", torch.sum, "sum", aten.sum)
_row(Kind.AMAX, "input dim keepdim", torch.amax, "amax", aten.amax)
_row(Kind.MAX, "input dim keepdim", torch.max, "max", aten.max)
_row(Kind.MASKED_FILL, "input mask value", torch.masked_fill, "masked_fill", aten.masked_fill,
     in_place=("masked_fill_", aten.masked_fill_))  # fmt: skip
_row(Kind.WHERE, "condition input other", torch.where, aten.where)
_row(Kind.WHERE, "input condition other", "where")
_row(Kind.DROPOUT, "input p training inplace", F.dropout)
_row(Kind.DROPOUT, "input p training", torch.dropout, aten.dropout, in_place=(torch.dropout_, aten.dropout_))
_row(
    Kind.CAST,
    "input dtype",
    "to",
    "type",
    aten._to_copy,
    aten.to,
    torch.ops.prims.convert_element_type,
    "type_as",
    aten.type_as,
)
_row(Kind.CAST, "input", "float", "half", "bfloat16", "double")
_row(Kind.SAME, "input", "contiguous", "clone", torch.clone, aten.contiguous, aten.clone, aten.alias)
_row(Kind.VIEW, "input size", "view", "reshape", torch.reshape, aten.view, aten.reshape, aten._unsafe_view)
_row(Kind.VIEW, "input start_dim end_dim", "flatten", torch.flatten, aten.flatten)
_row(Kind.VIEW, "input dim sizes", "unflatten", torch.unflatten, aten.unflatten)
_row(Kind.VIEW, "input other", "view_as", "reshape_as", aten.view_as, aten.reshape_as)
_row(Kind.EXPAND, "input size", "expand", aten.expand, torch.broadcast_to, "broadcast_to")
_row(Kind.EXPAND, "input other", "expand_as", aten.expand_as)
_row(Kind.TRANSPOSE, "input dim0 dim1", "transpose", torch.transpose, aten.transpose, "swapaxes", "swapdims",
     torch.swapaxes, torch.swapdims, aten.swapaxes, aten.swapdims)  # fmt: skip
_row(Kind.TRANSPOSE, "input", "t", torch.t, aten.t)
_row(Kind.PERMUTE, "input dims", "permute", torch.permute, aten.permute)
_row(
    Kind.MATRIX_TRANSPOSE, "input", aten.mT, aten.mH, aten.adjoint, "adjoint", torch.adjoint
)  # scores and weights are real
_row(Kind.REVERSE_AXES, "input", aten.numpy_T)
_row(Kind.UNSQUEEZE, "input dim", "unsqueeze", torch.unsqueeze, aten.unsqueeze)
_row(Kind.SQUEEZE, "input dim", "squeeze", torch.squeeze, aten.squeeze)
_row(Kind.GETITEM, "input index", operator.getitem)
_row(Kind.SETITEM, "input index value", in_place=(operator.setitem, "__setitem__"))
_row(Kind.SETITEM, "input indices value accumulate",
     in_place=(torch.index_put_, "index_put_", aten.index_put_))  # fmt: skip
_row(Kind.CAT, "input dim", torch.cat, torch.concat, torch.concatenate, aten.cat, aten.concat)
_row(Kind.SLICE, "input dim start end step", aten.slice)
_row(Kind.NARROW, "input dim start length", torch.narrow, "narrow", aten.narrow)
_row(Kind.SELECT, "input dim index", torch.select, "select", aten.select)
_row(Kind.CHUNK, "input chunks dim", torch.chunk, "chunk", aten.chunk)
_row(Kind.SPLIT, "input sections dim", torch.split, torch.functional.split, "split", aten.split,
     torch.split_with_sizes, "split_with_sizes", aten.split_with_sizes)  # fmt: skip
_row(Kind.TENSOR_SPLIT, "input sections dim", torch.tensor_split, "tensor_split", aten.tensor_split)
_row(Kind.UNBIND, "input dim", torch.unbind, "unbind", aten.unbind)
_row(Kind.GLU, "input dim", F.glu, torch._C._nn.glu, aten.glu)
_row(Kind.GROUPED_MATMUL, "input other offs bias out_dtype", torch._grouped_mm, aten._grouped_mm,
     *(getattr(F, name) for name in ("grouped_mm",) if hasattr(F, name)))  # fmt: skip
_CUSTOM_OPS = {"transformers::grouped_mm_fallback": _Row(Kind.GROUPED_MATMUL, ("input", "other", "offs"))}
_row(Kind.REPEAT_INTERLEAVE, "input repeats dim", torch.repeat_interleave, "repeat_interleave", aten.repeat_interleave)
_row(Kind.ADDCMUL, "input tensor1 tensor2 value", torch.addcmul, "addcmul", aten.addcmul)
_row(Kind.LOGSUMEXP, "input dim keepdim", torch.logsumexp, "logsumexp", aten.logsumexp, torch.special.logsumexp)
_row(Kind.FILLED_LIKE, "input fill_value", torch.full_like, aten.full_like)
_row(Kind.FILLED_LIKE, "input", torch.zeros_like, torch.ones_like, aten.zeros_like, aten.ones_like)
_row(Kind.FILLED_LIKE, "input size fill_value", "new_full", aten.new_full)
_row(Kind.FILLED_LIKE, "input size", "new_zeros", "new_ones", aten.new_zeros, aten.new_ones)
_row(Kind.ATTENTION, "query key value dropout_p is_causal attn_mask scale",
     aten._scaled_dot_product_flash_attention_for_cpu)  # fmt: skip
_row(Kind.SOFTMIN, "input dim _stacklevel dtype", F.softmin)
_row(Kind.OPAQUE, "input",
     aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
     aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_attention_math,
     torch.ops.higher_order.flex_attention)  # fmt: skip
_row(Kind.OPAQUE, "query key value", F.multi_head_attention_forward, F.gumbel_softmax, nn.MultiheadAttention,
     torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention, aten._native_multi_head_attention,
     aten._transformer_encoder_layer_fwd)  # fmt: skip
_row(Kind.RELU, "input", torch.relu, "relu", aten.relu, in_place=("relu_", aten.relu_, torch.relu_))
_row(Kind.RELU, "input inplace", F.relu)
_row(Kind.GELU, "input approximate", F.gelu, torch._C._nn.gelu, aten.gelu)
_row(Kind.SILU, "input inplace", F.silu)
_row(Kind.SILU, "input", torch._C._nn.silu, aten.silu, in_place=(aten.silu_,))
_row(Kind.POW, "input exponent", torch.pow, "pow", operator.pow, aten.pow)
_row(Kind.POW, "input", torch.square, "square", aten.square)
_row(Kind.ASSERT, "input", aten._assert_tensor_metadata)
_row(Kind.MODE, "mode", torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast,
     torch.amp.autocast_mode._exit_autocast, torch.autograd.grad_mode._enter_inference_mode,
     torch.autograd.grad_mode._exit_inference_mode)  # fmt: skip

_MODULES: dict[type[nn.Module], tuple[Kind, Callable[[Any], dict[str, Any]]]] = {
    nn.Softmax: (Kind.SOFTMAX, lambda m: {"dim": m.dim}),
    nn.Softmin: (Kind.SOFTMIN, lambda m: {"dim": m.dim}),
    nn.LogSoftmax: (Kind.LOG_SOFTMAX, lambda m: {"dim": m.dim}),
    nn.Dropout: (Kind.DROPOUT, lambda m: {"p": m.p, "inplace": m.inplace}),
    nn.Identity: (Kind.SAME, lambda m: {}),
    nn.ReLU: (Kind.RELU, lambda m: {"inplace": m.inplace}),
    nn.GELU: (Kind.GELU, lambda m: {"approximate": m.approximate}),
    nn.SiLU: (Kind.SILU, lambda m: {"inplace": m.inplace}),
    nn.Tanh: (Kind.TANH, lambda m: {}),
    nn.Linear: (Kind.LINEAR, lambda m: {}),
    nn.GLU: (Kind.GLU, lambda m: {"dim": m.dim}),
}
_OPAQUE_MODULES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder,
                   nn.TransformerDecoder, nn.Transformer)  # fmt: skip
_TRANSPOSED_ATTRIBUTES: dict[Any, Kind] = {
    "mT": Kind.MATRIX_TRANSPOSE, "mH": Kind.MATRIX_TRANSPOSE, "T": Kind.REVERSE_AXES,
}  # fmt: skip
_HARDTANH = (F.hardtanh, aten.hardtanh.default)

_LISTED = {"size", "dims"}  # parameters that take what is left of the positional arguments


def read(node: Any) -> Call | None:
    """The meaning of a node, or None."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return _read_module(node)
    if node.op == "call_function" and node.target is getattr:
        kind = _TRANSPOSED_ATTRIBUTES.get(node.args[1]) if len(node.args) == 2 else None
        return None if kind is None else Call(kind, node, {"input": node.args[0]})
    row = _find_row(node)
    if row is None:
        return None
    arguments = _bind(row, node)
    if arguments is None and row.kind in (Kind.SOFTMAX, Kind.SOFTMIN, Kind.ATTENTION):
        return Call(Kind.OPAQUE, node, {})  # one that no pass understands is still reported
    if arguments is None or (not isinstance(arguments.get("input", node), fx.Node) and row.kind not in _SCALAR_FIRST):
        return None
    if row.kind == Kind.VIEW and isinstance(arguments.get("size"), torch.dtype):
        return None  # the same bits as other numbers
    if row.kind == Kind.EINSUM and len(arguments["operands"]) == 1:
        return _read_einsum_of_one(node, arguments)
    if node.target in _HARDTANH:
        arguments = {"min": -1.0, "max": 1.0, **arguments}
    if node.target in ("float", "half", "bfloat16", "double"):
        arguments["dtype"] = _CAST_METHODS[node.target]
    if isinstance(indices := arguments.pop("indices", None), (list, tuple)):  # in which None is no new axis
        arguments["index"] = tuple(slice(None) if x is None else x for x in indices)
    return Call(row.kind, node, arguments, row.in_place or arguments.get("inplace") is True)


def _read_einsum_of_one(node: fx.Node, arguments: dict[str, Any]) -> Call | None:
    """An einsum of one tensor as the permutation that it is: a view, and no product; None if it sums or repeats."""
    (operand,), equation = arguments["operands"], arguments["equation"]
    letters, arrow, output = str(equation).replace(" ", "").partition("->")
    is_permutation = bool(arrow) and "." not in letters and len(set(letters)) == len(letters)
    if not is_permutation or sorted(letters) != sorted(output) or not isinstance(operand, fx.Node):
        return None
    return Call(Kind.PERMUTE, node, {"input": operand, "dims": tuple(letters.index(c) for c in output)})


def stops_at_bounds(call: Call) -> bool:
    """Whether a clamp to numbers has a gradient of 0 at its bounds, as hardtanh has in every version of torch."""
    return call.node.target in _HARDTANH or not CLAMP_PASSES_AT_BOUNDS


def changes_mode(node: fx.Node) -> bool:
    """Whether a node changes grad mode, autocast or inference mode."""
    row = _find_row(node)
    return row is not None and row.kind == Kind.MODE


_CAST_METHODS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
_SCALAR_FIRST = (Kind.CAT, Kind.ADD, Kind.SUB, Kind.MUL, Kind.DIV, Kind.WHERE, Kind.MODE, Kind.OPAQUE)


def _find_row(node: fx.Node) -> _Row | None:
    if node.op == "call_method":
        return _METHODS.get(node.target)  # type: ignore[arg-type]
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.overloadpacket is aten.max and target._overloadname != "dim":
            return None
        if target._overloadname == "dtype" and target.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            return None  # accumulates in another dtype
        return _FUNCTIONS.get(target.overloadpacket) or _CUSTOM_OPS.get(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _FUNCTIONS.get(target) or _CUSTOM_OPS.get(target._qualified_op_name)
    try:
        return _FUNCTIONS.get(target)
    except TypeError:  # not hashable
        return None


def _bind(row: _Row, node: fx.Node) -> dict[str, Any] | None:
    """Arguments by name; None if one is not in the table."""
    arguments: dict[str, Any] = {}
    if row.kind == Kind.MODE:
        return {"mode": node.args}
    if row.kind in (Kind.ASSERT, Kind.OPAQUE):
        return {"input": node.args[0]} if node.args else {}
    if row.kind == Kind.EINSUM:
        equation, *operands = node.args or (node.kwargs.get("equation"), node.kwargs.get("tensors"))
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
        return {"equation": equation, "operands": operands} if not node.kwargs.get("path") else None
    positional = list(node.args)
    if row.kind == Kind.CAST:
        source = (
            positional[0]
            if positional
            else next((node.kwargs[n] for n in ("self", "input", "a") if n in node.kwargs), None)
        )
        return {"input": source, **_cast_target(node, source)}
    if len(positional) > len(row.parameters):
        if row.parameters[-1] not in _LISTED:
            return None
        last = len(row.parameters) - 1
        positional = [*positional[:last], tuple(positional[last:])]
    arguments.update(zip(row.parameters, positional, strict=False))
    for name, value in node.kwargs.items():
        name = _SAME_NAMES.get(name, name)
        if name in row.parameters:
            arguments[name] = value
        elif name not in _IGNORED and value is not None:
            return None
    return arguments


def _cast_target(node: fx.Node, source: Any) -> dict[str, Any]:
    """The dtype that a cast names, or `like`: the tensor whose dtype it takes."""
    for argument in (*node.args[1:], *node.kwargs.values()):
        if isinstance(argument, torch.dtype):
            return {"dtype": argument}
        if isinstance(argument, fx.Node) and argument is not source:
            is_dtype = argument.target is getattr and len(argument.args) == 2 and argument.args[1] == "dtype"
            return {"like": argument.args[0] if is_dtype else argument}
    return {}


def _read_module(node: fx.Node) -> Call | None:
    module = _module_of(node)
    if module is None:
        return None
    if isinstance(module, _OPAQUE_MODULES):
        return Call(Kind.OPAQUE, node, {})
    entry = _MODULES.get(type(module))
    is_plain = len(node.args) == 1 and not node.kwargs and not module._forward_hooks and not module._forward_pre_hooks
    if entry is None or not is_plain:
        is_softmax = isinstance(module, (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax))
        return Call(Kind.OPAQUE, node, {}) if is_softmax else None
    kind, arguments = entry
    bound = {"input": node.args[0], "module": module, **arguments(module)}
    return Call(kind, node, bound, bound.get("inplace") is True)


def _module_of(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None
