"""Attention in the spellings that models use. Each is a function (or module) of tensors named in SHAPES.

Sizes: batch 2, heads 3 (where grouped 6, and 2 for keys), Lq 7, Lk 9, D 4, Dv 5: no two axes of a product are of one size.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten
B, H, LQ, LK, D, DV = 2, 3, 7, 9, 4, 5
GROUPED, KV_HEADS = 6, 2
INF = math.inf
SCALE = 1 / math.sqrt(D)

SHAPES = {
    "q": (B, H, LQ, D), "k": (B, H, LK, D), "v": (B, H, LK, DV),
    "k_transposed": (B, H, D, LK), "q_one": (1, H, LQ, D), "q_last": (B, H, 1, D),
    "k_one_head": (B, 1, LK, D), "v_one_head": (B, 1, LK, DV),
    "q_joined": (B * H, LQ, D), "k_joined": (B * H, LK, D), "v_joined": (B * H, LK, DV),
    "q_matrix": (LQ, D), "k_matrix": (LK, D), "v_matrix": (LK, DV), "k_single": (B, LK, D), "v_single": (B, LK, DV),
    "q_grouped": (B, GROUPED, LQ, D), "k_grouped": (B, KV_HEADS, LK, D), "v_grouped": (B, KV_HEADS, LK, DV),
    "q_heads_last": (B, LQ, H, D), "k_heads_last": (B, LK, H, D), "v_heads_last": (B, LK, H, DV),
    "bias": (1, H, LQ, LK), "bias_matrix": (LQ, LK), "bias_keys": (LK,), "bias_joined": (B * H, LQ, LK),
    "slopes": (H, 1, 1), "alibi_joined": (B * H, 1, LK), "temperature": (), "sink": (H,),
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    """The inputs by name, seeded. Of the masks, True is kept; every row of `keep` keeps some key, and one only two."""
    generator = torch.Generator().manual_seed(20210613)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found["temperature"] = torch.tensor(0.7)
    found["scale_heads"] = torch.rand(H, 1, 1, generator=generator) + 0.5
    found["keep"] = torch.rand(LQ, LK, generator=generator) > 0.3
    found["keep"][:, 0] = True
    found["keep"][3] = torch.arange(LK) < 2
    found["keep_some_rows"] = found["keep"].clone()
    found["keep_some_rows"][5] = False
    found["padding"] = torch.arange(LK) < torch.tensor([LK, 6]).view(B, 1, 1, 1)
    found["additive"] = torch.zeros(LQ, LK).masked_fill(~found["keep"], torch.finfo(torch.float32).min)
    return found


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One way to write attention.

    Attributes:
        model: a function of tensors, or an nn.Module.
        dense: the same with a softmax that `KeepingTopK` knows, if `model` has none.
        symbolic: why it stays dense under symbolic_trace, which records no shapes and dtypes; "" if it is rewritten.
        dtype: the coarsest dtype that it computes in.
    """

    name: str
    model: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    symbolic: str
    dtype: torch.dtype

    def inputs(self) -> tuple[Tensor, ...]:
        forward = self.model.forward if isinstance(self.model, nn.Module) else self.model
        available = tensors()
        return tuple(available[name] for name in inspect.signature(forward).parameters)


SPELLINGS: list[Spelling] = []


def spelling(
    *, dense: Callable[..., Tensor] | None = None, symbolic: str = "", dtype: torch.dtype = torch.float32
) -> Callable[[Any], Any]:
    """Puts the function or module class below into SPELLINGS."""

    def register(model: Any) -> Any:
        made = model() if isinstance(model, type) else model
        SPELLINGS.append(Spelling(model.__name__, made, dense or made, symbolic, dtype))
        return model

    return register


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


# The product of query and key.


@spelling()
def matmul_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1), v)


@spelling()
def matmul_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@spelling()
def matmul_method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.matmul(k.swapaxes(-2, -1)).softmax(dim=-1).matmul(v)


