"""The top-k FFN in chunks of tokens.

Many tokens share no units, so both products of a chunk are dense GEMMs over [chunk, F] with zeros where nothing is
kept: the time of a dense FFN, in memory that does not grow with tokens x hidden units. Saved for the backward are k
units a token. Few tokens are as fast as the weights are read: that is the work of a kernel, `lowering.cpu.ffn`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_fx.activation import ACTIVATIONS
from topk_fx.reference import compute

from .attention import dropout_factor, select

HIDDEN_BUDGET = 2**23
"""Elements of one chunk of hidden units: 32 MiB in float32."""


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [N, D], unit indices int32, and the pre-activations of the kept units (up, and gate or empty), [N, k]."""
    tokens, hidden_size = input.size(0), down_weight.size(1)
    kept = min(k, hidden_size)
    dtype = compute(input).dtype
    output = input.new_empty(tokens, down_weight.size(0))
    indices = torch.empty(tokens, kept, dtype=torch.int32, device=input.device)
    up_kept = input.new_empty(tokens, kept, dtype=dtype)
    gate_kept = input.new_empty(tokens, kept if gate_weight is not None else 0, dtype=dtype)
    weights = {"down": compute(down_weight)}
    if up_weight is not None:
        weights["up"] = compute(up_weight)
    if gate_weight is not None:
        weights["gate"] = compute(gate_weight)
    for rows in _chunks(tokens, hidden_size):
        x = compute(input[rows])
        up = x
        if up_weight is not None:
            up = F.linear(x, weights["up"], None if up_bias is None else up_bias.to(dtype))
        gate = None
        if gate_weight is not None:
            gate = F.linear(x, weights["gate"], None if gate_bias is None else gate_bias.to(dtype))
        hidden = _hidden(activation, up, gate)
        _, chosen = select(hidden.abs(), kept)
        hidden_kept = hidden.gather(-1, chosen)
        if dropout_keep is not None:
            hidden_kept = hidden_kept * dropout_factor(dropout_keep[rows], dropout_p, dtype)
        sparse = torch.zeros_like(hidden).scatter_(-1, chosen, hidden_kept)
        output[rows] = F.linear(sparse, weights["down"]).to(input.dtype)
        indices[rows] = chosen.to(torch.int32)
        up_kept[rows] = up.gather(-1, chosen)
        if gate is not None:
            gate_kept[rows] = gate.gather(-1, chosen)
    return output, indices, up_kept, gate_kept


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, up weight and bias, gate weight and bias, and down weight; empty for what is None."""
    tokens, hidden_size = input.size(0), down_weight.size(1)
    dtype = up.dtype
    derivative = ACTIVATIONS[activation].derivative
    down = compute(down_weight)
    up_rows = None if up_weight is None else compute(up_weight)
    gate_rows = None if gate_weight is None else compute(gate_weight)
    grad_input = input.new_empty(input.shape)
    # Their rows are contiguous, as the fake promises, whatever those of the weights are.
    grad_down = down.new_zeros(down.shape)
    grad_up, grad_gate = (down.new_zeros((0,) if x is None else x.shape) for x in (up_weight, gate_weight))
    grad_up_bias, grad_gate_bias = (down.new_zeros(x.size(0)) for x in (grad_up, grad_gate))
    for rows in _chunks(tokens, hidden_size):
        chosen = indices[rows].long()
        y = grad[rows].to(dtype)
        x = input[rows].to(dtype)
        grad_hidden = (y @ down).gather(-1, chosen)
        hidden = _hidden(activation, up[rows], gate[rows] if gate_weight is not None else None)
        if dropout_keep is not None:
            factor = dropout_factor(dropout_keep[rows], dropout_p, dtype)
            grad_hidden, hidden = grad_hidden * factor, hidden * factor
        dense = y.new_zeros(chosen.size(0), hidden_size)
        grad_down += y.T @ dense.scatter_(-1, chosen, hidden)
        if gate_rows is None:
            grad_up_kept = grad_hidden * derivative(up[rows])
            grad_x = torch.zeros_like(x)
        else:
            grad_up_kept = grad_hidden * ACTIVATIONS[activation].function(gate[rows])
            grad_gate_kept = grad_hidden * up[rows] * derivative(gate[rows])
            dense.zero_().scatter_(-1, chosen, grad_gate_kept)
            grad_gate += dense.T @ x
            grad_gate_bias += dense.sum(0)
            grad_x = dense @ gate_rows
        dense.zero_().scatter_(-1, chosen, grad_up_kept)
        if up_rows is None:
            grad_input[rows] = dense.to(input.dtype)
            continue
        grad_up += dense.T @ x
        grad_up_bias += dense.sum(0)
        grad_input[rows] = (grad_x + dense @ up_rows).to(input.dtype)
    return (
        grad_input,
        grad_up.to(down_weight.dtype),
        grad_up_bias,
        grad_gate.to(down_weight.dtype),
        grad_gate_bias,
        grad_down.to(down_weight.dtype),
    )


def _chunks(tokens: int, hidden_size: int) -> list[slice]:
    size = max(1, HIDDEN_BUDGET // max(1, hidden_size))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _hidden(activation: str, up: Tensor, gate: Tensor | None) -> Tensor:
    function = ACTIVATIONS[activation].function
    return function(up) if gate is None else function(gate) * up
