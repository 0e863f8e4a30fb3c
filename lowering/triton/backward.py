"""Launches the backward: one kernel where the score function leaves gradients as they are, else products one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from topk_fx.score import Score

from ..aten import attention_backward as aten_backward
from ..plain_gradients import keeps_gradients
from .arguments import device_of, operand_arguments, power_of_two, score_function, with_dense_rows
from .launch import Launch, launch_now

KEPT_BUDGET = 2**25
"""Kept entries that the parts of the backward work on at a time where no one kernel does it all."""


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
    launch: Launch = launch_now,
) -> list[Tensor]:
    """The gradients as `aten.attention_backward`."""
    if not is_one_kernel(grad, query, value, operands, score, weights, operand_needs_grad):
        return aten_backward(
            grad, query, key, value, operands, score, scale, indices, weights, dropout_p, operand_needs_grad,
            sparse_products=TritonProducts, kept_budget=KEPT_BUDGET,
        )  # fmt: skip
    from .kernels.backward import gradients

    grad, query, key, value = map(with_dense_rows, (grad, query, key, value))
    batch, heads, queries, depth = query.shape
    keys, value_size = value.shape[-2:]
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    function, kept = Score.parse(score), weights.size(-1)
    lanes = power_of_two(kept)
    _, only_adds = keeps_gradients(function.before, operands)
    has_mask = not only_adds and str(function) != "causal"  # under a causal mask alone every row has a key
    warps = max(1, min(16, lanes * _columns(query, value) // 2048))
    launch(
        gradients, (batch * heads * queries,),
        (query, key, value, grad, indices.contiguous(), weights.contiguous(), grad_query, grad_key, grad_value,
         *(x.stride()[:3] for x in (query, key, value, grad)), heads, heads // key.size(1), heads // value.size(1),
         queries, keys, float(scale), *operand_arguments(function, operands, query), kept,
         1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
        {"score": score_function(function.before, function, operands), "HAS_MASK": has_mask,
         "HAS_DROPOUT": dropout_p > 0, "D": depth, "BD": power_of_two(depth, 16), "DV_SIZE": value_size,
         "BDV": power_of_two(value_size, 16), "BK": lanes, "num_warps": warps},
    )  # fmt: skip
    return [grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)]


def is_one_kernel(
    grad: Tensor,
    query: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    weights: Tensor,
    operand_needs_grad: Sequence[bool],
) -> bool:
    """Whether one kernel computes all gradients: it adds to those of keys, and knows no derivative but of masks."""
    function = Score.parse(score)
    return (
        0 not in (grad.numel(), weights.numel())
        and any(keeps_gradients(function.before, operands))
        and not function.after
        and not any(operand_needs_grad)
        and not torch.are_deterministic_algorithms_enabled()
        and power_of_two(weights.size(-1)) * _columns(query, value) <= 2**14
    )


def _columns(query: Tensor, value: Tensor) -> int:
    return power_of_two(max(query.size(-1), value.size(-1)), 16)


class TritonProducts:
    """`aten.bags.SparseProducts` by Triton kernels; results have the dtype of the keys, dot products float32."""

    def __init__(self, indices: Tensor, keys: Tensor, dtype: torch.dtype) -> None:
        self.indices, self.keys = indices.contiguous(), with_dense_rows(keys)

    def dot_products(self, rows: Tensor) -> Tensor:
        from .kernels.backward import dot_products

        rows, products = with_dense_rows(rows), self.indices.new_empty(self.indices.shape, dtype=torch.float32)
        with device_of(rows):
            dot_products[self._grid](
                rows, self.keys, self.indices, products, rows.stride()[:3], self.keys.stride()[:3], *self._sizes,
                self.indices.size(-1), **self._columns,
            )  # fmt: skip
        return products

    def weighted_sum(self, weights: Tensor) -> Tensor:
        from .kernels.backward import weighted_sum

        result = self.keys.new_empty(*self.indices.shape[:-1], self.keys.size(-1))
        with device_of(result):
            weighted_sum[self._grid](
                self.keys, self.indices, weights.contiguous(), result, self.keys.stride()[:3], *self._sizes,
                self.indices.size(-1), **self._columns,
            )  # fmt: skip
        return result

    def scatter_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        from .kernels.backward import scatter_rows, sum_of_rows

        rows, weights = with_dense_rows(rows), weights.contiguous()
        kept = self.indices.size(-1)
        with device_of(rows):
            if torch.are_deterministic_algorithms_enabled():
                entries, starts = self._entries_of_keys()
                result = torch.empty(self.keys.shape, dtype=self.keys.dtype, device=rows.device)
                sum_of_rows[(starts.numel() - 1,)](
                    rows, entries, starts, weights, result, rows.stride()[:3], *self._sizes, kept, **self._columns
                )
                return result
            result = torch.zeros(self.keys.shape, dtype=torch.float32, device=rows.device)
            scatter_rows[self._grid](
                rows, self.indices, weights, result, rows.stride()[:3], *self._sizes, self.keys.size(2), kept,
                **self._columns,
            )  # fmt: skip
        return result.to(self.keys.dtype)

    def _entries_of_keys(self) -> tuple[Tensor, Tensor]:
        """Positions in the indices, sorted by the key that stands there, and where each key's begin."""
        batch, key_heads, keys, _ = self.keys.shape
        heads = self.indices.size(1)
        head_starts = torch.arange(batch * key_heads, device=self.indices.device).mul_(keys)
        head_starts = head_starts.repeat_interleave(heads // key_heads).view(batch, heads, 1, 1)
        key_of_entry = torch.where(self.indices < 0, batch * key_heads * keys, self.indices + head_starts).view(-1)
        key_of_entry, entries = key_of_entry.sort(stable=True)
        starts = torch.searchsorted(key_of_entry, torch.arange(batch * key_heads * keys + 1, device=entries.device))
        return entries, starts

    @property
    def _grid(self) -> tuple[int]:
        return (self.indices.shape[:-1].numel(),)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        heads, queries = self.indices.shape[1:3]
        return heads, heads // self.keys.size(1), queries

    @property
    def _columns(self) -> dict[str, int]:
        columns = power_of_two(self.keys.size(-1), 16)
        return {"D": self.keys.size(-1), "BD": columns, "BLOCK": max(8, min(64, 4096 // columns)), "num_warps": 2}
