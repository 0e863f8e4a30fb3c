"""Which lowering computes a site, and whether it would take less time than the dense form."""

from __future__ import annotations

from typing import Any

from topk_fx.config import Keep, TopKConfig
from topk_fx.errors import LoweringUnavailableError

AVAILABLE = ("aten",)


def choose(config: TopKConfig) -> str:
    """The name of the lowering that a configuration asks for, or of the best there is.

    Raises:
        LoweringUnavailableError: the one asked for cannot run; it is never replaced by another in silence.
    """
    if config.lowering is None:
        return AVAILABLE[0]
    if config.lowering not in AVAILABLE:
        raise LoweringUnavailableError(
            f"lowering={config.lowering!r} cannot run: this version of topk_fx has no {config.lowering} kernels; "
            f"available: {', '.join(map(repr, AVAILABLE))}"
        )
    return config.lowering


def pays(kind: str, shape: tuple[Any, ...] | None, keep: Keep) -> bool:
    """Whether the ATen lowering would beat the dense form on a site.

    It does not: its products are the dense form's, and the selection comes on top (measured: 2 to 6 times the time of
    SDPA from 1,024 to 16,384 keys). What it saves is memory, and that is asked for by giving k.
    """
    return False
