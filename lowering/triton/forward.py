"""Launches the forward: which kernels, with which block sizes and how much scratch memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topk_fx.score import Score

from .arguments import (
    all_registers,
    broadcast_strides,
    dot_of,
    multiprocessors,
    operand_arguments,
    power_of_two,
    score_function,
    with_dense_rows,
)
from .availability import is_interpreted
from .launch import Choice, Launch, launch_now
from .score_code import without_causal_mask

SCRATCH_BYTES = 2**30
"""Blocks of queries are worked on in parts whose scratch memory is no more than this."""

LONG = 448
"""From so many keys for each one that is kept, thresholds are found from every other tile of keys: that then saves more
than the further candidates cost."""

DECODE_ROWS = 16
"""Up to so many queries to a head of K, all scores are written and K is read once."""

DECODE_PROGRAMS = 4
"""The keys are split over so many programs for each multiprocessor."""


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Of `mark` and of `group_maxima`: queries and keys of a tile, warps, and stages of the pipeline."""

    queries: int
    keys: int
    bound_keys: int
    warps: int
    stages: int

    @property
    def choices(self) -> list[Choice]:
        """What else `max_autotune` may try; sizes of tiles are left, as the scratch memory is made for them."""
        return [] if is_interpreted() else [{"STAGES": 2 if self.stages != 2 else 3}, {"num_warps": 2 * self.warps}]

    @classmethod
    def of(cls, query: Tensor) -> BlockSizes:
        """Sizes that compile without spills; those of 16-bit heads up to 128 are the fastest of a dozen on an H100."""
        columns = power_of_two(query.size(-1), 16)
        if is_interpreted():
            return cls(16, 32, 32, 4, 1)
        if query.dtype == torch.float32:
            return cls(16, 64, 64, 4, 2)
        if columns <= 128:  # AMD's compute units have 64 KiB of shared memory
            return cls(64, 64, 64, 4, 2) if torch.version.hip else cls(64, 128, 64, 4, 3)
        return cls(64, 64, 64, 8, 2) if columns <= 256 else cls(64, 32, 32, 8, 2)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
    zero_empty_rows: bool,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, indices and weights as `aten.attention_forward`; the kept keys of a row ascend.

    Raises:
        NoCodeError: there is no Triton for the score function; `why_not` tells it before.
    """
    batch, heads, queries, _ = query.shape
    keys, value_size = value.shape[-2:]
    kept = min(k, keys)
    output = value.new_empty(batch, heads, queries, value_size)
    indices = query.new_empty(batch, heads, queries, kept, dtype=torch.int32)
    weights = query.new_empty(batch, heads, queries, kept, dtype=torch.float32)
    if 0 in (output.numel(), weights.numel()):
        return output.zero_(), indices.zero_(), weights.zero_()
    query, key, value = map(with_dense_rows, (query, key, value))
    call = _Forward(
        query, key, value, Score.parse(score), tuple(operands), float(scale), kept, dropout_keep, dropout_p,
        zero_empty_rows, output, indices, weights, launch,
    )  # fmt: skip
    if queries * (heads // key.size(1)) <= DECODE_ROWS:
        call.decode()
    else:
        call.prefill()
    return output, indices, weights


@dataclasses.dataclass(frozen=True)
class _Forward:
    """One call of the forward: its tensors, and what it launches."""

    query: Tensor
    key: Tensor
    value: Tensor
    function: Score
    operands: tuple[Tensor, ...]
    scale: float
    kept: int
    dropout_keep: Tensor | None
    dropout_p: float
    zero_empty_rows: bool
    output: Tensor
    indices: Tensor
    weights: Tensor
    launch: Launch

    def prefill(self) -> None:
        from .kernels.bound import group_maxima, thresholds
        from .kernels.collect import list_marked, mark, recollect
        from .kernels.finish import attend

        size = BlockSizes.of(self.query)
        batch, heads, queries, depth = self.query.shape
        keys = self.key.size(2)
        step = 2 if keys >= LONG * self.kept else 1
        parts = max(1, min(-(-4 * self.kept // size.bound_keys), -(-keys // size.bound_keys)))
        groups = parts * size.bound_keys
        row_words = -(-keys // size.keys) * size.keys // 32
        capacity = self._capacity
        blocks_a_head = -(-queries // size.queries)
        blocks = batch * heads * blocks_a_head
        at_once = min(blocks, max(1, SCRATCH_BYTES // (4 * size.queries * (groups + row_words + 2 * capacity + 2))))
        rows = at_once * size.queries
        maxima, threshold = self._scratch(torch.float32, rows, groups), self._scratch(torch.float32, rows)
        words, lists = self._scratch(torch.int32, rows, row_words), self._scratch(torch.int32, rows, capacity)
        scores, counts = self._scratch(torch.float32, rows, capacity), self._scratch(torch.int32, rows)

        score, score_of_past = self._score_functions
        is_causal = self.function.is_causal
        tiles = {
            "score": score, "score_of_past": score_of_past, "CAUSAL": is_causal, "D": depth,
            "BD": power_of_two(depth, 16), "BM": size.queries, "BN": size.keys, **dot_of(self.query),
            "STAGES": size.stages, "num_warps": size.warps,
        }  # fmt: skip
        for first_block in range(0, blocks, at_once):
            count = min(at_once, blocks - first_block)
            place = (first_block, blocks_a_head)
            described = (*self._strides_of_scores, *place, *self._lengths, *self._scoring)
            self.launch(
                group_maxima, (count,), (self.query, self.key, maxima, *described, parts),
                {"STEP": step, **tiles, "BN": size.bound_keys}, size.choices,
            )  # fmt: skip
            self.launch(
                thresholds, (count * size.queries,), (maxima, threshold, groups, self.kept),
                {"N": power_of_two(groups), "num_warps": 1 if groups <= 1024 else 4},
            )  # fmt: skip
            self.launch(
                mark, (count,), (self.query, self.key, threshold, words, *described, row_words), tiles, size.choices
            )
            self.launch(
                list_marked, (count * size.queries,),
                (words, lists, counts, *place, heads, queries, keys, row_words),
                {"CAUSAL": is_causal, "BM": size.queries, "CAPACITY": capacity,
                 "BLOCK": min(128, power_of_two(row_words, 32)), "num_warps": 1},
            )  # fmt: skip
            self.launch(
                recollect, (count,),
                (self.query, self.key, threshold, lists, scores, counts, *described, self.kept),
                {"CAPACITY": capacity, **tiles, "num_warps": 8, **all_registers()},
            )  # fmt: skip
            warps = max(1, capacity // 512)
            self.launch(
                attend, (count * size.queries,),
                (self.query, self.key, lists, scores, counts, *described, *self._finishing),
                {"score": score, "D": depth, "BD": power_of_two(depth, 16), "BM": size.queries,
                 **self._finishing_constants(warps), "num_warps": warps},
                [{"num_warps": 2 * warps}],
            )  # fmt: skip

    def decode(self) -> None:
        from .kernels.decode import attend_to_scores, row_scores

        batch, heads, queries, depth = self.query.shape
        key_heads, keys = self.key.shape[1:3]
        rows = batch * heads * queries
        # Few rows finish sooner with many warps each; many hide each other's latency.
        is_few = rows <= 2 * multiprocessors(self.query.device)
        warps, stretch = (8, 2048) if is_few else (max(2, self._capacity // 512), 1024)
        tile, stretch = (32, 64) if is_interpreted() else (64, stretch)
        tiles = -(-keys // tile)
        warps = max(warps, min(16, power_of_two(tiles) // 1024))  # the maxima of all tiles are held at once
        longest = power_of_two(self.kept + stretch)
        scores, maxima = self._scratch(torch.float32, rows, keys), self._scratch(torch.float32, rows, tiles)
        read, lists = self._scratch(torch.int32, rows, tiles), self._scratch(torch.int32, rows, longest)
        list_scores = self._scratch(torch.float32, rows, longest)
        tiles_a_program = max(
            1, -(-tiles * batch * key_heads // (DECODE_PROGRAMS * multiprocessors(self.query.device)))
        )
        self.launch(
            row_scores, (-(-tiles // tiles_a_program), batch * key_heads),
            (self.query, self.key, scores, maxima, *self._strides_of_scores, *self._lengths, *self._scoring,
             tiles_a_program),
            {"score": self._score_functions[0], "D": depth, "BD": power_of_two(depth, 16), "BM": DECODE_ROWS,
             "BN": tile, **dot_of(self.query), "STAGES": 2, "num_warps": 4},
            [{"STAGES": 3}, {"num_warps": 8}],
        )  # fmt: skip
        self.launch(
            attend_to_scores, (rows,),
            (scores, maxima, read, lists, list_scores, heads, queries, keys, *self._scoring[1:], *self._finishing),
            {"BN": tile, "N": power_of_two(tiles), "STRETCH": stretch, "LONGEST": longest,
             **self._finishing_constants(warps), "num_warps": warps},
            [{"num_warps": warps // 2}],
        )  # fmt: skip

    @functools.cached_property
    def _score_functions(self) -> tuple[Any, Any]:
        """The score function, and what it is where no key is later than its query."""
        program = self.function.before
        past = without_causal_mask(program) if self.function.is_causal else program
        score, score_of_past = (score_function(x, self.function, self.operands) for x in (program, past))
        return score, score_of_past

    @functools.cached_property
    def _finishing(self) -> tuple[Any, ...]:
        """The arguments of `finish_row` from V on; a tensor that there is not has another in its place."""
        sink = None if self.function.sink is None else self.operands[self.function.sink.index]
        keep = None if self.dropout_keep is None else self.dropout_keep.contiguous().view(torch.uint8)
        return (
            self.value, self.query if sink is None else sink, self.query if keep is None else keep, self.output,
            self.indices, self.weights, self.value.stride()[:3],
            (0, 0, 0) if sink is None else broadcast_strides(sink)[:3], self.query.size(1) // self.value.size(1),
            self.kept, self.kept, 1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0,
        )  # fmt: skip

    def _finishing_constants(self, warps: int) -> dict[str, Any]:
        value_size = self.value.size(-1)
        columns = power_of_two(max(self.query.size(-1), value_size), 16)
        return {
            "after": score_function(self.function.after, self.function, self.operands),
            "HAS_SINK": self.function.sink is not None, "HAS_DROPOUT": self.dropout_keep is not None,
            "HAS_AFTER": bool(self.function.after), "ZERO_EMPTY": self.zero_empty_rows, "DV": value_size,
            "BDV": power_of_two(value_size, 16), "CAPACITY": self._capacity, "BK": power_of_two(self.kept),
            "BLOCK": max(8, min(64, 2048 * warps // columns)),
        }  # fmt: skip

    @property
    def _capacity(self) -> int:
        """Of a row's list of candidates: some 1.2 k of them are found, 2.3 k if every other tile bounded the scores."""
        return power_of_two(max(4 * self.kept, self.kept + 32))

    @property
    def _strides_of_scores(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.query.stride()[:3], self.key.stride()[:3]

    @property
    def _lengths(self) -> tuple[int, int, int, int]:
        heads = self.query.size(1)
        return heads, heads // self.key.size(1), self.query.size(2), self.key.size(2)

    @property
    def _scoring(self) -> tuple[Any, ...]:
        return self.scale, *operand_arguments(self.function, self.operands, self.query)

    def _scratch(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)
