"""Which lowering computes a site, and whether it would take less time than the dense form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topk_fx.config import Keep, TopKConfig, kept_count
from topk_fx.errors import LoweringUnavailableError

from . import cpu, triton
from .cpu import build
from .triton import availability

AVAILABLE = ("aten", "cpu", "triton")

BEST = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}
"""The lowering that takes least time, by the type of the tensors' device; ATen where there is none or it cannot."""

FEWEST_KEYS = {"cpu": 1024, "triton": 65536}
KEPT_SHARE = {"cpu": 8, "triton": 1024}
"""Kernels take less time than SDPA where one key in so many is kept, of so many keys or more. Measured: C++ against
SDPA's kernel for processors, Triton against flash. In a forward alone, cuDNN takes less time than both on an H100."""


def choose(config: TopKConfig) -> str:
    """The name of the lowering that a configuration asks for, "" where the tensors are to decide.

    Raises:
        LoweringUnavailableError: the one asked for cannot run; it is never replaced by another in silence.
    """
    if config.lowering is None:
        return ""
    if why := _why_unavailable(config.lowering, "cuda"):
        raise LoweringUnavailableError(f"lowering={config.lowering!r} cannot run: {why}")
    return config.lowering


def lowering_of(chosen: str, arguments: Sequence[Any]) -> tuple[str, str]:
    """What will compute `topk_fx::attention` with these arguments, of which tensors may be fake, and why none better.

    `chosen` is what `choose` returned. Kernels only compute what they can, and ATen the rest.
    """
    query, key, value, operands, score, _, k = arguments[:7]
    name = chosen or BEST.get(query.device.type, "aten")
    if name == "aten":
        return "aten", ""
    if why := why_not(name, query, key, value, operands, score, k):
        return "aten", why
    if not chosen and name == "triton" and (why := _why_dense(key, k)):
        return "aten", why
    return name, ""


def lowering_to_run(chosen: str, arguments: Sequence[Any]) -> tuple[str, str]:
    """As `lowering_of`, for an attention that will run in this process: what must be built for it is begun beside."""
    name, why = lowering_of(chosen, arguments)
    if name == "cpu":
        cpu.prepare(*arguments[:5])
    return name, why


def why_not(
    name: str, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], score: str, k: int | torch.SymInt
) -> str:
    """Why the kernels of a lowering cannot compute an attention, or ""."""
    if name == "cpu":
        return cpu.why_not(query, key, value, operands, score)
    return triton.why_not(query, key, value, operands, score, k)


def _why_dense(key: Tensor, k: int | torch.SymInt) -> str:
    keys = key.size(-2)
    if isinstance(k, int) and isinstance(keys, int) and 2 * k > keys:
        return f"{min(k, keys)} of {keys} keys are kept: dense products take less time than kernels that select"
    return ""


def pays(kind: str, shape: tuple[Any, ...] | None, keep: Keep, device: str | None = None, lowering: str = "") -> bool:
    """Whether a lowering would beat the dense form on a site whose scores have a shape.

    ATen does not: its products are the dense form's, and the selection comes on top (measured: 2 to 6 times the time of
    SDPA from 1,024 to 16,384 keys). What it saves is memory, and that is asked for by giving k.
    """
    best = BEST.get(device or "", "aten")
    if kind != "attention" or shape is None or best == "aten" or lowering not in ("", best):
        return False
    if _why_unavailable(best, device or ""):
        return False
    keys = shape[-1]
    return isinstance(keys, int) and keys >= FEWEST_KEYS[best] and kept_count(keep, keys) * KEPT_SHARE[best] <= keys


def _why_unavailable(name: str, device: str) -> str:
    """Why no kernel of a lowering can run here, whatever it would compute, or ""."""
    if name == "cpu":
        return build.why_unavailable()
    return availability.why_unavailable(device) if name == "triton" else ""
