"""What is left dense and why: for each reason a model that gives it, whose graph stays as it was."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from models import DynamoTrace, SymbolicTrace, Trace, drawn
from spellings import INF, LK, LQ, B, D, H, tensors
from torch import Tensor, nn

import topk_fx
from topk_fx import passes

SHAPES = {"x": (2, 5, 8), "up": (16, 8), "down": (8, 16), "packed": (24, 8), "packed_bias": (24,), "output": (8, 8)}
LAYERS = {name: drawn(*shape) for name, shape in SHAPES.items()}
LAYERS |= {"experts_up": drawn(4, 8, 16), "experts_down": drawn(4, 16, 8)}
LAYERS["ends"] = torch.tensor([2, 3, 7, 10], dtype=torch.int32)
grouped_mm = torch._grouped_mm
BYTES = torch.ones(LQ, LK, dtype=torch.uint8)
LEARNED, SLOPE = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(1))
NESTED = torch.nested.nested_tensor([drawn(length, H, D) for length in (2, LK)], layout=torch.jagged)


@dataclasses.dataclass(frozen=True)
class Refused:
    """A model that gives `reason`; `symbolic`: if traced by symbolic_trace, which leaves run-time arguments open."""

    reason: str
    model: Callable[..., Any]
    symbolic: bool

    def trace(self) -> Trace:
        if self.symbolic:
            return SymbolicTrace(self.model)
        available = {**tensors(), **LAYERS}
        inputs = [available[name].clone() for name in inspect.signature(self.model).parameters]
        return DynamoTrace(self.model, inputs)

    def refuse(self) -> tuple[Trace, topk_fx.RewriteReport, str]:
        trace = self.trace()
        _, report, text = trace.rewrite(k=3, ffn_k=3)
        return trace, report, text


REFUSED: list[Refused] = []


def refused(reason: str, symbolic: bool = False) -> Callable[[Any], Any]:
    def register(model: Any) -> Any:
        REFUSED.append(Refused(reason, model() if isinstance(model, type) else model, symbolic))
        return model

    return register


# No attention: the softmax is over something else, or no values are weighed.


@refused("not_attention")
def router(x: Tensor, up: Tensor) -> Tensor:
    return F.linear(x, up).sigmoid().softmax(-1)


@refused("not_attention")
def router_over_the_best_experts(x: Tensor, up: Tensor) -> Tensor:
    return F.linear(x, up).topk(3, dim=-1)[0].softmax(-1)


@refused("not_attention")
def dynamic_convolution(x: Tensor, up: Tensor) -> Tensor:
    """ConvBert's: the kernel of each position and head is a softmax of a linear layer."""
    kernel = F.linear(x, up).reshape(-1, 4, 1).softmax(1)
    windows = x.reshape(-1, 2, 1).expand(-1, 2, 4)
    return windows @ kernel


@refused("not_attention")
def attention_pooling_by_one_vector(x: Tensor) -> Tensor:
    return ((x @ x[0, 0]).softmax(-1).unsqueeze(-2) @ x).squeeze(-2)


@refused("not_attention")
def probabilities_squared(k: Tensor) -> Tensor:
    weights = (k @ k.transpose(-2, -1)).softmax(-1)
    return weights @ weights


@refused("softmax_not_over_keys")
def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(1) @ v


@refused("softmax_not_over_keys")
def softmax_over_batch_of_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(0) @ v


