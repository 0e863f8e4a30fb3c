"""How the inputs of a top-k op fit together: broadcasting as matmul does, plus grouped query heads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .errors import DTypeError, ShapeError

PANEL_KEYS = 32
"""Keys that lie together in a copy in int8, four columns of one beside four of the next."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class AttentionFrame:
    """The inputs of an attention as kernels take them: 4-D, query and key broadcast, operands broadcastable.

    query [B, Hq, Lq, D], key [B, Hk, Lk, D], value [B, Hv, Lk, Dv] with Hk and Hv dividing Hq; operands [B|1, Hq|1,
    Lq|1, Lk|1]. All are views where the inputs' batch sizes agree: nothing is copied for grouped heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    operands: tuple[Tensor, ...]
    output_shape: tuple[int, ...]


def attention_frame(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    tables: Collection[int] = (),
    after: Collection[int] = (),
) -> AttentionFrame:
    """Fits query [..., Lq, D], key [..., Lk, D], value [..., Lk, Dv] and operands together.

    `tables` are the operands whose last axis is not that of the keys: [..., H|1, 1, N]; `after` are those which the
    probabilities alone meet, of which there are no more than keys.

    Raises:
        ShapeError: ranks, head sizes, key counts, heads or batch sizes that do not fit.
        DTypeError: inputs that are not floating-point.
    """
    check_attention_inputs(query, key, value)
    if not operands and _fits(query, key, value):
        return AttentionFrame(query, key, value, (), (*query.shape[:-1], value.size(-1)))
    rank = max(x.dim() for x in (query, key, value, *operands))
    query, key, value, *rest = (_pad(x, max(rank, 4)) for x in (query, key, value, *operands))

    heads = max(x.size(-3) for x in (query, key, value, *rest))
    for name, x in (("key", key), ("value", value)):
        if heads % max(1, x.size(-3)):
            raise ShapeError(
                f"{name} has {x.size(-3)} heads and query has {query.size(-3)}: the heads of {name} must divide "
                "those of query (grouped-query attention) or be equal"
            )
    batch = broadcast("batch sizes", *(x.shape[:-3] for x in (query, key, value, *rest)))
    (key_count,) = broadcast(
        "key counts", key.shape[-2:-1], *(x.shape[-1:] for n, x in enumerate(rest) if n not in {*tables, *after})
    )
    for n in sorted({*after} - {*tables}):
        if rest[n].size(-1) not in (1, key_count):
            raise ShapeError(
                f"operand ${n} has shape {tuple(rest[n].shape)}; it would enlarge the {key_count} probabilities"
            )
    if value.size(-2) != key_count:
        raise ShapeError(f"value has shape {tuple(value.shape)} and key {tuple(key.shape)}: their lengths differ")
    query_shape = broadcast(
        "query heads and lengths", query.shape[-3:-1], *(x.shape[-3:-1] for x in rest), torch.Size((heads, 1))
    )
    query = query.expand(*batch, *query_shape, query.size(-1))
    key = key.expand(*batch, key.size(-3), key_count, key.size(-1))
    value = value.expand(*batch, *value.shape[-3:])
    output_shape = (*batch, *query_shape, value.size(-1))[-rank:]
    return AttentionFrame(
        _join_batch(query),
        _join_batch(key),
        _join_batch(value),
        tuple(_join_operand(x, batch) for x in rest),
        output_shape,
    )


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether all are as a frame holds them: in a decoding step, to broadcast them takes longer than a kernel."""
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if not all(len(shape) == 4 and all(type(size) is int for size in shape) for shape in shapes):
        return False
    (batch, heads, *_), *others = shapes
    lengths_agree = others[0][2] == others[1][2]
    return lengths_agree and all(x[0] == batch and 0 < x[1] <= heads and heads % x[1] == 0 for x in others)


