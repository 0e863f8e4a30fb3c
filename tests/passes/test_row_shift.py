"""The row maximum that a model subtracts is left out only where the scores stay in range without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import ExportTrace, assert_same, values_and_gradients
from spellings import tensors
from torch import Tensor

MIN = torch.finfo(torch.float32).min
Change = Callable[[Tensor, Tensor], Tensor]


def shifted(scores: Tensor) -> Tensor:
    return scores - scores.amax(-1, keepdim=True)


STAYS_IN_RANGE: dict[str, Change] = {
    "at_the_softmax": lambda s, mask: shifted(s + mask),
    "between_scales": lambda s, mask: shifted((s + mask) / 32) * 32,
    "before_a_smaller_scale": lambda s, mask: shifted(s + mask) * 0.5,
    "of_products": lambda s, mask: shifted(s) / 0.5 + mask,
    "of_scores_filled_with_little": lambda s, mask: shifted(s.masked_fill(mask < 0, -1e9)) * 2,
    "of_clamped_scores": lambda s, mask: shifted((s + mask).clamp(-50, 50)) * 2,
}
OVERFLOWS: dict[str, Change] = {
    "before_a_scale": lambda s, mask: shifted(s + mask) * 2,
    "before_a_temperature": lambda s, mask: shifted(s + mask) / 0.5,
    "before_a_tensor": lambda s, mask: shifted(s.masked_fill(mask < 0, MIN)) * s.new_full((3, 1, 1), 2.0),
    "before_another_mask": lambda s, mask: shifted(s + mask) + mask,
}


def model_of(change: Change) -> Callable[..., Tensor]:
    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return change(q @ k.transpose(-2, -1), mask).softmax(-1) @ v

    return model


@pytest.mark.parametrize("name", [*STAYS_IN_RANGE, *OVERFLOWS])
def test_row_that_is_masked_whole_is_as_in_dense(name: str) -> None:
    available = tensors()
    mask = torch.zeros(7, 9).masked_fill(~available["keep_some_rows"], MIN)
    inputs = (*(available[x] for x in "qkv"), mask)
    model = model_of({**STAYS_IN_RANGE, **OVERFLOWS}[name])
    rewritten, report, _ = ExportTrace(model, inputs).rewrite(k="all")
    assert [site.reason for site in report] == ["" if name in STAYS_IN_RANGE else "unknown_score_op"]
    assert_same(values_and_gradients(rewritten, inputs), values_and_gradients(model, inputs))
