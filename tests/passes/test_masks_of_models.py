"""Masks and biases that a model builds of positions and small tensors: none of queries x keys is left."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import DynamoTrace, assert_same, drawn
from torch import Tensor

BATCH, HEADS, QUERIES, KEYS, SIZE = 2, 3, 7, 9, 4
LOWEST = torch.finfo(torch.float32).min
SHARED = f"{QUERIES}, {KEYS}]"
"""How the shape of a tensor of queries x keys ends in the text of a graph."""

Bias = Callable[[Tensor, Tensor], Tensor]
BIASES: list[Bias] = []


def bias(function: Bias) -> Bias:
    """A mask or bias from `kept`, the keys that are no padding, [BATCH, KEYS], and a table [32, HEADS]."""
    BIASES.append(function)
    return function


def attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(SIZE) + added).softmax(-1) @ v


def indices() -> tuple[Tensor, Tensor, Tensor]:
    """Batch, query and key positions that broadcast against the scores."""
    batch, queries, keys = (torch.arange(n) + 0 for n in (BATCH, QUERIES, KEYS))
    return batch[:, None, None, None], queries[None, None, :, None], keys[None, None, None, :]


@bias
def causal_and_padding_chosen_from_scalar_tensors(kept: Tensor, table: Tensor) -> Tensor:
    batch, queries, keys = indices()
    allowed = queries.new_ones((), dtype=torch.bool) & (keys <= queries) & kept[batch, keys]
    allowed = allowed.expand(BATCH, -1, QUERIES, KEYS)
    return torch.where(allowed, torch.zeros(()), LOWEST)


@bias
def sliding_window(kept: Tensor, table: Tensor) -> Tensor:
    _, queries, keys = indices()
    allowed = queries.new_ones((), dtype=torch.bool) & (keys > queries - 3) & (keys <= queries)
    return torch.where(allowed, torch.tensor(0.0), LOWEST)


@bias
def relative_buckets_summed_in_place(kept: Tensor, table: Tensor) -> Tensor:
    """T5's, whose far positions share buckets of growing width."""
    distance = torch.arange(KEYS)[None, :] - torch.arange(QUERIES)[:, None]
    buckets = 0 + (distance > 0).to(torch.long) * 16
    distance = distance.abs()
    far = 2 + (torch.log(distance.float() / 2) / math.log(8) * 6).to(torch.long)
    far = torch.min(far, torch.full_like(far, 15))
    buckets += torch.where(distance < 2, distance, far)
    return F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)


@bias
def distance_into_the_past(kept: Tensor, table: Tensor) -> Tensor:
    """T5's in a decoder."""
    distance = torch.arange(KEYS)[None, :] - torch.arange(QUERIES)[:, None]
    distance = -torch.min(distance, torch.zeros_like(distance))
    return table[distance].permute(2, 0, 1)


@bias
def zeros_of_the_shape_of_the_scores(kept: Tensor, table: Tensor) -> Tensor:
    return torch.zeros((1, HEADS, QUERIES, KEYS))


def rewritten(model: Callable[..., Tensor]) -> tuple[int, str]:
    """The mask bytes and the graph of a model after the rewrite; it computes what dense computes."""
    kept = torch.arange(KEYS) < torch.tensor([[KEYS], [KEYS - 3]])
    shapes = ((BATCH, HEADS, QUERIES, SIZE), (BATCH, HEADS, KEYS, SIZE), (BATCH, HEADS, KEYS, SIZE), (32, HEADS))
    q, k, v, table = (drawn(*shape) for shape in shapes)
    inputs = (q, k, v, kept, table)
    run, report, text = DynamoTrace(model, inputs).rewrite(k="all")
    assert_same(run(*inputs), model(*inputs))
    (site,) = (site for site in report if site.kind == "attention")
    assert site.rewritten
    assert site.mask_bytes is not None
    return site.mask_bytes, text


@pytest.mark.parametrize("added", BIASES, ids=lambda function: function.__name__)
def test_no_tensor_of_queries_and_keys_is_left(added: Bias) -> None:
    mask_bytes, text = rewritten(lambda q, k, v, kept, table: attend(q, k, v, added(kept, table)))
    assert mask_bytes == 0
    assert SHARED not in text


def test_write_to_a_result_of_its_own_memory_does_not_keep_a_mask() -> None:
    """As a mixture of experts between two attentions: what it writes to is a product that the dialect does not know."""

    def model(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, table: Tensor) -> Tensor:
        mask = causal_and_padding_chosen_from_scalar_tensors(kept, table)
        q = torch.cross(q[..., :3], q[..., 1:], dim=-1)
        q += table.mean()
        return attend(F.pad(q, (0, 1)), k, v, mask)

    mask_bytes, text = rewritten(model)
    assert mask_bytes == 0
    assert SHARED not in text


def test_write_that_others_see_keeps_the_mask() -> None:
    """The distances are read before and after the write, so neither reading tells what the other sees."""

    def model(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, table: Tensor) -> Tensor:
        distance = torch.arange(KEYS)[None, :] - torch.arange(QUERIES)[:, None] + 0
        before = distance.float()
        distance += 1
        return attend(q, k, v, before + distance)

    assert rewritten(model)[0] > 0


def test_write_through_a_view_keeps_the_mask() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, table: Tensor) -> Tensor:
        distance = (torch.arange(KEYS)[None, :] - torch.arange(QUERIES)[:, None]).float()
        first = distance[:1]
        first += 5.0
        return attend(q, k, v, distance)

    assert rewritten(model)[0] > 0


def test_scalar_tensor_of_a_wider_dtype_keeps_the_mask() -> None:
    """float16 with a scalar tensor of float32 is float16, and with a tensor that has axes float32."""

    def model(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, table: Tensor) -> Tensor:
        distance = (torch.arange(KEYS)[None, :] - torch.arange(QUERIES)[:, None]).half()
        return attend(q, k, v, (distance * torch.tensor(0.1)).float())

    assert rewritten(model)[0] > 0