def check_attention_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """ShapeError or DTypeError unless query [..., Lq, D], key [..., Lk, D] and value [..., Lk, Dv] fit."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise DTypeError(f"{name} is a {type(x).__name__}; accepted: a torch.Tensor")
        if x.dtype not in _DTYPES:
            raise DTypeError(f"{name} has dtype {x.dtype}; accepted: float64, float32, bfloat16, float16")
        if x.dim() < 2:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; accepted: [..., length, head size], at least 2-D")
    if query.dtype != key.dtype:
        raise DTypeError(f"key has dtype {key.dtype} and query {query.dtype}; they must be the same")
    if key.size(-1) != query.size(-1):
        raise ShapeError(
            f"key has shape {tuple(key.shape)} and query {tuple(query.shape)}: their last sizes (head size) differ"
        )
    if value.size(-2) != key.size(-2) and key.size(-2) != 1:
        raise ShapeError(f"value has shape {tuple(value.shape)} and key {tuple(key.shape)}: their lengths differ")


def column_quads(head_size: int) -> int:
    """How many times four columns a key has in a copy in int8."""
    return -(-head_size // 4)


def broadcast(what: str, *shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that shapes broadcast to; ShapeError if they do not."""
    first, *rest = (tuple(shape) for shape in shapes)
    if all(type(size) is int for shape in (first, *rest) for size in shape) and all(shape == first for shape in rest):
        return first  # in a decoding step, what torch does takes longer than a kernel
    try:
        return tuple(torch.broadcast_shapes(*(tuple(shape) for shape in shapes)))
    except RuntimeError as error:
        raise ShapeError(f"the {what} of query, key, value and mask do not broadcast: {shapes}") from error


def _pad(x: Tensor, rank: int) -> Tensor:
    return x[(None,) * (rank - x.dim())] if x.dim() < rank else x


def _join_batch(x: Tensor) -> Tensor:
    """[*batch, H, L, D] as [B, H, L, D]."""
    return x if x.dim() == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _join_operand(x: Tensor, batch: Sequence[int]) -> Tensor:
    if x.dim() == 4:
        return x
    if all(size == 1 for size in x.shape[:-3]):
        return x.reshape(1, *x.shape[-3:])
    return _join_batch(x.expand(*batch, *x.shape[-3:]))


def check_ffn_inputs(
    input: Tensor,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> None:
    """ShapeError or DTypeError unless input [..., D] and the weights, as `nn.Linear` holds them, fit.

    Without an up projection the input is [..., F]: what it would give.
    """
    given = {
        "input": input,
        "up_weight": up_weight,
        "up_bias": up_bias,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
        "down_weight": down_weight,
        "down_bias": down_bias,
    }
    optional = ("up_weight", "up_bias", "gate_weight", "gate_bias", "down_bias")
    tensors = {name: x for name, x in given.items() if x is not None or name not in optional}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise DTypeError(f"{name} is a {type(x).__name__}; accepted: a torch.Tensor")
        if x.dtype not in _DTYPES:
            raise DTypeError(f"{name} has dtype {x.dtype}; accepted: float64, float32, bfloat16, float16")
        if x.dtype != input.dtype:
            raise DTypeError(f"{name} has dtype {x.dtype} and input {input.dtype}; they must be the same")
    if input.dim() < 1:
        raise ShapeError("input is a scalar; accepted: [..., model size]")
    if down_weight.dim() != 2 or (up_weight is not None and up_weight.dim() != 2):
        up_shape = None if up_weight is None else tuple(up_weight.shape)
        raise ShapeError(
            f"up_weight has shape {up_shape} and down_weight {tuple(down_weight.shape)}; accepted: "
            "[hidden size, model size] and [output size, hidden size], as nn.Linear holds them"
        )
    for name in ("up_bias", "gate_weight"):
        if up_weight is None and name in tensors:
            raise ShapeError(f"{name} was given without up_weight; without one the input is what is activated")
    if gate_bias is not None and gate_weight is None:
        raise ShapeError("gate_bias was given without gate_weight; a gate bias needs a gate")
    hidden, model = (down_weight.size(1),) * 2 if up_weight is None else up_weight.shape
    expected = {
        "input": (*input.shape[:-1], model),
        "up_bias": (hidden,),
        "gate_weight": (hidden, model),
        "gate_bias": (hidden,),
        "down_weight": (down_weight.size(0), hidden),
        "down_bias": (down_weight.size(0),),
    }
    for name, shape in expected.items():
        x = tensors.get(name)
        if x is not None and tuple(x.shape) != shape:
            told = _hidden_by(up_weight, down_weight)
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; with {told} it must be {tuple(shape)}")


def _hidden_by(up_weight: Tensor | None, down_weight: Tensor) -> str:
    """What tells the number of hidden units."""
    if up_weight is None:
        return f"down_weight {tuple(down_weight.shape)} and no up_weight"
    return f"up_weight {tuple(up_weight.shape)}"


def could_be_one(size: int | torch.SymInt) -> bool:
    """Whether a size known only at run time may turn out to be 1; asked without a guard on the answer."""
    if not isinstance(size, torch.SymInt):
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not statically_known_true(size != 1)
