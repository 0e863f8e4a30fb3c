"""Programs that fuzzing has found to be rewritten wrongly, each reduced to what mattered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import ExportTrace, values_and_gradients
from torch import Tensor


def check(model: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """k="all" computes the same, to the rounding of float64. Returns the reasons of the sites that stay dense."""
    rewritten, report, _ = ExportTrace(model, inputs).rewrite(k="all")
    expected = values_and_gradients(model, inputs)
    torch.testing.assert_close(values_and_gradients(rewritten, inputs), expected, rtol=0, atol=1e-12, equal_nan=True)
    return [site.reason for site in report]


def test_bias_of_float64_looked_up_and_scaled_is_not_rounded_to_float32() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        distance = torch.arange(5)[:, None] - torch.arange(4)
        return torch.add(q @ k.mT, table[distance.clamp(0, 3)], alpha=2).softmax(-1) @ v

    assert check(model, *(torch.randn(*shape, dtype=torch.float64) for shape in ((5, 2), (4, 2), (4, 3), (4,)))) == [""]
