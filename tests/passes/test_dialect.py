"""`read` gives one meaning to every spelling of an operation, and none to what it does not wholly understand."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from topk_fx.passes import dialect
from topk_fx.passes.dialect import Kind, read
from torch import fx, nn

aten = torch.ops.aten


class Inputs:
    """A graph under construction, and its inputs x, y and z."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x, self.y, self.z = (self.graph.placeholder(name) for name in "xyz")

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function, of a method by its name, or of a module, with inputs named by their letters."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: getattr(self, a) if a in set("xyz") else a)
        if isinstance(target, str):
            return self.graph.call_method(target, args, kwargs)
        if not isinstance(target, nn.Module):
            return self.graph.call_function(target, args, kwargs)
        self.graph.owning_module = nn.Module()
        self.graph.owning_module.child = target
        return self.graph.call_module("child", args, kwargs)


Form = Callable[[Inputs], fx.Node]


def form(target: Any, *args: Any, **kwargs: Any) -> Form:
    return lambda inputs: inputs.call(target, *args, **kwargs)


SAME_MEANING: dict[str, tuple[Kind, dict[str, Any], list[Form]]] = {
    "matrix product": (Kind.MATMUL, {"input": "x", "other": "y"}, [
        form(torch.matmul, "x", "y"), form(torch.matmul, "x", other="y"), form(operator.matmul, "x", "y"),
        form("matmul", "x", "y"), form("__matmul__", "x", "y"), form(torch.bmm, "x", "y"), form("bmm", "x", mat2="y"),
        form(torch.mm, "x", mat2="y"), form(aten.matmul.default, "x", "y"), form(aten.bmm.default, "x", "y")]),
    "permutation": (Kind.PERMUTE, {"input": "x", "dims": (1, 2, 0)}, [
        form(torch.permute, "x", (1, 2, 0)), form("permute", "x", 1, 2, 0), form(torch.einsum, "i j k -> j k i", "x"),
        form(aten.permute.default, "x", (1, 2, 0)), form(aten.einsum.default, "ijk->jki", ["x"])]),
    "softmax": (Kind.SOFTMAX, {"input": "x", "dim": 1}, [
        form(F.softmax, "x", 1), form(F.softmax, "x", dim=1), form(F.softmax, "x", 1, 3),
        form(torch.softmax, "x", axis=1),
        form("softmax", "x", 1), form("softmax", "x", dim=1), form(torch.special.softmax, "x", 1),
        form(aten.softmax.int, "x", 1), form(aten._softmax.default, "x", 1, False), form(nn.Softmax(1), "x")]),
    "softmax in float32": (Kind.SOFTMAX, {"input": "x", "dim": -1, "dtype": torch.float32}, [
        form(F.softmax, "x", dim=-1, dtype=torch.float32), form(torch.softmax, "x", -1, torch.float32),
        form("softmax", "x", -1, dtype=torch.float32), form(aten.softmax.int, "x", -1, torch.float32)]),
    "log-softmax": (Kind.LOG_SOFTMAX, {"input": "x", "dim": 1}, [
        form(F.log_softmax, "x", 1), form(torch.log_softmax, "x", dim=1), form("log_softmax", "x", 1),
        form(aten.log_softmax.int, "x", 1), form(nn.LogSoftmax(1), "x")]),
    "attention": (Kind.ATTENTION, {"query": "x", "key": "y", "value": "z", "is_causal": True}, [
        form(F.scaled_dot_product_attention, "x", "y", "z", is_causal=True),
        form(F.scaled_dot_product_attention, query="x", key="y", value="z", is_causal=True),
        form(aten.scaled_dot_product_attention.default, "x", "y", "z", is_causal=True)]),
    "sum": (Kind.ADD, {"input": "x", "other": "y"}, [
        form(torch.add, "x", "y"), form(operator.add, "x", "y"), form("add", "x", other="y"),
        form(aten.add.Tensor, "x", "y")]),
    "sum with a factor": (Kind.ADD, {"input": "x", "other": "y", "alpha": 2}, [
        form(torch.add, "x", "y", alpha=2), form("add", "x", "y", alpha=2), form(aten.add.Tensor, "x", "y", alpha=2)]),
    "difference": (Kind.SUB, {"input": "x", "other": 3}, [
        form(torch.sub, "x", 3), form(torch.subtract, "x", 3), form(operator.sub, "x", 3), form("sub", "x", 3),
        form(aten.sub.Tensor, "x", 3)]),
    "product": (Kind.MUL, {"input": "x", "other": 0.5}, [
        form(torch.mul, "x", 0.5), form(torch.multiply, "x", 0.5), form(operator.mul, "x", 0.5), form("mul", "x", 0.5),
        form(aten.mul.Tensor, "x", 0.5), form(aten.mul.Scalar, "x", 0.5)]),
    "quotient": (Kind.DIV, {"input": "x", "other": 8}, [
        form(torch.div, "x", 8), form(torch.true_divide, "x", 8), form(operator.truediv, "x", 8),
        form("divide", "x", 8),
        form(aten.div.Tensor, "x", 8), form(aten.div.Scalar, "x", 8)]),
    "masked_fill": (Kind.MASKED_FILL, {"input": "x", "mask": "y", "value": -1e9}, [
        form(torch.masked_fill, "x", "y", -1e9), form("masked_fill", "x", "y", value=-1e9),
        form(aten.masked_fill.Scalar, "x", "y", -1e9)]),
    "where": (Kind.WHERE, {"condition": "y", "input": "x", "other": 0.0}, [
        form(torch.where, "y", "x", 0.0), form(aten.where.ScalarOther, "y", "x", 0.0)]),
    "tanh": (Kind.TANH, {"input": "x"}, [
        form(torch.tanh, "x"), form(F.tanh, "x"), form("tanh", "x"), form(aten.tanh.default, "x"),
        form(nn.Tanh(), "x")]),
    "clamp": (Kind.CLAMP, {"input": "x", "min": -1, "max": 2}, [
        form(torch.clamp, "x", -1, 2), form(torch.clip, "x", min=-1, max=2), form("clamp", "x", -1, max=2),
        form(aten.clamp.default, "x", -1, 2), form(F.hardtanh, "x", -1, 2),
        form(F.hardtanh, "x", min_val=-1, max_val=2)]),
    "dropout": (Kind.DROPOUT, {"input": "x", "p": 0.25, "training": True}, [
        form(F.dropout, "x", 0.25, True), form(F.dropout, "x", p=0.25, training=True),
        form(torch.dropout, "x", 0.25, True),
        form(torch.dropout, "x", 0.25, train=True), form(aten.dropout.default, "x", 0.25, True)]),
    "cast": (Kind.CAST, {"input": "x", "dtype": torch.float32}, [
        form("to", "x", torch.float32), form("to", "x", dtype=torch.float32), form("float", "x"),
        form("to", "x", "cpu", torch.float32), form("type", "x", torch.float32),
        form(aten.to.dtype, "x", torch.float32),
        form(aten._to_copy.default, "x", dtype=torch.float32),
        form(torch.ops.prims.convert_element_type.default, "x", torch.float32)]),
    "transpose": (Kind.TRANSPOSE, {"input": "x", "dim0": 1, "dim1": 2}, [
        form(torch.transpose, "x", 1, 2), form("transpose", "x", dim0=1, dim1=2), form("swapaxes", "x", 1, 2),
        form(torch.swapdims, "x", 1, 2), form(aten.transpose.int, "x", 1, 2)]),
    "transpose of matrices": (Kind.MATRIX_TRANSPOSE, {"input": "x"}, [form(getattr, "x", "mT"),
        form(aten.mT.default, "x")]),
    "linear layer": (Kind.LINEAR, {"input": "x", "weight": "y"}, [
        form(F.linear, "x", "y"), form(torch._C._nn.linear, "x", weight="y"), form(aten.linear.default, "x", "y")]),
    "relu": (Kind.RELU, {"input": "x"}, [
        form(torch.relu, "x"), form(F.relu, "x"), form("relu", "x"), form(aten.relu.default, "x"),
        form(nn.ReLU(), "x")]),
    "gelu by tanh": (Kind.GELU, {"input": "x", "approximate": "tanh"}, [
        form(F.gelu, "x", approximate="tanh"), form(torch._C._nn.gelu, "x", approximate="tanh"),
        form(aten.gelu.default, "x", approximate="tanh"), form(nn.GELU(approximate="tanh"), "x")]),
    "silu": (Kind.SILU, {"input": "x"}, [
        form(F.silu, "x"), form(torch._C._nn.silu, "x"), form(aten.silu.default, "x"), form(nn.SiLU(), "x")]),
    "the same values": (Kind.SAME, {"input": "x"}, [
        form("contiguous", "x"), form("clone", "x"), form(torch.clone, "x", memory_format=torch.preserve_format),
        form(aten.clone.default, "x"), form(nn.Identity(), "x")]),
}  # fmt: skip
FORMS = [(name, n) for name, (_, _, forms) in SAME_MEANING.items() for n in range(len(forms))]


