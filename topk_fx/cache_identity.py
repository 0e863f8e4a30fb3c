"""Keeps Inductor's caches right when topk_fx changes.

Their keys know a graph, not the code behind an op: they would serve what an older version of topk_fx, or another
lowering, compiled. So the version, the sources and the lowering's name go into the keys, by the way that is made for
it: the uuid of a custom pass, which itself changes nothing.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass

_InferenceAwarePass: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
"""The base of passes that are told whether gradients are needed; torch 2.11 has none."""


@functools.cache
def source_hash() -> str:
    """A hash of every source file of topk_fx, its passes and its lowerings."""
    digest = hashlib.sha256()
    for folder in _source_folders():
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _source_folders() -> list[Path]:
    from topk_fx import lowering, passes

    folders = {Path(__file__).parent, *(Path(package.__path__[0]) for package in (passes, lowering))}
    return sorted(folders)


def cache_identity(lowering_name: str) -> str:
    """What tells compiled code of this topk_fx and this lowering from any other."""
    return f"topk_fx {lowering_name} {source_hash()}"


def with_identity(options: dict[str, Any], identity: str) -> dict[str, Any]:
    """Inductor's `options` with the identity in its cache keys. The user's own pass, or passes, still run and count."""
    given = options.get("post_grad_custom_pre_pass", inductor_config.post_grad_custom_pre_pass)
    passes = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (given,)
    return {**options, "post_grad_custom_pre_pass": _Identity(identity, passes)}


class _Identity(_InferenceAwarePass or CustomGraphPass):  # type: ignore[misc]
    """Does nothing but be part of the key, and run the passes whose place it takes."""

    def __init__(self, identity: str, users_passes: tuple[Any, ...]) -> None:
        self.identity, self.users_passes = identity, users_passes

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        for users_pass in self.users_passes:
            if _InferenceAwarePass and isinstance(users_pass, _InferenceAwarePass):
                users_pass(graph, is_inference)
            else:
                users_pass(graph)

    def uuid(self) -> Any:
        if not self.users_passes:
            return self.identity
        inner = [x.uuid() if isinstance(x, CustomGraphPass) else None for x in self.users_passes]
        return (self.identity, *inner) if all(inner) else None  # None: Inductor does not cache
