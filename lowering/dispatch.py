"""What computes an attention: the lowering that the op names, or the best for its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from topk_fx.errors import LoweringUnavailableError

from . import aten, cpu, triton
from .choice import lowering_of

_LOWERINGS = {"aten": aten, "cpu": cpu, "triton": triton}


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
    zero_empty_rows: bool,
    lowering: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, indices and weights, as `aten.attention_forward`."""
    chosen = _choose(lowering, query, key, value, operands, score, k)
    return chosen.attention_forward(
        query, key, value, operands, score, scale, k, dropout_keep, dropout_p, zero_empty_rows
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
    lowering: str = "",
) -> list[Tensor]:
    """The gradients, as `aten.attention_backward`."""
    chosen = _choose(lowering, query, key, value, operands, score, indices.size(-1))
    return chosen.attention_backward(
        grad, query, key, value, operands, score, scale, indices, weights, dropout_p, operand_needs_grad
    )


def _choose(
    lowering: str, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], score: str, k: int
) -> Any:
    name, why = lowering_of(lowering, (query, key, value, operands, score, None, k))
    if lowering not in ("", name):
        raise LoweringUnavailableError(f"lowering={lowering!r} cannot run: {why}")
    return _LOWERINGS[name]
