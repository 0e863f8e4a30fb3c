"""The backward of attention in C++: one pass over the queries, and two scatters, where the score function is plain."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from topk_fx.score import Score

from ..aten import attention_backward as aten_backward
from ..plain_gradients import keeps_gradients
from .sparse import CppProducts, TensorArgument, run, with_dense_rows


class _GradientArguments(ctypes.Structure):
    """`GradientArguments` of sparse.cpp."""

    _fields_ = (
        *((name, TensorArgument) for name in ("grad", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("indices", "weights", "grad_products", "summed", "grad_query")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "value_heads", "queries")),
        *((name, ctypes.c_int64) for name in ("depth", "value_size", "kept")),
        *((name, ctypes.c_double) for name in ("scale", "dropout_factor")),
        ("threads", ctypes.c_int64),
    )


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    indices: Tensor,
    weights: Tensor,
    dropout_p: float,
    operand_needs_grad: Sequence[bool],
) -> list[Tensor]:
    """The gradients as `aten.attention_backward`."""
    function = Score.parse(score)
    is_of_one_dtype = query.dtype == key.dtype == value.dtype == grad.dtype and weights.dtype == torch.float32
    is_empty = 0 in (grad.numel(), weights.numel(), query.numel())
    if any(operand_needs_grad) or is_empty or not is_of_one_dtype or not _is_plain(function, operands, weights):
        return aten_backward(
            *(grad, query, key, value, operands, score, scale, indices, weights, dropout_p, operand_needs_grad),
            sparse_products=CppProducts,
        )
    grad, key, value = map(with_dense_rows, (grad, key, value))
    indices, weights = indices.contiguous(), weights.contiguous()
    grad_query = torch.empty(query.shape, dtype=query.dtype)
    grad_products = torch.empty(weights.shape)
    summed = torch.empty(weights.shape) if dropout_p > 0 else None
    batch, heads, queries, depth = query.shape
    arguments = _GradientArguments(
        *map(TensorArgument.of, (grad, key, value)),
        *(indices.data_ptr(), weights.data_ptr(), grad_products.data_ptr()),
        *(None if summed is None else summed.data_ptr(), grad_query.data_ptr()),
        *(batch, heads, key.size(1), value.size(1), queries, depth, value.size(-1), weights.size(-1)),
        *(scale, 1 / (1 - dropout_p) if dropout_p < 1 else 0.0, torch.get_num_threads()),
    )
    run("row_gradients", query.dtype, arguments)
    grad_value = CppProducts(indices, value, weights.dtype).scatter_rows(grad, weights if summed is None else summed)
    grad_key = CppProducts(indices, key, weights.dtype).scatter_rows(query, grad_products)
    return [grad_query, grad_key, grad_value]


def _is_plain(function: Score, operands: Sequence[Tensor], weights: Tensor) -> bool:
    """Whether the gradient of each kept score is that of its product.

    Under masks it is, but for the keys of a row that has no other, which have none: the weights of that row are NaN.
    """
    if function.after or function.sink is not None:
        return False
    only_masks, only_adds = keeps_gradients(function.before, operands)
    if only_adds or str(function) == "causal":
        return True
    return only_masks and not weights[..., 0].isnan().any()
