"""Where in a model a node comes from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

from torch import fx


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that a node was traced in, such as `model.layers.0.self_attn`; "" if unknown."""
    stack: Any = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    entry = list(stack.values())[-1]
    path = entry[0] if isinstance(entry, tuple) else str(entry)
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)  # L['self'].layers[0] -> L.self.layers.0
    # Dynamo calls a module of torch.nn that is compiled itself `fn`, and reaches into a class with a __getattr__.
    path = re.sub(r"^L\.(fn(\.|$))?|^G\.", "", path).replace(".__dict__", "")
    path = re.sub(r"^(L__self__|self|model_self)(\.|$)", "", path)
    return re.sub(r"\._(modules|orig_mod)\b", "", path).replace("_modules.", "").removeprefix("_orig_mod.")


def owner_path(nodes: Iterable[fx.Node]) -> str:
    """The path of the innermost module that all nodes were traced in."""
    paths = [module_path(node).split(".") for node in nodes]
    common = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in common)


_WELL_KNOWN = ("torch", "_operator", "math", "builtins", "torch_ops")


def describe(node: fx.Node) -> str:
    """A node for a sentence: its name, and what it calls."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    module = str(getattr(target, "__module__", None) or "torch")
    if node.op == "call_function" and module.split(".")[0] not in _WELL_KNOWN:
        name = f"{module}.{name}"  # a function of the user's, which may be called as one of torch's is
    return f"{node.name} ({node.op}: {name})"