@refused("softmax_not_over_keys")
def values_weighed_over_queries(k: Tensor, v: Tensor) -> Tensor:
    """Normalised over one axis, but summed over the other, which is as long."""
    return (k @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ v


@refused("softmax_not_over_keys")
def slot_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalised over the queries."""
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


@refused("product_not_over_keys")
def values_weighed_over_heads(q: Tensor, k: Tensor, v_heads_last: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1).permute(0, 2, 3, 1) @ v_heads_last[:, :1]


@refused("heads_mixed")
def heads_that_talk_before_the_softmax(q: Tensor, k: Tensor, v: Tensor, scale_heads: Tensor) -> Tensor:
    scores = torch.einsum("bhij,hg->bgij", q @ k.transpose(-2, -1), scale_heads[:, :, 0] @ scale_heads[:, :, 0].T)
    return scores.softmax(-1) @ v


@refused("not_attention")
def softmax_over_features_of_a_head(q_heads_last: Tensor, v: Tensor) -> Tensor:
    """As linear attention has it: the axis of the softmax comes out of a view, and no product comes before it."""
    q, k = q_heads_last.flatten(2).unflatten(-1, (H, -1)).transpose(1, 2).chunk(2, -1)
    return q.softmax(-1) @ (k.transpose(-2, -1) @ v[:, :, :LQ])


@refused("softmax_not_read")
def softmax_of_one_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exp = (q @ k.transpose(-2, -1)).exp()
    return exp / (1 + exp.sum(-1, keepdim=True)) @ v


@refused("softmax_not_read")
def exponentials_masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    exp = (q @ k.transpose(-2, -1)).exp() * keep
    return exp / exp.sum(-1, keepdim=True).clamp(min=1e-6) @ v


@refused("softmax_not_read")
def exponentials_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores.exp_()
    scores.div_(scores.sum(-1, keepdim=True))
    return scores @ v


@refused("softmax_dim_unknown")
def softmax_of_implicit_dim(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.transpose(-2, -1)) @ v


@refused("value_is_vector")
def values_are_one_vector(q: Tensor, k: Tensor, bias_keys: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ bias_keys


@refused("einsum_not_a_product")
def einsum_sums_heads(q: Tensor, k: Tensor, v_single: Tensor) -> Tensor:
    return torch.einsum("bhqd,bhkd->bqk", q, k).softmax(-1) @ v_single


@refused("einsum_not_a_product")
def einsum_of_three(q: Tensor, k: Tensor, v: Tensor, bias_keys: Tensor) -> Tensor:
    return torch.einsum("bhqd,bhkd,k->bhqk", q, k, bias_keys).softmax(-1) @ v


@refused("einsum_not_a_product")
def einsum_sums_heads_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bqd", (q @ k.transpose(-2, -1)).softmax(-1), v)


# The scores: something in between that a chunk of queries cannot be given.


@refused("unknown_score_op")
def scores_accumulated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).cumsum(-1).softmax(-1) @ v


@refused("unknown_score_op")
def scores_centred(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return (scores - scores.mean(-1, keepdim=True)).tanh().softmax(-1) @ v


@refused("scores_concatenated")
def scores_of_two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    products = [q @ k[:, :, :4].transpose(-2, -1), q @ k[:, :, 4:].transpose(-2, -1)]
    return torch.cat(products, dim=-1).softmax(-1) @ v


@refused("sink_not_cut_off")
def sink_weighs_a_value(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """The column beside the keys has a row of V."""
    logits = torch.cat([q @ k[:, :, 1:].transpose(-2, -1), sink.view(1, H, 1, 1).expand(B, H, LQ, 1)], dim=-1)
    return logits.softmax(-1) @ v


@refused("result_unused")
def weights_computed_for_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SAM 2 computes its weights, and then calls SDPA."""
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    weights.transpose(1, 2)
    return v + 1


@refused("sink_of_empty_rows")
def sink_as_factor_under_a_mask(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, keep: Tensor) -> Tensor:
    """A row without a key would be NaN, and with a sink beside the scores it would be 0."""
    scores = (q @ k.transpose(-2, -1)).masked_fill(~keep, -INF)
    factor = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink.view(1, H, 1, 1))
    return (scores.softmax(-1) @ v) * factor


@refused("scores_used_elsewhere")
def factor_of_a_sink_used_twice(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1)
    factor = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink.view(1, H, 1, 1))
    return (scores.softmax(-1) @ v) * factor, factor


@refused("scores_used_elsewhere")
def factor_of_a_reversed_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    factor = torch.sigmoid(sink.view(1, H, 1, 1) - scores.logsumexp(-1, keepdim=True))
    return (scores.softmax(-1) @ v) * factor


@refused("scores_sliced")
def scores_of_later_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1))[..., 2:].softmax(-1) @ v[:, :, 2:]


@refused("scores_used_elsewhere")
def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v, scores


@refused("mask_broadcasts_scores")
def mask_adds_heads(q_matrix: Tensor, k_matrix: Tensor, v_matrix: Tensor, bias: Tensor) -> Tensor:
    return (q_matrix @ k_matrix.t() + bias).softmax(-1) @ v_matrix


@refused("cast_not_floating")
def scores_quantised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).to(torch.int32).float().softmax(-1) @ v


@refused("condition_not_boolean", symbolic=True)
def mask_of_bytes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(BYTES, q @ k.transpose(-2, -1), -INF).softmax(-1) @ v


