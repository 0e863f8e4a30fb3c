"""A language model of bytes with ReLU FFNs, trained here: no weights of a ReLU model were found in a package."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 256


class Layer(nn.Module):
    def __init__(self, size: int, heads: int, is_causal: bool = True) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.norms = nn.ModuleList([nn.LayerNorm(size), nn.LayerNorm(size)])
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, L, size]; mask, of a layer that is not causal, bool [B, 1, 1, L]: True where a key may be seen."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norms[1](x))))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.is_causal)


class ByteModel(nn.Module):
    """Bytes [B, L], L at most `context`, to logits [B, L, 256] of the next."""

    def __init__(self, size: int = 128, heads: int = 4, layers: int = 3, context: int = CONTEXT) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, size), nn.Embedding(context, size)
        self.layers = nn.ModuleList(Layer(size, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions.weight[: ids.size(1)]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)


def trained(steps: int, progress: Callable[[], object], batch: int = 16) -> tuple[ByteModel, Tensor]:
    """A model trained on nine tenths of the topics of Python's `help()`, and windows [16, CONTEXT] of the rest."""
    topics = pydoc_data.topics.topics
    text = torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()))
    cut = len(text) * 9 // 10
    torch.manual_seed(0)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(cut - CONTEXT - 1, (batch,))
        window = torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress()
    rest = text[cut:]
    starts = torch.linspace(0, len(rest) - CONTEXT, 16).long().tolist()
    return model.eval(), torch.stack([rest[start : start + CONTEXT] for start in starts])
