"""Numbers written to places of the scores by index become steps, and what is more than that stays dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spellings import INF, tensors
from torch import Tensor, nn

import topk_fx

Write = Callable[[Tensor, Tensor], Any]


class Attention(nn.Module):
    """Attention whose scores [2, 3, 7, 9] a function writes to; its second argument is a mask [7, 9]."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        self.write(scores, keep)
        return scores.softmax(-1) @ v


def last_keys(scores: Tensor, keep: Tensor) -> None:
    scores[..., 6:] = -INF


def keys_from_the_end(scores: Tensor, keep: Tensor) -> None:
    scores[:, :, :, -3:-1] = -1e4


def one_key(scores: Tensor, keep: Tensor) -> None:
    scores[:, :, :, -2] = 0.5


def part_of_both_axes(scores: Tensor, keep: Tensor) -> None:
    scores[:, :, 2:5, :4] = 2.0
    scores[:, :, 6] = 0.0


def mask_of_queries_and_keys(scores: Tensor, keep: Tensor) -> None:
    scores[:, :, ~keep] = -INF


def mask_after_an_ellipsis(scores: Tensor, keep: Tensor) -> None:
    scores[..., ~keep] = -1e9


def mask_of_everything(scores: Tensor, keep: Tensor) -> None:
    scores[~keep.expand(2, 3, 7, 9)] = -INF


def mask_of_keys(scores: Tensor, keep: Tensor) -> None:
    scores[:, :, :, ~keep[3]] = -INF


def mask_of_keys_for_some_queries(scores: Tensor, keep: Tensor) -> None:
    scores[:, :, 4:, ~keep[3]] = -7.0


def mask_by_index_put(scores: Tensor, keep: Tensor) -> None:
    scores.index_put_((~keep.expand(2, 3, 7, 9),), torch.tensor(-1e9))


def diagonal(scores: Tensor, keep: Tensor) -> None:
    places = torch.arange(7)
    scores[:, :, places, places] = -5e4


WRITES = [
    last_keys, keys_from_the_end, one_key, part_of_both_axes, mask_of_queries_and_keys, mask_after_an_ellipsis,
    mask_of_everything, mask_of_keys, mask_of_keys_for_some_queries, mask_by_index_put, diagonal,
]  # fmt: skip


def inputs() -> tuple[Tensor, ...]:
    return tuple(tensors()[name] for name in ("q", "k", "v", "keep"))


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_write_is_a_step(write: Write) -> None:
    model, options = Attention(write), {"k": "all", "inner": "eager", "validate": "raise"}
    topk_fx.clear_reports()
    found = torch.compile(model, backend="topk", options=options, fullgraph=True)(*inputs())
    (report,) = topk_fx.reports()
    assert [site.rewritten for site in report.sites] == [True], report
    torch.testing.assert_close(found, model(*inputs()))


BY_MASK = [
    mask_of_queries_and_keys,
    mask_after_an_ellipsis,
    mask_of_everything,
    mask_of_keys,
    mask_by_index_put,
    diagonal,
]


@pytest.mark.parametrize("write", BY_MASK, ids=lambda write: write.__name__)
def test_exported_write_is_a_step(write: Write) -> None:
    """torch.export writes a slice as a view that is filled, which is left dense, and the others as index_put_."""
    model = Attention(write)
    program, report = topk_fx.rewrite(torch.export.export(model, inputs()), k="all", validate="raise")
    assert [site.rewritten for site in report.sites] == [True], report
    torch.testing.assert_close(program.module()(*inputs()), model(*inputs()))


def test_gradient_stops_where_a_number_was_written() -> None:
    model = Attention(part_of_both_axes)
    dense, ours = ([x.clone().requires_grad_() for x in inputs()[:3]] for _ in range(2))
    keep = inputs()[3]
    expected = torch.autograd.grad(model(*dense, keep).square().sum(), dense)
    compiled = torch.compile(model, backend="topk", options={"k": "all", "inner": "eager"})
    found = torch.autograd.grad(compiled(*ours, keep).square().sum(), ours)
    torch.testing.assert_close(found, expected)


def values_of_a_tensor(scores: Tensor, keep: Tensor) -> None:
    scores[..., 6:] = keep[:, :3].float()


def places_out_of_order(scores: Tensor, keep: Tensor) -> None:
    scores[:, :, torch.arange(7), torch.arange(7).flip(0)] = -INF


def every_second_key(scores: Tensor, keep: Tensor) -> None:
    scores[..., ::2] = -INF


def keys_by_number(scores: Tensor, keep: Tensor) -> None:
    scores[:, :, :, torch.tensor([1, 4])] = -INF


def some_batches(scores: Tensor, keep: Tensor) -> None:
    scores[1:, ..., 3] = -INF


LEFT_DENSE = [values_of_a_tensor, places_out_of_order, every_second_key, keys_by_number, some_batches]


@pytest.mark.parametrize("write", LEFT_DENSE, ids=lambda write: write.__name__)
def test_other_write_is_left_dense(write: Write) -> None:
    model = Attention(write)
    report = topk_fx.explain(model, inputs(), k="all")
    assert [(site.rewritten, site.reason) for site in report.sites] == [(False, "unknown_score_op")], report