@pytest.mark.parametrize(("meaning", "number"), FORMS, ids=lambda part: str(part).replace(" ", "_"))
def test_spelling_reads_as_its_meaning(meaning: str, number: int) -> None:
    kind, arguments, forms = SAME_MEANING[meaning]
    inputs = Inputs()
    call = read(forms[number](inputs))
    assert call is not None
    assert call.kind == kind
    assert not call.in_place
    for name, value in arguments.items():
        assert call[name] is getattr(inputs, value) if value in ("x", "y", "z") else call[name] == value


IN_PLACE = {
    "method": form("mul_", "x", 2),
    "augmented_assignment": form(operator.imul, "x", 2),
    "overload": form(aten.mul_.Tensor, "x", 2),
    "inplace_argument": form(F.dropout, "x", 0.5, True, True),
    "inplace_module": form(nn.ReLU(inplace=True), "x"),
    "masked_fill": form("masked_fill_", "x", "y", 0.0),
}


@pytest.mark.parametrize("written", IN_PLACE)
def test_in_place_spelling_reads_as_in_place(written: str) -> None:
    inputs = Inputs()
    call = read(IN_PLACE[written](inputs))
    assert call is not None
    assert call.in_place
    assert call["input"] is inputs.x


NOT_UNDERSTOOD = {
    "output_argument": form(torch.add, "x", "y", out="z"),
    "more_positional_arguments": form(torch.relu, "x", 1, torch.float32, "y"),
    "unknown_keyword": form(F.linear, "x", "y", scale=2.0),
    "einsum_with_path": form(torch.einsum, "ij,jk", "x", "y", path=[0, 1]),
    "einsum_that_sums_one": form(torch.einsum, "ij->i", "x"),
    "einsum_of_a_diagonal": form(torch.einsum, "ii->i", "x"),
    "einsum_of_one_without_arrow": form(torch.einsum, "ji", "x"),
    "maximum_of_two": form(aten.max.other, "x", "y"),
    "maximum_of_all": form(aten.max.default, "x"),
    "product_in_another_dtype": form(aten.bmm.dtype, "x", "y", torch.float32),
    "product_plus_term_in_another_dtype": form(aten.baddbmm.dtype, "x", "y", "z", torch.float32),
    "view_as_another_dtype": form("view", "x", torch.int32),
    "attribute": form(getattr, "x", "grad"),
    "method_on_a_number": form(torch.tanh, 2.0),
    "unknown_function": form(torch.cumsum, "x", 1),
    "unknown_module": form(nn.Softplus(), "x"),
}


