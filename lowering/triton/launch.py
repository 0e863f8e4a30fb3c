"""Top-k attention by the Triton kernels of this folder: block sizes, scratch memory, and launches."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topk_fx.score import Name, Program, Score

from ..aten import attention_backward as aten_backward
from .availability import is_interpreted, operand_kinds
from .score_code import function_of, without_causal_mask

SCRATCH_BYTES = 2**30
"""Blocks of queries are worked on in parts whose scratch memory is no more than this."""

KEPT_BUDGET = 2**25
"""Kept entries that the parts of the backward work on at a time where no one kernel does it all."""

LONG = 448
"""From so many keys for each one that is kept, thresholds are found from every other tile of keys: that then saves more
than the further candidates cost."""

DECODE_ROWS = 16
"""Up to so many queries to a head of K, all scores are written and K is read once."""

_ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}
"""Keeps NVIDIA's assembler from spilling a few to run more warps at a time; AMD's knows no such option."""

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

    @classmethod
    def of(cls, query: Tensor) -> BlockSizes:
        """The fastest that were measured, on an H100, of those that compile without spills."""
        columns = _power_of_two(query.size(-1), 16)
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
    query, key, value = map(_with_dense_rows, (query, key, value))
    call = _Forward(
        query, key, value, Score.parse(score), tuple(operands), float(scale), kept, dropout_keep, dropout_p,
        zero_empty_rows, output, indices, weights,
    )  # fmt: skip
    with _device_of(query):
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
            "BD": _power_of_two(depth, 16), "BM": size.queries, "BN": size.keys, **_dot_of(self.query),
            "STAGES": size.stages, "num_warps": size.warps,
        }  # fmt: skip
        for first_block in range(0, blocks, at_once):
            count = min(at_once, blocks - first_block)
            place = (first_block, blocks_a_head)
            described = (*self._strides_of_scores, *place, *self._lengths, *self._scoring)
            group_maxima[(count,)](
                self.query, self.key, maxima, *described, parts, STEP=step, **tiles | {"BN": size.bound_keys}
            )
            thresholds[(count * size.queries,)](
                maxima, threshold, groups, self.kept, N=_power_of_two(groups), num_warps=1 if groups <= 1024 else 4
            )
            mark[(count,)](self.query, self.key, threshold, words, *described, row_words, **tiles)
            list_marked[(count * size.queries,)](
                words, lists, counts, *place, heads, queries, keys, row_words, CAUSAL=is_causal, BM=size.queries,
                CAPACITY=capacity, BLOCK=min(128, _power_of_two(row_words, 32)), num_warps=1,
            )  # fmt: skip
            recollect[(count,)](
                self.query, self.key, threshold, lists, scores, counts, *described, self.kept, CAPACITY=capacity,
                **tiles | {"num_warps": 8}, **_ALL_REGISTERS,
            )  # fmt: skip
            warps = max(1, capacity // 512)
            attend[(count * size.queries,)](
                self.query, self.key, lists, scores, counts, *described, *self._finishing, score=score, D=depth,
                BD=_power_of_two(depth, 16), BM=size.queries, **self._finishing_constants(warps),
                num_warps=warps,
            )  # fmt: skip

    def decode(self) -> None:
        from .kernels.decode import attend_to_scores, row_scores

        batch, heads, queries, depth = self.query.shape
        key_heads, keys = self.key.shape[1:3]
        rows = batch * heads * queries
        # Few rows finish sooner with many warps each; many hide each other's latency.
        is_few = rows <= 2 * _multiprocessors(self.query.device)
        warps, stretch = (8, 2048) if is_few else (max(2, self._capacity // 512), 1024)
        tile, stretch = (32, 64) if is_interpreted() else (64, stretch)
        tiles = -(-keys // tile)
        warps = max(warps, min(16, _power_of_two(tiles) // 1024))  # the maxima of all tiles are held at once
        longest = _power_of_two(self.kept + stretch)
        scores, maxima = self._scratch(torch.float32, rows, keys), self._scratch(torch.float32, rows, tiles)
        read, lists = self._scratch(torch.int32, rows, tiles), self._scratch(torch.int32, rows, longest)
        list_scores = self._scratch(torch.float32, rows, longest)
        tiles_a_program = max(
            1, -(-tiles * batch * key_heads // (DECODE_PROGRAMS * _multiprocessors(self.query.device)))
        )
        row_scores[(-(-tiles // tiles_a_program), batch * key_heads)](
            self.query, self.key, scores, maxima, *self._strides_of_scores, *self._lengths, *self._scoring,
            tiles_a_program, score=self._score_functions[0], D=depth, BD=_power_of_two(depth, 16), BM=DECODE_ROWS,
            BN=tile, **_dot_of(self.query), STAGES=2, num_warps=4,
        )  # fmt: skip
        attend_to_scores[(rows,)](
            scores, maxima, read, lists, list_scores, heads, queries, keys, *self._scoring[1:], *self._finishing,
            BN=tile, N=_power_of_two(tiles), STRETCH=stretch, LONGEST=longest, **self._finishing_constants(warps),
            num_warps=warps,
        )  # fmt: skip

    @functools.cached_property
    def _score_functions(self) -> tuple[Any, Any]:
        """The score function, and what it is where no key is later than its query."""
        program = self.function.before
        past = without_causal_mask(program) if self.function.is_causal else program
        score, score_of_past = (_score_function(x, self.function, self.operands) for x in (program, past))
        return score, score_of_past

    @functools.cached_property
    def _finishing(self) -> tuple[Any, ...]:
        """The arguments of `finish_row` from V on; a tensor that there is not has another in its place."""
        sink = None if self.function.sink is None else self.operands[self.function.sink.index]
        keep = None if self.dropout_keep is None else self.dropout_keep.contiguous().view(torch.uint8)
        return (
            self.value, self.query if sink is None else sink, self.query if keep is None else keep, self.output,
            self.indices, self.weights, self.value.stride()[:3], (0, 0, 0) if sink is None else _strides(sink)[:3],
            self.query.size(1) // self.value.size(1), self.kept, self.kept,
            1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0,
        )  # fmt: skip

    def _finishing_constants(self, warps: int) -> dict[str, Any]:
        value_size = self.value.size(-1)
        columns = _power_of_two(max(self.query.size(-1), value_size), 16)
        return {
            "after": _score_function(self.function.after, self.function, self.operands),
            "HAS_SINK": self.function.sink is not None, "HAS_DROPOUT": self.dropout_keep is not None,
            "HAS_AFTER": bool(self.function.after), "ZERO_EMPTY": self.zero_empty_rows, "DV": value_size,
            "BDV": _power_of_two(value_size, 16), "CAPACITY": self._capacity, "BK": _power_of_two(self.kept),
            "BLOCK": max(8, min(64, 2048 * warps // columns)),
        }  # fmt: skip

    @property
    def _capacity(self) -> int:
        """Of a row's list of candidates: some 1.2 k of them are found, 2.3 k if every other tile bounded the scores."""
        return _power_of_two(max(4 * self.kept, self.kept + 32))

    @property
    def _strides_of_scores(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.query.stride()[:3], self.key.stride()[:3]

    @property
    def _lengths(self) -> tuple[int, int, int, int]:
        heads = self.query.size(1)
        return heads, heads // self.key.size(1), self.query.size(2), self.key.size(2)

    @property
    def _scoring(self) -> tuple[Any, ...]:
        return self.scale, *_operand_arguments(self.function, self.operands, self.query)

    def _scratch(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)


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
) -> list[Tensor]:
    """The gradients as `aten.attention_backward`."""
    kept = weights.size(-1)
    columns = _power_of_two(max(query.size(-1), value.size(-1)), 16)
    function = Score.parse(score)
    only_masks, only_adds = _keeps_gradients(function.before, operands)
    is_simple = (
        (only_masks or only_adds)
        and not function.after
        and not any(operand_needs_grad)
        and not torch.are_deterministic_algorithms_enabled()
        and _power_of_two(kept) * columns <= 2**14
    )
    if not is_simple or 0 in (grad.numel(), weights.numel()):
        return aten_backward(
            grad, query, key, value, operands, score, scale, indices, weights, dropout_p, operand_needs_grad,
            sparse_products=TritonProducts, kept_budget=KEPT_BUDGET,
        )  # fmt: skip
    from .kernels.backward import gradients

    grad, query, key, value = map(_with_dense_rows, (grad, query, key, value))
    batch, heads, queries, depth = query.shape
    keys, value_size = value.shape[-2:]
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    lanes = _power_of_two(kept)
    has_mask = not only_adds and str(function) != "causal"  # under a causal mask alone every row has a key
    with _device_of(query):
        gradients[(batch * heads * queries,)](
            query, key, value, grad, indices.contiguous(), weights.contiguous(), grad_query, grad_key, grad_value,
            *(x.stride()[:3] for x in (query, key, value, grad)), heads, heads // key.size(1), heads // value.size(1),
            queries, keys, float(scale), *_operand_arguments(function, operands, query), kept,
            1 / (1 - dropout_p) if dropout_p < 1 else 0.0, score=_score_function(function.before, function, operands),
            HAS_MASK=has_mask, HAS_DROPOUT=dropout_p > 0, D=depth, BD=_power_of_two(depth, 16), DV_SIZE=value_size,
            BDV=_power_of_two(value_size, 16), BK=lanes, num_warps=max(1, min(16, lanes * columns // 2048)),
        )  # fmt: skip
    return [grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)]


def _keeps_gradients(program: Program, operands: Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether a program does nothing but mask keys out, and whether it does nothing but add terms.

    In both cases the gradient of a kept score is that of its product.
    """
    only_masks = only_adds = True
    current = Name("s")
    for number, call in enumerate(program.operations):
        name = Name(f"%{number}")
        if name not in program.score_dependent:
            continue
        others = [x for x in call.arguments if x != current]
        first_alone = call.arguments[0] == current and len(others) == len(call.arguments) - 1
        is_boolean = call.name == "mask" and operands[call.arguments[1].index].dtype == torch.bool
        only_masks &= first_alone and (is_boolean or (call.name in ("keep", "fill") and call.arguments[2] == -math.inf))
        only_adds &= len(others) == 1 and (call.name == "add" or (first_alone and call.name in ("sub", "mask")))
        only_adds &= not is_boolean
        current = name
    is_result = current == program.result
    return only_masks and is_result, only_adds and is_result


class TritonProducts:
    """`aten.bags.SparseProducts` by Triton kernels; results have the dtype of the keys, dot products float32."""

    def __init__(self, indices: Tensor, keys: Tensor, dtype: torch.dtype) -> None:
        self.indices, self.keys = indices.contiguous(), _with_dense_rows(keys)

    def dot_products(self, rows: Tensor) -> Tensor:
        from .kernels.backward import dot_products

        rows, products = _with_dense_rows(rows), self.indices.new_empty(self.indices.shape, dtype=torch.float32)
        with _device_of(rows):
            dot_products[self._grid](
                rows, self.keys, self.indices, products, rows.stride()[:3], self.keys.stride()[:3], *self._sizes,
                self.indices.size(-1), **self._columns,
            )  # fmt: skip
        return products

    def weighted_sum(self, weights: Tensor) -> Tensor:
        from .kernels.backward import weighted_sum

        result = self.keys.new_empty(*self.indices.shape[:-1], self.keys.size(-1))
        with _device_of(result):
            weighted_sum[self._grid](
                self.keys, self.indices, weights.contiguous(), result, self.keys.stride()[:3], *self._sizes,
                self.indices.size(-1), **self._columns,
            )  # fmt: skip
        return result

    def scatter_rows(self, rows: Tensor, weights: Tensor) -> Tensor:
        from .kernels.backward import scatter_rows, sum_of_rows

        rows, weights = _with_dense_rows(rows), weights.contiguous()
        kept = self.indices.size(-1)
        with _device_of(rows):
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
        columns = _power_of_two(self.keys.size(-1), 16)
        return {"D": self.keys.size(-1), "BD": columns, "BLOCK": max(8, min(64, 4096 // columns)), "num_warps": 2}


def _score_function(program: Program, function: Score, operands: Sequence[Tensor]) -> Any:
    from .kernels.scores import unchanged

    return function_of(program, operand_kinds(function, operands)) if program else unchanged


def _operand_arguments(function: Score, operands: Sequence[Tensor], other: Tensor) -> tuple[Any, ...]:
    """Operands and their strides; never none, as Triton has no empty tuples: then another tensor stands there."""
    pointers = tuple(x.view(torch.uint8) if x.dtype == torch.bool else x for x in operands)
    strides = tuple(_operand_strides(x, n in function.tables) for n, x in enumerate(operands))
    return pointers or (other,), strides or ((0, 0, 0, 0),)


def _power_of_two(x: int, least: int = 1) -> int:
    """The least power of two that is no less than x and `least`."""
    return max(least, 1 << (x - 1).bit_length())


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def _operand_strides(x: Tensor, is_table: bool) -> tuple[int, ...]:
    """Of a table, which has no axis of queries, its length in the place of that axis's stride."""
    batch, head, query, key = _strides(x)
    return batch, head, x.size(-1) if is_table else query, key


def _dot_of(query: Tensor) -> dict[str, Any]:
    """In which dtype products are made, and how: float32's in three products of its parts where there is such a thing.

    Triton's interpreter multiplies the bits of bfloat16, so float32 it is there.
    """
    import triton.language as tl

    if query.dtype == torch.float32 or is_interpreted():
        return {"DOT": tl.float32, "PRECISION": "ieee" if torch.version.hip else "tf32x3"}
    return {"DOT": tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float16, "PRECISION": "ieee"}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return getattr(torch.get_device_module(device).get_device_properties(device), "multi_processor_count", 64)


def _device_of(x: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.get_device_module(x.device).device(x.device) if x.device.type != "cpu" else torch.device("cpu")
