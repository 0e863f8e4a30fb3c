"""Attention to memories, prompts and caches, and to what is left of a long sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import drawn
from torch import Tensor, nn

from .block import (
    BATCH,
    HEAD_SIZE,
    HEADS,
    LENGTH,
    REWRITTEN,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    FeedForward,
    GatedFeedForward,
    TransformerLayer,
    attend,
    heads_of,
    joined,
    parameter,
)  # fmt: skip


class PriorFittedNetwork(nn.Module):
    """Every row of a table attends to the training rows, which come first, and to itself.

    Müller et al. 2021, "Transformers Can Do Bayesian Inference", arXiv:2112.10510.
    """

    def __init__(self, train_rows: int = 7) -> None:
        super().__init__()
        self.train_rows = train_rows
        self.layer = TransformerLayer(FeedForward(F.gelu))

    def forward(self, x: Tensor) -> Tensor:
        is_train = torch.arange(x.size(1)) < self.train_rows
        return self.layer(x, keep=is_train | torch.eye(x.size(1)).bool())


class PriorFittedNetworkByAssignment(nn.Module):
    """The same mask as the paper's code makes it, by writing to a part of it: it stays the tensor that it is.

    Müller et al. 2021, "Transformers Can Do Bayesian Inference", arXiv:2112.10510.
    """

    def __init__(self, train_rows: int = 7) -> None:
        super().__init__()
        self.train_rows = train_rows
        self.layer = TransformerLayer(FeedForward(F.gelu))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.size(1), x.size(1)) == 0
        mask[:, self.train_rows :].zero_()
        mask |= torch.eye(x.size(1)) == 1
        return self.layer(x, keep=mask)


class TabPFN(nn.Module):
    """Attention among the features of each row, then of every row to the training rows alone.

    Hollmann et al. 2022, "TabPFN: A Transformer That Solves Small Tabular Classification Problems in a Second",
    arXiv:2207.01848; attention over both axes as in its second version.
    """

    def __init__(self, train_rows: int = 7) -> None:
        super().__init__()
        self.train_rows = train_rows
        self.features, self.rows, self.mlp = Attention(), Attention(), FeedForward(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.features(x)  # [B, rows, features, E]
        columns = x.transpose(1, 2)
        x = x + self.rows(columns, columns[:, :, : self.train_rows]).transpose(1, 2)
        return x + self.mlp(x)


class DeFormer(nn.Module):
    """Lower layers attend inside the question and inside the passage, upper layers everywhere.

    Cao et al. 2020, "DeFormer: Decomposing Pre-trained Transformers for Faster Question Answering", arXiv:2005.00697.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = (nn.ModuleList([TransformerLayer(FeedForward(F.gelu))]) for _ in range(2))

    def forward(self, x: Tensor, segment: Tensor) -> Tensor:
        same_segment = (segment[:, :, None] == segment[:, None, :]).unsqueeze(1)
        for layer in self.lower:
            x = layer(x, keep=same_segment)
        for layer in self.upper:
            x = layer(x)
        return x


class ReactiveTransformer(nn.Module):
    """Tokens read the slots of a memory by cross-attention, and the slots are updated from the tokens by a gate.

    Filipek 2025, "Reactive Transformer (RxT)", arXiv:2510.03561.
    """

    def __init__(self) -> None:
        super().__init__()
        self.itself, self.read, self.write = Attention(), Attention(), Attention()
        self.mlp, self.gate = GatedFeedForward(), parameter(WIDTH)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        position = torch.arange(x.size(1))
        x = x + self.itself(x, keep=position[:, None] >= position)
        x = x + self.read(x, slots)
        x = x + self.mlp(x)
        gate = self.gate.sigmoid()
        return torch.cat([x, (1 - gate) * slots + gate * self.write(slots, x)], 1)


