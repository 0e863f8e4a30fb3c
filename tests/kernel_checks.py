"""What a call of the kernels must give, whatever the instruction set or device: selection, weights and output."""

from __future__ import annotations

import math

import torch
from inputs import assert_near, double, integers
from topk_fx.lowering import cpu
from topk_fx.lowering.aten.positions import ChunkPositions

from topk_fx import reference
from topk_fx.activation import ACTIVATIONS
from topk_fx.score import Score, evaluate

NAN, INF = math.nan, math.inf
LOWEST = torch.finfo(torch.float32).min
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scores_of(query, key, operands, score, scale):
    """The scores [B, Hq, Lq, Lk] by the definition, in float64."""
    key = key.double().repeat_interleave(query.size(1) // key.size(1), 1)
    products = query.double() @ key.transpose(-2, -1) * scale
    operands = [x.double() if x.is_floating_point() else x for x in operands]
    positions = ChunkPositions(operands, slice(0, query.size(2)), key.size(2), query.device)
    return evaluate(Score.parse(score).before, products, positions)


def check_attention(query, key, value, score="", operands=(), *, scale=0.5, k=7, zero_empty_rows=False, is_exact=False):
    """Output, selection and weights are those of the definition on the scores; is_exact: float32 knows them exactly."""
    operands = list(operands)
    output, indices, weights = cpu.attention_forward(
        query, key, value, operands, score, scale, k, None, 0.0, zero_empty_rows
    )
    scores = scores_of(query, key, operands, score, scale)
    if not is_exact:
        magnitude = scores[scores.abs() < 1e30].abs().max().item() if (scores.abs() < 1e30).any() else 1.0
        scores = forgive_near_ties(scores, indices, 2e-6 * max(1.0, magnitude) * math.sqrt(query.size(-1)))
    expected_weights, expected = reference.select(scores, k, empty_row=0.0 if zero_empty_rows else NAN)
    order, expected_order = (x.sort(-1) for x in (indices.long(), expected))
    assert order.values.equal(expected_order.values)
    torch.testing.assert_close(
        weights.gather(-1, order.indices).double().masked_fill(order.values < 0, 0),
        expected_weights.gather(-1, expected_order.indices).masked_fill(order.values < 0, 0),
        rtol=1e-4,
        atol=1e-5,
        equal_nan=True,
    )
    values = value.repeat_interleave(query.size(1) // value.size(1), 1)
    assert_near(output, reference.weigh(weights.double(), indices.long(), values.double()).to(output.dtype))
    return indices


def forgive_near_ties(scores, indices, tolerance):
    """The scores, those that are as near to the cut as `tolerance` made to agree with the selection in `indices`."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, indices.clamp(min=0).long(), True)
    cut = scores.masked_fill(~chosen, INF).amin(-1, keepdim=True)
    is_near = ((scores - cut).abs() <= tolerance) & ~chosen
    return torch.where(is_near & (scores > cut), cut - 1e-12 * cut.abs() - 1e-300, scores)


def normal(*shape, generator=None):
    return torch.randn(shape, generator=generator)


def ffn_arguments(
    tokens, sizes=(37, 131, 29), *, gated=True, biased=True, dtype=torch.float32, draw=integers, generator=None
):
    """The tensors of ffn_forward by name. With `draw` integers, those of a ReLU have exact hidden units, many equal."""
    model, hidden, output = sizes

    def layer(is_there):
        weight = draw(hidden, model, generator=generator).to(dtype) if is_there else None
        return weight, draw(hidden, generator=generator).to(dtype) if is_there and biased else None

    up, gate = layer(True), layer(gated)
    return {
        "input": draw(tokens, model, generator=generator).to(dtype),
        "up_weight": up[0],
        "up_bias": up[1],
        "gate_weight": gate[0],
        "gate_bias": gate[1],
        "down_weight": normal(output, hidden, generator=generator).to(dtype),
    }


def hidden_units(args, activation):
    """up, gate (or None) and hidden units [N, F] by the definition, in float64."""
    args = {name: double(x) for name, x in args.items()}
    up = torch.nn.functional.linear(args["input"], args["up_weight"], args["up_bias"])
    function = ACTIVATIONS[activation].function
    if args["gate_weight"] is None:
        return up, None, function(up)
    gate = torch.nn.functional.linear(args["input"], args["gate_weight"], args["gate_bias"])
    return up, gate, function(gate) * up


def check_ffn(args, k, activation="relu", *, is_exact=False, lowering=cpu):
    """Selection, pre-activations and output are those of the definition; is_exact: float32 knows the hidden units."""
    output, indices, up, gate = lowering.ffn_forward(
        **args, activation=activation, k=k, dropout_keep=None, dropout_p=0.0
    )
    expected_up, expected_gate, hidden = hidden_units(args, activation)
    magnitudes, chosen = hidden.abs(), indices.long()
    kept = min(k, hidden.size(-1))
    assert indices.dtype == torch.int32
    assert (chosen.diff() > 0).all(), "kept units ascend, none twice"
    expected = magnitudes.argsort(dim=-1, descending=True, stable=True)[:, :kept]
    if is_exact:
        assert chosen.equal(expected.sort(-1).values)
    elif kept < hidden.size(-1):
        # No unit that was left out is larger than one that was kept, but for rounding.
        left_out = magnitudes.scatter(-1, chosen, -INF).amax(-1)
        scale = max(1.0, magnitudes.max().item()) * math.sqrt(args["input"].size(-1))
        assert (left_out - magnitudes.gather(-1, chosen).amin(-1) <= 2e-6 * scale).all()
    assert_near(up, expected_up.gather(-1, chosen).float())
    if expected_gate is not None:
        assert_near(gate, expected_gate.gather(-1, chosen).float())
    else:
        assert gate.shape == (hidden.size(0), 0)
    sparse = torch.zeros_like(hidden).scatter(-1, chosen, hidden.gather(-1, chosen))
    assert_near(output, (sparse @ args["down_weight"].double().T).to(output.dtype))
    return output, indices