@refused("axes_not_followed")
def softmax_over_joined_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries joined with heads, and parted again."""
    weights = (q @ k.transpose(-2, -1)).view(B, H * LQ, LK).softmax(-1)
    return weights.view(B, H, LQ, LK) @ v


@refused("axes_not_followed", symbolic=True)
def scores_permuted_at_run_time(q: Tensor, k: Tensor, v: Tensor, last: int) -> Tensor:
    return (q @ k.transpose(-2, -1)).permute(0, 1, 2, last).softmax(-1) @ v


@refused("shape_unknown", symbolic=True)
def softmax_over_axis_three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(3) @ v


@refused("scale_not_constant", symbolic=True)
def scaled_by_alpha_at_run_time(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(bias, q, k.transpose(-2, -1), alpha=scale).softmax(-1) @ v


@refused("not_expressible")
def products_of_integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.int() @ k.int().transpose(-2, -1)).float().softmax(-1) @ v


# The probabilities.


@refused("probabilities_used_elsewhere")
def probabilities_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v, weights


@refused("probabilities_used_elsewhere")
def probabilities_alone(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1)


@refused("probabilities_changed")
def probabilities_raised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys that are not kept would count too."""
    return ((q @ k.transpose(-2, -1)).softmax(-1) + 0.1) @ v


@refused("probabilities_changed")
def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return F.conv2d(weights, torch.eye(H).view(H, H, 1, 1)) @ v


@refused("two_dropouts")
def dropped_out_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.1), 0.2) @ v


@refused("dropout_on_scores")
def scores_dropped_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(q @ k.transpose(-2, -1), 0.1).softmax(-1) @ v


@refused("dropout_mode_not_static", symbolic=True)
def dropped_out_by_argument(q: Tensor, k: Tensor, v: Tensor, training: bool) -> Tensor:
    return F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.1, training) @ v


# What happens around it.


@refused("mode_changes_inside")
def gradient_stopped_at_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    with torch.no_grad():
        weights = scores.softmax(-1)
    return weights @ v


@refused("mode_changes_inside")
def autocast_left_for_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = q @ k.transpose(-2, -1)
    return scores.float().softmax(-1) @ v


@refused("mode_changes_inside")
def autocast_switched_off_for_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The op would round the query and key as it rounds the value."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = q * 2
        k = k.transpose(-2, -1)
        with torch.autocast("cpu", enabled=False):
            scores = q @ k
        return scores.softmax(-1) @ v


@refused("inputs_written_between")
def key_written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    k.zero_()
    return weights @ v


@refused("causal_not_static", symbolic=True)
def sdpa_causal_by_argument(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=1.0)


@refused("not_tensors", symbolic=True)
def sdpa_without_values(q: Tensor, k: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention.default(q, k, None)


@refused("nested_tensor", symbolic=True)
def sdpa_of_sequences_of_several_lengths(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, NESTED, NESTED, scale=1.0)


@refused("inside_vmap")
def mapped_over_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v)(q, k, v)


@refused("inside_vmap")
def sdpa_mapped_over_masks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.vmap(lambda bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias))(bias)


@refused("inside_jvp")
def forward_mode_derivative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(lambda q: (q @ k.transpose(-2, -1)).softmax(-1) @ v, (q,), (q,))[1]


@refused("inside_second_derivative")
def gradient_of_a_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def gradient(q: Tensor) -> Tensor:
        return torch.func.grad(lambda q: ((q @ k.transpose(-2, -1)).softmax(-1) @ v).sum())(q)

    return torch.func.grad(lambda q: gradient(q).square().sum())(q)


