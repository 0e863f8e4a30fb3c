"""A model as Python source: how it is fed and traced, and what it is where its softmax keeps k keys."""

from __future__ import annotations

import dataclasses
import linecache
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import topk_fx


@dataclasses.dataclass(frozen=True)
class Input:
    """A tensor of the sizes that `axes` name; `kind` tells what its numbers are."""

    name: str
    axes: str
    kind: str = "normal"

    def values(self, sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        shape = [sizes[axis] for axis in self.axes]
        match self.kind:
            case "keep":
                return torch.rand(shape, generator=generator) > 0.3
            case "ids":
                return torch.randint(0, 3, shape, generator=generator)
            case "scale":
                return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclasses.dataclass(frozen=True)
class Program:
    """A model as source, and how it is fed and traced.

    Attributes:
        lines: the body of the model.
        reference_lines: the same where the softmax (or the hidden units) keeps k: calls of `Keeping`.
        sizes: of each axis by its letter.
        dtype: of the floating inputs.
        coarsest: the least precise dtype that the model computes in.
        tracer: "make_fx", "propagated", "symbolic", "export" or "dynamo".
        dynamic: whether queries, keys and batch have symbolic sizes.
        special: an input and a number, infinite or NaN, that its first element becomes.
        softmaxes: how many calls of a softmax or of SDPA there are.
    """

    inputs: tuple[Input, ...]
    lines: tuple[str, ...]
    reference_lines: tuple[str, ...]
    sizes: Mapping[str, int]
    dtype: torch.dtype
    coarsest: torch.dtype
    tracer: str
    dynamic: bool
    special: tuple[str, float] | None
    softmaxes: int

    def __repr__(self) -> str:
        shapes = ", ".join(f"{x.name}: {x.kind}{[self.sizes[a] for a in x.axes]}" for x in self.inputs)
        return "\n".join(
            [
                f"# {self.tracer}{', dynamic' if self.dynamic else ''}, {self.dtype}, coarsest {self.coarsest}",
                f"# {shapes}{f'; {self.special}' if self.special else ''}",
                self.source(self.lines),
            ]
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis prints it."""
        printer.text("\n" + repr(self))

    def source(self, lines: tuple[str, ...]) -> str:
        return "\n    ".join([f"def model({', '.join(x.name for x in self.inputs)}):", *lines]) + "\n"

    def model(self, **names: Any) -> Callable[..., Any]:
        """The model; `names` are what its globals are instead."""
        return _compiled(self.source(self.lines), names)

    def exact(self) -> Callable[..., Any]:
        """The model with every dtype that it names replaced by float64."""
        return _compiled(self._in_float64(self.lines), {})

    def reference(self, keeping: Keeping) -> Callable[..., Any]:
        """The model in float64 where every softmax, or every hidden layer, keeps k."""
        return _compiled(self._in_float64(self.reference_lines), {"keeping": keeping})

    def _in_float64(self, lines: tuple[str, ...]) -> str:
        dtype = str(self.dtype)  # the limits of numbers stay those of the model
        return _in_float64(re.sub(r"finfo\(\w+\.dtype\)", f"finfo({dtype})", self.source(lines)))

    def values(self, longer: int = 0) -> tuple[Tensor, ...]:
        """The inputs, the same at every call; `longer`: by how much queries and keys are more, where they are several."""
        generator = torch.Generator().manual_seed(20210613)
        sizes = {a: n + longer * (a in "ij" and n > 1) for a, n in self.sizes.items()}
        found = {x.name: x.values(sizes, self.dtype, generator) for x in self.inputs}
        if self.special is not None:
            name, number = self.special
            found[name].view(-1)[0] = number
        return tuple(found.values())

    def dynamic_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each input, the axes whose size is symbolic."""
        free = [a for a in "bij" if self.sizes.get(a, 1) > 1] if self.dynamic else []
        return tuple(tuple(n for n, a in enumerate(x.axes) if a in free) for x in self.inputs)


def _compiled(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    scope = {"torch": torch, "F": F, "math": math, "aten": torch.ops.aten, "inf": math.inf, **names}
    filename = f"<program {abs(hash(source))}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # Dynamo reads it
    exec(compile(source, filename, "exec"), scope)
    return scope["model"]


def _in_float64(source: str) -> str:
    source = re.sub(r"(?<!finfo\()torch\.(bfloat16|float16|float32)\b", "torch.float64", source)
    return re.sub(r"\.(float|half|bfloat16)\(\)", ".double()", source)


@dataclasses.dataclass
class Keeping:
    """What reference programs call. `nearest` is the smallest distance, not 0, between a number kept and one not."""

    k: topk_fx.config.Keep
    nearest: float = math.inf

    def softmax(self, scores: Tensor, dim: int, sink: Tensor | None = None, empty_row: float = math.nan) -> Tensor:
        """softmax over dim of the k largest; `sink` is a logit [..., 1] more in the denominator of the last axis."""
        moved = scores.transpose(dim, -1)
        self._measure(moved)
        if sink is None:
            return topk_fx.reference.topk_softmax(moved, self.k, empty_row=empty_row).transpose(dim, -1)
        indices = topk_fx.reference.select(moved, self.k, empty_row=empty_row)[1]
        indices = indices.masked_fill(indices < 0, moved.size(-1))
        is_kept = torch.zeros_like(F.pad(moved, (0, 1)), dtype=torch.bool).scatter(-1, indices, True)[..., :-1]
        chosen = moved.masked_fill(~is_kept, -math.inf)
        return torch.cat([chosen, sink], -1).softmax(-1)[..., :-1].transpose(dim, -1)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        groups = query.size(-3) // key.size(-3) if arguments.get("enable_gqa") else 1
        keys = key.repeat_interleave(groups, -3) if groups > 1 else key
        mask = arguments.get("attn_mask")
        scores = query @ keys.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        self._measure(scores)
        return topk_fx.reference.attention(query, key, value, k=self.k, **arguments)

    def hidden(self, x: Tensor) -> Tensor:
        """The k units of largest magnitude, the others 0."""
        if self.k == "all":
            return x
        self._measure(x.abs())
        indices = x.detach().abs().argsort(dim=-1, descending=True, stable=True)[..., : self.k]
        return torch.zeros_like(x).scatter(-1, indices, x.gather(-1, indices))

    def _measure(self, x: Tensor) -> None:
        if isinstance(self.k, int) and self.k < x.size(-1):
            ordered = x.detach().sort(-1, descending=True).values
            last, first = ordered[..., self.k - 1], ordered[..., self.k]
            gap = (last - first) / last.abs().clamp(min=1)
            gap = gap[gap.isfinite() & (gap > 0)]
            self.nearest = min(self.nearest, gap.min().item() if gap.numel() else math.inf)
