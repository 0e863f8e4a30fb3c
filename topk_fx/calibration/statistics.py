"""What each site of a dense model would lose at each k: probability mass, and what it adds to its output.

The rewritten graph has one op a site. Each op's call is replaced by a module that computes the dense form in chunks of
queries, hands its output on, and looks at some rows of it: which keys would be kept at k = 1, 2, 4, ..., their mass,
and how far the output that they give is from the dense one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from topk_fx.activation import ACTIVATIONS
from topk_fx.config import TopKConfig
from topk_fx.export import rewrite
from topk_fx.reference import compute
from topk_fx.score import Score, evaluate
from topk_fx.shapes import AttentionFrame, attention_frame

SCORE_BUDGET = 2**22
"""Elements of one chunk of scores."""

SAMPLED_ROWS = 256
"""Queries, or tokens, of a batch that are looked at."""

MOST = 2**20
"""More keys, or units, than that are not told apart."""


class SiteKey(NamedTuple):
    """A site of the model: its kind, its module path, and its number among the sites there."""

    kind: str
    where: str
    number: int


@dataclasses.dataclass
class SiteStatistics:
    """Sums over the rows that were looked at.

    Attributes:
        total: keys of a query, or units of a token; the most of all batches.
        width: multiplications that each kept entry takes: the size of a value, or of a token.
        visible: for each row, the keys that are not masked out, and the number of rows that it stands for.
        error: by k, the squared distance of the output from the dense one.
        mass: by k, the probability of the kept keys; for units, their share of the sum of squares.
        norm: the dense output, squared.
        full_mass: the mass of all.
    """

    key: SiteKey
    total: int = 0
    width: int = 1
    visible: list[tuple[Tensor, float]] = dataclasses.field(default_factory=list)
    error: dict[int, float] = dataclasses.field(default_factory=dict)
    mass: dict[int, float] = dataclasses.field(default_factory=dict)
    norm: float = 0.0
    full_mass: float = 0.0

    @property
    def grid(self) -> list[int]:
        """1, 2, 4, ... below the number of keys."""
        return [k for k in _GRID if k < self.total]

    def kept(self, k: int | None) -> float:
        """Entries that are kept in all rows of the batches looked at; None: all."""
        most = self.total if k is None else k
        return sum(rows.clamp(max=most).sum().item() * weight for rows, weight in self.visible)

    def relative_error(self, k: int) -> float:
        """||output - dense||^2 / ||dense||^2, between the k of the grid on a line in the logarithms of both."""
        return self._between(k, {n: self.error[n] / self.norm if self.norm else 0.0 for n in self.grid}, 0.0)

    def mass_share(self, k: int) -> float:
        """The share of the probability that the k largest have."""
        return 1 - self._between(
            k, {n: 1 - self.mass[n] / self.full_mass if self.full_mass else 0.0 for n in self.grid}, 0.0
        )

    def _between(self, k: int, values: dict[int, float], at_all: float) -> float:
        if k >= self.total or not values:
            return at_all
        if k in values:
            return max(0.0, values[k])
        below = max(n for n in values if n < k)
        above = min((n for n in values if n > k), default=None)
        low = values[below]
        if above is None:  # from the last of the grid to all, where both the rows and the keys that are off end
            return max(0.0, low * ((self.total - k) / (self.total - below)) ** 2)
        high, share = values[above], math.log(k / below) / math.log(above / below)
        if low <= 0 or high <= 0:
            return max(0.0, low + (high - low) * share)
        return math.exp(math.log(low) * (1 - share) + math.log(high) * share)

    def add(self, total: int, visible: Tensor, weight: float, rows: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Adds rows, of `visible` keys each, that stand for `weight` as many.

        `rows(k)`: their outputs and masses if k are kept.
        """
        output, probability = rows(total)
        dense, mass = output.double(), probability.double().sum().item() * weight
        for k in _GRID:
            error, kept_mass = 0.0, mass
            if k < total:
                output, probability = rows(k)
                error = (output.double() - dense).square().sum().item() * weight
                kept_mass = probability.double().sum().item() * weight
            self.error[k] = self.error.get(k, 0.0) + error
            self.mass[k] = self.mass.get(k, 0.0) + kept_mass
        self.norm += dense.square().sum().item() * weight
        self.full_mass += mass
        self.total = max(self.total, total)
        self.visible.append((visible.flatten().cpu(), weight))


