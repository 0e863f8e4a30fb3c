"""The ops: schemas, fakes, autograd, vmap and autocast rules. What computes them is registered by `topk_fx.lowering`.

    topk_fx::attention          what stands in a rewritten graph: any rank, any batch; draws the dropout
      topk_fx::attention_forward    what a lowering computes: 4-D, returns the selection too
      topk_fx::attention_backward   its sparse gradient
    topk_fx::ffn, ffn_forward, ffn_backward   the same for the FFN
    topk_fx::attention_screened   an attention without gradients, by a copy of the keys in int8 that copy_keys writes

The outer ops are composite: autograd, AOTAutograd and torch.export's decompositions see through them to the inner ones,
so that the graph a person reads stays one line a site, while a training graph holds the two kernels. The rules for vmap
are in `vmap`.

`lowering` names what is to compute an attention or an FFN; "" leaves it to the tensors. It is an argument so that a
printed graph shows it and every cache's key holds it.

`min_slots`: the selection has a slot for each key that is kept, and no fewer than so many. Tracing asks of every size
whether it is 1. Of a number of keys known only at run time, such as a share of the length, the answer would be a guard
that is broken by the lengths at which one key is kept; so there the trace asks for two slots, and one stays empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .compat import SingleLevelFunction, below_autograd
from .errors import UnsupportedDerivativeError
from .reference import compute
from .score import Score, check_operands
from .shapes import attention_frame, check_ffn_inputs, could_be_one

library = torch.library.Library("topk_fx", "DEF")

library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor[] operands, str score, Scalar scale, SymInt k, "
    "float dropout_p=0.0, bool zero_empty_rows=False, str lowering='') -> Tensor"
)
library.define(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor[] operands, str score, Scalar scale, SymInt k, "
    "Tensor? dropout_keep, float dropout_p, bool zero_empty_rows, str lowering='', int min_slots=0) "
    "-> (Tensor output, Tensor indices, Tensor weights)"
)
library.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor[] operands, str score, "
    "Scalar scale, Tensor indices, Tensor weights, float dropout_p, bool[] operand_needs_grad, str lowering='') "
    "-> Tensor[]"
)
library.define(
    "attention_screened(Tensor query, Tensor key, Tensor value, Tensor[] operands, str score, Scalar scale, SymInt k, "
    "Tensor panels, Tensor facts, Tensor means, bool zero_empty_rows=True) -> Tensor"
)
library.define("copy_keys(Tensor rows, Tensor(a!) panels, Tensor(b!) facts, Tensor means, SymInt first) -> ()")
library.define("no_second_derivative(str op, Tensor[] grads, Tensor[] inputs) -> Tensor[]")
library.define(
    "ffn(Tensor input, Tensor? up_weight, Tensor? up_bias, Tensor? gate_weight, Tensor? gate_bias, Tensor down_weight, "
    "Tensor? down_bias, str activation, SymInt k, float dropout_p=0.0, str lowering='') -> Tensor"
)
library.define(
    "ffn_forward(Tensor input, Tensor? up_weight, Tensor? up_bias, Tensor? gate_weight, Tensor? gate_bias, "
    "Tensor down_weight, str activation, SymInt k, Tensor? dropout_keep, float dropout_p, str lowering='') "
    "-> (Tensor output, Tensor indices, Tensor up, Tensor gate)"
)
library.define(
    "ffn_backward(Tensor grad, Tensor input, Tensor? up_weight, Tensor? gate_weight, Tensor down_weight, "
    "Tensor indices, Tensor up, Tensor gate, Tensor? dropout_keep, str activation, float dropout_p, "
    "str lowering='') "
    "-> (Tensor input, Tensor up_weight, Tensor up_bias, Tensor gate_weight, Tensor gate_bias, Tensor down_weight)"
)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    k: int,
    dropout_p: float = 0.0,
    zero_empty_rows: bool = False,
    lowering: str = "",
) -> Tensor:
    function = Score.parse(score)
    check_operands(function, operands)
    if query.dim() == 1 or value.dim() == 1:  # a vector in a product: matmul adds its axis and takes it away again
        output = _attention(
            torch.atleast_2d(query),
            key,
            value.unsqueeze(-1) if value.dim() == 1 else value,
            operands,
            score,
            scale,
            k,
            dropout_p,
            zero_empty_rows,
            lowering,
        )
        output = output.squeeze(-1) if value.dim() == 1 else output
        return output.squeeze(-2 if value.dim() > 1 else -1) if query.dim() == 1 else output
    frame = attention_frame(query, key, value, operands, function.tables, function.only_after)
    keep = None
    kept = torch.sym_min(k, frame.key.size(-2))
    min_slots = 2 if could_be_one(kept) else 0
    if dropout_p > 0.0:
        slots = torch.sym_max(kept, min_slots)
        keep = torch.rand(*frame.query.shape[:-1], slots, device=query.device) >= dropout_p
    output, _, _ = torch.ops.topk_fx.attention_forward(
        *(frame.query, frame.key, frame.value, frame.operands, score, scale, k),
        *(keep, dropout_p, zero_empty_rows, lowering, min_slots),
    )
    return output.reshape(frame.output_shape)


class _Attention(SingleLevelFunction):
    """attention_forward with attention_backward as its derivative. Operands come last, one argument each."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score: str,
        scale: float,
        k: int,
        keep: Tensor | None,
        dropout_p: float,
        zero_empty_rows: bool,
        lowering: str,
        min_slots: int,
        *operands: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            return torch.ops.topk_fx.attention_forward(
                query, key, value, operands, score, scale, k, keep, dropout_p, zero_empty_rows, lowering, min_slots
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        query, key, value, score, scale, _, _, dropout_p, _, lowering, _, *operands = inputs
        _, indices, weights = output
        ctx.mark_non_differentiable(indices, weights)
        ctx.set_materialize_grads(False)
        # As for a sum, a term that no derivative reads is not kept: it takes no memory, and may be written to.
        is_read = Score.parse(score).read_in_backward
        operands = [x if n in is_read else x.new_zeros(()).expand(x.shape) for n, x in enumerate(operands)]
        ctx.save_for_backward(query, key, value, indices, weights, *operands)
        ctx.score, ctx.scale, ctx.dropout_p, ctx.lowering = score, scale, dropout_p, lowering

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        query, key, value, indices, weights, *operands = ctx.saved_tensors
        if grad is None:
            return (None,) * (11 + len(operands))
        needs_grad = list(ctx.needs_input_grad[11:])
        grad_query, grad_key, grad_value, *rest = torch.ops.topk_fx.attention_backward(
            grad,
            query,
            key,
            value,
            operands,
            ctx.score,
            ctx.scale,
            indices,
            weights,
            ctx.dropout_p,
            needs_grad,
            ctx.lowering,
        )
        found = iter(rest)
        grad_operands = [next(found) if needed else None for needed in needs_grad]
        return grad_query, grad_key, grad_value, *(None,) * 8, *grad_operands

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedDerivativeError(
            "topk_fx::attention has no forward-mode derivative (jvp); use reverse mode, or leave the site dense"
        )


class _Gradient(SingleLevelFunction):
    """The base of an op's gradient, whose own gradient is an error when it is computed, not when it is traced.

    AOTAutograd traces the derivative of all that it compiles, a gradient that torch.func.grad took included, before
    anybody asks for it.
    """

    op: str

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        needed = zip(inputs, ctx.needs_input_grad, strict=True)
        ctx.save_for_backward(*(x for x, is_needed in needed if is_needed))
        ctx.set_materialize_grads(False)

    @classmethod
    def second_derivative(cls, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        given = [x for x in grads if x is not None]
        found = iter(torch.ops.topk_fx.no_second_derivative(cls.op, given, ctx.saved_tensors))
        return tuple(next(found) if is_needed else None for is_needed in ctx.needs_input_grad)


def _no_second_derivative(op: str, grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    raise UnsupportedDerivativeError(
        f"topk_fx::{op} has no second derivative (double backward): its gradient holds the selection constant"
    )


library.impl("no_second_derivative", _no_second_derivative, "CompositeExplicitAutograd")


@torch.library.register_fake("topk_fx::no_second_derivative", lib=library)
def _no_second_derivative_fake(op: str, grads: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


class _AttentionBackward(_Gradient):
    """attention_backward, with a clear error instead of a second derivative."""

    op = "attention"

    @staticmethod
    def forward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score: str,
        scale: float,
        indices: Tensor,
        weights: Tensor,
        dropout_p: float,
        needs_grad: list[bool],
        lowering: str,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        with below_autograd():
            return tuple(
                torch.ops.topk_fx.attention_backward(
                    grad, query, key, value, operands, score, scale, indices, weights, dropout_p, needs_grad, lowering
                )
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _AttentionBackward.second_derivative(ctx, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedDerivativeError("topk_fx::attention_backward has no forward-mode derivative (jvp)")


def _attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
    zero_empty_rows: bool,
    lowering: str = "",
    min_slots: int = 0,
) -> Any:
    operands = operands or ()  # AOTInductor hands over an empty list as None
    return _Attention.run(
        query, key, value, score, scale, k, dropout_keep, dropout_p, zero_empty_rows, lowering, min_slots, *operands
    )


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    indices: Tensor,
    weights: Tensor,
    dropout_p: float,
    operand_needs_grad: list[bool],
    lowering: str = "",
) -> list[Tensor]:
    rest = (score, scale, indices, weights, dropout_p, operand_needs_grad, lowering)
    return list(_AttentionBackward.run(grad, query, key, value, *rest, *operands))


library.impl("attention_forward", _attention_forward, "Autograd")
library.impl("attention_backward", _attention_backward, "Autograd")


@torch.library.register_fake("topk_fx::attention_forward", lib=library)
def _attention_forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
    zero_empty_rows: bool,
    lowering: str = "",
    min_slots: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[:-1]
    slots = torch.sym_max(torch.sym_min(k, key.size(-2)), min_slots)
    output = value.new_empty(*rows, value.size(-1))
    indices = query.new_empty(*rows, slots, dtype=torch.int32)
    weights = query.new_empty(*rows, slots, dtype=compute(query).dtype)
    return output, indices, weights


@torch.library.register_fake("topk_fx::attention_backward", lib=library)
def _attention_backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    indices: Tensor,
    weights: Tensor,
    dropout_p: float,
    operand_needs_grad: Sequence[bool],
    lowering: str = "",
) -> list[Tensor]:
    wanted = [x for x, needed in zip(operands, operand_needs_grad, strict=True) if needed]
    return [x.new_empty(x.shape) for x in (query, key, value, *wanted)]


def _attention_screened(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Sequence[Tensor],
    score: str,
    scale: float,
    k: int,
    panels: Tensor,
    facts: Tensor,
    means: Tensor,
    zero_empty_rows: bool = True,
) -> Tensor:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *operands)):
        raise UnsupportedDerivativeError(
            "topk_fx::attention_screened has no gradient: call it under torch.no_grad(), or without screened_keys"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.topk_fx.attention_screened(
            query, key, value, operands, score, scale, k, panels, facts, means, zero_empty_rows
        )


library.impl("attention_screened", _attention_screened, "Autograd")


@torch.library.register_fake("topk_fx::attention_screened", lib=library)
def _attention_screened_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(*query.shape[:-1], value.size(-1))


@torch.library.register_fake("topk_fx::copy_keys", lib=library)
def _copy_keys_fake(rows: Tensor, panels: Tensor, facts: Tensor, means: Tensor, first: int) -> None:
    return None


def _ffn(
    input: Tensor,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    k: int,
    dropout_p: float = 0.0,
    lowering: str = "",
) -> Tensor:
    check_ffn_inputs(input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    tokens = input.reshape(math.prod(input.shape[:-1]), input.size(-1))
    keep = None
    if dropout_p > 0.0:
        keep = torch.rand(tokens.size(0), torch.sym_min(k, down_weight.size(1)), device=input.device) >= dropout_p
    output, *_ = torch.ops.topk_fx.ffn_forward(
        tokens, up_weight, up_bias, gate_weight, gate_bias, down_weight, activation, k, keep, dropout_p, lowering
    )
    if down_bias is not None:
        output = output + down_bias
    return output.reshape(*input.shape[:-1], output.size(-1))


class _FFN(SingleLevelFunction):
    """ffn_forward with ffn_backward as its derivative."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            return torch.ops.topk_fx.ffn_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, up_weight, up_bias, gate_weight, gate_bias, down_weight, activation, _, keep, *rest = inputs
        _, indices, up, gate = output
        ctx.mark_non_differentiable(indices, up, gate)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, up_weight, gate_weight, down_weight, indices, up, gate, keep)
        ctx.activation, ctx.dropout_p, ctx.lowering = activation, *rest
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (up_bias, gate_bias)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 11
        saved = ctx.saved_tensors  # once: a checkpoint unpacks each tensor no more than that
        has_up, has_gate = saved[1] is not None, saved[2] is not None
        input, up_weight, up_bias, gate_weight, gate_bias, down_weight = torch.ops.topk_fx.ffn_backward(
            grad, *saved, ctx.activation, ctx.dropout_p, ctx.lowering
        )
        up_dtype, gate_dtype = ctx.bias_dtypes
        up_bias = None if up_dtype is None else up_bias.to(up_dtype)
        gate_bias = None if gate_dtype is None else gate_bias.to(gate_dtype)
        up_weight, gate_weight = up_weight if has_up else None, gate_weight if has_gate else None
        return input, up_weight, up_bias, gate_weight, gate_bias, down_weight, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedDerivativeError(
            "topk_fx::ffn has no forward-mode derivative (jvp); use reverse mode, or leave the site dense"
        )


class _FFNBackward(_Gradient):
    """ffn_backward, with a clear error instead of a second derivative."""

    op = "ffn"

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            return torch.ops.topk_fx.ffn_backward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _FFNBackward.second_derivative(ctx, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedDerivativeError("topk_fx::ffn_backward has no forward-mode derivative (jvp)")


# The dispatcher leaves out a last argument that has its default, `lowering`.
def _ffn_forward(*args: Any) -> Any:
    return _FFN.run(*args, *("",) * (11 - len(args)))


def _ffn_backward(*args: Any) -> Any:
    return _FFNBackward.run(*args, *("",) * (12 - len(args)))


library.impl("ffn_forward", _ffn_forward, "Autograd")
library.impl("ffn_backward", _ffn_backward, "Autograd")


@torch.library.register_fake("topk_fx::ffn_forward", lib=library)
def _ffn_forward_fake(
    input: Tensor,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    activation: str,
    k: int,
    dropout_keep: Tensor | None,
    dropout_p: float,
    lowering: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = input.size(0)
    kept = torch.sym_min(k, down_weight.size(1))
    dtype = compute(input).dtype
    return (
        input.new_empty(tokens, down_weight.size(0)),
        input.new_empty(tokens, kept, dtype=torch.int32),
        input.new_empty(tokens, kept, dtype=dtype),
        input.new_empty(tokens, kept if gate_weight is not None else 0, dtype=dtype),
    )


@torch.library.register_fake("topk_fx::ffn_backward", lib=library)
def _ffn_backward_fake(
    grad: Tensor,
    input: Tensor,
    up_weight: Tensor | None,
    gate_weight: Tensor | None,
    down_weight: Tensor,
    indices: Tensor,
    up: Tensor,
    gate: Tensor,
    dropout_keep: Tensor | None,
    activation: str,
    dropout_p: float,
    lowering: str = "",
) -> tuple[Tensor, ...]:
    up_shape, gate_shape = ((0,) if x is None else x.shape for x in (up_weight, gate_weight))
    return (
        input.new_empty(input.shape),
        down_weight.new_empty(up_shape),
        up.new_empty(up_shape[0]),
        down_weight.new_empty(gate_shape),
        up.new_empty(gate_shape[0]),
        down_weight.new_empty(down_weight.shape),
    )


def _register(name: str, composite: Callable[..., Tensor]) -> None:
    """Registers the composite op `name` and its autocast rule for every device that has autocast."""
    library.impl(name, composite, "CompositeImplicitAutograd")
    op = getattr(torch.ops.topk_fx, name).default

    def autocast(device_type: str, key: Any) -> Callable[..., Tensor]:
        def lower(x: Any) -> Any:
            is_lowered = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(torch.get_autocast_dtype(device_type)) if is_lowered else x

        def kernel(*args: Any, **kwargs: Any) -> Tensor:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                # The operands of a score are in a list and so keep their precision, as an added mask does.
                return op(*map(lower, args), **{n: lower(x) for n, x in kwargs.items()})

        return kernel

    for device_type, key_name in AUTOCAST_KEYS.items():
        library.impl(name, autocast(device_type, getattr(torch._C.DispatchKey, key_name)), key_name)


AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}
_register("attention", _attention)
_register("ffn", _ffn)
