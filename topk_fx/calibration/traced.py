"""A model that Dynamo traces once, run with any configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from topk_fx.compat import no_recompile_limit
from topk_fx.explain import kept_buffers

Variant = Callable[[fx.GraphModule], Callable[..., Any]]
"""What runs in the place of a graph of the model."""


class TracedModel:
    """A model whose graphs are kept as Dynamo captured them, so that each run may rewrite them in another way.

    Only the first batch of each shape is traced. Graphs run uncompiled: with the kernels of topk_fx, without Inductor.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._graphs: list[fx.GraphModule] = []
        self._variant: Variant = _as_it_is
        self._made: dict[Variant, dict[int, Callable[..., Any]]] = {}
        self._compiled = torch.compile(model, backend=self._keep)

    @torch.no_grad()
    def run(self, batch: Mapping[str, Any], variant: Variant | None = None) -> Any:
        """What the model gives for keyword arguments, its graphs run as `variant` makes them; as they are by default.

        What was made of the graphs is kept for the last variant alone.
        """
        self._variant = variant or _as_it_is
        if variant is not None and variant not in self._made:
            self._made.clear()
        self._made.setdefault(self._variant, {})
        with torch.random.fork_rng():
            return self._compiled(**batch)

    def _keep(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        index = len(self._graphs)
        self._graphs.append(graph)

        def run(*args: Any) -> Any:
            made = self._made[self._variant]
            if index not in made:
                made[index] = self._variant(graph)
            return made[index](*args)

        return run


def _as_it_is(graph: fx.GraphModule) -> Callable[..., Any]:
    return graph


@contextlib.contextmanager
def traced_in_evaluation(model: Callable[..., Any]) -> Iterator[TracedModel]:
    """The model in evaluation mode, its modes and buffers given back at the end; a compiled one as it was before."""
    model = getattr(model, "_orig_mod", model)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with no_recompile_limit(), kept_buffers(model):
            yield TracedModel(model)
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
