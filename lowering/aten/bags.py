"""Products with a sparse matrix of k entries a row, as embedding bags.

A row of kept keys with its weights is a bag of embeddings with per-sample weights, so ATen's embedding-bag kernels do
the three sparse products of top-k attention without a [rows, k, D] buffer, on every device that has them:

    weighted_sum   out_i = sum_j w_ij table[index_ij]
    dot_products   d_ij  = rows_i . table[index_ij]
    scatter_rows   out[index_ij] += w_ij rows_i

A table has one more row than it has keys, of zeros: empty slots (index -1) point there, so that they add nothing even
where a key that is masked out holds inf or NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_SUM = 0  # ATen's number for mode="sum"


@dataclasses.dataclass(frozen=True)
class Bags:
    """The kept keys of `rows` query rows as flat bags over a table of `table_rows` rows (the spare one not counted)."""

    flat: Tensor
    rows: int
    kept: int
    table_rows: int

    @classmethod
    def of(cls, indices: Tensor, heads: int, key_count: int) -> Bags:
        """Bags over a table of batch * `heads` * `key_count` rows, from indices [B, Hq, Lq, kept] (-1: empty)."""
        batch, query_heads, queries, kept = indices.shape
        table_rows = batch * heads * key_count
        rows = batch * query_heads * queries
        wide = max(table_rows + 1, rows * kept) >= 2**31
        dtype = torch.int64 if wide else torch.int32
        starts = torch.arange(batch * heads, dtype=dtype, device=indices.device).mul_(key_count)
        starts = starts.repeat_interleave(query_heads // heads).view(batch, query_heads, 1, 1)
        flat = torch.where(indices < 0, table_rows, indices.to(dtype) + starts).view(-1)
        return cls(flat.to(dtype), rows, kept, table_rows)

    def _bag_of_sample(self) -> Tensor:
        bags = torch.arange(self.rows, dtype=self.flat.dtype, device=self.flat.device)
        return bags.repeat_interleave(self.kept)

    def _offsets(self) -> Tensor:
        return torch.arange(self.rows, dtype=self.flat.dtype, device=self.flat.device).mul_(self.kept)

    def weighted_sum(self, table: Tensor, weights: Tensor) -> Tensor:
        """[rows, D] from table [table_rows + 1, D] and weights of rows * kept elements."""
        if self.flat.numel() == 0:
            return table.new_zeros(self.rows, table.size(1))
        output, *_ = torch.ops.aten._embedding_bag(
            table, self.flat, self._offsets(), False, _SUM, False, weights.reshape(-1)
        )
        return output

    def dot_products(self, rows: Tensor, table: Tensor) -> Tensor:
        """[rows, kept] from rows [rows, D] and table [table_rows + 1, D]."""
        if self.flat.numel() == 0:
            return rows.new_zeros(self.rows, self.kept)
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows, table, self.flat, self._offsets(), self._bag_of_sample(), _SUM
        )
        return products.view(self.rows, self.kept)

    def scatter_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        """[table_rows, D] from rows [rows, D] and weights of rows * kept elements."""
        if self.flat.numel() == 0:
            return rows.new_zeros(self.table_rows, rows.size(1))
        sizes = torch.full_like(self.flat[:1], self.kept).expand(self.rows)
        table = torch.ops.aten._embedding_bag_dense_backward(
            rows,
            self.flat,
            self._bag_of_sample(),
            sizes,
            self.flat.new_empty(0),
            self.table_rows + 1,
            False,
            _SUM,
            weights.reshape(-1),
        )
        return table[:-1]


def as_table(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, L, D] as a table [B * H * L + 1, D] whose last row is zero."""
    table = x.new_zeros(x.shape[:-1].numel() + 1, x.size(-1), dtype=dtype)
    table[:-1].view(x.shape).copy_(x)
    return table


class SparseProducts(Protocol):
    """Products with the sparse matrix of the kept keys, indices [B, Hq, Lq, kept] (-1: empty), and a table of keys."""

    def dot_products(self, rows: Tensor) -> Tensor:
        """[B, Hq, Lq, kept]: of rows [B, Hq, Lq, D] and the kept keys; 0 in empty slots."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """[B, Hq, Lq, D]: the sums of the kept keys by weights [B, Hq, Lq, kept]."""

    def scatter_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        """[B, H, Lk, D]: for each key the sum of the rows that keep it, by their weights."""


SparseProductsOf = Callable[[Tensor, Tensor, torch.dtype], SparseProducts]
"""(indices, keys [B, H, Lk, D] whose H divides Hq, dtype of the sums) -> SparseProducts"""


class BagProducts:
    """SparseProducts as embedding bags."""

    def __init__(self, indices: Tensor, keys: Tensor, dtype: torch.dtype) -> None:
        self.bags = Bags.of(indices, keys.size(1), keys.size(2))
        self.keys, self.dtype, self.shape = keys, dtype, indices.shape

    def dot_products(self, rows: Tensor) -> Tensor:
        return self.bags.dot_products(self._flat(rows), as_table(self.keys, self.dtype)).view(self.shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        summed = self.bags.weighted_sum(as_table(self.keys, self.dtype), weights)
        return summed.view(*self.shape[:-1], self.keys.size(-1))

    def scatter_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        return self.bags.scatter_rows(self._flat(rows), weights).view(*self.keys.shape[:-1], rows.size(-1))

    def _flat(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype).reshape(-1, rows.size(-1))
