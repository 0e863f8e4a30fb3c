"""A copy of keys in int8, kept beside them for decoding, by the C++ in `sources/screened_keys.h`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topk_fx.errors import ShapeError
from topk_fx.shapes import PANEL_KEYS, column_quads

from . import build, screening
from .score_code import ELEMENT_TYPES
from .sparse import TensorArgument, with_dense_rows

MAX_HEAD_SIZE = 512


class KeyCopy(NamedTuple):
    """The copy: for each head so many panels, of which the last may be spare."""

    panels: Tensor  # [B, H, panels, PANEL_KEYS * D], uint8; D rounded up to a multiple of 4
    facts: Tensor  # [B, H, panels, 3, PANEL_KEYS], float32: step, and what rounding lost and left of each key
    means: Tensor  # [B, H, D], float32: what was subtracted from each key

    def check(self, key: Tensor, length: int) -> None:
        """ShapeError unless this has room for so many keys like key [B, H, L, D]: the kernel goes by addresses."""
        batch, heads, _, size = key.shape
        panels = self.panels.size(2) if self.panels.dim() == 4 else 0
        expected = (
            ("panels", self.panels, (batch, heads, panels, PANEL_KEYS * 4 * column_quads(size)), torch.uint8),
            ("facts", self.facts, (batch, heads, panels, 3, PANEL_KEYS), torch.float32),
            ("means", self.means, (batch, heads, size), torch.float32),
        )
        for name, x, shape, dtype in expected:
            if x.shape != shape or x.dtype != dtype or not x.is_contiguous():
                raise ShapeError(
                    f"{name} has shape {tuple(x.shape)} of {x.dtype}; accepted: contiguous {shape} of {dtype}"
                )
        if panels * PANEL_KEYS < length:
            raise ShapeError(f"panels has room for {panels * PANEL_KEYS} keys; accepted: for {length} or more")


class KeyCopyArgument(ctypes.Structure):
    """`KeyCopy` of arguments.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "facts", "means")),
        ("capacity", ctypes.c_int64),
    )

    @classmethod
    def of(cls, copy: KeyCopy) -> KeyCopyArgument:
        return cls(*(x.data_ptr() for x in copy), copy.panels.size(2))


class _CopyArguments(ctypes.Structure):
    """`CopyArguments` of screened_keys.h."""

    _fields_ = (
        ("rows", TensorArgument),
        ("copy", KeyCopyArgument),
        *((name, ctypes.c_int64) for name in ("batch", "key_heads", "count", "first", "depth", "threads")),
    )


def why_no_copy(key: Tensor) -> str:
    """Why there can be no copy of keys [B, H, L, D], or ""."""
    if key.device.type != "cpu":
        return f"key is on {key.device}"
    if key.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"key has dtype {key.dtype}"
    if key.size(-1) > MAX_HEAD_SIZE:
        return f"the head size {key.size(-1)} is above {MAX_HEAD_SIZE}"
    if why := build.why_unavailable():
        return why
    return "" if screening.is_available() else "the processor has no AVX512-VNNI beside AVX512-BF16"


def write(rows: Tensor, copy: KeyCopy, first: int) -> None:
    """Rounds keys `first`, `first` + 1 ..., rows [B, H, n, D], into a copy that has room for them."""
    rows = with_dense_rows(rows)
    batch, heads, count, depth = rows.shape
    copy.check(rows, first + count)
    if rows.numel() == 0:
        return
    arguments = _CopyArguments(
        TensorArgument.of(rows),
        KeyCopyArgument.of(copy),
        *(batch, heads, count, first, depth, torch.get_num_threads()),
    )
    _function(ELEMENT_TYPES[rows.dtype], build.current_instruction_set())(ctypes.byref(arguments))


@functools.cache
def _function(element: str, instructions: str) -> Any:
    function = build.load('#include "attention.cpp"\n', (f"QUERY={element}", f"VALUE={element}")).copy_keys
    function.restype = None
    return function
