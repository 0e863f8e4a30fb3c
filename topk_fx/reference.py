"""The definition of top-k attention and of the top-k FFN, in plain PyTorch: no chunks, no kernels.

Every lowering is tested against these functions. They are differentiable by autograd, with the selection held constant.
Source: Gupta et al. 2021, "Memory-efficient Transformers via Top-k Attention", arXiv:2106.06899.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATIONS
from .config import Keep, kept_count, validate_keep


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    k: Keep,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax over the k largest of scale * Q K^T + mask, times V. Arguments as `topk_fx.attention`."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (compute(query) @ compute(key).transpose(-2, -1)) * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    weights, indices = select(scores, k, empty_row=0.0)
    return weigh(F.dropout(weights, dropout_p), indices, value)


def select(scores: Tensor, k: Keep, *, empty_row: float = math.nan) -> tuple[Tensor, Tensor]:
    """softmax over the k largest of each row of scores [..., Lq, Lk]: weights and indices, both [..., Lq, min(k, Lk)].

    Ties keep the lowest key index. A score of -inf is a key that is masked out: where fewer than k others are left, its
    index is -1 and its weight 0. A row with no other score has the weights `empty_row`: NaN, what softmax gives, or 0,
    what scaled_dot_product_attention gives.
    """
    scores = compute(scores)
    kept = min(kept_count(validate_keep("k", k), scores.size(-1)), scores.size(-1))
    indices = scores.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    top = scores.gather(-1, indices)
    is_masked = top == -torch.inf
    is_empty = is_masked.all(-1, keepdim=True)
    if empty_row == 0.0:
        # Filled before the softmax too, whose gradient would be NaN.
        weights = top.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(is_empty, 0.0)
        return weights, indices.masked_fill(is_masked, -1)
    return top.softmax(-1), indices.masked_fill(is_masked & ~is_empty, -1)


def weigh(weights: Tensor, indices: Tensor, value: Tensor) -> Tensor:
    """sum_j weights_ij * value[indices_ij]: [..., Lq, Dv], dtype of value [..., Lk, Dv]. Index -1 adds nothing."""
    rows = compute(value).expand(*weights.shape[:-2], *value.shape[-2:]).unsqueeze(-3)
    rows = rows.expand(*weights.shape[:-1], *value.shape[-2:])
    chosen = indices.unsqueeze(-1).expand(*indices.shape, value.size(-1))
    kept = torch.where(chosen >= 0, rows.gather(-2, chosen.clamp(min=0)), 0)
    return (weights.unsqueeze(-1) * kept).sum(-2).to(value.dtype)


def topk_softmax(scores: Tensor, k: Keep, *, empty_row: float = math.nan) -> Tensor:
    """`select` as a dense tensor like scores, zero where a key is not kept: softmax as a top-k rewrite reads it."""
    weights, indices = select(scores, k, empty_row=empty_row)
    weights = weights.masked_fill(indices < 0, 0)
    return torch.zeros_like(compute(scores)).scatter_add(-1, indices.clamp(min=0), weights)


def ffn(
    input: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    *,
    k: Keep,
    activation: str = "relu",
    up_bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The k hidden units of largest magnitude of each token, projected down. Arguments as `topk_fx.ffn`."""
    up = compute(input)
    if up_weight is not None:
        up = F.linear(up, compute(up_weight), None if up_bias is None else compute(up_bias))
    if gate_weight is None:
        hidden = ACTIVATIONS[activation].function(up)
    else:
        gate = F.linear(compute(input), compute(gate_weight), None if gate_bias is None else compute(gate_bias))
        hidden = ACTIVATIONS[activation].function(gate) * up
    kept = min(kept_count(validate_keep("k", k), hidden.size(-1)), hidden.size(-1))
    indices = hidden.detach().abs().argsort(dim=-1, descending=True, stable=True)[..., :kept]
    hidden_kept = F.dropout(hidden.gather(-1, indices), dropout_p)
    hidden_kept = torch.zeros_like(hidden).scatter(-1, indices, hidden_kept)
    output = F.linear(hidden_kept, compute(down_weight), None if down_bias is None else compute(down_bias))
    return output.to(input.dtype)


def compute(x: Tensor) -> Tensor:
    """x in the dtype in which scores are accumulated and compared: float64 for float64, else float32."""
    return x if x.dtype == torch.float64 else x.float()