_GRID = tuple(2**n for n in range(MOST.bit_length()))


def measure_graph(
    graph: fx.GraphModule,
    config: TopKConfig,
    kinds: Sequence[str],
    found: dict[SiteKey, SiteStatistics],
    shared_paths: set[str],
) -> Callable[..., Any]:
    """A copy of a graph that computes what it does and adds to the statistics of its sites.

    New sites are put into `found`, and paths with more than one candidate, of any kind, into `shared_paths`.
    """
    module, report = rewrite(graph, config)
    shared_paths |= {where for where, count in Counter(site.where for site in report).items() if count > 1}
    for child in [child for child in module.modules() if isinstance(child, fx.GraphModule)]:
        nodes = [node for node in child.graph.nodes if "topk_fx_site" in node.meta and node.target in _MEASURES]
        for number, node in enumerate(nodes):
            kind, measure = _MEASURES[node.target]
            if kind not in kinds:
                continue
            key = SiteKey(kind, *node.meta["topk_fx_site"])
            name = f"topk_fx_measured_site_{number}"
            child.add_submodule(name, measure(found.setdefault(key, SiteStatistics(key))))
            with child.graph.inserting_before(node):
                measured = child.graph.call_module(name, node.args, node.kwargs)
            node.replace_all_uses_with(measured)
            child.graph.erase_node(node)
        child.recompile()
    return module