@spelling(dense=plain)
def aten_overloads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = aten.matmul.default(q, aten.transpose.int(k, -2, -1))
    return aten.matmul.default(aten.softmax.int(scores, -1), v)


@spelling(symbolic="shape_unknown")
def key_transposed_by_positive_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.transpose(2, 3), dim=3) @ v


@spelling()
def key_permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.permute(0, 1, 3, 2)).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def key_stored_transposed(q: Tensor, k_transposed: Tensor, v: Tensor) -> Tensor:
    return (q @ k_transposed).softmax(-1) @ v


@spelling()
def bmm_of_joined_heads(q_joined: Tensor, k_joined: Tensor, v_joined: Tensor) -> Tensor:
    return torch.bmm(F.softmax(torch.bmm(q_joined, k_joined.transpose(1, 2)), dim=-1), v_joined)


@spelling()
def one_matrix(q_matrix: Tensor, k_matrix: Tensor, v_matrix: Tensor) -> Tensor:
    return torch.mm(torch.mm(q_matrix, k_matrix.t()).softmax(-1), v_matrix)


@spelling(symbolic="shape_unknown")
def one_matrix_by_capital_t(q_matrix: Tensor, k_matrix: Tensor, v_matrix: Tensor) -> Tensor:
    return (q_matrix @ k_matrix.T).softmax(-1) @ v_matrix


@spelling()
def addmm_of_a_bias(q_matrix: Tensor, k_matrix: Tensor, v_matrix: Tensor, bias_matrix: Tensor) -> Tensor:
    return torch.addmm(bias_matrix, q_matrix, k_matrix.t(), beta=0.5, alpha=SCALE).softmax(-1) @ v_matrix


@spelling()
def baddbmm_of_a_bias(q_joined: Tensor, k_joined: Tensor, v_joined: Tensor, bias_joined: Tensor) -> Tensor:
    scores = torch.baddbmm(bias_joined, q_joined, k_joined.transpose(1, 2), beta=2.0, alpha=SCALE)
    return scores.softmax(-1) @ v_joined


@spelling()
def baddbmm_with_beta_zero(q_joined: Tensor, k_joined: Tensor, v_joined: Tensor, bias_joined: Tensor) -> Tensor:
    return torch.baddbmm(bias_joined, q_joined, k_joined.mT, beta=0).softmax(-1) @ v_joined


@spelling()
def einsum_heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


@spelling()
def einsum_heads_last(q_heads_last: Tensor, k_heads_last: Tensor, v_heads_last: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q_heads_last, k_heads_last).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v_heads_last)


@spelling()
def einsum_with_key_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhkd,bhqk->bhqd", v, torch.einsum("bhkd,bhqd->bhqk", k, q).softmax(-1))


@spelling()
def einsum_over_keys_in_the_middle(q_heads_last: Tensor, k_heads_last: Tensor, v_heads_last: Tensor) -> Tensor:
    weights = torch.einsum("bihd,bjhd->bijh", q_heads_last, k_heads_last).softmax(2)
    return torch.einsum("bijh,bjhd->bihd", weights, v_heads_last)


@spelling(symbolic="shape_unknown")
def einsum_with_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v)


@spelling()
def einsum_without_arrow(q_matrix: Tensor, k_matrix: Tensor, v_matrix: Tensor) -> Tensor:
    return torch.einsum("ij,jd", torch.einsum("id,jd", q_matrix, k_matrix).softmax(-1), v_matrix)


@spelling()
def einsum_of_single_keys(q: Tensor, k_single: Tensor, v_single: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bjd->bhij", q, k_single).softmax(-1)
    return torch.einsum("bhij,bjd->bihd", weights, v_single)


@spelling()
def einsum_then_matmul(q_heads_last: Tensor, k_heads_last: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", q_heads_last, k_heads_last).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def scores_key_by_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.transpose(-2, -1)).softmax(-2).transpose(-2, -1) @ v


@spelling(symbolic="shape_unknown")
def scores_transposed_before_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.transpose(-2, -1)).transpose(-2, -1).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def scores_adjoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.adjoint((k @ q.mH).adjoint().mH).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def value_from_the_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.transpose(-2, -1) @ (k @ q.transpose(-2, -1)).softmax(-2)


# Scales.


@spelling()
def scaled_by_quotient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1) @ v


