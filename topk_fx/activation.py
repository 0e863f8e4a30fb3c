"""The activations that an FFN site may have, with their derivatives: h = act(x)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative; `is_relu_like` if most of its outputs are exactly zero.

    `values_of` is the activation that has the same values, if they differ in the derivative alone.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    is_relu_like: bool = False
    values_of: str = ""


def _gelu_derivative(x: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return cdf + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _sigmoid_gate_derivative(slope: float) -> Callable[[Tensor], Tensor]:
    def derivative(x: Tensor) -> Tensor:
        gate = torch.sigmoid(slope * x)
        return gate + slope * x * gate * (1 - gate)

    return derivative


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda x: (~(x <= 0)).to(x.dtype), is_relu_like=True),
    "relu2": Activation(lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x), is_relu_like=True),
    # At 0, as where a token is zero, the derivatives of these are 1 and 1/2, and that of relu 0.
    "relu_clamp": Activation(
        lambda x: torch.where(x < 0, 0.0, x), lambda x: (~(x < 0)).to(x.dtype), is_relu_like=True, values_of="relu"
    ),
    "relu_maximum": Activation(
        lambda x: torch.maximum(x, x.new_zeros(())),
        lambda x: torch.where(x == 0, 0.5, (~(x < 0)).to(x.dtype)),
        is_relu_like=True,
        values_of="relu",
    ),
    "gelu": Activation(F.gelu, _gelu_derivative),
    "gelu_tanh": Activation(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_derivative),
    "silu": Activation(F.silu, _sigmoid_gate_derivative(1.0)),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), _sigmoid_gate_derivative(1.702)),
    "sigmoid": Activation(torch.sigmoid, lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x))),
}
