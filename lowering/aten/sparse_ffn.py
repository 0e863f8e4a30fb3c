"""The backward of the top-k FFN by the sparse products of a lowering, of the k kept units of each token alone.

With h [N, k] the kept hidden units, and Y the gradient of the output:

    grad h        = Y . rows of W_down^T           dot products
    grad W_down^T = sum over tokens of h * Y       rows scattered to the units
    grad W_up     = sum over tokens of grad u * x, and so for the gate
    grad x        = sum over kept units of grad u * W_up, and so for the gate
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from topk_fx.activation import ACTIVATIONS
from topk_fx.reference import compute

from .attention import dropout_factor
from .bags import SparseProducts, SparseProductsOf


def sparse_ffn_backward(
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
    *,
    sparse_products: SparseProductsOf,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients as `aten.ffn_backward`; the products have the dtype of the table, dot products float32."""
    products = _Products(indices, sparse_products)
    function, derivative = ACTIVATIONS[activation].function, ACTIVATIONS[activation].derivative
    hidden = function(up) if gate_weight is None else function(gate) * up
    grad_hidden = products.dot_products(grad, down_weight.T.contiguous())
    if dropout_keep is not None:
        factor = dropout_factor(dropout_keep, dropout_p, up.dtype)
        grad_hidden, hidden = grad_hidden * factor, hidden * factor
    grad_down = products.scatter_rows(grad, hidden, down_weight.T).T.contiguous()
    grad_up = grad_hidden * (derivative(up) if gate_weight is None else function(gate))
    grad_input = products.weighted_sum(grad_up, up_weight)
    grad_up_weight, grad_up_bias = products.layer_gradients(grad_up, input, up_weight)
    if gate_weight is None:
        none = up_weight.new_empty(0), up.new_empty(0)
        return grad_input.to(input.dtype), grad_up_weight, grad_up_bias, *none, grad_down
    grad_gate = grad_hidden * up * derivative(gate)
    grad_input += products.weighted_sum(grad_gate, gate_weight)
    gate_gradients = products.layer_gradients(grad_gate, input, gate_weight)
    return grad_input.to(input.dtype), grad_up_weight, grad_up_bias, *gate_gradients, grad_down


@dataclasses.dataclass(frozen=True)
class _Products:
    """Products with the kept units, indices [N, k], as those of one head whose keys are the units."""

    indices: Tensor
    sparse_products: SparseProductsOf

    def dot_products(self, rows: Tensor, table: Tensor) -> Tensor:
        """[N, k]: of rows [N, D] and the kept rows of a table [F, D]."""
        return self._of(table).dot_products(rows[None, None])[0, 0]

    def weighted_sum(self, weights: Tensor, table: Tensor) -> Tensor:
        """float32 [N, D]: two of them may still be added."""
        return self._of(compute(table)).weighted_sum(weights[None, None])[0, 0]

    def scatter_rows(self, rows: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        """Row j: the sum of weights[n, j] * rows[n] over the tokens n that keep unit j; shape and dtype of `like`."""
        return self._of(like).scatter_rows(rows[None, None], weights[None, None])[0, 0]

    def layer_gradients(self, grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of the weight and the bias of a layer, from the gradient [N, k] of its kept outputs."""
        bias = grad.new_zeros(weight.size(0)).index_add_(0, self.indices.flatten(), grad.flatten())
        return self.scatter_rows(input, grad, weight), bias

    def _of(self, table: Tensor) -> SparseProducts:
        return self.sparse_products(self.indices[None, None], table[None, None], torch.float32)
