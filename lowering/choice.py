"""Which lowering computes a site, and whether it would take less time than the dense form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topk_fx.config import Keep, TopKConfig, kept_count
from topk_fx.errors import LoweringUnavailableError

from . import cpu
from .cpu import build

AVAILABLE = ("aten", "cpu")

FEWEST_KEYS = 1024
KEPT_SHARE = 8
"""The C++ kernels take less time than SDPA where one key in so many is kept, of so many keys or more (measured)."""


def choose(config: TopKConfig) -> str:
    """The name of the lowering that a configuration asks for, or of the best that a processor has.

    Raises:
        LoweringUnavailableError: the one asked for cannot run; it is never replaced by another in silence.
    """
    if config.lowering is None:
        return "aten" if build.why_unavailable() else "cpu"
    if config.lowering not in AVAILABLE:
        raise LoweringUnavailableError(
            f"lowering={config.lowering!r} cannot run: this version of topk_fx has no {config.lowering} kernels; "
            f"available: {', '.join(map(repr, AVAILABLE))}"
        )
    if config.lowering == "cpu" and build.why_unavailable():
        raise LoweringUnavailableError(f"lowering='cpu' cannot run: {build.why_unavailable()}")
    return config.lowering


def lowering_of(chosen: str, arguments: Sequence[Any]) -> tuple[str, str]:
    """What will compute `topk_fx::attention` with these arguments, of which tensors may be fake, and why none better.

    `chosen` is what `choose` returned: the C++ kernels only compute what they can, and ATen the rest.
    """
    query, key, value, operands, score = arguments[:5]
    if chosen == "cpu":
        why = cpu.why_not(query, key, value, operands, score)
        return ("aten", why) if why else ("cpu", "")
    return "aten", build.why_unavailable() if query.device.type == "cpu" else ""


def pays(
    kind: str, shape: tuple[Any, ...] | None, keep: Keep, device: str | None = None, lowering: str = "aten"
) -> bool:
    """Whether a lowering would beat the dense form on a site whose scores have a shape.

    ATen does not: its products are the dense form's, and the selection comes on top (measured: 2 to 6 times the time of
    SDPA from 1,024 to 16,384 keys). What it saves is memory, and that is asked for by giving k.
    """
    if kind != "attention" or lowering != "cpu" or device != "cpu" or shape is None:
        return False
    keys = shape[-1]
    return isinstance(keys, int) and keys >= FEWEST_KEYS and kept_count(keep, keys) * KEPT_SHARE <= keys
