"""Whether the Triton kernels can compute an attention."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from topk_fx.score import Score

from .score_code import OperandKind, why_no_code

MOST_KEPT = 1024
"""A row's candidates are selected in registers."""

MOST_COLUMNS = {torch.float32: 128, torch.bfloat16: 512, torch.float16: 512}
"""Of the head size: tiles of queries and of keys must fit in shared memory, and float32's parts in registers."""

_LONGEST = 2**30 - 1
"""Of queries and of keys: their positions are held in 32 bits, and so are the differences of two."""


def why_not(
    query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], score: str, k: int | torch.SymInt
) -> str:
    """Why the Triton kernels cannot compute an attention of these tensors, which may be fake, or ""."""
    for name, x in (("query", query), ("value", value)):
        if x.device.type not in ("cuda", "xpu") and not is_interpreted():
            return f"{name} is on {x.device}"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} has dtype {x.dtype}; there are kernels for float32, bfloat16 and float16"
        most = MOST_COLUMNS[x.dtype]
        if isinstance(x.size(-1), int) and not 1 <= x.size(-1) <= most:
            return f"{name} has head size {x.size(-1)} and dtype {x.dtype}; there are kernels for 1 to {most}"
    if any(isinstance(size, int) and size > _LONGEST for x in (query, key) for size in x.shape):
        return f"there are more than {_LONGEST} queries or keys"
    kept = [x for x in (k, key.size(-2)) if isinstance(x, int)]
    if len(kept) == 2 and min(kept) > MOST_KEPT:
        return f"{min(kept):,} keys are kept; there are kernels for {MOST_KEPT:,} at most"
    why = why_unavailable(query.device.type)
    if why:
        return why
    function = Score.parse(score)
    kinds = operand_kinds(function, operands)
    for program in (function.before, function.after):
        if why := why_no_code(program, kinds):
            return f"the score function {score!r} has no Triton: {why}"
    return ""


def operand_kinds(function: Score, operands: Sequence[Tensor]) -> tuple[OperandKind, ...]:
    """What code depends on of the operands. Symbolic sizes count as more than one."""

    def has(x: Tensor, axis: int) -> bool:
        return x.dim() >= -axis and not (isinstance(x.size(axis), int) and x.size(axis) == 1)

    return tuple(
        OperandKind(x.dtype, has(x, -2), has(x, -1), n in function.tables) if n != _sink(function) else _SINK
        for n, x in enumerate(operands)
    )


_SINK = OperandKind(torch.float32, False, False)


def _sink(function: Score) -> int | None:
    return None if function.sink is None else function.sink.index


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 has Triton run kernels on tensors of any device, slowly, to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_unavailable(device_type: str) -> str:
    """Why no Triton kernel can run on a kind of device, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (is_interpreted() or torch.cuda.is_available() or torch.xpu.is_available()):
        return "there is no GPU"
    is_nvidia = device_type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    if is_nvidia and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} has a compute capability below 8.0"
    return ""
