"""Where the scores of a chunk stand: all its keys, or those that were kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ChunkPositions:
    """Query rows `rows` against the keys up to `key_count`. Operands are [B|1, Hq|1, Lq|1, Lk|1], or tables."""

    operands: Sequence[Tensor]
    rows: slice
    key_count: int
    device: torch.device

    def operand(self, index: int) -> Tensor:
        x = self.operands[index]
        x = x[:, :, self.rows] if x.size(-2) > 1 else x
        return x[..., : self.key_count] if x.size(-1) > 1 else x

    def table(self, index: int) -> Tensor:
        return self.operands[index]

    def query_positions(self) -> Tensor:
        return torch.arange(self.rows.start, self.rows.stop, device=self.device).unsqueeze(-1)[None, None]

    def key_positions(self) -> Tensor:
        return torch.arange(self.key_count, device=self.device)[None, None, None]


@dataclasses.dataclass(frozen=True)
class KeptPositions:
    """Query rows `rows` against the keys `indices` [B, Hq, rows, kept], int64 and not negative."""

    operands: Sequence[Tensor]
    rows: slice
    indices: Tensor

    def operand(self, index: int) -> Tensor:
        x = self.operands[index]
        x = x[:, :, self.rows] if x.size(-2) > 1 else x
        if x.size(-1) == 1:
            return x
        return x.expand(*self.indices.shape[:-1], x.size(-1)).gather(-1, self.indices)

    def table(self, index: int) -> Tensor:
        return self.operands[index]

    def query_positions(self) -> Tensor:
        return torch.arange(self.rows.start, self.rows.stop, device=self.indices.device).unsqueeze(-1)[None, None]

    def key_positions(self) -> Tensor:
        return self.indices
