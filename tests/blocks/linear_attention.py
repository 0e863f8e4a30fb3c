"""Recurrences, linear attention and learned weights: nothing to rewrite but a softmax attention beside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import (
    HEAD_SIZE,
    HEADS,
    LENGTH,
    REWRITTEN,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    FeedForward,
    heads_of,
    joined,
    parameter,
)


class LinearAttention(nn.Module):
    """phi(Q) (phi(K)^T V) / phi(Q) sum phi(K), phi = elu + 1.

    Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    arXiv:2006.16236.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        total = q @ k.sum(-2, keepdim=True).mT
        return self.out(joined(q @ (k.mT @ v) / total))


class EfficientAttention(LinearAttention):
    """softmax(Q) (softmax(K)^T V): Q over its features, K over the tokens.

    Shen et al. 2018, "Efficient Attention: Attention with Linear Complexities", arXiv:1812.01243.
    """

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        return self.out(joined(q.softmax(-1) @ (k.softmax(-2).mT @ v)))


class SearchedMixture(nn.Module):
    """Layers of softmax attention and of linear attention, in the order that a search has found.

    Liu et al. 2022, "Neural Architecture Search on Efficient Transformers and Beyond", arXiv:2207.13955.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), LinearAttention(), Attention(), EfficientAttention()])
        self.mlps = nn.ModuleList([FeedForward() for _ in self.layers])

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in zip(self.layers, self.mlps, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return x


class Mamba(nn.Module):
    """h_t = exp(dt A) h_(t-1) + dt B_t x_t, y_t = C_t h_t + D x_t, with dt, B, C of the token; y is gated by SiLU(z).

    Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752.
    """

    def __init__(self, states: int = 3) -> None:
        super().__init__()
        self.states = states
        self.into, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
        self.selection, self.step = nn.Linear(WIDTH, 1 + 2 * states), nn.Linear(1, WIDTH)
        self.decay, self.skip = parameter(WIDTH, states), parameter(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.into(x).chunk(2, -1)
        x = F.silu(self.conv(x.mT)[..., : x.size(1)].mT)
        dt, b, c = self.selection(x).split([1, self.states, self.states], -1)
        dt = F.softplus(self.step(dt)).unsqueeze(-1)
        decay = (-dt * self.decay.exp()).exp()
        inflow = dt * b.unsqueeze(-2) * x.unsqueeze(-1)  # [B, L, E, states]
        state, outputs = torch.zeros_like(inflow[:, 0]), []
        for t in range(x.size(1)):
            state = decay[:, t] * state + inflow[:, t]
            outputs.append((state @ c[:, t].unsqueeze(-1)).squeeze(-1))
        y = torch.stack(outputs, 1) + self.skip * x
        return self.out(y * F.silu(z))


class GatedLinearAttention(nn.Module):
    """S_t = diag(a_t) S_(t-1) + k_t^T v_t, o_t = q_t S_t, in the form that is parallel over tokens.

    Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv:2312.06635.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.swish = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decay = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH))
        self.norm = nn.LayerNorm(HEAD_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        decay = heads_of(F.logsigmoid(self.decay(x)) / 16).cumsum(-2).exp()
        scores = ((q * decay) @ (k / decay).mT).tril()
        return self.out(F.silu(self.swish(x)) * joined(self.norm(scores @ v)))


class DeltaNet(nn.Module):
    """S_t = S_(t-1) + b_t (v_t - S_(t-1) k_t) k_t^T: what a key stands for is replaced, not added to.

    Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", arXiv:2406.06484.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.beta = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        q, k = F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1)
        beta = self.beta(x).sigmoid().mT[..., None, None]
        state, outputs = x.new_zeros(x.size(0), HEADS, HEAD_SIZE, HEAD_SIZE), []
        for t in range(x.size(1)):
            key, value = k[:, :, t].unsqueeze(-1), v[:, :, t].unsqueeze(-1)
            state = state + beta[:, :, t] * (value - state @ key) @ key.mT
            outputs.append((state @ q[:, :, t].unsqueeze(-1)).squeeze(-1))
        return self.out(joined(torch.stack(outputs, 2)))


class SparseStateExpansion(nn.Module):
    """Each token writes to the state's partitions that a classification of it ranks best, and reads from the same.

    Pan et al. 2025, "Scaling Linear Attention with Sparse State Expansion", arXiv:2507.16577.
    """

    def __init__(self, partitions: int = 4) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.classes = nn.Linear(WIDTH, partitions)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = self.classes(x).softmax(-1)
        best, index = weights.topk(2)
        chosen = torch.zeros_like(weights).scatter(-1, index, best)  # [B, L, partitions]
        shared = chosen @ chosen.mT
        return self.out(((q @ k.softmax(-1).mT) * shared).tril() @ v)


class ConvolutionalLinearAttention(nn.Module):
    """Causal convolutions of queries and keys, then gated linear attention that is normalised.

    Liu et al. 2025, "LAWCAT: Efficient Distillation from Quadratic to Linear Attention with Convolution across Tokens
    for Long Context Modeling", arXiv:2509.18467.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HEADS)
        self.conv_q, self.conv_k = (nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = (conv(y.mT)[..., :LENGTH].mT for conv, y in ((self.conv_q, q), (self.conv_k, k)))
        q, k, v = heads_of(q.relu()), heads_of(k.relu()), heads_of(v)
        decay = F.logsigmoid(self.gate(x)).mT.cumsum(-1)
        scores = (q @ k.mT * (decay.unsqueeze(-1) - decay.unsqueeze(-2)).exp()).tril()
        return self.out(joined(scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v))


class LegendreMemoryFormer(nn.Module):
    """m_t = A m_(t-1) + B u_t with fixed A, B, a hidden layer over memory and input, and convolutions that mix channels.

    Liu, Datta, Li & Beerel 2024, "LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units",
    arXiv:2402.04882.
    """

    def __init__(self, order: int = 4) -> None:
        super().__init__()
        n = torch.arange(order)
        rates = torch.where(n[:, None] < n, -1.0, (-1.0) ** (n[:, None] - n + 1)) * (2 * n[:, None] + 1) / LENGTH
        self.register_buffer("transition", torch.linalg.matrix_exp(rates))
        self.register_buffer("entry", (-1.0) ** n * (2 * n + 1) / LENGTH)
        self.into, self.hidden = nn.Linear(WIDTH, 1), nn.Linear(WIDTH + order, WIDTH)
        self.up, self.down = nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.into(x))
        memory, memories = x.new_zeros(x.size(0), self.entry.size(0)), []
        for t in range(x.size(1)):
            memory = memory @ self.transition.T + u[:, t] * self.entry
            memories.append(memory)
        hidden = F.relu(self.hidden(torch.cat([x, torch.stack(memories, 1)], -1)))
        return x + self.down(F.gelu(self.up(hidden.mT))).mT


class Extractor(nn.Module):
    """sum_(j <= i) w_(i-j) x_j with learned weights of each distance, times a gate of the token.

    Chen 2023, "Attention Is Not All You Need Anymore", arXiv:2308.07661: the super high-performance Extractor (SHE).
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = parameter(LENGTH, WIDTH)
        self.out, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        weights = self.weights[distance.clamp(min=0)] * (distance >= 0).unsqueeze(-1)  # [L, L, E]
        return self.out(torch.einsum("ije,bje->bie", weights, x)) * self.gate(x)


class AtlasHybrid(nn.Module):
    """A memory fitted to the last tokens by gradient descent, then attention in a sliding window over its output.

    Behrouz et al. 2025, "ATLAS: Learning to Optimally Memorize the Context at Test Time", arXiv:2505.23735.
    """

    def __init__(self, window: int = 3) -> None:
        super().__init__()
        self.window = window
        self.qkv, self.rates, self.attention = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2), Attention()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = (torch.cat([y, y.square()], -1) for y in (q, k))  # polynomial features
        rate, decay = self.rates(x).sigmoid().unsqueeze(-1).unbind(-2)
        memory, outputs = x.new_zeros(x.size(0), k.size(-1), WIDTH), []
        for t in range(x.size(1)):
            recent = slice(max(0, t + 1 - self.window), t + 1)
            error = k[:, recent] @ memory - v[:, recent]
            memory = decay[:, t].unsqueeze(-1) * memory - 0.1 * rate[:, t].unsqueeze(-1) * (k[:, recent].mT @ error)
            outputs.append((q[:, t].unsqueeze(1) @ memory).squeeze(1))
        x = x + torch.stack(outputs, 1)
        position = torch.arange(x.size(1))
        distance = position[:, None] - position
        return x + self.attention(x, keep=(distance >= 0) & (distance < self.window))


FEW = TOKENS[:, :5]
"""For what Python loops over, token by token."""

LINEAR_ATTENTION = [
    Block(LinearAttention, (TOKENS,)),
    Block(EfficientAttention, (TOKENS,), ("not_attention", "not_attention")),
    Block(SearchedMixture, (TOKENS,), ("", "", "not_attention", "not_attention"), REWRITTEN * 4),
    Block(Mamba, (FEW,)),
    Block(GatedLinearAttention, (TOKENS,)),
    Block(DeltaNet, (FEW,)),
    Block(SparseStateExpansion, (TOKENS,), ("not_attention", "not_attention")),
    Block(ConvolutionalLinearAttention, (TOKENS,)),
    Block(LegendreMemoryFormer, (FEW,)),
    Block(Extractor, (TOKENS,)),
    Block(AtlasHybrid, (FEW,), REWRITTEN),
]