class _AttentionWithItsGradient(torch.autograd.Function):
    """The gradients of query and value, as they are without top-k."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        k, v = ctx.saved_tensors
        return (grad @ v.transpose(-2, -1)) @ k, None, None


@refused("custom_gradient")
def gradient_written_beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _AttentionWithItsGradient.apply(q * LEARNED, k, v)


@refused("opaque_call", symbolic=True)
def multi_head_attention(x: Tensor, packed: Tensor, packed_bias: Tensor, output: Tensor) -> Tensor:
    return F.multi_head_attention_forward(
        x, x, x, 8, 2, packed, packed_bias, None, None, False, 0.0, output, None, need_weights=False
    )[0]


@refused("opaque_call", symbolic=True)
class CallsAttentionModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


# FFNs.


@refused("hidden_used_elsewhere")
def hidden_units_returned(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    hidden = F.relu(F.linear(x, up))
    return F.linear(hidden, down), hidden


@refused("hidden_not_elementwise")
def hidden_units_normed(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.layer_norm(F.gelu(F.linear(x, up)), up.shape[:1]), down)


@refused("hidden_not_elementwise")
def hidden_units_of_padding_masked(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    keep = x[..., 0] > 0
    return F.linear(F.gelu(F.linear(x, up)) * keep.unsqueeze(-1), down)


@refused("hidden_not_elementwise")
def hidden_units_of_a_learned_slope(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.prelu(F.linear(x, up), SLOPE), down)


@refused("inside_vmap")
def ffn_mapped_over_tokens(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.vmap(lambda x: F.linear(F.relu(F.linear(x, up)), down))(x)


@refused("mixed_dtypes")
def layers_of_two_dtypes(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)).bfloat16(), down.bfloat16())


@refused("mode_changes_inside")
def gradient_stopped_at_hidden(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = F.relu(F.linear(x, up))
    return F.linear(hidden, down)


@refused("inputs_written_between")
def input_written_in_ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.relu(F.linear(x, up))
    x.zero_()
    return F.linear(hidden, down)


@refused("dropout_mode_not_static", symbolic=True)
def hidden_dropped_out_by_argument(x: Tensor, up: Tensor, down: Tensor, training: bool) -> Tensor:
    return F.linear(F.dropout(F.relu(F.linear(x, up)), 0.1, training), down)


@refused("two_dropouts")
def hidden_dropped_out_twice(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.dropout(F.dropout(F.relu(F.linear(x, up)), 0.1), 0.2), down)


@refused("unknown_activation")
def hidden_units_cubed(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)) ** 3, down)


@refused("unknown_activation")
def hidden_units_squared(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up) ** 2, down)


@refused("unknown_activation")
def gate_and_units_clamped(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """gpt-oss."""
    gate, units = F.linear(x, up).chunk(2, -1)
    gate, units = gate.clamp(max=7.0), units.clamp(-7.0, 7.0)
    return F.linear((units + 1) * gate * torch.sigmoid(1.702 * gate), down[:, :8])


@refused("unknown_activation")
def relu_that_drops_nan(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = F.linear(x, up)
    return F.linear(torch.where(hidden > 0, hidden, 0.0), down)


@refused("unknown_activation")
def leaky_relu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.leaky_relu(F.linear(x, up), 1e-3), down)


@refused("unknown_activation")
def relu6(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu6(F.linear(x, up)), down)


@refused("moe_experts")
def experts_batched(x: Tensor, experts_up: Tensor, experts_down: Tensor) -> Tensor:
    tokens = x.view(1, 10, 8).expand(4, 10, 8)
    return torch.bmm(F.silu(torch.bmm(tokens, experts_up)), experts_down)


@refused("moe_experts")
def experts_in_groups(x: Tensor, ends: Tensor, experts_up: Tensor, experts_down: Tensor) -> Tensor:
    gate, units = grouped_mm(x.view(10, 8).bfloat16(), experts_up.bfloat16(), offs=ends).chunk(2, -1)
    return grouped_mm(F.silu(gate) * units, experts_down.bfloat16()[:, :8], offs=ends)


@refused("shape_unknown", symbolic=True)
def weights_are_arguments(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)), down)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: getattr(case.model, "__name__", type(case.model).__name__))
def test_refusal_names_its_reason_and_leaves_the_graph(case: Refused) -> None:
    trace, report, text = case.refuse()
    assert [(site.rewritten, site.reason) for site in report] == [(False, case.reason)]
    assert text == trace.text


FROM_CONFIG = {"disabled_by_config", "k_covers_all_keys", "k_covers_all_units", "dense_is_faster", "ffn_k_not_given",
               "layer_in_two_ffns", "validation_failed"}  # fmt: skip
"""Reasons that a configuration gives: test_judge.py, test_validate.py and test_find_ffn.py have them."""

IN_A_PROCESS_GROUP = "distributed_tensor"
"""test_training.py has it."""

FAULT = "internal_error"
"""Of topk_fx itself: the last test has it."""


def test_every_reason_has_a_model() -> None:
    sources = "".join(path.read_text() for path in Path(passes.__path__[0]).glob("*.py"))
    given = set(re.findall(r"""Refus(?:e|al)\(\s*['"](\w+)['"]""", sources))
    assert given == {case.reason for case in REFUSED} | FROM_CONFIG | {IN_A_PROCESS_GROUP, FAULT}