class _MeasuredAttention(nn.Module):
    """`topk_fx::attention` with every key kept, and no dropout."""

    def __init__(self, statistics: SiteStatistics) -> None:
        super().__init__()
        self.statistics = statistics

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        operands: Sequence[Tensor],
        score: str,
        scale: float,
        k: int,
        dropout_p: float = 0.0,
        zero_empty_rows: bool = False,
        lowering: str = "",
    ) -> Tensor:
        function = Score.parse(score)
        if query.dim() == 1 or value.dim() == 1:  # one query, or a value that is a number: nothing to save there
            return torch.ops.topk_fx.attention(query, key, value, operands, score, scale, k, 0.0, zero_empty_rows)
        frame = attention_frame(query, key, value, operands, function.tables, function.only_after)
        batch, heads, queries, _ = frame.query.shape
        keys = frame.key.size(-2)
        output = frame.value.new_empty(batch, heads, queries, frame.value.size(-1))
        if output.numel() and keys:
            step = max(1, SCORE_BUDGET // (batch * heads * keys))
            for start in range(0, queries, step):
                rows = torch.arange(start, min(start + step, queries), device=query.device)
                result, _ = _Rows(frame, function, scale, rows).keep(keys)
                output[:, :, rows] = (result.nan_to_num(0.0) if zero_empty_rows else result).to(output.dtype)
            sample = _sample(queries, max(1, SAMPLED_ROWS // batch), query.device)
            self.statistics.width = frame.value.size(-1)
            for rows in sample.split(max(1, SCORE_BUDGET // (batch * heads * keys))):
                looked_at = _Rows(frame, function, scale, rows)
                self.statistics.add(keys, looked_at.visible, queries / len(sample), looked_at.keep_of_numbers)
        return output.reshape(frame.output_shape)


@dataclasses.dataclass(frozen=True)
class _RowPositions:
    """Some query rows against all keys: what a score function reads there. Operands are [B|1, Hq|1, Lq|1, Lk|1]."""

    operands: Sequence[Tensor]
    rows: Tensor
    key_count: int

    def operand(self, index: int) -> Tensor:
        x = self.operands[index]
        return x[:, :, self.rows] if x.size(-2) > 1 else x

    def table(self, index: int) -> Tensor:
        return self.operands[index]

    def query_positions(self) -> Tensor:
        return self.rows.unsqueeze(-1)[None, None]

    def key_positions(self) -> Tensor:
        return torch.arange(self.key_count, device=self.rows.device)[None, None, None]


class _Rows:
    """Dense attention of some queries, of which any number of keys may be kept."""

    def __init__(self, frame: AttentionFrame, function: Score, scale: float, rows: Tensor) -> None:
        self.function, self.value = function, compute(frame.value)
        self.positions = _RowPositions(frame.operands, rows, frame.key.size(-2))
        scores = _grouped(compute(frame.query[:, :, rows]), compute(frame.key).transpose(-2, -1)) * scale
        scores = evaluate(function.before, scores, self.positions)
        # A mask that adds the least number, as models of transformers do, masks out as -inf does.
        self.visible = (scores > torch.finfo(scores.dtype).min / 2).sum(-1)
        top = scores.amax(-1, keepdim=True)
        sink = None
        if function.sink is not None:
            sink = self.positions.operand(function.sink.index).to(scores.dtype)
            top = torch.maximum(top, sink)
        self.exponentials = (scores - top).exp()
        self.sink = 0.0 if sink is None else (sink - top).exp()
        self.sorted: Tensor | None = None

    def keep(self, k: int) -> tuple[Tensor, Tensor]:
        """The outputs [B, H, rows, Dv] if k keys are kept, and their masses; keys equal to the last are kept too."""
        kept = self.exponentials
        if k < kept.size(-1):
            if self.sorted is None:
                self.sorted = self.exponentials.sort(dim=-1, descending=True).values
            kept = torch.where(kept >= self.sorted[..., k - 1 : k], kept, 0)
        total = kept.sum(-1, keepdim=True) + self.sink
        weights = kept / total
        if self.function.after:
            weights = evaluate(self.function.after, weights, self.positions)
        mass = total / (self.exponentials.sum(-1, keepdim=True) + self.sink)
        return _grouped(weights, self.value), mass

    def keep_of_numbers(self, k: int) -> tuple[Tensor, Tensor]:
        """`keep`, with rows that are masked out whole as 0, not NaN."""
        output, mass = self.keep(k)
        return output.nan_to_num(0.0, 0.0, 0.0), mass.nan_to_num(0.0)


def _grouped(x: Tensor, table: Tensor) -> Tensor:
    """x [B, Hq, R, N] @ table [B, Hk, N, M] as [B, Hq, R, M], with the table not repeated for grouped heads."""
    batch, heads, rows, size = x.shape
    grouped = x.reshape(batch, table.size(1), heads // table.size(1) * rows, size)
    return (grouped @ table).view(batch, heads, rows, table.size(-1))


class _MeasuredFFN(nn.Module):
    """`topk_fx::ffn` with every unit kept, and no dropout."""

    def __init__(self, statistics: SiteStatistics) -> None:
        super().__init__()
        self.statistics = statistics

    def forward(
        self,
        input: Tensor,
        up_weight: Tensor | None,
        up_bias: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        activation: str,
        k: int,
        dropout_p: float = 0.0,
        lowering: str = "",
    ) -> Tensor:
        tokens = input.reshape(-1, input.size(-1))
        function = ACTIVATIONS[activation].function

        def hidden(x: Tensor) -> Tensor:
            up = x if up_weight is None else F.linear(x, up_weight, up_bias)
            return up_activated(x, up)

        def up_activated(x: Tensor, up: Tensor) -> Tensor:
            return function(up) if gate_weight is None else function(F.linear(x, gate_weight, gate_bias)) * up

        if len(tokens):
            sample = _sample(len(tokens), SAMPLED_ROWS, input.device)
            units = compute(hidden(tokens[sample]))
            by_size = units.abs().sort(dim=-1, descending=True).values
            weight = compute(down_weight)

            def keep(count: int) -> tuple[Tensor, Tensor]:
                kept = torch.where(units.abs() >= by_size[:, count - 1 : count], units, 0)
                return F.linear(kept, weight), kept.square().sum(-1)

            self.statistics.width = down_weight.size(0)
            visible = torch.full((len(sample),), units.size(-1))
            self.statistics.add(units.size(-1), visible, len(tokens) / len(sample), keep)
        step = max(1, SCORE_BUDGET // down_weight.size(1))
        parts = [F.linear(hidden(part), down_weight, down_bias) for part in tokens.split(step)]
        return torch.cat(parts).view(*input.shape[:-1], down_weight.size(0))


def _sample(count: int, most: int, device: torch.device) -> Tensor:
    """At most so many row numbers, evenly spread and in the middle of their stretches."""
    most = min(count, most)
    return ((torch.arange(most, device=device) * 2 + 1) * count) // (2 * most)


_MEASURES: dict[Any, tuple[str, Callable[[SiteStatistics], nn.Module]]] = {
    torch.ops.topk_fx.attention.default: ("attention", _MeasuredAttention),
    torch.ops.topk_fx.ffn.default: ("ffn", _MeasuredFFN),
}
