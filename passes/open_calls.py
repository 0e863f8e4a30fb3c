"""Opens calls that hide attention: retraces them to the ATen calls inside, and puts these in their place.

Dynamo keeps `F.multi_head_attention_forward` as one node, and `nn.TransformerEncoderLayer` runs as one kernel where no
gradient is needed. Each is traced again, before autograd and autocast, on the values that were recorded for its
arguments; a kernel is first written out in functions of torch. What is opened can be closed again, so that a call in
which nothing is rewritten stays as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from topk_fx.compat import SpecializedError, trace_to_aten

from .emit import Emitter
from .trace import erase_unread, is_unread
from .values import attribute_of, value_of

aten = torch.ops.aten

Autocasts = tuple[fx.Node, ...]
"""The nodes that entered the autocast regions around a place, outermost first."""


class OpenError(Exception):
    """A call cannot be opened; the message says why."""


def can_open(node: fx.Node) -> bool:
    """Whether a node is a call whose inside is known here."""
    return _definition(node) is not None


def why_closed(node: fx.Node) -> str:
    """A sentence for a call that hides attention and that nothing here opens."""
    if node.op == "call_module":
        return f"{node.name} calls a module as one: trace it with torch.export or torch.compile, which go inside"
    return f"{node.name} is one call: what happens inside is not in the graph"


@dataclasses.dataclass(frozen=True)
class OpenedCall:
    """What stands for a call now.

    Attributes:
        nodes: what the call does, in order.
        rewired: for each former result its replacement, and the nodes that used it.
    """

    call: fx.Node
    nodes: tuple[fx.Node, ...]
    rewired: tuple[tuple[fx.Node, fx.Node, list[fx.Node]], ...]

    def close(self) -> None:
        """Puts the graph back as it was; nothing in it may have changed since."""
        for old, new, users in self.rewired:
            for user in users:
                user.replace_input_with(new, old)
        for node in reversed(self.nodes):
            node.graph.erase_node(node)

    def commit(self) -> None:
        """Erases the call, which nothing uses any more."""
        for old, new, _ in self.rewired:
            new.meta["replaces"] = old.name
        erase_unread(self.call)


def open_call(call: fx.Node, autocasts: Autocasts = ()) -> OpenedCall:
    """Puts what a call does in front of it, and lets the users of its results use that.

    Args:
        call: a node that `can_open`.
        autocasts: those around the graph that the call stands in.

    Raises:
        OpenError: the call cannot be retraced, or not for every size that the graph was traced for; the graph is as it
            was.
    """
    definition = _definition(call)
    assert definition is not None
    emit = Emitter(call)
    results = _results(call, definition)
    traced, inputs = _trace(emit, call, definition, [position for position, _ in results], autocasts)
    try:
        outputs = _inline(emit, traced, inputs, definition)
        for (_, old), new in zip(results, outputs, strict=True):
            _check_value(call, old, new)
    except Exception:
        emit.undo()
        raise
    rewired = [(old, new, old.replace_all_uses_with(new)) for (_, old), new in zip(results, outputs, strict=True)]
    return OpenedCall(call, tuple(emit.emitted), tuple(rewired))


def autocasts_of_bodies(module: fx.GraphModule) -> dict[fx.GraphModule, Autocasts]:
    """The autocast regions in which each graph inside a module is called first."""
    found: dict[fx.GraphModule, Autocasts] = {module: ()}
    pending = [module]
    while pending:
        parent = pending.pop()
        for node in parent.graph.find_nodes(op="get_attr"):
            body = attribute_of(node)
            if isinstance(body, fx.GraphModule) and body not in found:
                found[body] = _autocasts_around(node, found[parent])
                pending.append(body)
    return found


def _autocasts_around(node: fx.Node, outer: Autocasts) -> Autocasts:
    entered = list(outer)
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if earlier.target is torch.amp.autocast_mode._enter_autocast:
            entered.append(earlier)
        elif earlier.target is torch.amp.autocast_mode._exit_autocast:
            entered = [region for region in entered if region is not earlier.args[0]]
    return tuple(entered)


def _results(call: fx.Node, definition: _Definition) -> list[tuple[int | None, fx.Node]]:
    """The nodes that hold a used result of a call, each with its position; None if the call has one result."""
    if definition.has_one_result:
        return [(None, call)]
    results: list[tuple[int | None, fx.Node]] = []
    for user in call.users:
        if user.target is not operator.getitem:
            raise OpenError(f"{call.name} is one call, and {user.name} takes all its results together")
        if not all(map(is_unread, user.users)):
            results.append((user.args[1], user))  # type: ignore[arg-type]
    return results


def _trace(
    emit: Emitter, call: fx.Node, definition: _Definition, wanted: Sequence[int | None], autocasts: Autocasts
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """What a call does to compute the results wanted, as a graph of its inputs, and these."""
    if emit.fake_mode is None:
        raise OpenError(
            f"{call.name} is one call, and tracing recorded no shapes to open it with: trace the model with "
            "torch.export or torch.compile"
        )
    inputs = list(dict.fromkeys(call.all_input_nodes))
    values = [emit.fake_value(node) for node in inputs]
    for node, value in zip(inputs, values, strict=True):
        if value is None or (isinstance(value, Tensor) and value.is_nested):
            what = "has no recorded value" if value is None else "is a nested tensor"
            raise OpenError(f"{call.name} is one call, and its argument {node.name} {what}")

    def results(*values: Any) -> list[Any]:
        known = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.node.map_arg((call.args, call.kwargs), known.__getitem__)
        found = definition.function(*args, **kwargs)
        return [found if position is None else found[position] for position in wanted]

    try:
        with contextlib.ExitStack() as stack:
            for region in _autocasts_around(call, autocasts):
                stack.enter_context(torch.autocast(*region.args))  # type: ignore[arg-type]
            traced = trace_to_aten(results, values, emit.fake_mode)
    except SpecializedError as error:
        raise OpenError(f"{call.name} is one call, and opening it would fix a size: {error}") from error
    except Exception as error:
        raise OpenError(f"{call.name} is one call, and retracing it failed: {type(error).__name__}: {error}") from error
    traced.graph.eliminate_dead_code()
    return traced, inputs


def _inline(emit: Emitter, traced: fx.GraphModule, inputs: Sequence[fx.Node], definition: _Definition) -> list[fx.Node]:
    """Copies a traced graph in front of the call; the nodes of its results."""
    call = emit.before
    arguments = inspect.signature(definition.function).bind(*call.args, **call.kwargs).arguments
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    within: _Part | None = None
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            raise OpenError(f"{call.name} is one call, and has the tensor {node.target} inside")
        if node.op != "call_function":
            continue
        copy = copies[node] = emit.copy(node, copies)
        reads = copy.all_input_nodes
        within = within or next((part for part in definition.parts if arguments[part.first] in reads), None)
        if within is not None:
            _enter(copy, within)
            within = None if arguments[within.last] in reads else within
    outputs = [copies.get(node) for node in traced.graph.output_node().args[0]]  # type: ignore[union-attr]
    if None in outputs:
        raise OpenError(f"{call.name} is one call, and a result of it that is used is no tensor")
    return outputs  # type: ignore[return-value]


def _enter(node: fx.Node, part: _Part) -> None:
    """Notes that a node belongs to a submodule of the module that it was traced in."""
    stack = dict(node.meta.get("nn_module_stack") or {})
    if not stack:
        return
    key, (path, owner) = list(stack.items())[-1]
    kind = f"{part.type.__module__}.{part.type.__qualname__}" if isinstance(owner, str) else part.type
    stack[f"{key}.{part.submodule}"] = (f"{path}.{part.submodule}", kind)
    node.meta["nn_module_stack"] = stack


def _check_value(call: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """What was recorded for a result holds for its replacement."""
    before, after = value_of(old), value_of(new)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        raise OpenError(f"{call.name} is one call, and a result of it that is used is no tensor")
    is_same = before.dtype == after.dtype and before.dim() == after.dim()
    for axis in range(before.dim()) if is_same else ():
        is_same &= statically_known_true(before.size(axis) == after.size(axis))
        is_same &= statically_known_true(before.size(axis) == 1) or statically_known_true(
            before.stride(axis) == after.stride(axis)
        )
    if not is_same:
        raise OpenError(
            f"{call.name} is one call; retraced, {old.name} is {after.dtype} {tuple(after.shape)} with strides "
            f"{after.stride()}, and was {before.dtype} {tuple(before.shape)} with strides {before.stride()}"
        )


@dataclasses.dataclass(frozen=True)
class _Part:
    """A submodule's part of a call: from the first use of one parameter of it to that of another."""

    submodule: str
    type: type[nn.Module]
    first: str
    last: str


