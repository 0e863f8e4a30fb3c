"""A top-k FFN of few tokens: the up and gate weights are read once, and of the down weight what the kept units need.

    hidden_units     pre-activations of all units, in float32          [tokens, units]
    select_units     of each token the k units of largest |h|, exactly  [tokens, kept]
    project_down     the sum of the kept columns of the down weight     [tokens, outputs]

h is act(up), or act(gate) * up. Weights may lie by rows or by columns. By rows, as `nn.Linear` has them, most cache
lines of the down weight hold a kept unit, and nearly all of it is read.
"""

import triton
import triton.language as tl

from .scores import tanh
from .selection import cut_for, to_key


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of that name in `topk_fx.activation`, of float32."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0.0, 0.0, x * x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "quick_gelu":
        return x * sigmoid(1.702 * x)
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        return sigmoid(x)


@triton.jit
def layer(
    X, W, BIAS, x_strides, w_strides, token, is_token, unit, is_unit, size, HAS_BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x W^T + bias of a tile of tokens [BM] and units [BN], in float32."""
    columns = tl.arange(0, BD)
    result = tl.zeros([BM, BN], tl.float32)
    for first in tl.range(0, size, BD, num_stages=STAGES):
        at = first + columns
        x = tl.load(
            X + token[:, None] * x_strides[0] + at[None, :] * x_strides[1],
            mask=is_token[:, None] & (at < size)[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            W + unit[None, :] * w_strides[0] + at[:, None] * w_strides[1],
            mask=is_unit[None, :] & (at < size)[:, None], other=0.0,
        )  # fmt: skip
        result += tl.dot(x.to(DOT), w.to(DOT), input_precision=PRECISION)
    if HAS_BIAS:
        result += tl.load(BIAS + unit, mask=is_unit, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def hidden_units(
    X, UP, UP_BIAS, GATE, GATE_BIAS, UP_RESULT, GATE_RESULT, KEYS, x_strides, up_strides, gate_strides, tokens, units,
    size, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """UP_RESULT and, if HAS_GATE, GATE_RESULT [tokens, units] in float32, and KEYS, the order of |h|."""
    token = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    unit = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    is_token, is_unit = token < tokens, unit < units
    at = token[:, None] * units + unit[None, :]
    is_there = is_token[:, None] & is_unit[None, :]
    up = layer(
        X, UP, UP_BIAS, x_strides, up_strides, token, is_token, unit, is_unit, size, HAS_UP_BIAS, BM, BN, BD, DOT,
        PRECISION, STAGES,
    )  # fmt: skip
    tl.store(UP_RESULT + at, up, mask=is_there)
    if HAS_GATE:
        gate = layer(
            X, GATE, GATE_BIAS, x_strides, gate_strides, token, is_token, unit, is_unit, size, HAS_GATE_BIAS, BM, BN,
            BD, DOT, PRECISION, STAGES,
        )  # fmt: skip
        tl.store(GATE_RESULT + at, gate, mask=is_there)
        hidden = activated(gate, ACTIVATION) * up
    else:
        hidden = activated(up, ACTIVATION)
    tl.store(KEYS + at, to_key(tl.abs(hidden)), mask=is_there)


@triton.jit
def select_units(
    UP, GATE, KEYS, KEEP, INDICES, UP_KEPT, GATE_KEPT, HIDDEN, units, kept, dropout_factor, ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_DROPOUT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program: INDICES, UP_KEPT and GATE_KEPT [tokens, kept], and HIDDEN, after dropout, that are summed.

    N, a power of two, is at least `units`. Of units with the same |h| the first are kept, and the kept ones ascend. The
    keys of all are held to find the cut; what is kept is then read again, BLOCK units at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    KEYS += token * units
    all_units = tl.arange(0, N)
    keys = tl.load(KEYS + all_units, mask=all_units < units, other=-1)  # those of |h| are no less than 0
    cut = cut_for(keys, kept)
    free = kept - tl.sum((keys > cut).to(tl.int32), 0)
    number, equals = 0, 0
    for first in tl.range(0, units, BLOCK, num_stages=1):
        unit = first + tl.arange(0, BLOCK)
        key = tl.load(KEYS + unit, mask=unit < units, other=-1)
        is_equal = (key == cut) & (unit < units)
        is_taken = (key > cut) | (is_equal & (equals + tl.cumsum(is_equal.to(tl.int32), 0) <= free))
        slot = token * kept + number + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        equals += tl.sum(is_equal.to(tl.int32), 0)
        number += tl.sum(is_taken.to(tl.int32), 0)
        up = tl.load(UP + token * units + unit, mask=is_taken, other=0.0)
        if HAS_GATE:
            gate = tl.load(GATE + token * units + unit, mask=is_taken, other=0.0)
            hidden = activated(gate, ACTIVATION) * up
            tl.store(GATE_KEPT + slot, gate, mask=is_taken)
        else:
            hidden = activated(up, ACTIVATION)
        if HAS_DROPOUT:
            keep = tl.load(KEEP + slot, mask=is_taken, other=0) != 0
            hidden = hidden * tl.where(keep, dropout_factor, 0.0)
        tl.store(INDICES + slot, unit, mask=is_taken)
        tl.store(UP_KEPT + slot, up, mask=is_taken)
        tl.store(HIDDEN + slot, hidden, mask=is_taken)


@triton.jit
def project_down(
    DOWN, INDICES, HIDDEN, OUTPUT, down_strides, outputs, kept, BO: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """OUTPUT [tokens, outputs]: the sum of the kept columns of DOWN [outputs, units]. BO outputs a program."""
    token = tl.program_id(1).to(tl.int64)
    output = (tl.program_id(0) * BO + tl.arange(0, BO)).to(tl.int64)
    is_output = output < outputs
    result = tl.zeros([BO], tl.float32)
    for first in tl.range(0, kept, BLOCK, num_stages=STAGES):
        slot = first + tl.arange(0, BLOCK)
        is_kept = slot < kept
        unit = tl.load(INDICES + token * kept + slot, mask=is_kept, other=0).to(tl.int64)
        hidden = tl.load(HIDDEN + token * kept + slot, mask=is_kept, other=0.0)
        down = tl.load(
            DOWN + output[:, None] * down_strides[0] + unit[None, :] * down_strides[1],
            mask=is_output[:, None] & is_kept[None, :], other=0.0,
        )  # fmt: skip
        result += tl.sum(down.to(tl.float32) * hidden[None, :], 1)
    tl.store(OUTPUT + token * outputs + output, result.to(OUTPUT.dtype.element_ty), mask=is_output)
