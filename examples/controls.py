"""Other rules of what to keep, in the place of the top-k ops of a rewritten graph: what top-k is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import topk_fx
from topk_fx.activation import ACTIVATIONS
from topk_fx.score import Score

CHUNK = 256
"""Queries whose scores exist at a time."""


def with_ops_replaced(
    graph: fx.GraphModule, config: topk_fx.TopKConfig, op: Any, replacement: Callable[[int], nn.Module]
) -> fx.GraphModule:
    """The rewritten graph with each call of `op` as a call of `replacement(number of the site)`, same arguments."""
    module, _ = topk_fx.rewrite(graph, config)
    nodes = [node for node in module.graph.nodes if node.target is op]
    for number, node in enumerate(nodes):
        module.add_submodule(f"control_{number}", replacement(number))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(f"control_{number}", node.args, node.kwargs)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.recompile()
    return module


class CausalKeys(nn.Module):
    """Causal attention that keeps k keys of each query by a rule other than their score.

    `rule`: "recent", the last k; "random", the first k that the query may see in an order of the keys that is drawn for
    each head.
    """

    def __init__(self, rule: str, k: int, seed: int) -> None:
        super().__init__()
        self.rule, self.k, self.seed = rule, k, seed

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        operands: Sequence[Tensor],
        score: str,
        scale: float,
        k: int,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """query [B, Hq, L, D], key and value [B, Hk, L, D]."""
        if not Score.parse(score).is_causal or operands:
            raise ValueError(
                f"the control is for plain causal attention, and this one has the score function {score!r}"
            )
        (_, heads, length, _), groups = query.shape, query.size(-3) // key.size(-3)
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
        order = torch.arange(length).expand(heads, length)
        if self.rule == "random":
            draw = torch.Generator().manual_seed(self.seed)
            order = torch.rand(heads, length, generator=draw).argsort(-1)
            head = torch.arange(heads)[:, None]
            key, value = key[:, head, order], value[:, head, order]
        chunks = []
        for rows in torch.arange(length).split(CHUNK):
            is_seen = order[:, None] <= rows[:, None]  # [Hq, rows, L]
            if self.rule == "random":
                is_kept = is_seen & (is_seen.cumsum(-1, dtype=torch.int32) <= self.k)
            else:
                is_kept = is_seen & (order[:, None] > rows[:, None] - self.k)
            scores = query[..., rows, :] @ key.transpose(-2, -1) * scale
            chunks.append(scores.masked_fill(~is_kept, -torch.inf).softmax(-1) @ value)
        return torch.cat(chunks, -2)


class FFNUnits(nn.Module):
    """An FFN that keeps some of its hidden units h of each token.

    `rule`: "magnitude" |h|, "contribution" |h| times the norm of its output row, both the largest `share` of each
    token; "threshold", all with |h| of at least `threshold`, which is a different number for each token.
    """

    def __init__(self, rule: str, share: float, threshold: float = 0.0) -> None:
        super().__init__()
        self.rule, self.share, self.threshold = rule, share, threshold
        self.kept = self.all = 0
        self.record: list[Tensor] | None = None

    def forward(
        self,
        input: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        activation: str,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        function = ACTIVATIONS[activation].function
        hidden = F.linear(input, up_weight, up_bias)
        hidden = function(hidden) if gate_weight is None else function(F.linear(input, gate_weight, gate_bias)) * hidden
        size = hidden.abs()
        if self.record is not None:
            self.record.append(size.flatten())
        if self.rule == "threshold":
            is_kept = size >= self.threshold
        else:
            if self.rule == "contribution":
                size = size * down_weight.norm(dim=0)
            count = max(1, round(self.share * size.size(-1)))
            is_kept = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, size.topk(count, dim=-1).indices, True)
        self.kept, self.all = self.kept + int(is_kept.sum()), self.all + is_kept.numel()
        return F.linear(torch.where(is_kept, hidden, 0), down_weight, down_bias)
