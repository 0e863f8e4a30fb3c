"""Every spelling of an FFN is found, look-alikes are not, and the op that replaces one computes what was asked for."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TRACERS, DynamoTrace, SymbolicTrace, assert_same, leaves, values_and_gradients
from torch import Tensor, nn

import topk_fx
from topk_fx import reference

aten = torch.ops.aten
MODEL, HIDDEN, OUTPUT, K = 7, 13, 5, 4
SHAPES = {
    "x": (2, 3, MODEL), "token": (MODEL,), "up": (HIDDEN, MODEL), "gate": (HIDDEN, MODEL), "down": (OUTPUT, HIDDEN),
    "up_bias": (HIDDEN,), "gate_bias": (HIDDEN,), "down_bias": (OUTPUT,),
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(20210613)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def inputs_of(function: Callable[..., Any]) -> tuple[Tensor, ...]:
    available = tensors()
    return tuple(available[name] for name in inspect.signature(function).parameters)


@dataclasses.dataclass(frozen=True)
class Spelling:
    model: Callable[..., Tensor]
    activation: str


SPELLINGS: list[Spelling] = []


def spelling(activation: str = "relu") -> Callable[[Any], Any]:
    def register(model: Any) -> Any:
        SPELLINGS.append(Spelling(model, activation))
        return model

    return register


@spelling()
def relu_function(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)), down)


@spelling()
def relu_method_with_biases(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    return F.linear(F.linear(x, up, up_bias).relu(), down, down_bias)


@spelling()
def relu_in_place(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up, up_bias), inplace=True), down)


@spelling()
def relu_aten(x: Tensor, up: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    return aten.linear.default(aten.relu.default(aten.linear.default(x, up)), down, down_bias)


@spelling()
def one_token(token: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(token, up)), down)


@spelling()
def dropout_in_eval(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.dropout(F.linear(F.dropout(F.relu(F.linear(x, up)), 0.5, training=False), down), 0.5, training=False)


@spelling("relu2")
def relu_squared(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)).square(), down)


@spelling("relu2")
def relu_to_the_second_power(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(torch.pow(F.relu(F.linear(x, up)), 2), down)


@spelling("relu2")
def relu_operator_power(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)) ** 2.0, down)


@spelling("gelu")
def gelu(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down)


@spelling("gelu_tanh")
def gelu_by_tanh(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up), approximate="tanh"), down)


@spelling("silu")
def silu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, up)).contiguous(), down)


@spelling("silu")
def gated_silu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@spelling("gelu_tanh")
def gated_gelu_with_biases(
    x: Tensor, gate: Tensor, gate_bias: Tensor, up: Tensor, up_bias: Tensor, down: Tensor
) -> Tensor:
    """T5: the linear half first."""
    hidden = F.linear(x, up, up_bias) * F.gelu(F.linear(x, gate, gate_bias), approximate="tanh")
    return F.linear(F.dropout(hidden, 0.1, False), down)


def dense_of(function: Callable[..., Tensor], activation: str, k: Any) -> Callable[..., Tensor]:
    """The reference, called as a spelling is."""
    names = {"x": "input", "token": "input", "up": "up_weight", "gate": "gate_weight", "down": "down_weight"}
    parameters = [names.get(name, name) for name in inspect.signature(function).parameters]
    return lambda *args: reference.ffn(**dict(zip(parameters, args, strict=True)), k=k, activation=activation)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.model.__name__)
@pytest.mark.parametrize("tracer", TRACERS)
def test_ffn_spelling_is_rewritten(spelling: Spelling, tracer: str) -> None:
    inputs = inputs_of(spelling.model)
    trace = TRACERS[tracer](spelling.model, leaves(inputs))
    assert_same(values_and_gradients(dense_of(spelling.model, spelling.activation, "all"), inputs),
                values_and_gradients(spelling.model, inputs))  # fmt: skip
    for k in ("all", K):
        model, report, text = trace.rewrite(ffn_k=k)
        assert [(site.kind, site.rewritten, site.reason) for site in report] == [("ffn", True, "")]
        assert text.count("topk_fx.ffn(") == 1
        assert "linear(" not in text
        expected = values_and_gradients(dense_of(spelling.model, spelling.activation, k), inputs)
        assert_same(values_and_gradients(model, inputs), expected)


class Modules(nn.Module):
    """symbolic_trace makes of it calls of modules."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(MODEL, HIDDEN), nn.Linear(HIDDEN, OUTPUT, bias=False)
        self.gate = nn.Linear(MODEL, HIDDEN, bias=False) if gated else None
        self.activation, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        return self.down(self.dropout(hidden))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_ffn_of_called_modules_is_rewritten(gated: bool) -> None:
    dense = Modules(gated).eval()
    x = tensors()["x"]
    for k in ("all", K):
        model, report, text = SymbolicTrace(dense).rewrite(ffn_k=k)
        assert [site.rewritten for site in report] == [True]
        assert "up(" not in text
        expected = reference.ffn(
            x, dense.up.weight, dense.down.weight, k=k, up_bias=dense.up.bias,
            gate_weight=None if dense.gate is None else dense.gate.weight,
        )  # fmt: skip
        assert_same(model(x), expected)
    assert_same(expected, model(x))


def test_dropout_module_of_ffn_is_asked_at_run_time() -> None:
    """Rewritten while it trains, the FFN stops dropping units when the model is put to eval mode."""
    dense = Modules()
    model, report, _ = SymbolicTrace(dense).rewrite(ffn_k="all")
    assert [site.rewritten for site in report] == [True]
    x = tensors()["x"]
    trained = [model(x) for _ in range(2)]
    assert not torch.equal(*trained)
    assert_same(model.eval()(x), dense.eval()(x))