@spelling()
def scaled_from_the_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (SCALE * (q @ k.transpose(-2, -1))).softmax(-1) @ v


@spelling()
def scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores *= 3.0
    scores.div_(2.0)
    return scores.softmax(-1) @ v


@spelling()
def scaled_before_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * SCALE) @ (k / 2).transpose(-2, -1)).softmax(-1) @ v


@spelling()
def scaled_by_size_at_run_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).softmax(-1) @ v


@spelling()
def scaled_by_constant_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / torch.full([], 2.0, dtype=q.dtype)).softmax(-1) @ v


@spelling()
def scaled_by_learned_temperature(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * temperature.exp()).softmax(-1) @ v


@spelling()
def divided_by_learned_scale_of_heads(q: Tensor, k: Tensor, v: Tensor, scale_heads: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / scale_heads).softmax(-1) @ v


@spelling()
def negated_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.neg(-(q @ k.transpose(-2, -1))).softmax(-1) @ v


@spelling()
def negative_distance(q: Tensor, k: Tensor, v: Tensor, bias_keys: Tensor) -> Tensor:
    return (-(bias_keys - 2 * (q @ k.transpose(-2, -1)))).softmax(-1) @ v


# Masks and biases.


@spelling()
def additive_mask(q: Tensor, k: Tensor, v: Tensor, additive: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * SCALE + additive).softmax(-1) @ v


@spelling()
def additive_mask_first(q: Tensor, k: Tensor, v: Tensor, additive: Tensor) -> Tensor:
    return torch.add(additive, q @ k.transpose(-2, -1), alpha=SCALE).softmax(-1) @ v


@spelling()
def bias_with_factor(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.add(q @ k.transpose(-2, -1), bias, alpha=0.5).softmax(-1) @ v


@spelling()
def bias_subtracted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.sub(q @ k.transpose(-2, -1), bias, alpha=2).softmax(-1) @ v


@spelling()
def subtracted_from_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.sub(bias, q @ k.transpose(-2, -1), alpha=-0.5).softmax(-1) @ v


@spelling()
def several_biases(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, bias_keys: Tensor, additive: Tensor) -> Tensor:
    """T5: a learned bias of heads, one of keys, and the mask."""
    scores = q @ k.transpose(-2, -1)
    scores += bias
    return (scores + bias_keys + additive).softmax(-1) @ v


@spelling()
def addcmul_of_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale_heads: Tensor) -> Tensor:
    return torch.addcmul(bias, q @ k.transpose(-2, -1), scale_heads, value=SCALE).softmax(-1) @ v


@spelling()
def bias_expanded_to_the_scores(q: Tensor, k: Tensor, v: Tensor, bias_keys: Tensor, padding: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) + bias_keys.expand(B, H, LQ, LK)
    return scores.masked_fill(~padding.expand(B, 1, LQ, LK), -INF).softmax(-1) @ v


@spelling()
def the_same_bias_twice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1) + bias) * 2 + bias).softmax(-1) @ v


@spelling()
def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    distance = torch.arange(LK) - torch.arange(LQ).unsqueeze(-1)
    return (q @ k.transpose(-2, -1) * SCALE + slopes * distance).softmax(-1) @ v


@spelling()
def integer_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) - torch.arange(LK)).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def bloom(q_joined: Tensor, k_joined: Tensor, v_joined: Tensor, alibi_joined: Tensor, padding: Tensor) -> Tensor:
    scores = alibi_joined.baddbmm(q_joined, k_joined.transpose(1, 2), beta=1.0, alpha=SCALE)
    scores = scores.view(B, H, LQ, LK).masked_fill(~padding, torch.finfo(torch.float32).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).view(B * H, LQ, LK)
    return torch.bmm(weights, v_joined)


@spelling()
def masked_fill_of_padding(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).masked_fill(~padding, -INF).softmax(-1) @ v


