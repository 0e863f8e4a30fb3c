"""Which lowering computes a site, and whether it would take less time than the dense form."""

from __future__ import annotations

import math
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

FEW_TOKENS = {torch.float32: 16, torch.bfloat16: 128, torch.float16: 128}
"""The C++ FFN reads all weights for each eight tokens. Up to so many it takes less time than chunks of ATen calls,
which convert weights of 16 bits first. Measured, SwiGLU 2048 -> 8192, a tenth kept, time of C++ / ATen: float32 .59 at
8 tokens, .89 at 16, 1.2 at 32; bfloat16 .09 at 8, .46 at 64, .65 at 128."""

FEW_TOKENS_OF_TRITON = 16
"""Of one tile of the Triton FFN, so that each weight is read once. Not measured on a GPU."""

_LANGUAGE = {"cpu": "C++", "triton": "Triton"}

MANY_TOKENS = 128
"""From so many tokens on, a sparse backward of an FFN can take less time than ATen's dense products, which by far fewer
are lost among the gradients of all weights."""

KEPT_SHARE_OF_BACKWARD = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}
"""And does where one unit in so many is kept. Measured, SwiGLU 1024 -> 4096, 512 tokens, time of C++ / ATen: float32
.41 with 1/16 kept, .65 with 1/8, 1.06 with 1/4; bfloat16 .27, .46, .79."""

MOST_TOKENS_THAT_PAY, FEWEST_UNITS_THAT_PAY = 4, 2048
"""A top-k FFN in C++ takes less time than the dense one for so few tokens of so many hidden units. Measured, SwiGLU
2048 -> 8192, time of C++ / dense: float32 .90 at 1 token, .41 at 2, .40 at 4, .57 at 8; bfloat16 .55, .74, .81, 1.12.
"""


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


def ffn_lowering_of(chosen: str, arguments: Sequence[Any], kept_in_backward: int | None = None) -> tuple[str, str]:
    """What will compute `topk_fx::ffn` with these arguments, of which tensors may be fake, and why none better.

    Args:
        kept_in_backward: asks for the backward, of an FFN that keeps so many units.
    """
    input, up_weight = arguments[:2]
    name = chosen or BEST.get(input.device.type, "aten")
    if name == "aten":
        return "aten", ""
    if why := (cpu if name == "cpu" else triton).ffn_why_not(input, up_weight):
        return "aten", why
    if chosen:
        return name, ""
    if name == "cpu" and kept_in_backward is not None:
        is_sparse = kept_in_backward * KEPT_SHARE_OF_BACKWARD[input.dtype] <= up_weight.size(0)
        return ("cpu" if is_sparse and input.size(0) >= MANY_TOKENS else "aten"), ""
    most = FEW_TOKENS[input.dtype] if name == "cpu" else FEW_TOKENS_OF_TRITON
    tokens = math.prod(input.shape[:-1])
    if not isinstance(tokens, int):
        return name, f"for up to {most} tokens; ATen computes more"
    if tokens > most:
        return "aten", f"{tokens} tokens: chunks of ATen calls take less time than {_LANGUAGE[name]} above {most}"
    return name, ""


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
    """Whether a lowering would beat the dense form on a site whose scores, or hidden units, have a shape.

    ATen does not: its products are the dense form's, and the selection comes on top (measured: 2 to 6 times the time of
    SDPA from 1,024 to 16,384 keys). What it saves is memory, and that is asked for by giving k.
    """
    best = BEST.get(device or "", "aten")
    if shape is None or best == "aten" or lowering not in ("", best):
        return False
    if _why_unavailable(best, device or ""):
        return False
    if kind == "ffn":
        return best == "cpu" and _pays_of_ffn(shape, keep)
    keys = shape[-1]
    return isinstance(keys, int) and keys >= FEWEST_KEYS[best] and kept_count(keep, keys) * KEPT_SHARE[best] <= keys


def _pays_of_ffn(shape: tuple[Any, ...], keep: Keep) -> bool:
    if not all(isinstance(size, int) for size in shape):
        return False
    tokens, units = math.prod(shape[:-1]), shape[-1]
    return tokens <= MOST_TOKENS_THAT_PAY and units >= FEWEST_UNITS_THAT_PAY and 2 * kept_count(keep, units) <= units


def _why_unavailable(name: str, device: str) -> str:
    """Why no kernel of a lowering can run here, whatever it would compute, or ""."""
    if name == "cpu":
        return build.why_unavailable()
    return availability.why_unavailable(device) if name == "triton" else ""
