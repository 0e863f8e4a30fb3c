"""Dense attention by the micro-kernel of the top-k kernels, to tell what top-k buys from what a faster GEMM buys."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from topk_fx.lowering.cpu import build
from torch import Tensor

SOURCE = Path(__file__).with_name("dense_attention.cpp")
ELEMENTS = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half"}


class _Arguments(ctypes.Structure):
    """`DenseArguments` of dense_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output")),
        *((name, ctypes.c_int64) for name in ("heads", "length", "depth", "is_causal", "threads")),
        ("scale", ctypes.c_double),
    )


def attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """softmax(query key^T / sqrt(D)) value, forward alone; all contiguous [B, H, L, D], as is the result."""
    batch, heads, length, depth = query.shape
    if not all(x.shape == query.shape and x.dtype == query.dtype and x.is_contiguous() for x in (key, value, query)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must be contiguous and of one shape and dtype, not {shapes}")
    output = torch.empty_like(query)
    arguments = _Arguments(
        *(x.data_ptr() for x in (query, key, value, output)),
        *(batch * heads, length, depth, is_causal, torch.get_num_threads()),
        depth**-0.5,
    )
    _kernel(query.dtype, build.current_instruction_set())(ctypes.byref(arguments))
    return output


@functools.cache
def _kernel(dtype: torch.dtype, instructions: str) -> Any:
    function = build.load(SOURCE.read_text(encoding="utf-8"), (f"QUERY={ELEMENTS[dtype]}",)).dense_attention
    function.restype = None
    return function
