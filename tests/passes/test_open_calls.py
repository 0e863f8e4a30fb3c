"""Attention inside one call: F.multi_head_attention_forward, and the kernel of nn.TransformerEncoderLayer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from models import DynamoTrace, KeepingTopK, assert_same, drawn, leaves
from topk_fx.passes import open_calls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import topk_fx
from topk_fx.testing import graph_text

needs_fake_kernel = pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="Dynamo of torch 2.11 does not trace the kernel, which has no fake there"
)
B, L, S, E, H = 2, 7, 9, 8, 2
QUERY, MEMORY = drawn(B, L, E, seed=1), drawn(B, S, E, seed=2)
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.arange(L) >= torch.tensor([[L], [L - 2]])
MEMORY_PADDING = torch.arange(S) >= torch.tensor([[S - 3], [S]])
ADDITIVE = drawn(L, S, seed=3)
OF_HEADS = drawn(B * H, L, S, seed=4)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A model of a layer and its inputs; `sites` of attention and `ffn` in it are rewritten."""

    name: str
    build: Callable[[], nn.Module]
    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...] = (QUERY, MEMORY)
    sites: int = 1
    ffn: int = 0

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        module = self.build()
        for parameter in module.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide a mistake
                nn.init.uniform_(parameter, -0.5, 1.0)
        return module


class Applied(nn.Module):
    """`call` of a module and its inputs, as a module with the parameters of that."""

    def __init__(self, module: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner, self.call = module, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.inner, *inputs)


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(E, H, **{"batch_first": True, **options})


def cross(**options: Any) -> Callable[..., Tensor]:
    return lambda m, q, memory: m(q, memory, memory, **options)[0]


def heads_of_weights(output: Tensor, weights: Tensor) -> Tensor:
    """WavLM: the weights would be returned if anybody asked for them."""
    weights[:, None].broadcast_to((*weights.shape[:1], H, *weights.shape[1:]))
    return output


ATTENTION = [
    Layer("self_attention", attention(), lambda m, x: m(x, x, x)[0], (QUERY,)),
    Layer("self_attention_without_weights", attention(), lambda m, x: m(x, x, x, need_weights=False)[0], (QUERY,)),
    Layer("cross_attention", attention(), cross()),
    Layer("three_inputs", attention(), lambda m, q, k, v: m(q, k, v, need_weights=False)[0], (QUERY, MEMORY, MEMORY + 1)),
    Layer("length_first", attention(batch_first=False), lambda m, q, k: m(q.mT, k.mT, k.mT)[0].mT, (drawn(L, E, B), drawn(S, E, B))),
    Layer("unbatched", attention(), cross(need_weights=False), (QUERY[0], MEMORY[0])),
    Layer("unbatched_with_weights", attention(), cross(), (QUERY[0], MEMORY[0])),
    Layer("weights_made_larger_and_unused", attention(), lambda m, x: heads_of_weights(*m(x, x, x)), (QUERY,)),
    Layer("weights_of_heads_unused", attention(), cross(average_attn_weights=False)),
    Layer("key_padding", attention(), cross(key_padding_mask=MEMORY_PADDING)),
    Layer("key_padding_without_weights", attention(), cross(key_padding_mask=MEMORY_PADDING, need_weights=False)),
    Layer("additive_mask", attention(), cross(attn_mask=ADDITIVE)),
    Layer("mask_of_heads", attention(), cross(attn_mask=OF_HEADS, need_weights=False)),
    Layer("boolean_mask_of_heads", attention(), cross(attn_mask=OF_HEADS > 1)),
    Layer("both_masks", attention(), cross(attn_mask=ADDITIVE, key_padding_mask=torch.zeros(B, S).masked_fill(MEMORY_PADDING, -torch.inf), need_weights=False)),
    Layer("causal", attention(), lambda m, x: m(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0], (QUERY,)),
    Layer("causal_with_weights", attention(), lambda m, x: m(x, x, x, attn_mask=CAUSAL, is_causal=True)[0], (QUERY,)),
    Layer("causal_and_padding", attention(), lambda m, x: m(x, x, x, attn_mask=CAUSAL, key_padding_mask=PADDING, is_causal=True)[0], (QUERY,)),
    Layer("bias_of_keys", attention(add_bias_kv=True), cross(attn_mask=ADDITIVE, key_padding_mask=MEMORY_PADDING.float())),
    Layer("zero_key", attention(add_zero_attn=True), cross(attn_mask=ADDITIVE, need_weights=False)),
    Layer("own_sizes_of_key_and_value", attention(kdim=5, vdim=3), lambda m, q, k, v: m(q, k, v)[0], (QUERY, drawn(B, S, 5), drawn(B, S, 3))),
    Layer("no_biases", attention(bias=False), cross()),
    Layer("three_heads_of_one", lambda: nn.MultiheadAttention(3, 3), lambda m, x: m(x, x, x)[0], (drawn(L, B, 3),)),
]  # fmt: skip