@dataclasses.dataclass(frozen=True)
class _Definition:
    """What a call computes, as functions of torch that can be traced."""

    function: Callable[..., Any]
    has_one_result: bool = False
    parts: tuple[_Part, ...] = ()


def _native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """aten::_native_multi_head_attention of [B, L, embed_dim]; a row whose keys are all masked is NaN.

    Whatever the dtype of the mask, what is not 0 is masked out. It is [L, L] (mask_type 0), [B, L] (1, of keys), or
    [B, H, L, L] (2).

    Source: aten/src/ATen/native/transformers/attention.cpp, native_multi_head_attention_cpu, of torch 2.13.
    """
    if query is key and key is value:
        projected = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        layers = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        projected = tuple(F.linear(*layer) for layer in layers)
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for x in projected)
    scores = (q * (1 / math.sqrt(embed_dim // num_head))) @ k.transpose(-2, -1)
    if mask is not None:
        masked = mask.bool()
        scores = scores.masked_fill(masked[:, None, None] if mask_type == 1 else masked, -math.inf)
    weights = scores.softmax(-1)
    output = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if need_weights and average_attn_weights:
        weights = weights.mean(1)
    return output, weights


def _transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """aten::_transformer_encoder_layer_fwd of [B, L, embed_dim]: nn.TransformerEncoderLayer without dropout.

    Source: aten/src/ATen/native/transformers/transformer.cpp, transformer_encoder_layer_forward, of torch 2.13.
    """

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attention(x: Tensor) -> Tensor:
        arguments = (embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask)
        return _native_multi_head_attention(x, x, x, *arguments, need_weights=False, mask_type=mask_type)[0]

    def feed_forward(x: Tensor) -> Tensor:
        activation = F.gelu if use_gelu else F.relu
        return F.linear(activation(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = attention(norm1(src)) + src
        return feed_forward(norm2(x)) + x
    x = norm1(attention(src) + src)
    return norm2(feed_forward(x) + x)


_PARTS_OF_ENCODER_LAYER = (
    _Part("self_attn", nn.MultiheadAttention, "qkv_weight", "proj_weight"),
    _Part("linear1", nn.Linear, "ffn_weight_1", "ffn_weight_1"),
    _Part("linear2", nn.Linear, "ffn_weight_2", "ffn_weight_2"),
)
_NATIVE_ATTENTION = _Definition(_native_multi_head_attention)
_ENCODER_LAYER = _Definition(_transformer_encoder_layer, has_one_result=True, parts=_PARTS_OF_ENCODER_LAYER)
_DEFINITIONS: dict[Any, _Definition] = {
    F.multi_head_attention_forward: _Definition(F.multi_head_attention_forward),
    torch._native_multi_head_attention: _NATIVE_ATTENTION,
    aten._native_multi_head_attention.default: _NATIVE_ATTENTION,
    torch._transformer_encoder_layer_fwd: _ENCODER_LAYER,
    aten._transformer_encoder_layer_fwd.default: _ENCODER_LAYER,
}


def _definition(node: fx.Node) -> _Definition | None:
    if node.op != "call_function":
        return None
    try:
        return _DEFINITIONS.get(node.target)
    except TypeError:  # not hashable
        return None