class ByteTransformer(nn.Module):
    """Sequences packed one after the other: tokens attend to those of their own sequence.

    Zhai et al. 2022, "ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs",
    arXiv:2210.03052.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = TransformerLayer(FeedForward(F.gelu))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        document = torch.searchsorted(ends, torch.arange(x.size(0)), right=True)
        return self.layer(x, keep=document[:, None] == document)


class ClusteredAttention(nn.Module):
    """The mean of each cluster of queries attends, and its result is that of every query in the cluster.

    Vyas et al. 2020, "Fast Transformers with Clustered Attention", arXiv:2007.04825.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cluster: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        members = F.one_hot(cluster, 4).to(q.dtype).unsqueeze(1)  # [B, 1, L, C]
        centroids = members.mT @ q / members.sum(-2).clamp(min=1).unsqueeze(-1)
        return self.out(joined(members @ attend(centroids, k, v)))


class ImprovedClusteredAttention(nn.Module):
    """As ClusteredAttention, and for the 3 best keys of a cluster each query computes its own scores.

    Vyas et al. 2020, "Fast Transformers with Clustered Attention", arXiv:2007.04825, section 3.3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cluster: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        members = F.one_hot(cluster, 4).to(q.dtype).unsqueeze(1)
        centroids = members.mT @ q / members.sum(-2).clamp(min=1).unsqueeze(-1)
        weights = (centroids @ k.mT / HEAD_SIZE**0.5).softmax(-1)
        mass, best = weights.topk(3)  # [B, H, C, 3]
        rest = members @ (weights.scatter(-1, best, 0.0) @ v)
        own = cluster[:, None, :, None].expand(*q.shape[:3], 3)
        best, mass = best.gather(2, own), mass.sum(-1, keepdim=True).gather(2, own[..., :1])
        rows = best.flatten(2).unsqueeze(-1).expand(-1, -1, -1, HEAD_SIZE)
        k_best, v_best = (y.gather(2, rows).unflatten(2, (-1, 3)) for y in (k, v))
        scores = torch.einsum("bhld,bhlcd->bhlc", q, k_best) / HEAD_SIZE**0.5
        exact = torch.einsum("bhlc,bhlcd->bhld", scores.softmax(-1), v_best)
        return self.out(joined(mass * exact + rest))


class Combiner(nn.Module):
    """softmax over the keys of a query's own block and one summary of every other block.

    Ren et al. 2021, "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv:2107.05768.
    """

    def __init__(self, block: int = 4) -> None:
        super().__init__()
        self.block = block
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y).unflatten(2, (-1, self.block)) for y in self.qkv(x).chunk(3, -1))  # [B, H, N, block, D]
        blocks = q.size(2)
        k, v = (torch.cat([y, self.summaries(y)], 3) for y in (k, v))
        own = torch.arange(blocks)
        is_summary = torch.arange(k.size(3)) - self.block
        keep = own.view(-1, 1, 1) != is_summary
        return self.out(joined(attend(q, k, v, keep).flatten(2, 3)))

    def summaries(self, y: Tensor) -> Tensor:
        """The mean of every block, for every block."""
        return y.mean(3).unsqueeze(2).expand(-1, -1, y.size(2), -1, -1)


class CombinerOfScores(Combiner):
    """Combiner as a softmax over two products that are joined: scores of local keys, and scores of summaries."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y).unflatten(2, (-1, self.block)) for y in self.qkv(x).chunk(3, -1))
        local, summary = q @ k.mT, q @ self.summaries(k).mT
        own = torch.eye(q.size(2), dtype=torch.bool).unsqueeze(1)
        scores = torch.cat([local, summary.masked_fill(own, -torch.inf)], -1) / HEAD_SIZE**0.5
        near, far = scores.softmax(-1).split([self.block, q.size(2)], -1)
        return self.out(joined((near @ v + far @ self.summaries(v)).flatten(2, 3)))


