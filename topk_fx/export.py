"""rewrite: the same passes on a GraphModule or an ExportedProgram."""

from __future__ import annotations

import copy
import functools
from typing import Any, TypeVar

import torch
from torch import fx
from torch.export import ExportedProgram

from . import lowering
from .config import ConfigSource, as_config
from .errors import UnsupportedProgramError
from .passes import TopKPass
from .report import RewriteReport

Program = TypeVar("Program", fx.GraphModule, ExportedProgram)


def rewrite(program: Program, config: ConfigSource | None = None, **options: Any) -> tuple[Program, RewriteReport]:
    """A copy of a traced program in which attention and FFNs are top-k ops, and the report on each candidate.

    Parameters and buffers are shared with the program given, which is not changed.

    Args:
        program: a `torch.fx.GraphModule` (of symbolic_trace, Dynamo or make_fx) or a `torch.export.ExportedProgram`.
        config: a TopKConfig or the path of its JSON, or its fields as keyword arguments: `rewrite(program, k=64)`.

    Raises:
        UnsupportedProgramError: `program` is neither; trace it first.
        ConfigError: an option is not accepted.
    """
    settings = as_config(config, options)
    chosen = lowering.choose(settings)
    pays = functools.partial(lowering.pays, lowering=chosen)
    run = TopKPass(settings, chosen, pays, lowering.lowering_of, lowering.ffn_lowering_of)
    if isinstance(program, ExportedProgram):
        rewritten, report = _rewrite_exported(program, run)
        lowering.register_for(report)  # of AOTInductor, which may compile it next
        return rewritten, report  # type: ignore[return-value]
    if isinstance(program, fx.GraphModule):
        module = copy_graph_module(program)
        return module, run(module, _name(program))
    raise UnsupportedProgramError(
        f"program is a {type(program).__name__}; accepted: a torch.fx.GraphModule or a torch.export.ExportedProgram. "
        "A model is traced with torch.export.export(model, args), or compiled with torch.compile(model, backend='topk')"
    )


def _rewrite_exported(program: ExportedProgram, run: TopKPass) -> tuple[ExportedProgram, RewriteReport]:
    module = copy_graph_module(program.graph_module)
    for old, new in zip(program.graph_module.graph.nodes, module.graph.nodes, strict=True):
        if old.op == "placeholder":  # copying renames one that is called as a builtin is, and the signature knows names
            new.name = new.target = old.name
    module.recompile()
    report = run(module, "exported program")
    signature = copy.deepcopy(program.graph_signature)
    calls = copy.deepcopy(program.module_call_graph)
    renamed = {node.meta["replaces"]: node.name for node in module.graph.nodes if "replaces" in node.meta}
    for entry in calls:
        arguments = [] if entry.signature is None else [*entry.signature.inputs, *entry.signature.outputs]
        for argument in arguments:
            if getattr(argument, "name", None) in renamed:
                argument.name = renamed[argument.name]
    names = zip(_output_names(program.graph_module), _output_names(module), strict=True)
    for old, new in names:
        if old != new:
            signature.replace_all_uses(old, new)
    return (
        ExportedProgram(
            root=module,
            graph=module.graph,
            graph_signature=signature,
            state_dict=program.state_dict,
            range_constraints=copy.deepcopy(program.range_constraints),
            module_call_graph=calls,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        ),
        report,
    )


def _output_names(module: fx.GraphModule) -> list[str]:
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    return [node.name for node in output.all_input_nodes]


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with graphs of its own, at every depth, that shares parameters, buffers and other modules."""
    shared: dict[int, Any] = {}
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False)):
                shared[id(tensor)] = tensor
            for value in vars(child).values():
                if isinstance(value, torch.Tensor):
                    shared[id(value)] = value
        else:
            shared[id(child)] = child
    return copy.deepcopy(module, shared)


def _name(module: fx.GraphModule) -> str:
    return module.__class__.__name__
