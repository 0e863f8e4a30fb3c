"""The top-k FFN of few tokens by the C++ kernel in `sources/ffn.cpp`: compiles it and hands it the tensors."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from topk_fx.activation import ACTIVATIONS

from ..aten import sparse_ffn_backward
from . import build
from .score_code import ELEMENT_TYPES
from .sparse import CppProducts

KERNELS = ("relu", "relu2", "gelu", "gelu_tanh", "silu", "quick_gelu", "sigmoid")
"""In the order of `Activation` in activations.h."""

_MOST_UNITS = 2**30


class _Matrix(ctypes.Structure):
    """`Matrix` of ffn.cpp."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("by_columns", ctypes.c_int64))


class _Arguments(ctypes.Structure):
    """`FFNArguments` of ffn.cpp."""

    _fields_ = (
        ("input", ctypes.c_void_p),
        ("input_strides", ctypes.c_int64 * 2),
        *((name, _Matrix) for name in ("up", "gate", "down")),
        *((name, ctypes.c_void_p) for name in ("up_bias", "gate_bias", "output", "indices")),
        *((name, ctypes.c_void_p) for name in ("up_kept", "gate_kept", "dropout_keep")),
        *((name, ctypes.c_int64) for name in ("tokens", "model_size", "hidden_size", "output_size", "kept")),
        ("dropout_factor", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("activation", "has_gate", "threads")),
    )


def ffn_why_not(input: Tensor, up_weight: Tensor | None) -> str:
    """Why the C++ kernel cannot compute an FFN of these tensors, or ""."""
    if input.device.type != "cpu":
        return f"input is on {input.device}"
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"input has dtype {input.dtype}; there are kernels for float32, bfloat16 and float16"
    if up_weight is None:
        return "there is no up projection, whose product with the tokens the kernel computes"
    hidden_size = up_weight.size(0)
    if isinstance(hidden_size, int) and hidden_size > _MOST_UNITS:
        return f"there are more than {_MOST_UNITS} hidden units"
    return build.why_unavailable()


def ffn_forward(
    input: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    activation: str,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, unit indices and pre-activations as `aten.ffn_forward`; the kept units of a token ascend.

    Raises:
        LoweringUnavailableError: there is no compiler.
    """
    tokens, model_size = input.shape
    output_size, hidden_size = down_weight.shape
    kept = min(k, hidden_size)
    output = input.new_empty(tokens, output_size)
    indices = input.new_empty(tokens, kept, dtype=torch.int32)
    up_kept = input.new_empty(tokens, kept, dtype=torch.float32)
    gate_kept = input.new_empty(tokens, kept if gate_weight is not None else 0, dtype=torch.float32)
    # Held until the call is over: they may be copies.
    matrices = [None if x is None else with_dense_rows_or_columns(x) for x in (up_weight, gate_weight, down_weight)]
    biases = [None if x is None else x.float().contiguous() for x in (up_bias, gate_bias)]
    keep = None if dropout_keep is None else dropout_keep.contiguous()
    arguments = _Arguments(
        input.data_ptr(),
        (ctypes.c_int64 * 2)(*input.stride()),
        *map(_matrix, matrices),
        *(None if x is None else x.data_ptr() for x in (*biases, output, indices, up_kept, gate_kept, keep)),
        *(tokens, model_size, hidden_size, output_size, kept),
        1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        *(
            KERNELS.index(ACTIVATIONS[activation].values_of or activation),
            gate_weight is not None,
            torch.get_num_threads(),
        ),
    )
    if _kernel(ELEMENT_TYPES[input.dtype], build.current_instruction_set())(ctypes.byref(arguments)):
        raise MemoryError("not enough memory for the hidden units of a top-k FFN")
    return output, indices, up_kept, gate_kept


def ffn_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, from and as `aten.ffn_backward`."""
    return sparse_ffn_backward(*arguments, sparse_products=CppProducts)


def with_dense_rows_or_columns(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows are contiguous if neither these nor its columns are."""
    return x if _has_dense_rows(x) or _has_dense_columns(x) else x.contiguous()


def _matrix(x: Tensor | None) -> _Matrix:
    if x is None:
        return _Matrix()
    by_columns = not _has_dense_rows(x)
    return _Matrix(x.data_ptr(), x.stride(1 if by_columns else 0), by_columns)


def _has_dense_rows(x: Tensor) -> bool:
    return x.stride(1) == 1 or x.size(1) == 1


def _has_dense_columns(x: Tensor) -> bool:
    return x.stride(0) == 1 or x.size(0) == 1


@functools.cache
def _kernel(element: str, instructions: str) -> Any:
    function = build.load('#include "ffn.cpp"\n', (f"ELEMENT={element}",)).ffn_forward
    function.restype = ctypes.c_int64
    return function