class TestSentences(TestCase):
    """The sentences for the model's owner, each naming the node."""

    maxDiff = None

    def sentences(self, *models: Callable[..., Any]) -> str:
        cases = [case for case in REFUSED if case.model in models]
        return "\n".join(f"{site.reason}: {site.detail}" for case in cases for site in case.refuse()[1])

    def test_no_attention(self) -> None:
        found = self.sentences(router, softmax_over_heads, slot_attention, softmax_of_implicit_dim, einsum_of_three)
        self.assertExpectedInline(
            found,
            """\
not_attention: no product of query and key leads to softmax: sigmoid (call_method: sigmoid)
softmax_not_over_keys: softmax runs over a batch or head axis of matmul
softmax_not_over_keys: matmul_1 sums over the keys, and the softmax runs over the queries
softmax_dim_unknown: softmax does not say over which dimension it runs
einsum_not_a_product: einsum is not an einsum of two tensors""",
        )

    def test_scores(self) -> None:
        found = self.sentences(
            scores_accumulated, scores_of_later_keys, scores_returned, mask_adds_heads, scores_quantised, mask_of_bytes,
            softmax_over_joined_rows, products_of_integers,
        )  # fmt: skip
        self.assertExpectedInline(
            found,
            """\
unknown_score_op: cumsum (call_method: cumsum) lies between the product and the softmax
scores_sliced: getitem takes a part of the scores
scores_used_elsewhere: matmul_1 is also used by the output
mask_broadcasts_scores: add (call_function: add) enlarges the scores from (7, 9) to (1, 3, 7, 9)
cast_not_floating: to (call_method: to) casts to torch.int32
condition_not_boolean: the mask _tensor_constant0 is not a boolean tensor, but torch.uint8
axes_not_followed: a view from (2, 3, 7, 9) to (2, 21, 9) splits or joins the queries or keys
not_expressible: DTypeError: query has dtype torch.int32; accepted: float64, float32, bfloat16, float16""",
        )

    def test_probabilities(self) -> None:
        found = self.sentences(probabilities_returned, probabilities_alone, probabilities_raised, dropped_out_twice)
        self.assertExpectedInline(
            found,
            """\
probabilities_used_elsewhere: the probabilities weights are used by matmul_1, the output
probabilities_used_elsewhere: the probabilities softmax are used by the output
probabilities_changed: add (call_function: add) changes the probabilities before the product with V
two_dropouts: dropout_1 (call_function: dropout) is a second dropout on the same values""",
        )

    def test_surroundings(self) -> None:
        found = self.sentences(
            gradient_stopped_at_softmax,
            key_written_between,
            sdpa_causal_by_argument,
            multi_head_attention,
            CallsAttentionModule,
        )
        self.assertExpectedInline(
            found,
            """\
mode_changes_inside: grad mode or autocast changes at _set_grad_enabled, inside the attention
inputs_written_between: zero_ (call_method: zero_) writes to an input of the attention inside it
causal_not_static: is_causal of scaled_dot_product_attention is known only at run time
opaque_call: multi_head_attention_forward is one call, and tracing recorded no shapes to open it with: trace the model with torch.export or torch.compile""",
        )

    def test_module_called_as_one(self) -> None:
        (case,) = (case for case in REFUSED if isinstance(case.model, CallsAttentionModule))
        self.assertExpectedInline(
            case.refuse()[1].sites[0].detail,
            """attention calls a module as one: trace it with torch.export or torch.compile, which go inside""",
        )

    def test_ffn(self) -> None:
        found = self.sentences(hidden_units_returned, layers_of_two_dtypes, input_written_in_ffn, weights_are_arguments)
        self.assertExpectedInline(
            found,
            """\
hidden_used_elsewhere: the hidden units hidden are also used by the output
mixed_dtypes: the layers of linear_1 have the dtypes ['torch.bfloat16', 'torch.float32']
inputs_written_between: zero_ (call_method: zero_) writes to an input of the FFN inside it
shape_unknown: a layer of linear_1 has no weight matrix and bias vector""",
        )


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def test_module_that_is_not_traced_is_refused_with_what_to_do() -> None:
    with pytest.raises(topk_fx.errors.UnsupportedProgramError, match=r"program is a Attention; .*torch.export.export"):
        topk_fx.rewrite(Attention(), k=3)


def test_fault_in_reading_a_site_is_told_and_leaves_it_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: Any) -> None:
        raise ZeroDivisionError("a fault")

    program = torch.export.export(Attention(), tuple(drawn(2, 3, 4) for _ in range(3)))
    monkeypatch.setattr(passes.topk, "find_attention", faulty)
    with pytest.warns(topk_fx.errors.InternalErrorWarning, match="stays dense.*ZeroDivisionError: a fault"):
        rewritten, report = topk_fx.rewrite(program, k=2)
    assert [(site.reason, site.detail) for site in report] == [
        ("internal_error", "topk_fx failed in reading it: ZeroDivisionError: a fault")
    ]
    assert str(rewritten.graph) == str(program.graph)
