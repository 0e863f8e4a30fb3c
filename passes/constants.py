"""The values of small tensors that depend on nothing but the graph: positions, and what is computed from them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .mutation import is_mutated
from .values import shape_of

_CREATORS = {"arange", "ones", "zeros", "full", "new_ones", "new_zeros", "ones_like", "zeros_like", "full_like",
             "scalar_tensor"}  # fmt: skip
_LARGEST = 2**22
"""Elements of the largest tensor that is computed."""


class Constants:
    """Computes nodes of one graph that have no input but numbers."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, torch.Tensor | None] = {}

    def value_of(self, node: fx.Node, depth: int = 24) -> torch.Tensor | None:
        """The tensor that a node always is, on the CPU; None if it depends on an input, or is too large."""
        if node not in self._known:
            self._known[node] = self._compute(node, depth)
        return self._known[node]

    def _compute(self, node: fx.Node, depth: int) -> torch.Tensor | None:
        shape = shape_of(node)
        is_static = shape is not None and all(isinstance(size, int) for size in shape)
        if not depth or not is_static or math.prod(shape or ()) > _LARGEST or not _is_pure(node):
            return None
        sources = node.all_input_nodes
        if not sources and _name(node) not in _CREATORS:
            return None
        for source in sources:
            if self.value_of(source, depth - 1) is None:
                return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value_of)
        kwargs = {name: x for name, x in kwargs.items() if name not in ("device", "pin_memory", "layout")}
        args = tuple(x for x in args if not isinstance(x, torch.device))
        try:
            with torch.no_grad():
                target: Any = node.target
                found = (
                    getattr(args[0], target)(*args[1:], **kwargs)
                    if node.op == "call_method"
                    else target(*args, **kwargs)
                )
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        return found if isinstance(found, torch.Tensor) and tuple(found.shape) == shape else None


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _is_pure(node: fx.Node) -> bool:
    """Whether a node computes the same from the same, with no effect."""
    if node.op not in ("call_function", "call_method") or node.is_impure() or is_mutated(node):
        return False
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in target.tags
    module = getattr(target, "__module__", None) or "torch"
    name = _name(node)
    is_random = any(word in name for word in ("rand", "dropout", "normal", "bernoulli", "multinomial", "empty"))
    return not is_random and (node.op == "call_method" or module.split(".")[0] in ("torch", "_operator", "operator"))
