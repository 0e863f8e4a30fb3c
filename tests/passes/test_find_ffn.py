"""Every spelling of an FFN is found, look-alikes are not, and the op that replaces one computes what was asked for."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TRACERS, DynamoTrace, ExportTrace, SymbolicTrace, assert_same, drawn, leaves, values_and_gradients
from torch import Tensor, nn

import topk_fx
from topk_fx import reference
from topk_fx.compat import CLAMP_PASSES_AT_BOUNDS

aten = torch.ops.aten
MODEL, HIDDEN, OUTPUT, K = 7, 13, 5, 4
SHAPES = {
    "x": (2, 3, MODEL), "token": (MODEL,), "up": (HIDDEN, MODEL), "gate": (HIDDEN, MODEL), "down": (OUTPUT, HIDDEN),
    "up_bias": (HIDDEN,), "gate_bias": (HIDDEN,), "down_bias": (OUTPUT,), "up_stored": (MODEL, HIDDEN),
    "gate_stored": (MODEL, HIDDEN), "down_stored": (HIDDEN, OUTPUT), "fused": (2 * HIDDEN, MODEL),
    "fused_bias": (2 * HIDDEN,),
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    """The inputs by name, seeded. One token is zero, as padding is: a layer without a bias gives 0, where ReLU bends."""
    generator = torch.Generator().manual_seed(20210613)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found["x"][0, 1] = 0
    return found


def inputs_of(function: Callable[..., Any]) -> tuple[Tensor, ...]:
    available = tensors()
    return tuple(available[name] for name in inspect.signature(function).parameters)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """`gate` and `up` are the rows of a fused weight that a model takes for each."""

    model: Callable[..., Tensor]
    activation: str
    gate: slice
    up: slice


SPELLINGS: list[Spelling] = []
FIRST, SECOND = slice(HIDDEN), slice(HIDDEN, None)
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)


def spelling(activation: str = "relu", gate: slice = FIRST, up: slice = SECOND) -> Callable[[Any], Any]:
    def register(model: Any) -> Any:
        SPELLINGS.append(Spelling(model, activation, gate, up))
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


# The layers: other products, weights stored [in, out].


@spelling()
def matmul_operator(x: Tensor, up_stored: Tensor, down_stored: Tensor) -> Tensor:
    return F.relu(x @ up_stored) @ down_stored


@spelling()
def matmul_of_transposes(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.matmul(F.relu(x.matmul(up.T)), down.transpose(0, 1))


@spelling()
def one_token_matmul_added_bias(token: Tensor, up_stored: Tensor, up_bias: Tensor, down_stored: Tensor) -> Tensor:
    return torch.relu(up_bias + token @ up_stored) @ down_stored


@spelling("silu")
def matmul_with_added_biases(
    x: Tensor, up_stored: Tensor, up_bias: Tensor, down_stored: Tensor, down_bias: Tensor
) -> Tensor:
    return torch.matmul(F.silu(torch.matmul(x, up_stored) + up_bias), down_stored) + down_bias


@spelling("gelu_tanh")
def conv1d_of_gpt2(x: Tensor, up_stored: Tensor, up_bias: Tensor, down_stored: Tensor, down_bias: Tensor) -> Tensor:
    hidden = torch.addmm(up_bias, x.view(-1, x.size(-1)), up_stored).view(*x.shape[:-1], HIDDEN)
    hidden = F.gelu(hidden, approximate="tanh")
    return torch.addmm(down_bias, hidden.view(-1, hidden.size(-1)), down_stored).view(*x.shape[:-1], OUTPUT)


@spelling("silu")
def gate_and_up_of_two_views(x: Tensor, gate_stored: Tensor, up_stored: Tensor, down: Tensor) -> Tensor:
    gate, up = (x.reshape(-1, MODEL).mm(weight).view(2, 3, HIDDEN) for weight in (gate_stored, up_stored))
    return F.linear(F.silu(gate) * up, down)


@spelling()
def tokens_flattened_between(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)).flatten(0, 1), down).view(2, 3, OUTPUT)


# The gate and the linear half in one weight.


@spelling("silu")
def chunked(x: Tensor, fused: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, fused).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


@spelling("gelu", gate=SECOND, up=FIRST)
def chunked_linear_half_first(x: Tensor, fused: Tensor, fused_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    up, gate = torch.chunk(F.linear(x, fused, fused_bias), 2, dim=2)
    return F.linear(up * F.gelu(gate), down, down_bias)


@spelling("silu")
def split_by_size(x: Tensor, fused: Tensor, fused_bias: Tensor, down: Tensor) -> Tensor:
    gate, up = (F.linear(x, fused) + fused_bias).split(HIDDEN, dim=-1)
    return F.linear(F.silu(gate) * up, down)


@spelling("relu")
def split_by_sizes(x: Tensor, fused: Tensor, down: Tensor) -> Tensor:
    gate, up = torch.split(F.linear(x, fused), [HIDDEN, HIDDEN], -1)
    return F.linear(up * F.relu(gate), down)


@spelling("silu")
def sliced(x: Tensor, fused: Tensor, down: Tensor) -> Tensor:
    both = F.linear(x, fused)
    return F.linear(F.silu(both[..., :HIDDEN]) * both[:, :, HIDDEN:], down)


@spelling("silu")
def split_by_number(x: Tensor, fused: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, fused).tensor_split(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


@spelling("gelu", gate=SECOND, up=FIRST)
def split_at_a_place(x: Tensor, fused: Tensor, down: Tensor) -> Tensor:
    up, gate = torch.tensor_split(F.linear(x, fused), (HIDDEN,), 2)
    return F.linear(up * F.gelu(gate), down)


@spelling("silu")
def unbound_rows(x: Tensor, fused: Tensor, fused_bias: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, fused, fused_bias).unflatten(-1, (2, HIDDEN)).unbind(-2)
    return F.linear(F.silu(gate) * up, down)


@spelling("silu", gate=EVEN, up=ODD)
def unbound_pairs(x: Tensor, fused: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, fused).view(2, 3, HIDDEN, 2).unbind(dim=3)
    return F.linear(F.silu(gate) * up, down)


@spelling("silu", gate=ODD, up=EVEN)
def viewed_as_pairs(x: Tensor, fused: Tensor, fused_bias: Tensor, down: Tensor) -> Tensor:
    both = F.linear(x, fused, fused_bias).view(2, 3, HIDDEN, 2)
    return F.linear(both[..., 0] * F.silu(both[:, :, :, 1]), down)


@spelling("silu")
def viewed_as_two_rows(x: Tensor, fused: Tensor, fused_bias: Tensor, down: Tensor) -> Tensor:
    """Moshi."""
    both = F.linear(x, fused, fused_bias).view(2, 3, 2, -1)
    return F.linear(F.silu(both[..., 0, :]) * both[..., 1, :], down)


@spelling("quick_gelu", gate=EVEN, up=ODD)
def interleaved(x: Tensor, fused: Tensor, fused_bias: Tensor, down: Tensor) -> Tensor:
    """gpt-oss, without its clamps."""
    both = F.linear(x, fused, fused_bias)
    gate, up = both[..., ::2], both[..., 1::2]
    return F.linear(up * (gate * torch.sigmoid(gate * 1.702)), down)


@spelling("sigmoid", gate=SECOND, up=FIRST)
def glu(x: Tensor, fused: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.glu(F.linear(x, fused)), down)


@spelling("sigmoid")
def glu_of_two_layers(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(torch.sigmoid(F.linear(x, gate)) * F.linear(x, up), down)


# Activations written out.


@spelling("relu_clamp" if CLAMP_PASSES_AT_BOUNDS else "relu")
def relu_by_clamp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up).clamp(min=0), down)


@spelling("relu_clamp")
def relu_by_where(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(x, up)
    return F.linear(torch.where(hidden < 0, 0.0, hidden), down)


@spelling("relu_maximum")
def relu_by_maximum(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(x, up)
    return F.linear(torch.maximum(hidden, torch.zeros_like(hidden)), down)


@spelling("relu_maximum")
def relu_by_magnitude(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(x, up)
    return F.linear((hidden + hidden.abs()) / 2, down)


@spelling()
def relu_by_comparison(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(x, up)
    return F.linear(hidden * (hidden > 0), down)


@spelling("relu2")
def relu_times_relu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.relu(F.linear(x, up))
    return F.linear(hidden * hidden, down)


@spelling("gelu")
def gelu_by_erf(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(x, up)
    return F.linear(hidden * 0.5 * (1.0 + torch.erf(hidden / math.sqrt(2.0))), down)


@spelling("gelu_tanh")
def gelu_of_gpt2(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(x, up, up_bias)
    inner = math.sqrt(2.0 / math.pi) * (hidden + 0.044715 * torch.pow(hidden, 3.0))
    return F.linear(0.5 * hidden * (1.0 + torch.tanh(inner)), down)


@spelling("gelu_tanh")
def gelu_of_bloom(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The constant has eight digits."""
    hidden = F.linear(x, up)
    return F.linear(hidden * 0.5 * (1.0 + torch.tanh(0.79788456 * hidden * (1 + 0.044715 * hidden * hidden))), down)


