"""How tensors, operands and score functions are handed to the kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topk_fx.score import Program, Score

from .availability import is_interpreted, operand_kinds
from .score_code import function_of


def score_function(program: Program, function: Score, operands: Sequence[Tensor]) -> Any:
    from .kernels.scores import unchanged

    return function_of(program, operand_kinds(function, operands)) if program else unchanged


def operand_arguments(function: Score, operands: Sequence[Tensor], other: Tensor) -> tuple[Any, ...]:
    """Operands and their strides; never none, as Triton has no empty tuples: then another tensor stands there."""
    pointers = tuple(x.view(torch.uint8) if x.dtype == torch.bool else x for x in operands)
    strides = tuple(operand_strides(x, n in function.tables) for n, x in enumerate(operands))
    return pointers or (other,), strides or ((0, 0, 0, 0),)


def power_of_two(x: int, least: int = 1) -> int:
    """The least power of two that is no less than x and `least`."""
    return max(least, 1 << (x - 1).bit_length())


def with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def operand_strides(x: Tensor, is_table: bool) -> tuple[int, ...]:
    """Of a table, which has no axis of queries, its length in the place of that axis's stride."""
    batch, head, query, key = broadcast_strides(x)
    return batch, head, x.size(-1) if is_table else query, key


def dot_of(query: Tensor) -> dict[str, Any]:
    """In which dtype products are made, and how: float32's in three products of its parts where there is such a thing.

    Triton's interpreter multiplies the bits of bfloat16, so float32 it is there.
    """
    import triton.language as tl

    if query.dtype == torch.float32 or is_interpreted():
        return {"DOT": tl.float32, "PRECISION": "ieee" if torch.version.hip else "tf32x3"}
    return {"DOT": tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float16, "PRECISION": "ieee"}


def all_registers() -> dict[str, int]:
    """Keeps NVIDIA's assembler from spilling a few to run more warps at a time; AMD's knows no such option."""
    return {} if torch.version.hip else {"maxnreg": 255}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return getattr(torch.get_device_module(device).get_device_properties(device), "multi_processor_count", 64)


def device_of(x: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.get_device_module(x.device).device(x.device) if x.device.type != "cpu" else torch.device("cpu")
