"""Finds FFNs of mixtures of experts, whose weights are one tensor of three axes: they stay dense, and are reported."""

from __future__ import annotations

from typing import Any

from torch import fx

from .dialect import Call, Kind, read
from .elementwise import read_elementwise
from .hidden import read_activation_function
from .sites import Refusal
from .values import rank_of

_LARGEST = 64
"""Nodes between two products of experts, beyond which they are no FFN."""


def find_experts(down: Call) -> Refusal | None:
    """The FFN that a product with the weights of all experts closes; None if it reads no other such product."""
    source = _read_product(down)
    if source is None:
        return None
    products = _products_before(source)
    if not products:
        return None
    detail = f"the layers of {down.node.name} have weights for several experts, in one tensor of three axes"
    return Refusal("moe_experts", detail, down.node, "ffn", (down.node, *products))


def _read_product(call: Call | None) -> fx.Node | None:
    """What a product with experts' weights multiplies: grouped_mm, or bmm or baddbmm with a parameter of three axes."""
    if call is None:
        return None
    match call.kind:
        case Kind.GROUPED_MATMUL:
            factors = (call["input"], call.get("other"))
            return factors[0] if rank_of(factors[0]) == 2 and _is_weights(factors[1]) else None
        case Kind.MATMUL:
            factors = (call["input"], call.get("other"))
        case Kind.BADDBMM:
            factors = (call["left"], call["right"])
        case _:
            return None
    are_weights = [_is_weights(factor) for factor in factors]
    if are_weights.count(True) != 1:
        return None
    return factors[are_weights.index(False)]


def _is_weights(node: Any) -> bool:
    """Whether a tensor is a parameter of three axes, through transposes, casts and the choice of experts."""
    if not isinstance(node, fx.Node) or rank_of(node) != 3:
        return False
    while node.op not in ("placeholder", "get_attr"):
        call = read(node)
        if call is None or call.kind not in _OF_WEIGHTS:
            return False
        node = call["input"]
    return rank_of(node) == 3


_OF_WEIGHTS = {Kind.TRANSPOSE, Kind.MATRIX_TRANSPOSE, Kind.PERMUTE, Kind.CAST, Kind.SAME, Kind.GETITEM}
_HANDED_ON = {Kind.SAME, Kind.CAST, Kind.VIEW, Kind.DROPOUT, Kind.GETITEM, Kind.SLICE, Kind.NARROW, Kind.CHUNK,
              Kind.SPLIT, Kind.TENSOR_SPLIT, Kind.UNBIND, Kind.UNSQUEEZE, Kind.SQUEEZE, Kind.TRANSPOSE,
              Kind.MATRIX_TRANSPOSE, Kind.GLU}  # fmt: skip


def _products_before(node: fx.Node) -> list[fx.Node]:
    """The products of experts of which, with their biases, a tensor is an elementwise function; none if of more."""
    products: list[fx.Node] = []
    pending, seen, is_computed = [node], {node}, False
    while pending:
        current = pending.pop()
        call = read(current)
        if _read_product(call) is not None:
            products.append(current)
            continue
        if len(seen) > _LARGEST:
            return []
        if _is_chosen_parameter(current):
            continue
        is_operation = read_elementwise(current, in_place=True) is not None or (
            read_activation_function(current) is not None
        )
        if not is_operation and (call is None or call.kind not in _HANDED_ON):
            return []
        is_computed |= is_operation and (call is None or call.kind != Kind.CAST)
        sources = current.all_input_nodes if is_operation else [call["input"]]  # type: ignore[index]
        pending += [x for x in sources if x not in seen]
        seen.update(sources)
    return products if is_computed else []


def _is_chosen_parameter(node: fx.Node) -> bool:
    """Whether a tensor is a parameter, or rows of one: the bias of each expert."""
    while node.op not in ("placeholder", "get_attr"):
        call = read(node)
        if call is None or call.kind not in (Kind.GETITEM, Kind.UNSQUEEZE, Kind.CAST):
            return False
        node = call["input"]
    return True
