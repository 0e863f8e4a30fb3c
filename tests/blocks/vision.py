"""Blocks that see images and point clouds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import drawn
from torch import Tensor, nn

from .block import (
    BATCH,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    REWRITTEN,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    FeedForward,
    GatedFeedForward,
    heads_of,
    joined,
)  # fmt: skip


class CrossFormer(nn.Module):
    """Attention in windows of neighbours, then in windows of tokens far apart; a small MLP of the offset is the bias.

    Wang et al. 2021, "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention", arXiv:2108.00154.
    """

    def __init__(self, side: int = 6, window: int = 3) -> None:
        super().__init__()
        self.window, self.stride = window, side // window
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = FeedForward(F.gelu)
        self.position_in, self.position_norm = nn.Linear(2, 5), nn.LayerNorm(5)
        self.position_out = nn.Linear(5, HEADS)
        offsets = torch.arange(1 - window, window)
        self.register_buffer("offsets", torch.cartesian_prod(offsets, offsets).float())
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = place[:, None] - place + window - 1
        self.register_buffer("offset_of_pair", offset[..., 0] * (2 * window - 1) + offset[..., 1])

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        table = self.position_out(F.relu(self.position_norm(self.position_in(self.offsets))))
        bias = table[self.offset_of_pair].permute(2, 0, 1)
        scores = q * HEAD_SIZE**-0.5 @ k.transpose(-2, -1) + bias
        return self.out(joined(scores.softmax(-1) @ v))

    def forward(self, x: Tensor) -> Tensor:
        batch, side, _, width = x.shape
        for is_local in (True, False):
            if is_local:  # [B, row of windows, row in it, column of windows, column in it, E]
                split = x.view(batch, self.stride, self.window, self.stride, self.window, width).permute(
                    0, 1, 3, 2, 4, 5
                )
            else:
                split = x.view(batch, self.window, self.stride, self.window, self.stride, width).permute(
                    0, 2, 4, 1, 3, 5
                )
            read = self.attention(split.reshape(-1, self.window**2, width)).view(split.shape)
            order = (0, 1, 3, 2, 4, 5) if is_local else (0, 3, 1, 4, 2, 5)
            x = x + read.permute(order).reshape(batch, side, side, width)
            x = x + self.mlp(x)
        return x


class Hiera(nn.Module):
    """Attention inside mask units, the queries of a unit pooled by their maximum.

    Ryali et al. 2023, "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", arXiv:2306.00989.
    """

    def __init__(self, units: int = 3, query_stride: int = 2) -> None:
        super().__init__()
        self.units, self.query_stride = units, query_stride
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection, self.out = (nn.Linear(WIDTH, size) for size in (3 * WIDTH, WIDTH, WIDTH))
        self.mlp = FeedForward(F.gelu)

    def attention(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        qkv = self.qkv(x).reshape(batch, -1, self.units, 3, HEADS, HEAD_SIZE).permute(3, 0, 4, 2, 1, 5)
        q, k, v = qkv[0], qkv[1], qkv[2]  # [B, H, units, tokens of a unit, D]
        q = q.view(batch, HEADS, self.units, self.query_stride, -1, HEAD_SIZE).amax(dim=3)
        read = F.scaled_dot_product_attention(q, k, v)
        return self.out(read.transpose(1, 3).reshape(batch, -1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        pooled = self.projection(normed).view(x.size(0), self.query_stride, -1, WIDTH).amax(dim=1)
        x = pooled + self.attention(normed)
        return x + self.mlp(self.norm2(x))


class TurboViT(nn.Module):
    """Attention inside mask units with query pooling, and then attention over all tokens that are left.

    Wong et al. 2023, "TurboViT: Generating Fast Vision Transformers via Generative Architecture Search",
    arXiv:2308.11421.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside_units, self.norm, self.everywhere = Hiera(), nn.LayerNorm(WIDTH), Attention()
        self.mlp = FeedForward(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside_units(x)
        x = x + self.everywhere(self.norm(x))
        return x + self.mlp(x)


class CloudAttention(nn.Module):
    """Each sampled point attends to the k nearest points, then all points to the sampled ones.

    Saleh et al. 2022, "CloudAttention: Efficient Multi-Scale Attention Scheme For 3D Point Cloud Learning",
    arXiv:2208.00524.
    """

    def __init__(self) -> None:
        super().__init__()
        self.local, self.across, self.mlp = Attention(), Attention(), FeedForward()

    def forward(self, features: Tensor, points: Tensor) -> Tensor:
        sampled = points[:, ::3]
        nearest = torch.cdist(sampled, points).topk(6, largest=False).indices  # [B, samples, 6]
        batch = torch.arange(points.size(0)).view(-1, 1, 1)
        groups = features[batch, nearest]  # [B, samples, 6, E]
        summaries = self.local(groups).amax(2)
        features = features + self.across(features, summaries)
        return features + self.mlp(features)


class MaskFormer(nn.Module):
    """Queries attend to the pixels in their own predicted mask, or to all if it is empty; then to each other.

    Cheng et al. 2021, "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527.
    """

    def __init__(self) -> None:
        super().__init__()
        self.across, self.among, self.mlp = Attention(), Attention(), FeedForward()

    def forward(self, queries: Tensor, pixels: Tensor) -> Tensor:
        inside = (queries @ pixels.transpose(1, 2)).sigmoid() > 0.5
        inside = inside | ~inside.any(-1, keepdim=True)
        queries = queries + self.across(queries, pixels, keep=inside.unsqueeze(1))
        queries = queries + self.among(queries)
        return queries + self.mlp(queries)


class PrototypeMaskFormer(nn.Module):
    """Each query reads the one pixel that is most like it, in the place of a softmax over all.

    Cavagnero et al. 2024, "PEM: Prototype-based Efficient MaskFormer for Image Segmentation", arXiv:2402.19422.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.alpha = nn.Parameter(torch.ones(WIDTH))

    def forward(self, queries: Tensor, pixels: Tensor) -> Tensor:
        keys = F.normalize(heads_of(self.key(pixels)), dim=-1)
        own = F.normalize(heads_of(self.query(queries)), dim=-1)
        best = (own @ keys.transpose(-2, -1)).argmax(-1, keepdim=True)
        prototype = keys.gather(2, best.expand(-1, -1, -1, HEAD_SIZE))
        return queries + self.out(joined(own * prototype) * self.alpha)


class KMeansMaskTransformer(nn.Module):
    """V summed over the pixels by softmax over the clusters: each pixel is assigned to a cluster, as in k-means.

    Yu et al. 2022, "CMT-DeepLab: Clustering Mask Transformers for Panoptic Segmentation", arXiv:2206.08948, and
    "k-means Mask Transformer", arXiv:2207.04044, which has an argmax in the place of the softmax.
    """

    def __init__(self, is_hard: bool = False) -> None:
        super().__init__()
        self.is_hard = is_hard
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.among, self.mlp = Attention(), FeedForward()

    def forward(self, clusters: Tensor, pixels: Tensor) -> Tensor:
        affinity = self.query(clusters) @ self.key(pixels).transpose(-2, -1)
        if self.is_hard:
            assignment = F.one_hot(affinity.argmax(1), clusters.size(1)).transpose(-2, -1).to(affinity.dtype)
        else:
            assignment = affinity.softmax(1)
        clusters = clusters + assignment @ self.value(pixels)
        clusters = clusters + self.among(clusters)
        return clusters + self.mlp(clusters)


def hard_k_means_mask_transformer() -> nn.Module:
    """KMeansMaskTransformer with an argmax over the clusters."""
    return KMeansMaskTransformer(is_hard=True)


class Activator(nn.Module):
    """Two gated feed-forwards, one of which stands in the place of attention.

    Abdullah & Aydin 2024, "Activator: GLU Activation Function as the Core Component of a Vision Transformer",
    arXiv:2405.15953.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixer, self.mlp = GatedFeedForward(F.gelu), GatedFeedForward(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PoolFormer(nn.Module):
    """Average pooling less its input in the place of attention; the MLP is two 1x1 convolutions.

    Yu et al. 2021, "MetaFormer Is Actually What You Need for Vision", arXiv:2111.11418.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, WIDTH), nn.GroupNorm(1, WIDTH)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.up, self.down = nn.Conv2d(WIDTH, HIDDEN, 1), nn.Conv2d(HIDDEN, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.pool(normed) - normed
        return x + self.down(F.gelu(self.up(self.norm2(x))))


IMAGE = drawn(BATCH, 6, 6, WIDTH)
PIXELS = drawn(BATCH, 13, WIDTH, seed=1)
QUERIES = drawn(BATCH, 5, WIDTH)

VISION = [
    Block(CrossFormer, (IMAGE,), REWRITTEN * 2, REWRITTEN * 2, mask_is_tensor=True),
    Block(Hiera, (drawn(BATCH, 18, WIDTH),), REWRITTEN, REWRITTEN),
    Block(TurboViT, (drawn(BATCH, 18, WIDTH),), REWRITTEN * 2, REWRITTEN * 2),
    Block(CloudAttention, (TOKENS, drawn(*TOKENS.shape[:2], 3, seed=1)), REWRITTEN * 2, REWRITTEN),
    Block(MaskFormer, (QUERIES, PIXELS), REWRITTEN * 2, REWRITTEN, mask_is_tensor=True),
    Block(PrototypeMaskFormer, (QUERIES, PIXELS)),
    Block(KMeansMaskTransformer, (QUERIES, PIXELS), ("softmax_not_over_keys", ""), REWRITTEN),
    Block(hard_k_means_mask_transformer, (QUERIES, PIXELS), REWRITTEN, REWRITTEN),
    Block(Activator, (TOKENS,), (), REWRITTEN * 2),
    Block(PoolFormer, (drawn(BATCH, WIDTH, 5, 5),)),
]  # fmt: skip
