"""Finds FFNs: anchors on a linear layer whose input is an activated linear layer of the same tokens."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from .dialect import Call, Kind, read
from .mutation import mutated_arguments, storage_roots
from .sites import FFNSite, LinearLayer, Refusal, Refuse
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
        dropout: tuple[Any, fx.Node | None] = (0.0, None)
        call = read(self.down["input"])
        while call is not None and call.kind in (Kind.DROPOUT, Kind.CAST, Kind.SAME):
            self.interior.append(call.node)
            if call.kind == Kind.DROPOUT:
                dropout = self._merge(dropout, call)
            call = read(call["input"])
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
        if dropout == (None, None):
            raise Refuse(
                "dropout_mode_not_static", f"a dropout before {self.down.node.name} is not static, or not alone"
            )
        self._check_used_once()
        layers = [linear_layer(c) for c in (up, gate, self.down) if c is not None]
        self._check_dtypes(up["input"], layers)
        self._check_span(up["input"], layers)
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

    def _merge(self, dropout: tuple[Any, fx.Node | None], call: Call) -> tuple[Any, fx.Node | None]:
        """The dropout after one more call; (None, None) if it is not static."""
        p = call.get("p", 0.5)
        found: tuple[Any, fx.Node | None]
        if "module" in call.arguments:
            found = (p, call.node) if p > 0 else (0.0, None)
        elif call.get("training", True) is False or p == 0:
            found = (0.0, None)
        else:
            found = (
                (float(p), None) if call.get("training", True) is True and isinstance(p, (int, float)) else (None, None)
            )
        if found == (0.0, None):
            return dropout
        return found if dropout == (0.0, None) else (None, None)

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

    def _check_dtypes(self, x: fx.Node, layers: list[LinearLayer]) -> None:
        tensors = [x, *(t for layer in layers for t in (layer.weight, layer.bias) if isinstance(t, fx.Node))]
        dtypes = {dtype for t in tensors if (dtype := dtype_of(t)) is not None}
        if len(dtypes) > 1:
            raise Refuse(
                "mixed_dtypes", f"the layers of {self.down.node.name} have the dtypes {sorted(map(str, dtypes))}"
            )

    def _check_span(self, x: fx.Node, layers: list[LinearLayer]) -> None:
        """The op stands where the down projection stood, so nothing it reads may have changed in between."""
        tensors = {x, *(t for layer in layers for t in (layer.weight, layer.bias) if isinstance(t, fx.Node))}
        inside = set(self.interior)
        start, end = min(map(self.order.__getitem__, inside)), self.order[self.down.node]
        for node in self.down.node.graph.nodes:
            if not start <= self.order[node] < end or node in inside:
                continue
            call = read(node)
            if call is not None and call.kind == Kind.MODE:
                raise Refuse("mode_changes_inside", f"grad mode or autocast changes at {node.name}, inside the FFN")
            written = mutated_arguments(node)
            if written:
                roots = set().union(*map(storage_roots, tensors))
                if any(storage_roots(t) & roots for t in written):
                    raise Refuse("inputs_written_between", f"{node.name} writes to an input of the FFN inside it")


def linear_layer(call: Call) -> LinearLayer:
    """The weight and bias of a linear call: nodes, or the module that owns them."""
    module = call.get("module")
    if isinstance(module, nn.Linear):
        return LinearLayer(None, None, call.node, tuple(module.weight.shape), module.bias is not None)
    weight, bias = call["weight"], call.get("bias")
    return LinearLayer(weight, bias, None, shape_of(weight), bias is not None)