@pytest.mark.parametrize("unknown", NOT_UNDERSTOOD)
def test_call_with_unknown_argument_is_unknown(unknown: str) -> None:
    assert read(NOT_UNDERSTOOD[unknown](Inputs())) is None


def test_module_with_hook_is_unknown() -> None:
    relu = nn.ReLU()
    relu.register_forward_hook(lambda module, args, output: 2 * output)
    assert read(Inputs().call(relu, "x")) is None


def test_subclass_of_a_softmax_module_is_opaque() -> None:
    class Sharper(nn.Softmax):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * input)

    call = read(Inputs().call(Sharper(-1), "x"))
    assert call is not None
    assert call.kind == Kind.OPAQUE


def test_number_is_not_a_call() -> None:
    assert read(3) is None
    assert read(Inputs().x) is None


def test_clamp_defaults_are_those_of_the_function() -> None:
    """hardtanh clamps to [-1, 1] unless told otherwise, clamp to nothing."""
    for target in (F.hardtanh, aten.hardtanh.default):
        call = read(Inputs().call(target, "x"))
        assert call is None or (call.get("min"), call.get("max")) == (-1, 1)


OVERLOADS = [
    getattr(packet, name)
    for packet in dialect._FUNCTIONS
    if isinstance(packet, torch._ops.OpOverloadPacket)
    for name in packet.overloads()
    if sum(not argument.kwarg_only for argument in getattr(packet, name)._schema.arguments) > 1
]


@pytest.mark.parametrize("overload", OVERLOADS, ids=str)
def test_overload_reads_the_same_by_position_and_by_keyword(overload: Any) -> None:
    """So no row of the table has its parameters in another order than the operator."""
    names = [argument.name for argument in overload._schema.arguments if not argument.kwarg_only]
    inputs = Inputs()
    values = [inputs.graph.placeholder(name) for name in names]
    by_position = read(inputs.call(overload, *values))
    by_keyword = read(inputs.graph.call_function(overload, (), dict(zip(names, values, strict=True))))
    if by_keyword is not None and by_position is not None and by_keyword.kind not in (Kind.OPAQUE, Kind.ASSERT):
        assert by_keyword.arguments == by_position.arguments


def test_methods_of_the_table_are_methods_of_tensors() -> None:
    assert [name for name in dialect._METHODS if not hasattr(torch.Tensor, name)] == []
