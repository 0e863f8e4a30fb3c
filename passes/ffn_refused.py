"""FFNs that no walk takes, named in the report: what lies between their layers is more than elementwise.

A norm, a learned factor or a low-rank layer beside the first one makes another function of the hidden units than
`topk_fx.ffn` computes. Only layers that enlarge the tokens, are activated, and give tokens of their size count: heads
and gates do not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .dialect import Kind, read
from .elementwise import read_elementwise
from .hidden import read_activation_function
from .linear import LinearCall, Part, is_rewritten, read_part, token_source
from .sites import Refusal
from .values import is_scalar, shape_of
from .where import describe

aten = torch.ops.aten

_MOST_NODES = 48
_ACTIVATIONS = {"relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "erf", "log_sigmoid", "elu", "leaky_relu",
                "softplus", "softsign", "exp", "clamp", "maximum"}  # fmt: skip
_NORMS = {
    F.layer_norm, F.rms_norm, F.batch_norm, F.normalize, torch.layer_norm, torch.rms_norm, torch.batch_norm, torch.mean,
    torch.sum, torch.var, "mean", "sum", "var", "norm", aten.layer_norm.default, aten.rms_norm.default, aten.mean.dim,
    aten.batch_norm.default,
}  # fmt: skip
_LEARNED_ACTIVATIONS = {F.prelu, torch.prelu, "prelu", aten.prelu.default}
_NORM_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)
_PASSING = (Kind.CAST, Kind.SAME, Kind.DROPOUT, Kind.VIEW, Kind.SQUEEZE, Kind.UNSQUEEZE, Kind.TRANSPOSE, Kind.EXPAND)


def refuse_ffn(down: LinearCall) -> Refusal | None:
    """The refusal of the FFN that a layer closes, if it closes one whose hidden units are not read elementwise."""
    parts: dict[fx.Node, Part] = {}
    obstacle: fx.Node | None = None
    is_activated = False
    pending, seen = [down.input], {down.input}
    while pending:
        node = pending.pop()
        part = read_part(node)
        if part is not None and part.units is not None and not is_rewritten(part.linear.product):
            parts[part.linear.product] = part
            continue
        if len(seen) > _MOST_NODES:
            return None
        if node.op in ("placeholder", "get_attr") or (read_elementwise(node) is None and _is_factor(node)):
            if not _is_vector(node) and not _is_factor(node):
                return None
            obstacle = obstacle or next(iter(node.users))
            continue
        operation = read_elementwise(node, in_place=True) or read_activation_function(node)
        if operation is not None:
            is_activated |= not isinstance(operation.name, str) or operation.name in _ACTIVATIONS
        elif _is_norm(node):
            obstacle = node
        elif node.target in _LEARNED_ACTIVATIONS:
            obstacle, is_activated = node, True
        elif (call := read(node)) is None or call.kind not in _PASSING:
            return None
        sources = [x for x in node.all_input_nodes if x not in seen and not is_scalar(x)]
        pending += sources
        seen.update(sources)
    if not is_activated or not _are_of_one_ffn(list(parts.values()), down):
        return None
    if len({_low_rank_source(part) for part in parts.values()}) > 1:
        return None
    products = tuple(sorted({down.product, *parts}))
    detail = f"{down.product.name} closes an FFN whose hidden units are the sum of several layers"
    if obstacle is not None:
        detail = f"{down.product.name} closes an FFN in which {describe(obstacle)} reads more than a unit's own value"
    return Refusal("hidden_not_elementwise", detail, down.product, "ffn", products)


def _is_norm(node: fx.Node) -> bool:
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and isinstance(owner.get_submodule(str(node.target)), _NORM_MODULES)
    return node.target in _NORMS


def _is_vector(node: fx.Node) -> bool:
    """Whether a tensor has one value a hidden unit, or one in all."""
    shape = shape_of(node)
    return shape is not None and all(size == 1 for size in shape[:-1])


def _is_factor(node: fx.Node) -> bool:
    """Whether a tensor has one value a token, as a mask of padding has, and is no statistic of the token's units."""
    shape = shape_of(node)
    return shape is not None and len(shape) > 1 and shape[-1] == 1 and not _is_norm(node)


def _are_of_one_ffn(parts: list[Part], down: LinearCall) -> bool:
    """Whether layers have as many units as the next one takes, more than they read, and that gives what they read."""
    sizes: set[Any] = {len(part.units or ()) for part in parts}
    given, taken = down.layer.shape[:2] if down.layer.shape is not None else (None, None)
    read_sizes = [shape[-1] for part in parts if (shape := shape_of(_low_rank_source(part)))]
    return sizes == {taken} and read_sizes == [given] * len(parts) and bool(given) and taken > given


def _low_rank_source(part: Part) -> fx.Node:
    """The tokens that a layer reads, be it through a narrow layer and dropout, as LoRA's are."""
    node = token_source(part.linear.input)
    while True:
        call = read(node)
        if call is not None and call.kind in (Kind.DROPOUT, Kind.CAST):
            node = token_source(call["input"])
        elif (inner := read_part(node)) is not None and len(inner.units or ()) < len(part.units or ()):
            before = token_source(inner.linear.input)
            size = shape_of(before)
            if not size or not isinstance(size[-1], int) or size[-1] <= len(inner.units or ()):
                return node
            node = before
        else:
            return node