def by_name(layer: Layer) -> str:
    return layer.name


def value_and_all_gradients(model: Callable[..., Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The output, and the gradients of inputs and parameters for a fixed, uneven gradient of the output."""
    arguments = leaves(inputs)
    output = model(*arguments)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    wanted = [*arguments, *module.parameters()]
    return output.detach(), torch.autograd.grad(output, wanted, weights, materialize_grads=True)


def check_attention(layer: Layer, dynamic: bool | None = None) -> None:
    module = layer.module()
    model = Applied(module, layer.call)
    trace = DynamoTrace(model, leaves(layer.inputs), dynamic=dynamic)
    assert "multi_head_attention_forward(" in trace.text
    for k in ("all", 3):
        rewritten, report, text = trace.rewrite(k=k)
        assert [(site.rewritten, site.where.endswith("inner")) for site in report] == [(True, True)]
        assert "softmax" not in text
        assert "multi_head_attention_forward" not in text
        with KeepingTopK(k):
            expected = value_and_all_gradients(model, module, layer.inputs)
        assert_same(value_and_all_gradients(rewritten, module, layer.inputs), expected)


@pytest.mark.parametrize("layer", ATTENTION, ids=by_name)
def test_multi_head_attention_is_rewritten(layer: Layer) -> None:
    check_attention(layer)


SYMBOLIC = ("unbatched", "both_masks", "causal_and_padding", "bias_of_keys", "own_sizes_of_key_and_value")


@pytest.mark.parametrize("layer", [layer for layer in ATTENTION if layer.name in SYMBOLIC], ids=by_name)
def test_multi_head_attention_of_symbolic_sizes_is_rewritten(layer: Layer) -> None:
    check_attention(layer, dynamic=True)


def test_multi_head_attention_compiled_for_symbolic_sizes_serves_them_all() -> None:
    """Without a graph for each: there are two, as there are of the dense model."""
    module = nn.MultiheadAttention(E, H, batch_first=True)
    model = Applied(module, lambda m, x, memory: m(x, memory, memory)[0])
    compiled = torch.compile(model, backend="topk", dynamic=True, options={"k": "all", "inner": "aot_eager"})
    for batch, length in ((2, 7), (3, 5), (4, 12)):
        inputs = drawn(batch, length, E), drawn(batch, length + 2, E)
        assert_same(value_and_all_gradients(compiled, module, inputs), value_and_all_gradients(model, module, inputs))
    assert len(topk_fx.reports()) <= 2
    assert [site.rewritten for report in topk_fx.reports() for site in report] == [True] * len(topk_fx.reports())


def encoder(layers: int = 1, **options: Any) -> Callable[[], nn.Module]:
    options = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": True, **options}
    if layers == 1:
        return lambda: nn.TransformerEncoderLayer(E, H, **options)
    return lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, **options), layers)


def transformer() -> nn.Module:
    return nn.Transformer(E, H, 1, 1, dim_feedforward=12, dropout=0.0, batch_first=True)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 12, dropout=0.0, batch_first=True), 2)


def plain(m: nn.Module, x: Tensor) -> Tensor:
    return m(x)


ENCODERS = [
    Layer("encoder_layer", encoder(), plain, (QUERY,), 1, 1),
    Layer("norm_first_with_gelu", encoder(norm_first=True, activation="gelu"), plain, (QUERY,), 1, 1),
    Layer("padding_of_layer", encoder(), lambda m, x: m(x, src_key_padding_mask=PADDING), (QUERY,), 1, 1),
    Layer("causal_layer", encoder(), lambda m, x: m(x, src_mask=CAUSAL, is_causal=True), (QUERY,), 1, 1),
    Layer("both_masks_of_layer", encoder(), lambda m, x: m(x, src_mask=CAUSAL, src_key_padding_mask=PADDING), (QUERY,), 1, 1),
    Layer("encoder", encoder(2), lambda m, x: m(x, src_key_padding_mask=PADDING), (QUERY,), 2, 2),
    Layer("decoder", decoder, lambda m, x, memory: m(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True), (QUERY, MEMORY), 4, 2),
    Layer("transformer", transformer, lambda m, x, memory: m(memory, x, tgt_mask=CAUSAL, tgt_is_causal=True), (QUERY, MEMORY), 3, 2),
]  # fmt: skip


@pytest.mark.parametrize("layer", ENCODERS, ids=by_name)
def test_transformer_in_training_is_rewritten(layer: Layer) -> None:
    module = layer.module()
    model = Applied(module, layer.call)
    trace = DynamoTrace(model, leaves(layer.inputs))
    for k in ("all", 3):
        rewritten, report, _ = trace.rewrite(k=k, ffn_k="all")
        counts = [sum(site.kind == kind for site in report.rewritten) for kind in ("attention", "ffn")]
        assert (counts, len(report)) == ([layer.sites, layer.ffn], layer.sites + layer.ffn)
        with KeepingTopK(k):
            expected = value_and_all_gradients(model, module, layer.inputs)
        assert_same(value_and_all_gradients(rewritten, module, layer.inputs), expected)


@needs_fake_kernel
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layer", ENCODERS, ids=by_name)
def test_transformer_without_gradients_is_rewritten(layer: Layer, dynamic: bool | None) -> None:
    """Where no gradient is needed, an encoder layer is one call of a kernel.

    Eager, nn.TransformerEncoder then makes the rows of padding 0; compiled it does not, with any backend.
    """
    module = layer.module().eval()
    model = Applied(module, layer.call)
    options = {"k": "all", "inner": "eager"}
    with torch.no_grad():
        expected = torch.compile(model, backend="eager", dynamic=dynamic)(*layer.inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="topk", dynamic=dynamic, fullgraph=True, options=options)
        assert_same(compiled(*layer.inputs), expected)
    (report,) = topk_fx.reports()
    counts = [sum(site.kind == kind for site in report.rewritten) for kind in ("attention", "ffn")]
    assert (counts, len(report)) == ([layer.sites, layer.ffn], layer.sites + layer.ffn)


@needs_fake_kernel
def test_sites_of_an_encoder_layer_have_the_same_paths_with_and_without_gradients() -> None:
    model = Applied(encoder(2)(), plain)

    def paths() -> list[str]:
        return [site.where for site in topk_fx.explain(model, (QUERY,), k=3, ffn_k=3)]

    trained = paths()
    expected = ["layers.0.self_attn", "layers.0", "layers.1.self_attn", "layers.1"]
    assert [path.split("inner.")[1] for path in trained] == expected
    model.eval()
    with torch.no_grad():
        assert paths() == trained


@needs_fake_kernel
def test_kernel_in_a_strict_export_is_opened() -> None:
    module = encoder(2)().eval()
    with torch.no_grad():
        program = torch.export.export(module, (QUERY,), strict=True)
        new, report = topk_fx.rewrite(program, k="all", sites={"layers.?": False})
        reasons = {site.where: site.reason for site in report}
        assert reasons == {
            **{f"layers.{n}.self_attn": "" for n in (0, 1)},
            **{f"layers.{n}": "disabled_by_config" for n in (0, 1)},
        }
        new.validate()
        assert_same(new.module()(QUERY), module(QUERY))
        assert_same(new.run_decompositions().module()(QUERY), module(QUERY))


def native(q: Tensor, k: Tensor, v: Tensor, *layers: Tensor, **options: Any) -> Tensor:
    return torch._native_multi_head_attention(q, k, v, E, H, *layers, **options)[0]


def test_kernel_of_multi_head_attention_is_opened() -> None:
    layers = drawn(3 * E, E), drawn(3 * E), drawn(E, E), drawn(E)
    mask = drawn(B, H, S, S) > 1
    for inputs, options in (
        ((QUERY, QUERY, QUERY, *layers), {"need_weights": False}),
        ((MEMORY, MEMORY + 1, MEMORY + 1, *layers), {"mask": MEMORY_PADDING, "mask_type": 1}),
        ((MEMORY, MEMORY + 1, MEMORY + 2, *layers), {"mask": mask, "mask_type": 2}),
    ):
        with torch.no_grad():
            rewritten, report, text = DynamoTrace(lambda *x, options=options: native(*x, **options), inputs).rewrite(
                k="all"
            )
            assert [site.rewritten for site in report] == [True]
            assert "_native" not in text
            assert_same(rewritten(*inputs), native(*inputs, **options))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_inside_is_that_of_the_op(need_weights: bool) -> None:
    """With V = 1 and an output projection that is the identity, what is left of the weights sums to their output."""
    module = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight[-E:].zero_()
        module.in_proj_bias[-E:].fill_(1.0)
        module.out_proj.weight.copy_(torch.eye(E))
    x = drawn(64, 16, E)
    trace = DynamoTrace(Applied(module, lambda m, x: m(x, x, x, need_weights=need_weights)[0]), (x,))
    rewritten, report, text = trace.rewrite(k="all")
    assert [site.rewritten for site in report] == [True]
    assert "0.5)" in text or "0.5, zero_empty_rows=True)" in text
    output = rewritten(x).detach()
    assert abs(output.mean() - 1) < 0.05
    assert output.std() > 0.1
    module.eval()
    rewritten, _, _ = DynamoTrace(Applied(module, lambda m, x: m(x, x, x, need_weights=need_weights)[0]), (x,)).rewrite(
        k="all"
    )
    assert_same(rewritten(x).detach(), torch.ones_like(x))


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["in_region", "in_body"])
def test_call_under_autocast_is_opened_in_its_dtype(is_checkpointed: bool) -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True)

    def attend(x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=False)[0]

    def model(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(attend, x, use_reentrant=False) if is_checkpointed else attend(x)

    trace = DynamoTrace(model, leaves((QUERY,)))
    rewritten, report, _ = trace.rewrite(k="all")
    assert [(site.rewritten, site.reason) for site in report] == [(True, "")]
    actual, expected = (
        value_and_all_gradients(rewritten, module, (QUERY,)),
        value_and_all_gradients(model, module, (QUERY,)),
    )
    assert actual[0].dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_call_in_body_of_checkpoint_is_opened() -> None:
    module = encoder()()
    model = Applied(module, lambda m, x: checkpoint(m, x, use_reentrant=False))
    rewritten, report, _ = DynamoTrace(model, leaves((QUERY,))).rewrite(k="all")
    assert [(site.kind, site.rewritten) for site in report] == [("attention", True), ("ffn", True)]
    expected = value_and_all_gradients(model, module, (QUERY,))
    assert_same(value_and_all_gradients(rewritten, module, (QUERY,)), expected)


def test_call_whose_weights_are_used_stays_closed() -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True)
    trace = DynamoTrace(Applied(module, lambda m, x: m(x, x, x)), (QUERY,))
    _, report, text = trace.rewrite(k="all")
    assert [(site.reason, site.node) for site in report] == [
        ("probabilities_used_elsewhere", "multi_head_attention_forward")
    ]
    assert report.sites[0].detail.startswith(
        "inside multi_head_attention_forward: the probabilities softmax are used by"
    )
    assert text == trace.text


@needs_fake_kernel
def test_call_in_which_nothing_is_rewritten_stays_closed() -> None:
    with torch.no_grad():
        trace = DynamoTrace(Applied(encoder()().eval(), plain), (QUERY,))
    _, report, text = trace.rewrite(k=L, ffn_k=12)
    assert [site.reason for site in report] == ["k_covers_all_keys", "k_covers_all_units"]
    assert text == trace.text
    assert "_transformer_encoder_layer_fwd(" in text


def test_call_that_takes_all_results_together_stays_closed() -> None:
    graph = DynamoTrace(Applied(nn.MultiheadAttention(E, H), lambda m, x: m(x, x, x)[0]), (QUERY,)).program.graph
    call = next(node for node in graph.nodes if node.target is F.multi_head_attention_forward)
    with graph.inserting_after(call):
        graph.call_function(str, (call,))
    with pytest.raises(open_calls.OpenError, match="multi_head_attention_forward is one call, and str_1 takes all"):
        open_calls.open_call(call)


def test_opened_call_that_is_closed_leaves_the_graph_as_it_was() -> None:
    trace = DynamoTrace(Applied(nn.MultiheadAttention(E, H), lambda m, x: m(x, x, x)[0]), (QUERY,))
    call = next(node for node in trace.program.graph.nodes if node.target is F.multi_head_attention_forward)
    opened = open_calls.open_call(call)
    assert "aten.bmm" in trace.text
    opened.close()
    trace.program.graph.lint()
    fresh = DynamoTrace(Applied(nn.MultiheadAttention(E, H), lambda m, x: m(x, x, x)[0]), (QUERY,))
    assert graph_text(trace.program) == fresh.text


class TestOpened(TestCase):
    maxDiff = None

    def test_multi_head_attention(self) -> None:
        """From the mask to the op; how the output is joined afterwards differs between versions of torch."""
        module = nn.MultiheadAttention(E, H)
        trace = DynamoTrace(Applied(module, lambda m, x: m(x, x, x, key_padding_mask=PADDING)[0]), (drawn(L, B, E),))
        lines = trace.rewrite(k=3)[2].splitlines()
        first, last = (
            next(n for n, line in enumerate(lines) if line.startswith(name)) for name in ("zeros", "attention")
        )
        self.assertExpectedInline(
            "\n".join(lines[first : last + 1]),
            """\
zeros_like: f32[2, 7] = zeros_like(g_padding_, dtype=torch.float32)
mask: f32[2, 7] = zeros_like.masked_fill_(g_padding_, -inf)
linear: f32[7, 2, 24] = aten.linear(l_inputs_0_, l_self_modules_inner_parameters_in_proj_weight_, l_self_modules_inner_parameters_in_proj_bias_)
unflatten: f32[7, 2, 3, 8] = aten.unflatten.int(linear, -1, [3, 8])
unsqueeze: f32[1, 7, 2, 3, 8] = aten.unsqueeze(unflatten, 0)
transpose: f32[3, 7, 2, 1, 8] = aten.transpose.int(unsqueeze, 0, -2)
squeeze: f32[3, 7, 2, 8] = aten.squeeze.dim(transpose, -2)
contiguous: f32[3, 7, 2, 8] = aten.contiguous(squeeze)
select: f32[7, 2, 8] = aten.select.int(contiguous, 0, 0)
select_1: f32[7, 2, 8] = aten.select.int(contiguous, 0, 1)
select_2: f32[7, 2, 8] = aten.select.int(contiguous, 0, 2)
view: f32[7, 4, 4] = aten.view(select, [7, 4, 4])
transpose_1: f32[4, 7, 4] = aten.transpose.int(view, 0, 1)
view_1: f32[7, 4, 4] = aten.view(select_1, [7, 4, 4])
transpose_2: f32[4, 7, 4] = aten.transpose.int(view_1, 0, 1)
view_2: f32[7, 4, 4] = aten.view(select_2, [7, 4, 4])
transpose_3: f32[4, 7, 4] = aten.transpose.int(view_2, 0, 1)
view_3: f32[2, 1, 1, 7] = aten.view(mask, [2, 1, 1, 7])
expand: f32[2, 2, 1, 7] = aten.expand(view_3, [-1, 2, -1, -1])
reshape: f32[4, 1, 7] = aten.reshape(expand, [4, 1, 7])
mul: f32[4, 7, 4] = aten.mul.Tensor(transpose_1, 0.5)
attention: f32[4, 7, 4] = topk_fx.attention(mul, transpose_2, transpose_3, [reshape], 'add($0)', 1.0, 3)""",
        )
