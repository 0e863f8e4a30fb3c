"""What computes an attention or an FFN: the lowering that the op names, or the best for its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from topk_fx.errors import LoweringUnavailableError

from . import aten, cpu, triton
from .choice import ffn_lowering_of, lowering_of
from .cpu.key_copy import KeyCopy, why_no_copy, write

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
    min_slots: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, indices and weights, as `aten.attention_forward`, with empty slots up to `min_slots`."""
    operands = operands or ()  # under inference mode, AOTInductor's None for an empty list arrives here
    chosen = _choose(lowering, query, key, value, operands, score, k)
    empty = min_slots - min(k, key.size(-2))
    if dropout_keep is not None and empty > 0:
        dropout_keep = dropout_keep[..., :-empty]
    output, indices, weights = chosen.attention_forward(
        query, key, value, operands, score, scale, k, dropout_keep, dropout_p, zero_empty_rows
    )
    if empty > 0:
        indices, weights = F.pad(indices, (0, empty), value=-1), F.pad(weights, (0, empty))
    return output, indices, weights


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


def attention_screened(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    k: int,
    panels: Tensor,
    facts: Tensor,
    means: Tensor,
    zero_empty_rows: bool = True,
) -> Tensor:
    """The output of `attention_forward`, in C++ by a copy of the keys if that can serve."""
    operands = operands or ()
    arguments = (query, key, value, operands, score, scale, k, None, 0.0, zero_empty_rows)
    name, _ = lowering_of("", arguments[:7])
    if name != "cpu" or panels.size(2) == 0 or why_no_copy(key):
        return attention_forward(*arguments)[0]
    return cpu.attention_forward(*arguments, KeyCopy(panels, facts, means))[0]


def copy_keys(rows: Tensor, panels: Tensor, facts: Tensor, means: Tensor, first: int) -> None:
    """Writes keys `first`, `first` + 1 ... into their copy."""
    write(rows, KeyCopy(panels, facts, means), first)


def ffn_forward(
    input: Tensor,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    activation: str,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
    lowering: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, indices and pre-activations, as `aten.ffn_forward`."""
    chosen = _choose_ffn(lowering, input, up_weight)
    return chosen.ffn_forward(
        *(input, up_weight, up_bias, gate_weight, gate_bias, down_weight, activation, k, dropout_keep, dropout_p)
    )


def ffn_backward(
    grad: Tensor,
    input: Tensor,
    up_weight: Tensor | None,
    gate_weight: Tensor | None,
    down_weight: Tensor,
    indices: Tensor,
    up: Tensor,
    gate: Tensor,
    dropout_keep: Tensor | None,
    activation: str,
    dropout_p: float,
    lowering: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, as `aten.ffn_backward`."""
    chosen = _choose_ffn(lowering, input, up_weight, indices.size(-1))
    return chosen.ffn_backward(
        *(grad, input, up_weight, gate_weight, down_weight, indices, up, gate, dropout_keep, activation, dropout_p)
    )


def _choose(
    lowering: str, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], score: str, k: int
) -> Any:
    name, why = lowering_of(lowering, (query, key, value, operands, score, None, k))
    if lowering not in ("", name):
        raise LoweringUnavailableError(f"lowering={lowering!r} cannot run: {why}")
    return _LOWERINGS[name]


def _choose_ffn(lowering: str, input: Tensor, up_weight: Tensor | None, kept_in_backward: int | None = None) -> Any:
    name, why = ffn_lowering_of(lowering, (input, up_weight), kept_in_backward)
    if lowering not in ("", name):
        raise LoweringUnavailableError(f"lowering={lowering!r} cannot run: {why}")
    return _LOWERINGS[name]
