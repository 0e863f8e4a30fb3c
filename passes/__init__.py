"""graph -> graph: dialect (which target means what) -> find -> judge -> rewrite. README.md has the invariants."""

from .topk import TopKPass

__all__ = ["TopKPass"]
