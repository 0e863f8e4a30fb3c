"""explain: what would be rewritten and what not, and why, without compiling anything."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from .compat import no_recompile_limit
from .config import ConfigSource, as_config
from .export import rewrite
from .report import RewriteReport


def explain(
    model: Callable[..., Any] | fx.GraphModule | ExportedProgram,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    config: ConfigSource | None = None,
    **options: Any,
) -> RewriteReport:
    """The report that `backend="topk"` would give, from tracing alone.

    The model runs once, dense, so that tracing goes on after a graph break; nothing is compiled and nothing changed.

    Args:
        model: a module or function; or a GraphModule or ExportedProgram, which needs no arguments.
        args: positional arguments of the model; a single tensor is taken as the only one.
        kwargs: keyword arguments of the model.
        config: a TopKConfig or the path of its JSON, or its fields as keyword arguments: `explain(model, args, k=64)`.

    Raises:
        ConfigError: an option is not accepted.
    """
    if isinstance(model, fx.GraphModule):
        return rewrite(model, config, **options)[1]
    if isinstance(model, ExportedProgram):
        return rewrite(model, config, **options)[1]
    settings = as_config(config, options)
    reports: list[RewriteReport] = []

    def record(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        reports.append(rewrite(graph, settings)[1])
        return graph.forward

    args = (args,) if isinstance(args, torch.Tensor) else args
    with torch.random.fork_rng(), no_recompile_limit(), kept_buffers(model):
        torch.compile(model, backend=record)(*args, **(kwargs or {}))
    if not reports:
        return RewriteReport((), f"Dynamo captured no graph of {_name(model)} (torch._dynamo.explain tells why)")
    graphs = f"{len(reports)} graph{'s' if len(reports) != 1 else ''} of {_name(model)}"
    return dataclasses.replace(functools.reduce(operator.add, reports), graph=graphs)


@contextlib.contextmanager
def kept_buffers(model: object) -> Iterator[None]:
    """Gives a module's buffers back what they hold now: running a model may count batches and fill caches."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _name(model: Any) -> str:
    return getattr(model, "__name__", type(model).__name__)
