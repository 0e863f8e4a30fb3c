"""The backward of the top-k FFN by sparse products, of the k kept units of each token alone.

With h [N, k] the kept hidden units, and Y the gradient of the output:

    grad h        = Y . rows of W_down^T           dot products
    grad W_down^T = sum over tokens of h * Y       rows scattered to the units
    grad W_up     = sum over tokens of grad u * x, and so for the gate
    grad x        = sum over kept units of grad u * W_up, and so for the gate
"""

from __future__ import annotations

import torch
from torch import Tensor

from topk_fx.activation import ACTIVATIONS
from topk_fx.reference import compute

from ..aten.attention import dropout_factor
from .sparse import CppProducts


def ffn_backward(
    grad: Tensor,
    input: Tensor,
    up_weight: Tensor,
    gate_weight: Tensor | None,
    down_weight: Tensor,
    indices: Tensor,
    up: Tensor,
    gate: Tensor,
    dropout_keep: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients as `aten.ffn_backward`."""
    function, derivative = ACTIVATIONS[activation].function, ACTIVATIONS[activation].derivative
    hidden = function(up) if gate_weight is None else function(gate) * up
    grad_hidden = _products(indices, down_weight.T.contiguous()).dot_products(grad[None, None])[0, 0]
    if dropout_keep is not None:
        factor = dropout_factor(dropout_keep, dropout_p, up.dtype)
        grad_hidden, hidden = grad_hidden * factor, hidden * factor
    grad_down = _scatter(indices, hidden, grad, down_weight.T).T.contiguous()
    grad_up = grad_hidden * (derivative(up) if gate_weight is None else function(gate))
    grad_input = _weighted_sum(indices, grad_up, up_weight)
    grad_up_weight, grad_up_bias = _layer_gradients(indices, grad_up, input, up_weight)
    if gate_weight is None:
        none = up_weight.new_empty(0), up.new_empty(0)
        return grad_input.to(input.dtype), grad_up_weight, grad_up_bias, *none, grad_down
    grad_gate = grad_hidden * up * derivative(gate)
    grad_input += _weighted_sum(indices, grad_gate, gate_weight)
    gate_gradients = _layer_gradients(indices, grad_gate, input, gate_weight)
    return grad_input.to(input.dtype), grad_up_weight, grad_up_bias, *gate_gradients, grad_down


def _layer_gradients(indices: Tensor, grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the weight and the bias of a layer, from the gradient [N, k] of its kept outputs."""
    bias = grad.new_zeros(weight.size(0)).index_add_(0, indices.flatten(), grad.flatten())
    return _scatter(indices, grad, input, weight), bias


def _scatter(indices: Tensor, weights: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Row j: the sum of weights[n, j] * rows[n] over the tokens n that keep unit j; shape and dtype of `like`."""
    return _products(indices, like).scatter_rows(rows[None, None], weights)[0, 0]


def _weighted_sum(indices: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """float32 [N, D]: two of them may still be added."""
    return _products(indices, compute(rows)).weighted_sum(weights)[0, 0]


def _products(indices: Tensor, keys: Tensor) -> CppProducts:
    return CppProducts(indices[None, None], keys[None, None], torch.float32)
