"""Finds FFNs: anchors on a linear layer whose input is an activated linear layer of the same tokens."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from .dialect import Call, Kind, read
from .score_steps import NO_DROPOUT, check_cast, merge_dropout
from .sites import FFNSite, LinearLayer, Refusal, Refuse
from .span import check_span
from .values import constant_of, dtype_of, shape_of

Order = dict[fx.Node, int]


def find_ffn(down: Call, order: Order) -> FFNSite | Refusal | None:
    """The FFN that a linear call closes, or why it stays dense; None if it reads no activated linear layer."""
    try:
        return _Reader(down, order).read()
    except Refuse as refusal:
        return Refusal(refusal.reason, refusal.detail, down.node)


class _Reader:
    """Reads one candidate down projection. Raises Refuse once it is clear that this is an FFN which cannot be taken."""

    def __init__(self, down: Call, order: Order) -> None:
        self.down = down
        self.order = order
        self.interior: list[fx.Node] = [down.node]

    def read(self) -> FFNSite | None:
        passed: list[Call] = []
        call = read(self.down["input"])
        while call is not None and call.kind in (Kind.DROPOUT, Kind.CAST, Kind.SAME):
            passed.append(call)
            call = read(call["input"])
        self.interior += [c.node for c in passed]
        if call is None:
            return None
        gated = self._read_gated(call) if call.kind == Kind.MUL else None
        gate = None
        if gated is not None:
            activation, gate, up = gated
        else:
            activated = self._read_activation(call)
            if activated is None:
                return None
            activation, up = activated
        if gate is not None and gate["input"] is not up["input"]:
            return None
        dropout = NO_DROPOUT
        for step in passed:
            if step.kind == Kind.DROPOUT:
                dropout = merge_dropout(dropout, step)
            elif step.kind == Kind.CAST:
                check_cast(step)
        self._check_used_once()
        layers = [linear_layer(c) for c in (up, gate, self.down) if c is not None]
        self._check_layers(layers)
        self._check_dtypes(up["input"], layers)
        inputs = {up["input"], *(t for layer in layers for t in (layer.weight, layer.bias) if isinstance(t, fx.Node))}
        start = min(map(self.order.__getitem__, self.interior))
        check_span("FFN", inputs, self.interior, start, self.down.node, self.order)
        return FFNSite(
            anchor=self.down.node,
            output=self.down.node,
            input=up["input"],
            up=layers[0],
            gate=layers[1] if gate is not None else None,
            down=layers[-1],
            activation=activation,
            dropout_p=dropout[0],
            dropout_module=dropout[1],
            interior=tuple(sorted(self.interior, key=self.order.__getitem__)),
            tokens_shape=None if (shape := shape_of(up["input"])) is None else shape[:-1],
        )

    def _read_gated(self, product: Call) -> tuple[str, Call, Call] | None:
        """act(gate(x)) * up(x), in either order: the activation and both linear calls."""
        for gate_side, up_side in (("input", "other"), ("other", "input")):
            up = self._linear(product[up_side])
            gate = read(product[gate_side])
            if up is None or gate is None or gate.node is up.node:
                continue
            before = len(self.interior)
            activated = self._read_activation(gate)
            if activated is not None:
                self.interior += [product.node, up.node]
                return activated[0], activated[1], up
            del self.interior[before:]
        return None

    def _read_activation(self, call: Call) -> tuple[str, Call] | None:
        """act(linear(x)): the activation's name and the linear call."""
        passed = [call.node]
        name = {Kind.RELU: "relu", Kind.SILU: "silu"}.get(call.kind)
        if call.kind == Kind.GELU:
            name = {"none": "gelu", "tanh": "gelu_tanh"}.get(call.get("approximate", "none"))
        elif call.kind == Kind.POW and constant_of(call.get("exponent", 2)) == 2:
            inner = read(call["input"])
            if inner is not None and inner.kind == Kind.RELU:
                name, call = "relu2", inner
                passed.append(inner.node)
        if name is None:
            return None
        linear = self._linear(call["input"])
        if linear is None:
            return None
        self.interior += [*passed, linear.node]
        return name, linear

    def _linear(self, node: Any) -> Call | None:
        call = read(node)
        return call if call is not None and call.kind == Kind.LINEAR else None

    def _check_used_once(self) -> None:
        inside = set(self.interior)
        for node in inside - {self.down.node}:
            for user in node.users:
                call = read(user)
                if user not in inside and not (call is not None and call.kind == Kind.ASSERT):
                    name = "the output" if user.op == "output" else user.name
                    raise Refuse("hidden_used_elsewhere", f"the hidden units {node.name} are also used by {name}")

    def _check_layers(self, layers: list[LinearLayer]) -> None:
        for layer in layers:
            bias = shape_of(layer.bias)
            is_matrix = layer.shape is not None and len(layer.shape) == 2
            if not is_matrix or (bias is not None and len(bias) != 1):
                raise Refuse("shape_unknown", f"a layer of {self.down.node.name} has no weight matrix and bias vector")

    def _check_dtypes(self, x: fx.Node, layers: list[LinearLayer]) -> None:
        tensors = [x, *(t for layer in layers for t in (layer.weight, layer.bias) if isinstance(t, fx.Node))]
        dtypes = {dtype for t in tensors if (dtype := dtype_of(t)) is not None}
        if len(dtypes) > 1:
            raise Refuse(
                "mixed_dtypes", f"the layers of {self.down.node.name} have the dtypes {sorted(map(str, dtypes))}"
            )


def linear_layer(call: Call) -> LinearLayer:
    """The weight and bias of a linear call: nodes, or the module that owns them."""
    module = call.get("module")
    if isinstance(module, nn.Linear):
        return LinearLayer(None, None, call.node, tuple(module.weight.shape), module.bias is not None)
    weight, bias = call["weight"], call.get("bias")
    return LinearLayer(weight, bias, None, shape_of(weight), bias is not None)