@spelling("quick_gelu")
def quick_gelu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(x, up)
    return F.linear(hidden * torch.sigmoid(1.702 * hidden), down)


@spelling("silu")
def silu_by_exp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(x, up)
    return F.linear(hidden / (1 + torch.exp(-hidden)), down)


@spelling("silu")
def gated_silu_multiplied_in_another_order(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = F.linear(x, gate)
    return F.linear(F.linear(x, up) * gated * gated.sigmoid(), down)


@spelling("gelu_tanh")
def gelu_in_place(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    inner = F.linear(x, up)
    gate = inner.pow(3).mul_(0.044715).add_(inner).mul_(math.sqrt(2 / math.pi)).tanh_()
    return F.linear((inner * 0.5).mul_(gate + 1), down)


def dense_of(spelling: Spelling, k: Any) -> Callable[..., Tensor]:
    """The reference, called as a spelling is."""
    names = {"x": "input", "token": "input", "up": "up_weight", "gate": "gate_weight", "down": "down_weight"}
    parameters = list(inspect.signature(spelling.model).parameters)

    def dense(*args: Tensor) -> Tensor:
        given: dict[str, Tensor] = {}
        for name, value in zip(parameters, args, strict=True):
            if name.startswith("fused"):
                suffix = "bias" if name.endswith("bias") else "weight"
                given |= {f"gate_{suffix}": value[spelling.gate], f"up_{suffix}": value[spelling.up]}
            elif name.endswith("_stored"):
                given[name.replace("stored", "weight")] = value.T
            else:
                given[names.get(name, name)] = value
        return reference.ffn(**given, k=k, activation=spelling.activation)

    return dense


class DecomposedTrace(ExportTrace):
    """Exported and decomposed to core ATen: products are mm and addmm of views."""

    def __init__(self, model: Callable[..., Any], inputs: Any) -> None:
        super().__init__(model, inputs)
        self.program = self.program.run_decompositions()


FFN_TRACERS = {"dynamo": DynamoTrace, "export": ExportTrace, "decomposed": DecomposedTrace}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.model.__name__)
@pytest.mark.parametrize("tracer", FFN_TRACERS)
def test_ffn_spelling_is_rewritten(spelling: Spelling, tracer: str) -> None:
    inputs = inputs_of(spelling.model)
    trace = FFN_TRACERS[tracer](spelling.model, leaves(inputs))
    assert_same(values_and_gradients(dense_of(spelling, "all"), inputs), values_and_gradients(spelling.model, inputs))
    for k in ("all", K):
        model, report, text = trace.rewrite(ffn_k=k)
        assert [(site.kind, site.rewritten, site.reason) for site in report] == [("ffn", True, "")]
        assert text.count("topk_fx.ffn(") == 1
        assert not re.search(r"linear\(|mm\(|matmul\(", text)
        assert_same(values_and_gradients(model, inputs), values_and_gradients(dense_of(spelling, k), inputs))


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


class Conv1D(nn.Module):
    """A layer as GPT-2 has it."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size_in, size_out)), nn.Parameter(torch.randn(size_out))
        self.size_out = size_out

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(x.size()[:-1] + (self.size_out,))  # noqa: RUF005


class Written(nn.Module):
    """`act(x)` between layers of two makes."""

    def __init__(self, layer: Callable[[int, int], nn.Module], act: Callable[[Tensor], Tensor], width: int = 1) -> None:
        super().__init__()
        self.up, self.down, self.act = layer(MODEL, width * HIDDEN), layer(HIDDEN, OUTPUT), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def silu_of_chunk(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)[0], x[..., HIDDEN:]
    return F.silu(gate) * up


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


WRITTEN = {
    "gelu_module": (nn.Linear, nn.GELU(), 1),
    "new_gelu": (nn.Linear, new_gelu, 1),
    "glu_module": (nn.Linear, nn.GLU(), 2),
    "chunk": (nn.Linear, silu_of_chunk, 2),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_ffn_without_recorded_shapes_is_rewritten(name: str) -> None:
    """What symbolic_trace leaves: the shapes of parameters alone."""
    torch.manual_seed(20210613)
    dense = Written(*WRITTEN[name])
    model, report, text = SymbolicTrace(dense).rewrite(ffn_k="all")
    assert [site.rewritten for site in report] == [True]
    assert "topk_fx.ffn(" in text
    assert_same(model(tensors()["x"]), dense(tensors()["x"]))


def test_size_that_is_read_off_the_hidden_units_keeps_them() -> None:
    """symbolic_trace arranges the tokens of a Conv1D by the size of its input, and that is the activation."""
    _, report, text = SymbolicTrace(Written(Conv1D, new_gelu)).rewrite(ffn_k="all")
    assert [site.reason for site in report] == ["hidden_used_elsewhere"]
    assert "topk_fx" not in text


def test_number_known_only_at_run_time_is_in_no_activation() -> None:
    def model(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
        hidden = F.linear(x, up)
        return F.linear(hidden * torch.sigmoid(slope * hidden), down)

    inputs = (*inputs_of(model_of_two_layers), 1.0)
    _, report, _ = DynamoTrace(model, inputs, dynamic=True).rewrite(ffn_k="all")
    assert [site.reason for site in report] == ["unknown_activation"]


def model_of_two_layers(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)), down)


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


def linear_scaled(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(3 * F.linear(x, up) + 1, down)


def gate_of_one_unit(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, up[:1])) * F.linear(x, up), down)


def gate_of_another_token(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The rows are those of one layer, but each meets the gates of all others."""
    return F.linear(F.silu(F.linear(x, gate)).view(6, 1, HIDDEN) * F.linear(x, up).view(6, HIDDEN), down)


def units_moved_between(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)).view(2, HIDDEN, 3).transpose(1, 2), down)


