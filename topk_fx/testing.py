"""What snapshot tests of rewritten graphs compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.bool: "bool",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip


def graph_text(program: fx.Graph | fx.GraphModule | ExportedProgram) -> str:
    """A graph as text, one line a node: `name: dtype[shape] = op(arguments)`.

    It holds what a person designs (ops, shapes, dtypes, arguments) and nothing that varies by machine or version of
    torch's code generation, so a snapshot test can compare it. Child graphs follow their parent, indented.
    """
    if isinstance(program, ExportedProgram):
        return graph_text(program.graph_module)
    graph: fx.Graph = program.graph if isinstance(program, fx.GraphModule) else program
    lines = [_line(node) for node in graph.nodes]
    if isinstance(program, fx.GraphModule):
        for name, child in program.named_children():
            if isinstance(child, fx.GraphModule):
                lines.append(f"{name}:")
                lines += ["  " + line for line in graph_text(child).splitlines()]
    return "\n".join(lines)


def _line(node: fx.Node) -> str:
    arguments = [_text(a) for a in node.args] + [f"{name}={_text(value)}" for name, value in node.kwargs.items()]
    match node.op:
        case "output":
            return f"return {', '.join(_text(a) for a in node.args)}"
        case "placeholder":
            return f"{node.name}{_type(node)} = input"
        case "get_attr":
            return f"{node.name}{_type(node)} = self.{node.target}"
        case "call_module":
            return f"{node.name}{_type(node)} = self.{node.target}({', '.join(arguments)})"
        case "call_method":
            receiver, *rest = arguments
            return f"{node.name}{_type(node)} = {receiver}.{node.target}({', '.join(rest)})"
    return f"{node.name}{_type(node)} = {_op_name(node.target)}({', '.join(arguments)})"


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._schema.name.split('::')[1]}"
        return name if target._overloadname == "default" else f"{name}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def _type(node: fx.Node) -> str:
    value = node.meta.get("val", node.meta.get("example_value"))
    if isinstance(value, torch.Tensor):
        return f": {_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (torch.SymInt, torch.SymFloat, int, float)):
        return f": {value}"
    return ""


def _text(argument: Any) -> str:
    match argument:
        case fx.Node():
            return argument.name
        case list() | fx.immutable_collections.immutable_list():
            return f"[{', '.join(map(_text, argument))}]"
        case tuple():
            return f"({', '.join(map(_text, argument))})"
        case slice():
            parts = (argument.start, argument.stop, argument.step)
            return ":".join("" if part is None else _text(part) for part in parts).removesuffix(":") or ":"
        case _:
            return repr(argument)
