"""When the C++ attention screens its keys in int8 first, as `sources/screening.h` says: the selection is the same.

Screened are scores that a program masks, fills or makes an affine function of the products. The processor needs
AVX512-VNNI.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from . import build
from .affine import Affine

FEWEST_KEYS = {torch.float32: 1024, torch.float16: 1024, torch.bfloat16: 2048}
KEYS_PER_KEPT = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 64}
FEWEST_ROWS = {torch.float32: 96, torch.float16: 96, torch.bfloat16: 384}
"""Screening takes less time for so many keys of which one in so many is kept, and so many queries that share them.
Measured on an AMD EPYC (Zen 4), one thread, D 64, time of screened / plain, full and causal: float32 1,024 keys k=32
.75 and .95, 4,096 keys k=64 .56 and .70; bfloat16 1,024 keys k=16 .92 and 1.10, 4,096 keys k=64 .82 and .97. With terms
float32 2,048 keys k=64, a bias of queries x keys .78 and 1.02, ALiBi .87; bfloat16 4,096 keys k=64 .89, 1.12 and .82.
With 96, 192 and 384 queries: float32 4,096 keys k=64 .94, .76 and .67; bfloat16 1.30, 1.15 and 1.02.
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


def is_used(query: Tensor, key: Tensor, k: int, program: Affine | None) -> bool:
    """Whether the keys of an attention are screened. query [B, Hq, Lq, D], key [B, Hk, Lk, D]."""
    if program is None or not is_available():
        return False
    return _pays(query, key, k) if _forced is None else _forced


def is_available() -> bool:
    """Whether the processor, as kernels are built for it, has what screening needs."""
    return "TOPK_AVX512_VNNI" in build.current_defines()


def copy_is_used(program: Affine | None) -> bool:
    """Whether few queries are screened by a copy of the keys: where the program only masks."""
    return program is not None and program.only_masks and is_available()


def _pays(query: Tensor, key: Tensor, k: int) -> bool:
    keys, rows = key.size(2), query.size(1) // key.size(1) * query.size(2)
    return keys >= FEWEST_KEYS[key.dtype] and k * KEYS_PER_KEPT[key.dtype] <= keys and rows >= FEWEST_ROWS[key.dtype]