def weight_computed(x: Tensor, up_stored: Tensor, down_stored: Tensor) -> Tensor:
    return F.relu(x @ up_stored.softmax(0)) @ down_stored


def relu_attention(x: Tensor) -> Tensor:
    return F.relu(x @ x.transpose(-2, -1)) @ x


def softmax_between(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up).softmax(-1) * F.linear(x, up), down)


LOOK_ALIKES = [
    activation_of_input, norm_before_down, residual_before_down, gate_of_another_input, linear_scaled, gate_of_one_unit,
    gate_of_another_token, units_moved_between, weight_computed, relu_attention, softmax_between,
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


def three_layers_of_viewed_tokens(x: Tensor, up: Tensor, square: Tensor, down: Tensor) -> Tensor:
    """What lies between the layers arranges the tokens anew."""
    hidden = F.linear(F.relu(F.linear(x, up)), square).flatten(0, 1)
    return F.linear(F.dropout(F.gelu(hidden), 0.5, training=False), down).unflatten(0, x.shape[:2])


REGIONS = [
    units_quantised, three_layers, three_layers_of_viewed_tokens, ffn_of_ffn, gate_of_ffn, query_from_ffn,
]  # fmt: skip


@pytest.mark.parametrize("model", REGIONS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("tracer", TRACERS)
def test_adjoining_regions_compute_what_dense_computes(model: Callable[..., Tensor], tracer: str) -> None:
    """Whichever of them are rewritten, the result with everything kept is that of the model."""
    available = {**tensors(), "square": torch.randn(HIDDEN, HIDDEN), "back": torch.randn(MODEL, HIDDEN)}
    inputs = tuple(available[name] for name in inspect.signature(model).parameters)
    rewritten, report, _ = TRACERS[tracer](model, inputs).rewrite(k="all")
    assert_same(rewritten(*inputs), model(*inputs))
    assert bool(report.rewritten) == (model is not units_quantised)
    if model is three_layers:
        assert [site.reason for site in report] == ["", ""]


def einsum_of_matrices(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("btf,df->btd", F.relu(torch.einsum("...d,df->...f", x, up.T)), down)


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
def test_layers_written_as_einsums_are_rewritten(tracer: str) -> None:
    inputs = inputs_of(einsum_of_matrices)
    for k in ("all", K):
        rewritten, report, _ = TRACERS[tracer](einsum_of_matrices, inputs).rewrite(ffn_k=k)
        assert [site.rewritten for site in report] == [True]
        assert_same(rewritten(*inputs), reference.ffn(*inputs, k=k))


@pytest.mark.parametrize("tracer", TRACERS)
def test_layers_of_three_keep_units_twice(tracer: str) -> None:
    """The second FFN begins at what the first puts out: its hidden units are activated, and no layer is left to them."""
    x, up, down = (tensors()[name] for name in ("x", "up", "down"))
    inputs = [y.clone().requires_grad_() for y in (x, up, drawn(HIDDEN, HIDDEN), down)]
    rewritten, report, text = TRACERS[tracer](three_layers, inputs).rewrite(ffn_k=K)
    assert [site.rewritten for site in report] == [True, True]
    assert "linear" not in text

    def expected(x: Tensor, up: Tensor, square: Tensor, down: Tensor) -> Tensor:
        return reference.ffn(reference.ffn(x, up, square, k=K), None, down, k=K)

    assert_same(values_and_gradients(rewritten, inputs), values_and_gradients(expected, inputs))


def test_kernel_that_starts_at_an_up_projection_leaves_the_second_of_three_layers_dense() -> None:
    x, up, down = (tensors()[name] for name in ("x", "up", "down"))
    inputs = (x, up, drawn(HIDDEN, HIDDEN), down)
    rewritten, report, _ = DynamoTrace(three_layers, inputs).rewrite(k="all", lowering="cpu")
    assert [site.reason for site in report] == ["", "layer_in_two_ffns"]
    assert_same(rewritten(*inputs), three_layers(*inputs))


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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = Modules(gated=True), nn.Linear(OUTPUT, OUTPUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x))


@pytest.mark.parametrize("tracer", TRACERS)
def test_ffn_stands_in_the_module_that_owns_its_layers(tracer: str) -> None:
    trace = TRACERS[tracer](Block().eval(), (tensors()["x"],))
    for sites, outcome in (({"*mlp": {"ffn_k": 2}}, ""), ({"*mlp": False}, "disabled_by_config")):
        _, report, _ = trace.rewrite(ffn_k=K, sites=sites)
        assert [(site.where, site.reason) for site in report] == [("mlp", outcome)]


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("limit", [1e-3, 7.0, 6000.0])
def test_activation_cut_off_is_not_taken_for_the_whole(tracer: str, limit: float) -> None:
    def model(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, up)).clamp(max=limit), down)

    _, report, text = TRACERS[tracer](model, inputs_of(model)).rewrite(ffn_k="all")
    assert [site.reason for site in report] == ["unknown_activation"]
    assert "topk_fx" not in text


@pytest.mark.parametrize("module", [nn.ReLU6(inplace=True), nn.Hardswish(), nn.ELU(), nn.Tanh(), nn.Mish()])
def test_activation_module_without_an_op_is_refused(module: nn.Module) -> None:
    _, report, _ = SymbolicTrace(Written(nn.Linear, module)).rewrite(ffn_k="all")
    assert [site.reason for site in report] == ["unknown_activation"]


def test_part_written_in_place_is_seen_by_what_reads_it_later() -> None:
    """The gate is cut out of the layer twice, and the second time after it was activated."""

    def model(x: Tensor, fused: Tensor, down: Tensor) -> Tensor:
        both = F.linear(x, fused)
        F.silu(both[..., :HIDDEN], inplace=True)
        return F.linear(both[..., :HIDDEN] * both[..., HIDDEN:], down)

    inputs = inputs_of(model)
    rewritten, _, _ = DynamoTrace(model, inputs).rewrite(ffn_k="all")
    assert_same(rewritten(*inputs), model(*inputs))
