"""Launches the kernels of a top-k FFN of few tokens, and its backward by sparse products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from topk_fx.activation import ACTIVATIONS

from ..aten import sparse_ffn_backward
from .arguments import all_registers, dot_of, power_of_two
from .availability import is_interpreted, why_unavailable
from .backward import TritonProducts
from .launch import Launch, launch_now

MOST_UNITS = 2**15
"""A token's hidden units are selected in registers."""

TOKENS_OF_TILE = 16
"""The fewest rows that a matrix instruction has."""

SCRATCH_BYTES = 2**28
"""Tokens are worked on in parts whose hidden units take no more than this."""


def ffn_why_not(input: Tensor, up_weight: Tensor | None) -> str:
    """Why the Triton kernels cannot compute an FFN of these tensors, which may be fake, or ""."""
    if input.device.type not in ("cuda", "xpu") and not is_interpreted():
        return f"input is on {input.device}"
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"input has dtype {input.dtype}; there are kernels for float32, bfloat16 and float16"
    if up_weight is None:
        return "there is no up projection, whose product with the tokens the kernels compute"
    units = up_weight.size(0)
    if isinstance(units, int) and units > MOST_UNITS:
        return f"there are {units:,} hidden units; there are kernels for {MOST_UNITS:,} at most"
    return why_unavailable(input.device.type)


def ffn_forward(
    input: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    activation: str,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, unit indices and pre-activations as `aten.ffn_forward`; the kept units of a token ascend."""
    tokens, units = input.size(0), up_weight.size(0)
    kept = min(k, units)
    function = ACTIVATIONS[activation].values_of or activation
    output = input.new_empty(tokens, down_weight.size(0))
    indices = input.new_empty(tokens, kept, dtype=torch.int32)
    up_kept = input.new_empty(tokens, kept, dtype=torch.float32)
    gate_kept = input.new_empty(tokens, kept if gate_weight is not None else 0, dtype=torch.float32)
    if 0 in (output.numel(), indices.numel()):
        # No output, or none of the units that there are not; kept units, if there are any, are found for the backward.
        output.zero_()
        if indices.numel() == 0:
            return output, indices, up_kept, gate_kept
    step = max(TOKENS_OF_TILE, SCRATCH_BYTES // (12 * units))
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        x, out, kept_indices, up, gate = (
            y.narrow(0, start, count) for y in (input, output, indices, up_kept, gate_kept)
        )
        keep = None if dropout_keep is None else dropout_keep.narrow(0, start, count).contiguous().view(torch.uint8)
        _compute(
            x, (up_weight, up_bias), (gate_weight, gate_bias), down_weight, function, keep, dropout_p,
            out, kept_indices, up, gate, launch,
        )  # fmt: skip
    return output, indices, up_kept, gate_kept


def _compute(
    x: Tensor,
    up_layer: tuple[Tensor, Tensor | None],
    gate_layer: tuple[Tensor | None, Tensor | None],
    down_weight: Tensor,
    activation: str,
    keep: Tensor | None,
    dropout_p: float,
    output: Tensor,
    indices: Tensor,
    up_kept: Tensor,
    gate_kept: Tensor,
    launch: Launch,
) -> None:
    """The three kernels, for so many tokens at a time. A tensor that there is not has another in its place."""
    from .kernels.ffn import hidden_units, project_down, select_units

    (up_weight, up_bias), (gate_weight, gate_bias) = up_layer, gate_layer
    (tokens, size), (outputs, units), kept = x.shape, down_weight.shape, indices.size(1)
    has_gate = gate_weight is not None
    gate_matrix = up_weight if gate_weight is None else gate_weight
    up, gate = (torch.empty(tokens, units if n else 0, dtype=torch.float32, device=x.device) for n in (True, has_gate))
    hidden = torch.empty(tokens, kept, dtype=torch.float32, device=x.device)
    keys = torch.empty(tokens, units, dtype=torch.int32, device=x.device)
    tile = _tile(x)
    launch(
        hidden_units, (-(-units // tile["BN"]), -(-tokens // TOKENS_OF_TILE)),
        (x, up_weight, x if up_bias is None else up_bias, gate_matrix, x if gate_bias is None else gate_bias, up, gate,
         keys, x.stride(), up_weight.stride(), gate_matrix.stride(), tokens, units, size),
        {"ACTIVATION": activation, "HAS_GATE": has_gate, "HAS_UP_BIAS": up_bias is not None,
         "HAS_GATE_BIAS": gate_bias is not None, "BM": TOKENS_OF_TILE, **dot_of(x), **tile, **all_registers()},
    )  # fmt: skip
    lanes = power_of_two(units)
    launch(
        select_units, (tokens,),
        (up, gate, keys, x if keep is None else keep, indices, up_kept, gate_kept, hidden, units, kept,
         1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
        {"ACTIVATION": activation, "HAS_GATE": has_gate, "HAS_DROPOUT": keep is not None, "N": lanes,
         "BLOCK": min(1024, lanes), "num_warps": max(1, min(16, lanes // 512))},
    )  # fmt: skip
    if outputs:
        blocks = 16
        launch(
            project_down, (-(-outputs // blocks), tokens),
            (down_weight, indices, hidden, output, down_weight.stride(), outputs, kept),
            {"BO": blocks, "BLOCK": min(128, power_of_two(kept)), "STAGES": 2, "num_warps": 4},
            [{"STAGES": 3}, {"num_warps": 2}],
        )  # fmt: skip


def _tile(x: Tensor) -> dict[str, Any]:
    """Units and columns of a tile of weights, stages and warps of `hidden_units`."""
    columns = 32 if is_interpreted() else 64 if x.dtype == torch.float32 else 128
    return {"BN": 32, "BD": columns, "STAGES": 3, "num_warps": 4}


def ffn_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, from and as `aten.ffn_backward`."""
    return sparse_ffn_backward(*arguments, sparse_products=TritonProducts)