class EstimatedAttention(nn.Module):
    """A mask of the best keys by scores that a cheap estimator gives, then attention under that mask.

    Lee et al. 2023, "SEA: Sparse Linear Attention with Estimated Attention Mask", arXiv:2310.01777.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.estimator = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(HEAD_SIZE, LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        linear = (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v)
        estimate = self.estimator(linear)
        keep = torch.zeros_like(estimate, dtype=torch.bool).scatter(-1, estimate.topk(5).indices, True)
        return joined(attend(q, k, v, keep))


class LightningIndexer(nn.Module):
    """sum_h w_h ReLU(q_h K^T) ranks the keys; those past the best are masked out of the attention.

    DeepSeek-AI 2025, "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention".
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.index_query, self.index_key, self.index_weight = (nn.Linear(WIDTH, n) for n in (2 * 3, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        causal = torch.full((length, length), -torch.inf).triu(1)
        index_query = heads_of(self.index_query(x), 2)
        logits = F.relu(torch.einsum("bhid,bjd->bhij", index_query, self.index_key(x)))
        index = torch.einsum("bhij,bih->bij", logits, self.index_weight(x)) + causal
        best = index.topk(5, dim=-1).indices
        index_mask = torch.full((x.size(0), length, length), -torch.inf).scatter_(-1, best, 0)
        q, k, v = map(heads_of, self.attention_qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) * HEAD_SIZE**-0.5 + (index_mask + causal).unsqueeze(1)
        return joined(scores.softmax(-1, dtype=torch.float32) @ v)


class LeanDecode(nn.Module):
    """One query of each sequence over a cache that holds as many keys as the sequence has had tokens.

    Sanovar et al. 2024, "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of
    Transformers", arXiv:2405.10480.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        q = heads_of(self.query(x))
        keep = torch.arange(keys.size(2)) < lengths.view(-1, 1, 1, 1)
        return self.out(joined(F.scaled_dot_product_attention(q, keys, values, attn_mask=keep)))


SEGMENT = torch.tensor([[0] * 4 + [1] * 7, [0] * 6 + [1] * 5])
CLUSTER = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2], [3, 3, 1, 1, 1, 1, 0, 3, 0, 0, 3]])
CACHE = (BATCH, HEADS, 17, HEAD_SIZE)

MEMORY = [
    Block(PriorFittedNetwork, (TOKENS,), REWRITTEN, REWRITTEN),
    Block(PriorFittedNetworkByAssignment, (TOKENS,), REWRITTEN, REWRITTEN, mask_is_tensor=True),
    Block(TabPFN, (drawn(BATCH, LENGTH, 5, WIDTH),), REWRITTEN * 2, REWRITTEN),
    Block(DeFormer, (TOKENS, SEGMENT), REWRITTEN * 2, REWRITTEN * 2),
    Block(ReactiveTransformer, (TOKENS, drawn(BATCH, 5, WIDTH, seed=1)), REWRITTEN * 3, REWRITTEN),
    Block(ReactiveTransformer, (TOKENS, drawn(BATCH, 2, WIDTH, seed=1)), ("", "k_covers_all_keys", ""), REWRITTEN),
    Block(ByteTransformer, (TOKENS[0], torch.tensor([3, 4, 11])), REWRITTEN, REWRITTEN),
    Block(ClusteredAttention, (TOKENS, CLUSTER), REWRITTEN),
    Block(ImprovedClusteredAttention, (TOKENS, CLUSTER), ("probabilities_used_elsewhere", "not_attention")),
    Block(Combiner, (drawn(BATCH, 12, WIDTH),), REWRITTEN),
    Block(CombinerOfScores, (drawn(BATCH, 12, WIDTH),), ("scores_concatenated",)),
    Block(EstimatedAttention, (TOKENS,), REWRITTEN, mask_is_tensor=True),
    Block(LightningIndexer, (TOKENS,), REWRITTEN, mask_is_tensor=True),
    Block(LeanDecode, (drawn(BATCH, 1, WIDTH), drawn(*CACHE, seed=1), drawn(*CACHE, seed=2), torch.tensor([9, 17])),
          REWRITTEN),
]  # fmt: skip
