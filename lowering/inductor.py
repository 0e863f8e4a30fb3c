"""Where Inductor calls an op of ours by its Triton kernels: it launches them from the code that it generates.

An op is else an opaque call of that code, which C++ and ATen stay. Its kernels are traced as a graph of launches and
allocations, and that is lowered in its place: Inductor plans the memory between them, captures them in CUDA graphs, and
writes them into packages of AOTInductor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from topk_fx.compat import INDUCTOR_VIEWS_BOOLS, lower_as_graph, register_inductor_lowering
from topk_fx.report import RewriteReport

from . import triton
from .choice import ffn_lowering_of, lowering_of
from .triton.availability import is_interpreted
from .triton.backward import is_one_kernel
from .triton.launch import launch_in_graph


def register_for(report: RewriteReport) -> None:
    """Tells Inductor of the ops if one in a rewritten graph is computed by Triton kernels."""
    if any(site.lowering == "triton" for site in report):
        register()


@functools.cache
def register() -> None:
    """Tells Inductor of the ops, once in a process."""
    ops = torch.ops.topk_fx
    for op, serves, function, taken in (
        (ops.attention_forward.default, _serves_attention_forward, triton.attention_forward, 10),
        (ops.attention_backward.default, _serves_attention_backward, triton.attention_backward, 11),
        (ops.ffn_forward.default, _serves_ffn_forward, triton.ffn_forward, 10),
    ):
        register_inductor_lowering(op, functools.partial(_lower, serves, function, taken))


def _lower(
    serves: Callable[..., bool],
    function: Callable[..., Any],
    taken: int,
    arguments: Sequence[Any],
    values: Sequence[Any],
) -> Any:
    """What Inductor shall put in the place of a call, or None for the call itself.

    Args:
        serves: whether launches can compute the op for its fake arguments.
        function: what launches the kernels.
        taken: how many of the arguments it takes.
        arguments: of the call, as Inductor holds them.
        values: the same, fake.
    """
    if is_interpreted() or not all(map(_is_plain, values)) or not serves(*values):
        return None

    def launches(*given: Any) -> Any:
        return function(*given[:taken], launch=launch_in_graph)

    return lower_as_graph(launches, arguments, values)


def _is_plain(x: Any) -> bool:
    """Whether no size or number of an argument is symbolic, and Inductor can do with tensors what a launch does."""
    if isinstance(x, Tensor):
        is_viewed = x.dtype != torch.bool or INDUCTOR_VIEWS_BOOLS
        return is_viewed and all(isinstance(n, int) for n in (*x.shape, *x.stride()))
    if isinstance(x, (list, tuple)):
        return all(map(_is_plain, x))
    return not isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _serves_attention_forward(
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
) -> bool:
    name, _ = lowering_of(lowering, (query, key, value, operands, score, scale, k))
    has_elements = 0 not in (query.numel(), key.numel(), value.numel())
    return name == "triton" and min_slots <= min(k, key.size(-2)) and has_elements


def _serves_attention_backward(
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
) -> bool:
    name, _ = lowering_of(lowering, (query, key, value, operands, score, scale, indices.size(-1)))
    return name == "triton" and is_one_kernel(grad, query, value, operands, score, weights, operand_needs_grad)


def _serves_ffn_forward(
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
) -> bool:
    name, _ = ffn_lowering_of(lowering, (input, up_weight))
    return name == "triton" and 0 not in (input.numel(), down_weight.numel())
