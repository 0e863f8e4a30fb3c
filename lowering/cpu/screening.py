"""When the C++ attention screens its keys in int8 first, as `sources/screening.h` says: the selection is the same.

Screened are scores that are products, masked or not: no other step has a bound. The processor needs AVX512-VNNI.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from topk_fx.score import Call, Name, Operand, Program
from topk_fx.score.language import SCORES

from . import build
from .score_code import OperandKind

FEWEST_KEYS = 1024
KEYS_PER_KEPT = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 64}
FEWEST_ROWS = 96
"""Screening takes less time for so many keys of which one in so many is kept, and so many queries that share them.
Measured on an AMD EPYC (Zen 4), one thread, D 64, time of screened / plain, full and causal: float32 1,024 keys k=32
.73 and .84, 4,096 keys k=64 .56 and .70, 8,192 keys k=256 .74 and .94; bfloat16 1,024 keys k=16 .85 and .94, 4,096
keys k=64 .90 and .97, 16,384 keys k=256 .92 and .99, but 1,024 keys k=64 1.03 and 1.17.
"""

_forced: bool | None = None
_counts: Counts | None = None


class Counts(ctypes.Structure):
    """What the kernel did with the rows of its calls, in decoding once for each split of the keys.

    `ScreeningCounts` of arguments.h.
    """

    _fields_ = (
        ("screened", ctypes.c_int64),  # rows whose selection is among their survivors
        ("left", ctypes.c_int64),  # rows of which all scores were computed
        ("survivors", ctypes.c_int64),  # of the screened rows
    )


@contextlib.contextmanager
def forced(is_on: bool) -> Iterator[Counts]:
    """While entered, keys are screened wherever they can be, or never, and the rows are counted."""
    global _forced, _counts
    counts, (is_forced, outer) = Counts(), (_forced, _counts)
    _forced, _counts = is_on, counts
    try:
        yield counts
    finally:
        _forced, _counts = is_forced, outer
        for name, _ in Counts._fields_ if outer else ():
            setattr(outer, name, getattr(outer, name) + getattr(counts, name))


def counts_address() -> int | None:
    """Where the kernel is to count, if anybody asked."""
    return None if _counts is None else ctypes.addressof(_counts)


def is_used(query: Tensor, key: Tensor, k: int, program: Program, kinds: Sequence[OperandKind]) -> bool:
    """Whether the keys of an attention are screened. query [B, Hq, Lq, D], key [B, Hk, Lk, D]."""
    if not can_be_used(program, kinds):
        return False
    return _pays(query, key, k) if _forced is None else _forced


def is_available() -> bool:
    """Whether the processor, as kernels are built for it, has what screening needs."""
    return "TOPK_AVX512_VNNI" in build.current_defines()


def can_be_used(program: Program, kinds: Sequence[OperandKind]) -> bool:
    """Whether keys can be screened by what a program makes of their products."""
    return is_available() and only_masks(program, kinds)


def _pays(query: Tensor, key: Tensor, k: int) -> bool:
    keys, rows = key.size(2), query.size(1) // key.size(1) * query.size(2)
    return keys >= FEWEST_KEYS and k * KEYS_PER_KEPT[key.dtype] <= keys and rows >= FEWEST_ROWS


def only_masks(program: Program, kinds: Sequence[OperandKind]) -> bool:
    """Whether a program leaves each score as it is or makes it -inf, whatever the scores are."""
    name = program.result
    while name != SCORES:
        masked = _masked(program.operations[int(name.text[1:])], program, kinds)
        if masked is None:
            return False
        name = masked
    return True


def _masked(call: Call, program: Program, kinds: Sequence[OperandKind]) -> Name | None:
    """The scores that an operation only masks."""
    match call.name, call.arguments:
        case (("keep" | "fill"), (scores, condition, value)) | ("where", (condition, scores, value)):
            is_mask = value == -math.inf
        case ("where", (condition, float(value), scores)):
            is_mask = value == -math.inf
        case ("mask", (scores, Operand() as condition)):
            is_mask = kinds[condition.index].dtype == torch.bool
        case _:
            return None
    reads_scores = isinstance(condition, Name) and condition in program.score_dependent
    return scores if is_mask and scores in program.score_dependent and not reads_scores else None