@pytest.mark.parametrize("tracer", TRACERS)
def test_ffn_dropout_acts_on_kept_units(tracer: str) -> None:
    """Half of the kept units are dropped and the others doubled: each output is a sum over some of them."""

    def model(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.dropout(F.relu(F.linear(x, up)), 0.5), down)

    inputs = tensors()
    x, up = inputs["x"], inputs["up"]
    rewritten, report, _ = TRACERS[tracer](model, (x, up, torch.eye(HIDDEN))).rewrite(ffn_k=K)
    assert [site.rewritten for site in report] == [True]
    kept = reference.ffn(x, up, torch.eye(HIDDEN), k=K)
    hidden = rewritten(x, up, torch.eye(HIDDEN))
    is_kept = hidden != 0
    assert_same(hidden[is_kept], 2 * kept[is_kept])
    assert 0 < is_kept.sum() < (kept != 0).sum()


# Look-alikes.


def activation_of_input(x: Tensor, up: Tensor) -> Tensor:
    return F.linear(F.relu(x), up)


def norm_before_down(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.layer_norm(F.gelu(F.linear(x, up)), (HIDDEN,)), down)


def residual_before_down(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)) + up_bias, down)


def gate_of_another_input(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(2 * x, up), down)


def gate_by_sigmoid(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(torch.sigmoid(F.linear(x, gate)) * F.linear(x, up), down)


def relu_cubed(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)) ** 3, down)


def linear_squared(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up) ** 2, down)


def softmax_between(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up).softmax(-1) * F.linear(x, up), down)


LOOK_ALIKES = [
    activation_of_input, norm_before_down, residual_before_down, gate_of_another_input, gate_by_sigmoid, relu_cubed,
    linear_squared, softmax_between,
]  # fmt: skip


@pytest.mark.parametrize("model", LOOK_ALIKES, ids=lambda model: model.__name__)
def test_look_alike_is_no_ffn(model: Callable[..., Tensor]) -> None:
    trace = DynamoTrace(model, inputs_of(model))
    _, report, text = trace.rewrite(ffn_k=2)
    assert [site for site in report if site.kind == "ffn"] == []
    assert text == trace.text


# Regions that are more than they seem.


def units_quantised(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)).to(torch.int8).to(torch.float32), down)


def three_layers(x: Tensor, up: Tensor, square: Tensor, down: Tensor) -> Tensor:
    """The second layer is the down projection of one FFN and the up projection of the next."""
    return F.linear(F.relu(F.linear(F.relu(F.linear(x, up)), square)), down)


def ffn_of_ffn(x: Tensor, up: Tensor, back: Tensor, down: Tensor) -> Tensor:
    """The output of one is the input of the next."""
    inner = F.linear(F.relu(F.linear(x, up)), back)
    return F.linear(F.relu(F.linear(inner, up)), down)


def gate_of_ffn(x: Tensor, up: Tensor, square: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """What one FFN puts out is the linear half of another."""
    inner = F.linear(F.relu(F.linear(x, up)), square)
    return F.linear(F.silu(F.linear(x, gate)) * inner, down)


def query_from_ffn(x: Tensor, up: Tensor, back: Tensor) -> Tensor:
    """What an FFN puts out is the query of an attention of one head."""
    query = F.linear(F.relu(F.linear(x, up)), back)
    return (query @ x.transpose(-2, -1)).softmax(-1) @ x


REGIONS = [units_quantised, three_layers, ffn_of_ffn, gate_of_ffn, query_from_ffn]


@pytest.mark.parametrize("model", REGIONS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("tracer", TRACERS)
def test_adjoining_regions_compute_what_dense_computes(model: Callable[..., Tensor], tracer: str) -> None:
    """Whichever of them are rewritten, the result with everything kept is that of the model."""
    available = {**tensors(), "square": torch.randn(HIDDEN, HIDDEN), "back": torch.randn(MODEL, HIDDEN)}
    inputs = tuple(available[name] for name in inspect.signature(model).parameters)
    rewritten, report, _ = TRACERS[tracer](model, inputs).rewrite(k="all")
    assert_same(rewritten(*inputs), model(*inputs))
    assert bool(report.rewritten) == (model is not units_quantised)


def test_ffn_beside_attention_is_rewritten_by_itself() -> None:
    """`k` alone rewrites attention; an FFN of GELU needs `ffn_k`."""
    model = query_from_gelu
    inputs = inputs_of(model)
    trace = DynamoTrace(model, inputs)
    kinds = {"k": {"k": 2}, "ffn_k": {"ffn_k": 2}}
    found = {name: [s.kind for s in trace.rewrite(**options)[1].rewritten] for name, options in kinds.items()}
    assert found == {"k": ["attention"], "ffn_k": ["ffn"]}


def query_from_gelu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(F.gelu(F.linear(x, up)), down)
    return (hidden.tanh() @ hidden.tanh().transpose(-2, -1)).softmax(-1) @ x


def test_model_without_ffn_or_attention_gives_an_empty_report() -> None:
    trace = DynamoTrace(activation_of_input, inputs_of(activation_of_input))
    _, report, text = trace.rewrite(k="all")
    assert (len(report), text) == (0, trace.text)
    assert str(report) == "topk_fx: GraphModule: no softmax, attention call or FFN found; nothing was changed"
    assert report + report == topk_fx.RewriteReport((), "GraphModule")
