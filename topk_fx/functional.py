"""The ops as functions, with the arguments of torch.nn.functional and errors that name them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .config import Keep, kept_count, nearest, validate_keep
from .errors import ConfigError, DTypeError, ShapeError
from .screened_keys import ScreenedKeys
from .shapes import attention_frame, broadcast, check_attention_inputs, check_ffn_inputs


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
    screened_keys: ScreenedKeys | None = None,
) -> Tensor:
    """Exact top-k attention: each query attends to the k keys of largest score, sum_{j in top-k} softmax_j(s) v_j.

    The arguments are those of `torch.nn.functional.scaled_dot_product_attention`, and k = "all" gives its result. What
    is selected: of the scores s_ij = scale * q_i.k_j + mask_ij, accumulated and compared in float32 (float64 for
    float64 inputs), the k largest of each row; ties keep the lowest key. Memory is linear in Lq and Lk.

    Args:
        query: [..., Hq, Lq, D], floating-point.
        key: [..., Hk, Lk, D], dtype of query. Leading sizes broadcast as in matmul.
        value: [..., Hk, Lk, Dv], dtype of query.
        k: keys kept per query: an int >= 1, a float in (0, 1] (a share of Lk, rounded up), or "all".
        attn_mask: broadcastable to [..., Hq, Lq, Lk]; boolean (False masks the key out) or additive. It may be given
            together with is_causal.
        is_causal: query i attends to keys j <= i (aligned top left).
        scale: 1 / sqrt(D) by default.
        enable_gqa: lets Hk be a divisor of Hq; the keys are not copied.
        dropout_p: the share of the kept weights that is dropped; always applied, as SDPA does.
        screened_keys: of key [B, Hk, Lk, D], to read less of it in decoding: the result is the same. It takes neither
            dropout nor gradients.

    Returns:
        [..., Hq, Lq, Dv], dtype of value. A row whose keys are all masked out is 0; a row with a NaN score is NaN.

    Raises:
        ConfigError, ShapeError, DTypeError: an argument is not accepted; the message names it.

    Its gradient holds the selection constant. Double backward and forward-mode differentiation raise. Source: Gupta et
    al. 2021, arXiv:2106.06899.
    """
    keep = validate_keep("k", k)
    check_attention_inputs(query, key, value)
    if value.dtype != query.dtype:
        raise DTypeError(f"value has dtype {value.dtype} and query {query.dtype}; they must be the same")
    _check_heads(query, key, value, enable_gqa)
    _check_dropout(dropout_p)
    if not isinstance(is_causal, bool):
        raise DTypeError(f"is_causal is a {type(is_causal).__name__}; accepted: a bool")
    if scale is None:
        scale = 1 / math.sqrt(query.size(-1)) if query.size(-1) else 1.0
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise DTypeError(f"scale is a {type(scale).__name__}; accepted: a float")
    steps, operands = [], []
    if attn_mask is not None:
        _check_mask(attn_mask, query, key)
        steps.append("mask($0)")
        operands.append(attn_mask)
    if is_causal:
        steps.append("causal")
    kept = max(1, min(kept_count(keep, key.size(-2)), 2**62))
    if screened_keys is not None:
        _check_screened_keys(screened_keys, key, dropout_p)
        frame = attention_frame(query, key, value, operands)
        return torch.ops.topk_fx.attention_screened(
            *(frame.query, frame.key, frame.value, frame.operands, " ".join(steps), scale, kept),
            *(screened_keys.panels, screened_keys.facts, screened_keys.means),
        ).reshape(frame.output_shape)
    return torch.ops.topk_fx.attention(query, key, value, operands, " ".join(steps), scale, kept, dropout_p, True)


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
    """Exact top-k FFN: y = h_kept W_down^T + b_down over the k hidden units of largest |h| of each token.

    h = act(x W_up^T + b_up), or, with a gate, act(x W_gate^T + b_gate) * (x W_up^T + b_up). Ties keep the lowest unit.

    Args:
        input: [..., D], floating-point.
        up_weight: [F, D], as nn.Linear holds it, and up_bias [F]. None: the input is [..., F], and h = act(x).
        down_weight: [Dout, F], and down_bias [Dout].
        k: units kept per token: an int >= 1, a float in (0, 1] (a share of F, rounded up), or "all".
        activation: "relu", "relu2", "gelu", "gelu_tanh", "silu", "quick_gelu" or "sigmoid" (of GLU); "relu_clamp" and
            "relu_maximum" are relu as clamp(x, 0) and maximum(x, 0), whose derivatives at 0 are 1 and 1/2.
        gate_weight: [F, D], and gate_bias [F]; the activation then acts on the gate.
        dropout_p: the share of the kept units that is dropped; always applied.

    Returns:
        [..., Dout], dtype of input.

    Raises:
        ConfigError, ShapeError, DTypeError: an argument is not accepted; the message names it.

    Its gradient holds the selection constant. Source: Gupta et al. 2021, arXiv:2106.06899, section 3.
    """
    keep = validate_keep("k", k)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ConfigError(
            f"activation={activation!r} is not accepted: give one of {', '.join(map(repr, ACTIVATIONS))}."
            f"{nearest(str(activation), ACTIVATIONS)}"
        )
    check_ffn_inputs(input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    _check_dropout(dropout_p)
    kept = min(kept_count(keep, down_weight.size(1)), 2**62)
    return torch.ops.topk_fx.ffn(
        input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, activation, kept, dropout_p
    )


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if query.dim() < 3 or key.dim() < 3 or value.dim() < 3:
        return
    heads = {"query": query.size(-3), "key": key.size(-3), "value": value.size(-3)}
    several = {count for count in heads.values() if count != 1}
    if len(several) > 1 and not enable_gqa:
        raise ShapeError(
            f"query, key and value have {', '.join(map(str, heads.values()))} heads (third from last sizes): they must "
            "be equal or 1; for grouped-query attention pass enable_gqa=True"
        )


def _check_mask(mask: object, query: Tensor, key: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise DTypeError(f"attn_mask is a {type(mask).__name__}; accepted: a torch.Tensor or None")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise DTypeError(f"attn_mask has dtype {mask.dtype}; accepted: torch.bool (True is kept) or a floating dtype")
    lead = broadcast("batch sizes", query.shape[:-3], key.shape[:-3])
    heads = max(x.size(-3) if x.dim() > 2 else 1 for x in (query, key))
    scores = (*lead, heads, query.size(-2), key.size(-2))
    fits = mask.dim() <= len(scores) and all(
        size in (1, total) for size, total in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise ShapeError(f"attn_mask has shape {tuple(mask.shape)}; it must broadcast to the scores, {scores}")


def _check_screened_keys(screened: object, key: Tensor, dropout_p: float) -> None:
    if not isinstance(screened, ScreenedKeys):
        raise DTypeError(f"screened_keys is a {type(screened).__name__}; accepted: a topk_fx.ScreenedKeys or None")
    batch, heads, size = screened.shape
    if (*key.shape,) != (batch, heads, screened.length, size) or key.dtype != screened.dtype:
        raise ShapeError(
            f"screened_keys is of keys [{batch}, {heads}, {screened.length}, {size}] of {screened.dtype}; "
            f"key has shape {tuple(key.shape)} and dtype {key.dtype}"
        )
    if dropout_p > 0:
        raise ConfigError(f"dropout_p={dropout_p!r} is not accepted together with screened_keys: give 0.0")


def _check_dropout(dropout_p: object) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        raise ConfigError(f"dropout_p={dropout_p!r} is not accepted: give a float in [0, 1]")