@spelling()
def masked_fill_in_place(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * SCALE
    scores.masked_fill_(~keep, -1e9)
    return scores.softmax(-1) @ v


@spelling()
def masked_fill_in_place_of_a_mask_as_large_as_the_scores(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """XLM's: the mask reads the shape of the scores, and nothing else of them."""
    scores = q @ k.transpose(-2, -1)
    mask = (~keep).view(1, 1, LQ, LK).expand_as(scores)
    scores.masked_fill_(mask, -1e9)
    return scores.softmax(-1) @ v


@spelling(symbolic="unknown_score_op")
def maximum_with_a_scalar_tensor(q_joined: Tensor, k_joined: Tensor, v_joined: Tensor, additive: Tensor) -> Tensor:
    """XGLM's, between two views."""
    scores = (q_joined @ k_joined.mT).view(B, H, LQ, LK) + additive
    scores = torch.max(scores, torch.tensor(torch.finfo(torch.float32).min))
    return scores.view(B * H, LQ, LK).softmax(-1) @ v_joined


@spelling()
def row_maximum_subtracted_between_scales(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CogView's, in LayoutLMv3: the maximum loses its dimension and gets it back."""
    scores = q @ k.transpose(-2, -1) / 32
    return ((scores - scores.amax(dim=-1).unsqueeze(-1)) * 32).softmax(-1) @ v


@spelling(symbolic="scores_used_elsewhere")
def bias_reshaped_as_the_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """SAM's decomposed positions: the scores tell a shape, and nothing else."""
    scores = q @ k.transpose(-2, -1)
    bias = bias.expand(B, -1, -1, -1).flatten()
    return (scores + bias.reshape_as(scores)).softmax(-1) @ v


@spelling()
def bias_written_before_it_is_added(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """Funnel's: the write comes after the product, and before anything of the attention reads the bias."""
    scores = q @ k.transpose(-2, -1)
    bias = bias + 1
    bias *= keep
    return (scores + bias).softmax(-1) @ v


@spelling()
def probabilities_masked_in_place(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """SEW-D's: what is read is the tensor that was written to."""
    weights = (q @ k.transpose(-2, -1)).softmax(-1) * 1.0
    weights.masked_fill_(~padding, 0)
    return weights @ v


@spelling()
def probabilities_viewed_for_nobody(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ProphetNet's, which gives them back only if asked for them."""
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    output = weights @ v
    weights.view(B, H, LQ, LK)
    return output


@spelling()
def masked_fill_of_whole_rows(q: Tensor, k: Tensor, v: Tensor, keep_some_rows: Tensor) -> Tensor:
    """The row with no key left is NaN, as is every gradient that it reaches."""
    return (q @ k.transpose(-2, -1)).masked_fill(~keep_some_rows, -INF).softmax(-1) @ v


@spelling()
def masked_fill_by_tensor(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, temperature: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).masked_fill(~keep, temperature).softmax(-1) @ v


@spelling()
def where_kept(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, q @ k.transpose(-2, -1), torch.finfo(torch.float32).min).softmax(-1) @ v


@spelling()
def where_masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return torch.where(~keep, torch.tensor(-1e4), q @ k.transpose(-2, -1)).softmax(-1) @ v


@spelling()
def where_learned(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
    return torch.where(keep, q @ k.transpose(-2, -1), bias).softmax(-1) @ v


@spelling()
def one_minus_mask(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) - 1e4 * (1 - padding.float())).softmax(-1) @ v


@spelling()
def causal_by_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(LQ, LK, dtype=torch.bool).triu(1)
    return (q @ k.transpose(-2, -1)).masked_fill(future, -INF).softmax(-1) @ v


@spelling()
def causal_by_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    past = torch.arange(LK) <= torch.arange(LQ).unsqueeze(-1)
    return torch.where(past, q @ k.transpose(-2, -1), -INF).softmax(-1) @ v


@spelling()
def window_and_padding(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    i, j = torch.arange(LQ).unsqueeze(-1), torch.arange(LK)
    mask = torch.where((j <= i) & (j > i - 4) & padding, 0.0, torch.finfo(torch.float32).min)
    return (q @ k.transpose(-2, -1) * SCALE + mask).softmax(-1) @ v


@spelling()
def soft_cap_then_mask(q: Tensor, k: Tensor, v: Tensor, additive: Tensor) -> Tensor:
    return (torch.tanh(q @ k.transpose(-2, -1) / 5.0) * 5.0 + additive).softmax(-1) @ v


@spelling()
def bias_then_soft_cap(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1) + bias).tanh() * 2).softmax(-1) @ v


@spelling()
def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).clamp(-0.5, 0.75).softmax(-1) @ v


@spelling()
def clamped_from_below(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.clamp(q @ k.transpose(-2, -1), min=-0.5).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def clamped_to_a_tensor(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.clamp(q @ k.transpose(-2, -1), min=bias).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def activated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)).sigmoid() * 4).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def gated_by_themselves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return (scores * scores.sigmoid()).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def doubled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return (scores + scores).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def leaky_below_zero(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) + bias
    return torch.where(scores > 0, scores, 0.1 * scores).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def decayed_by_learned_distance(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """DA-Transformer."""
    distance = (torch.arange(LQ)[:, None] - torch.arange(LK)).abs()
    decay = 2 / (1 + torch.exp(slopes * distance))
    return (F.relu(q @ k.transpose(-2, -1)) * decay * SCALE).softmax(-1) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, additive: Tensor | None = None) -> Tensor:
    """A sink as what it does to the probabilities of the keys, whose softmax knows no sink."""
    scores = q @ k.transpose(-2, -1) + (0 if additive is None else additive)
    weights = scores.softmax(-1)
    logs = torch.where(weights > 0, weights, 1).log()
    total = (scores - logs).masked_fill(weights == 0, -INF).amax(-1, keepdim=True)
    return weights * torch.sigmoid(total - sink.view(1, H, 1, 1)) @ v


@spelling(symbolic="scores_concatenated", dense=with_sink)
def sink_concatenated(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """gpt-oss: a column that is no key, cut off after the softmax."""
    logits = torch.cat([q @ k.transpose(-2, -1), sink.view(1, H, 1, 1).expand(B, H, LQ, 1)], dim=-1)
    logits = logits - logits.max(-1, keepdim=True).values
    return logits.softmax(-1)[..., :-1] @ v


@spelling(symbolic="scores_concatenated", dense=with_sink)
def sink_in_front(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, additive: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) + additive
    logits = torch.cat([sink.view(1, H, 1, 1).expand(B, H, LQ, 1), scores], dim=-1)
    return F.dropout(logits.softmax(-1), 0.0).narrow(-1, 1, LK) @ v


@spelling(symbolic="scores_used_elsewhere", dense=with_sink)
def sink_as_factor_of_the_output(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """Granite with sliding windows."""
    scores = q @ k.transpose(2, 3)
    factor = (torch.logsumexp(scores, dim=-1) - sink.view(1, -1, 1)).to(torch.float32).sigmoid()
    output = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    return output * factor.unsqueeze(-1).to(output.dtype)


@spelling(symbolic="scores_used_elsewhere", dense=with_sink)
def sink_as_factor_of_the_weights(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    factor = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink[:, None, None])
    return (factor * scores.softmax(-1)) @ v


@spelling()
def filled_by_a_multiple_of_ones(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Graph attention."""
    scores = q @ k.transpose(-2, -1)
    return torch.where(keep, scores, -9e15 * torch.ones_like(scores)).softmax(-1) @ v


@spelling(symbolic="scores_used_elsewhere")
def filled_by_a_new_tensor_of_one_number(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, padding: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores = torch.where(keep, scores, scores.new_full((), -1e9))
    return (scores + scores.new_zeros(scores.shape).masked_fill(~padding, -INF)).softmax(-1) @ v


@spelling()
def where_as_a_method(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).where(keep, -1e9).softmax(-1) @ v


@spelling()
def weights_times_a_truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)).softmax(-1) * True) @ v


@spelling()
def weights_scaled_by_head(q: Tensor, k: Tensor, v: Tensor, scale_heads: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)).softmax(-1) * scale_heads) @ v


@spelling()
def weights_filled_after(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """XSoftmax of DeBERTa."""
    scores = (q @ k.transpose(-2, -1)).masked_fill(~keep, torch.finfo(torch.float32).min)
    return scores.softmax(-1).masked_fill(~keep, 0.0) @ v


@spelling()
def weights_without_nan(q: Tensor, k: Tensor, v: Tensor, keep_some_rows: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)).masked_fill(~keep_some_rows, -INF)
    return scores.softmax(-1).nan_to_num(0.0) @ v


@spelling()
def hard_tanh_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.hardtanh(q @ k.transpose(-2, -1)).softmax(-1) @ v


# The softmax, and what stands between it and the product with V.


@spelling()
def softmax_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.transpose(-2, -1), dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=0.1, training=False) @ v


@spelling()
def softmax_from_special(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.special.softmax(q @ k.transpose(-2, -1), -1).type_as(v) @ v


@spelling(dense=plain)
def exp_of_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.transpose(-2, -1), dim=-1).exp() @ v


@spelling(dense=plain)
def exp_over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exp = torch.exp(q @ k.transpose(-2, -1))
    return (exp / exp.sum(dim=-1, keepdim=True)) @ v


@spelling(dense=plain)
def exp_less_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


@spelling(symbolic="", dense=plain)
def exp_over_sum_unsqueezed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    weights = torch.exp(scores - scores.max(-1)[0].unsqueeze(-1))
    return weights / weights.sum(-1).unsqueeze(-1) @ v


@spelling(symbolic="", dense=plain)
def exp_less_logsumexp_unsqueezed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return (scores - torch.logsumexp(scores, -1).unsqueeze(-1)).exp() @ v


@spelling()
def softmax_less_row_maximum(q: Tensor, k: Tensor, v: Tensor, additive: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) + additive
    return (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1) @ v


@spelling(dense=plain)
def exp_over_sum_less_row_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    exp = (scores - scores.amax(-1, keepdim=True)).exp()
    return (exp / exp.sum(-1, keepdim=True)) @ v


@spelling(dense=plain)
def exp_over_sum_less_detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    exp = torch.exp(scores - scores.max(dim=-1, keepdim=True).values.detach())
    return exp.div(exp.sum((-1,), True)) @ v


@spelling(dense=plain)
def exp_over_sum_less_maximum_by_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    exp = torch.exp(scores - torch.max(scores, -1, keepdim=True)[0])
    return (exp / exp.sum(-1, keepdim=True)) @ v


@spelling()
class SoftmaxAndDropoutModules(nn.Module):
    """In eval mode; symbolic_trace makes of them calls of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.dropout, self.copy = nn.Softmax(dim=-1), nn.Dropout(0.5), nn.Identity()
        self.eval()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.copy(self.dropout(self.softmax(q @ k.transpose(-2, -1)))) @ v


@spelling()
class LearnedBiasOfModule(nn.Module):
    """The bias is a parameter, the mask a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-1, 1, H).view(H, 1, 1) * torch.arange(LK))
        self.register_buffer("future", torch.ones(LQ, LK, dtype=torch.bool).triu(1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) + self.bias).masked_fill(self.future, -INF).softmax(-1) @ v


def half_precision_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float()).bfloat16()


@spelling(dense=half_precision_dense, dtype=torch.bfloat16)
def half_precision(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    return F.softmax(q @ k.transpose(-2, -1), dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(dense=half_precision_dense, dtype=torch.bfloat16)
def half_precision_upcast_before_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.to(torch.bfloat16), k.to(torch.bfloat16), v.to(torch.bfloat16)
    return (q @ k.transpose(-2, -1)).float().softmax(-1).to(torch.bfloat16) @ v


# Moves of axes, and broadcasting.


@spelling(symbolic="shape_unknown")
def weights_viewed_before_product(q: Tensor, k: Tensor, v_joined: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return torch.bmm(weights.reshape(B * H, LQ, LK), v_joined)


@spelling(symbolic="shape_unknown")
def scores_viewed_with_mask_between(q_joined: Tensor, k_joined: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    scores = torch.bmm(q_joined, k_joined.transpose(1, 2)).view(B, H, LQ, LK)
    return scores.masked_fill(~padding, -INF).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def scores_viewed_after_learned_temperature(
    q_joined: Tensor, k_joined: Tensor, v: Tensor, temperature: Tensor
) -> Tensor:
    scores = torch.bmm(q_joined + 1, k_joined.transpose(1, 2)).tanh() / temperature
    return scores.view(B, H, LQ, LK).softmax(-1) @ v


@spelling(symbolic="shape_unknown")
def scores_joined_again(q_joined: Tensor, k_joined: Tensor, v_joined: Tensor, padding: Tensor, bias: Tensor) -> Tensor:
    """BART of old: heads split for the mask, joined for the softmax."""
    scores = torch.bmm(q_joined, k_joined.transpose(1, 2)).view(B, H, LQ, LK) + bias
    scores = scores.masked_fill(~padding, -INF).view(B * H, LQ, LK)
    return torch.bmm(F.softmax(scores, dim=-1), v_joined)


@spelling(symbolic="not_expressible")
def scores_permuted_to_heads_last(q: Tensor, k: Tensor, v_heads_last: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).permute(0, 2, 3, 1).softmax(2)
    return torch.einsum("bqkh,bkhd->bqhd", weights, v_heads_last)


@spelling(symbolic="shape_unknown")
def weights_unsqueezed(q_joined: Tensor, k_joined: Tensor, v_joined: Tensor) -> Tensor:
    weights = (q_joined @ k_joined.mT).softmax(-1)
    return (weights.unsqueeze(1) @ v_joined.unsqueeze(1)).squeeze(1)


@spelling(symbolic="shape_unknown")
def scores_of_groups(q_grouped: Tensor, k_grouped: Tensor, v_grouped: Tensor) -> Tensor:
    """Grouped heads as a fifth axis, and the heads joined before the softmax."""
    repeats = GROUPED // KV_HEADS
    q = q_grouped.view(B, KV_HEADS, repeats, LQ, D)
    scores = (q @ k_grouped.unsqueeze(2).transpose(-2, -1)).view(B, GROUPED, LQ, LK)
    weights = scores.softmax(-1).view(B, KV_HEADS, repeats, LQ, LK)
    return (weights @ v_grouped[:, :, None]).reshape(B, GROUPED, LQ, DV)


@spelling()
def key_and_value_expanded(q_grouped: Tensor, k_grouped: Tensor, v_grouped: Tensor) -> Tensor:
    """LLaMA's repeat_kv."""
    repeats = GROUPED // KV_HEADS
    k = k_grouped[:, :, None, :, :].expand(B, KV_HEADS, repeats, LK, D).reshape(B, GROUPED, LK, D)
    v = v_grouped[:, :, None, :, :].expand(B, KV_HEADS, repeats, LK, DV).reshape(B, GROUPED, LK, DV)
    return (q_grouped @ k.transpose(2, 3) * SCALE).softmax(-1) @ v


@spelling()
def key_and_value_interleaved(q_grouped: Tensor, k_grouped: Tensor, v_grouped: Tensor) -> Tensor:
    repeats = GROUPED // KV_HEADS
    k, v = k_grouped.repeat_interleave(repeats, dim=1), torch.repeat_interleave(v_grouped, repeats, -3)
    return (q_grouped @ k.transpose(2, 3)).softmax(-1) @ v


@spelling()
def key_and_value_tiled(q_grouped: Tensor, k_grouped: Tensor, v_grouped: Tensor) -> Tensor:
    """Other groups than LLaMA's: head h reads key head h % KV_HEADS."""
    repeats = GROUPED // KV_HEADS
    k = k_grouped[:, None].expand(B, repeats, KV_HEADS, LK, D).reshape(B, GROUPED, LK, D)
    return (q_grouped @ k.transpose(2, 3)).softmax(-1) @ v_grouped.repeat(1, repeats, 1, 1)


@spelling()
def one_key_head(q: Tensor, k_one_head: Tensor, v_one_head: Tensor) -> Tensor:
    return (q @ k_one_head.transpose(-2, -1)).softmax(-1) @ v_one_head


@spelling()
def query_shared_by_the_batch(q_one: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q_one @ k.transpose(-2, -1)).softmax(-1) @ v


@spelling()
def weights_shared_by_the_batch(q_matrix: Tensor, k_matrix: Tensor, v: Tensor) -> Tensor:
    return (q_matrix @ k_matrix.transpose(-2, -1)).softmax(-1) @ v


@spelling()
def one_query(q_last: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Decoding."""
    return (q_last @ k.transpose(-2, -1)).masked_fill(~padding, -INF).softmax(-1) @ v


@spelling()
def query_is_key_is_value(k: Tensor) -> Tensor:
    return (k @ k.transpose(-2, -1)).softmax(-1) @ k


# scaled_dot_product_attention.


@spelling()
def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@spelling()
def sdpa_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


@spelling()
def sdpa_with_additive_mask(q: Tensor, k: Tensor, v: Tensor, bias_matrix: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_matrix, scale=0.3)


@spelling()
def sdpa_with_boolean_mask(q: Tensor, k: Tensor, v: Tensor, keep_some_rows: Tensor) -> Tensor:
    """The row with no key left is 0."""
    return F.scaled_dot_product_attention(q, k, v, keep_some_rows)


@spelling(dense=lambda q, k, v, keep_some_rows: F.scaled_dot_product_attention(q, k, v, keep_some_rows, scale=1.0))
def safe_softmax_of_whole_rows(q: Tensor, k: Tensor, v: Tensor, keep_some_rows: Tensor) -> Tensor:
    """What scaled_dot_product_attention is decomposed into: the row with no key left is 0."""
    scores = (q @ k.transpose(-2, -1)).masked_fill(~keep_some_rows, -INF)
    return aten._safe_softmax.default(scores, -1) @ v


# Rows without a key made 0 after the softmax. Of what NaN is filled with, and of softmin, symbolic_trace tells enough.


@spelling()
def nan_replaced_by_zeros_like(q: Tensor, k: Tensor, v: Tensor, keep_some_rows: Tensor) -> Tensor:
    weights = torch.where(keep_some_rows, q @ k.transpose(-2, -1), -INF).softmax(-1)
    return torch.where(torch.isnan(weights), torch.zeros_like(weights), weights) @ v


@spelling()
def nan_filled(q: Tensor, k: Tensor, v: Tensor, keep_some_rows: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).masked_fill(~keep_some_rows, -INF).softmax(-1)
    return weights.masked_fill(weights != weights, 0.0) @ v


def _negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(-(q @ k.transpose(-2, -1)), dim=-1) @ v


@spelling(dense=_negated)
def softmin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmin(q @ k.transpose(-2, -1), dim=-1) @ v


@spelling(dense=lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) * math.log(2), dim=-1) @ v)
def powers_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    powers = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True) @ v


@spelling(dense=plain)
def sum_given_an_axis_by_none(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exp = (q @ k.transpose(-2, -1)).exp()
    return exp / exp.sum(-1)[..., None] @ v


@spelling()
def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling()
def sdpa_grouped(q_grouped: Tensor, k_grouped: Tensor, v_grouped: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_grouped, k_grouped, v_grouped, is_causal=True, enable_gqa=True)


@spelling()
def sdpa_of_joined_heads(q_joined: Tensor, k_joined: Tensor, v_joined: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_joined, k_joined, v_joined)


@spelling(dense=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3))
def sdpa_aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return aten.scaled_dot_product_attention.default(q, k, v, scale=0.3)
