"""Finds FFNs: anchors on a layer whose input is an activation of linear layers of the same tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from topk_fx.activation import ACTIVATIONS

from .dialect import Call, Kind, read
from .ffn_refused import refuse_ffn
from .hidden import HiddenReader, NotHidden, is_affine, is_floating_cast, name_activation
from .linear import RESHAPES, LinearCall, Part, is_rewritten, keeps_rows, read_product, token_source
from .score_steps import NO_DROPOUT, merge_dropout
from .sites import FFNSite, LinearLayer, Refusal, Refuse
from .span import check_span
from .values import dtype_of, shape_of, value_of

Order = dict[fx.Node, int]


def find_ffn(down: Call, order: Order) -> FFNSite | Refusal | None:
    """The FFN that a linear layer closes, or why it stays dense; None if it reads no activation of linear layers."""
    layer = read_product(down)
    if layer is None:
        return None
    candidate = _Candidate(layer, order)
    try:
        return candidate.read() or refuse_ffn(layer)
    except NotHidden:
        return refuse_ffn(layer)
    except Refuse as refusal:
        return Refusal(refusal.reason, refusal.detail, down.node, "ffn", candidate.products)


class _Candidate:
    """One candidate down projection. Raises Refuse once it is clear that it closes an FFN which cannot be taken."""

    def __init__(self, down: LinearCall, order: Order) -> None:
        self.down = down
        self.order = order
        self.interior: set[fx.Node] = {down.product}
        self.products: tuple[fx.Node, ...] = (down.product,)
        self.reader = HiddenReader()

    def read(self) -> FFNSite | None:
        end, dropouts = self._walk_to_activation()
        hidden = self.reader.read(end)
        parts = self.reader.parts
        if not self._is_of_same_tokens() or is_affine(hidden, self.reader):
            return None
        self.products = tuple(sorted({self.down.product, *(p for p, _ in parts)}, key=self.order.__getitem__))
        before = next((product for product, _ in parts if is_rewritten(product)), None)
        if before is not None and len(parts) > 1:
            return None  # what its hidden units and the tokens of another layer give meets here
        self.interior.update(self.reader.interior)
        activated = name_activation(hidden, self.reader, self._dtype())
        if activated is None:
            known = ", ".join(ACTIVATIONS)
            raise Refuse("unknown_activation", f"what {self.down.product.name} reads is no activation of {known}")
        dropout = NO_DROPOUT
        for call in dropouts:
            dropout = merge_dropout(dropout, call)
        self._check_used_once()
        up = parts[activated.linear or activated.active]
        gate = parts[activated.active] if activated.linear is not None else None
        layers = [] if before is not None else [_layer_of(part) for part in (up, gate) if part is not None]
        self._check_layers([*layers, self.down.layer])
        x = self._input(before)
        inputs = {x, *self.down.tensors, *(t for part in parts.values() for t in part.linear.tensors)}
        self._check_dtypes(inputs)
        passed = self._views_of_input(x) if before is None else ()
        start = min(self.order[node] for node in (*self.interior, *passed))
        check_span("FFN", inputs, self.interior, start, self.down.product, self.order)
        return FFNSite(
            anchor=self.down.product,
            output=self.down.product,
            input=x,
            up=layers[0] if layers else None,
            gate=layers[1] if gate is not None else None,
            down=self.down.layer,
            activation=activated.name,
            dropout_p=dropout[0],
            dropout_module=dropout[1],
            interior=tuple(sorted(self.interior, key=self.order.__getitem__)),
            products=self.products,
            tokens_shape=None if (shape := shape_of(x)) is None else shape[:-1],
        )

    def _walk_to_activation(self) -> tuple[fx.Node, list[Call]]:
        """The node before the casts, views and dropouts that lead to the down projection, and the dropouts."""
        size = self.down.layer.shape[1] if self.down.layer.shape is not None else None
        dropouts: list[Call] = []
        node = self.down.input
        while (call := read(node)) is not None and _is_passed(call, size):
            self.reader.has_views |= call.kind in RESHAPES
            if call.kind == Kind.DROPOUT:
                dropouts.append(call)
            self.interior.add(node)
            node = call["input"]
        return node, dropouts

    def _is_of_same_tokens(self) -> bool:
        """Whether one or two layers of as many units read the same tensor, so that one token's units meet."""
        parts = list(self.reader.parts.values())
        if not parts or len({_size(part) for part in parts}) != 1:
            return False
        if len({part.linear.input for part in parts}) > 1:
            return len({token_source(part.linear.input) for part in parts}) == 1
        is_traced = all(value_of(node) is not None for node in self.reader.interior)
        return len(parts) == 1 or is_traced or not self.reader.has_views

    def _input(self, before: fx.Node | None) -> fx.Node:
        """The tokens, in an arrangement from which all layers got theirs; or what the FFN `before` gives."""
        inputs = [before] if before is not None else [part.linear.input for part in self.reader.parts.values()]
        x = inputs[0] if len(set(inputs)) == 1 else token_source(inputs[0])
        if self.reader.has_views or x not in inputs:
            are_matrices = x in inputs and all(read(p).kind == Kind.ADDMM for p in self.products)  # type: ignore[union-attr]
            if not are_matrices and None in (shape_of(x), shape_of(self.down.product)):
                raise Refuse("shape_unknown", f"how {self.down.product.name} arranges the tokens was not traced")
        return x

    def _views_of_input(self, x: fx.Node) -> set[fx.Node]:
        """The nodes that stand between the tokens and the layers."""
        found = set()
        for part in self.reader.parts.values():
            node = part.linear.input
            while node is not x:
                found.add(node)
                node = node.all_input_nodes[0]
        return found

    def _dtype(self) -> torch.dtype | None:
        """The dtype in which the model computes, as far as it was traced."""
        part = next(iter(self.reader.parts.values()))
        tensors = (part.linear.product, part.linear.input, *part.linear.tensors)
        return next((dtype for x in tensors if (dtype := dtype_of(x)) is not None), None)

    def _check_used_once(self) -> None:
        for node in sorted(self.interior - {self.down.product}, key=self.order.__getitem__):
            for user in node.users:
                call = read(user)
                if user not in self.interior and not (call is not None and call.kind == Kind.ASSERT):
                    name = "the output" if user.op == "output" else user.name
                    raise Refuse("hidden_used_elsewhere", f"the hidden units {node.name} are also used by {name}")

    def _check_layers(self, layers: list[LinearLayer]) -> None:
        for layer in layers:
            bias = shape_of(layer.bias)
            is_matrix = layer.shape is not None and len(layer.shape) == 2
            if not is_matrix or (bias is not None and len(bias) != 1):
                raise Refuse(
                    "shape_unknown", f"a layer of {self.down.product.name} has no weight matrix and bias vector"
                )

    def _check_dtypes(self, tensors: set[fx.Node]) -> None:
        dtypes = {dtype for t in tensors if (dtype := dtype_of(t)) is not None}
        if len(dtypes) > 1:
            raise Refuse(
                "mixed_dtypes", f"the layers of {self.down.product.name} have the dtypes {sorted(map(str, dtypes))}"
            )


def _is_passed(call: Call, size: object) -> bool:
    """Whether a call hands its input's rows on, but for rounding and dropout."""
    match call.kind:
        case Kind.DROPOUT | Kind.SAME:
            return True
        case Kind.CAST:
            return is_floating_cast(call)
        case Kind.VIEW | Kind.SQUEEZE | Kind.UNSQUEEZE:
            return isinstance(size, int) and keeps_rows(call, size)
    return False


def _size(part: Part) -> int | None:
    return None if part.units is None else len(part.units)


def _layer_of(part: Part) -> LinearLayer:
    return dataclasses.replace(part.linear.layer, units=part.units)
