"""The ATen lowering of the FFN: chunks of tokens, memory, and what reaches the backward."""

from __future__ import annotations

import pytest
import torch
from inputs import LargestTensor, assert_near, integers
from topk_fx.lowering import aten
from topk_fx.lowering.aten import ffn as module

from topk_fx.activation import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

TOKENS, MODEL, HIDDEN, OUTPUT, KEPT = 512, 4, 64, 4, 3
BUDGET = 2048
"""Elements of a chunk: 32 tokens, and no less than input, weights or output have."""


def forward_args(tokens=TOKENS, gated=True, dtype=torch.float32, dropout_p=0.0, activation="relu"):
    """Arguments of ffn_forward by name."""
    return {
        "input": integers(tokens, MODEL, dtype=dtype),
        "up_weight": integers(HIDDEN, MODEL, dtype=dtype),
        "up_bias": integers(HIDDEN, dtype=dtype),
        "gate_weight": integers(HIDDEN, MODEL, dtype=dtype) if gated else None,
        "gate_bias": integers(HIDDEN, dtype=dtype) if gated else None,
        "down_weight": torch.randn(OUTPUT, HIDDEN).to(dtype),
        "activation": activation,
        "k": KEPT,
        "dropout_keep": torch.rand(tokens, KEPT) < 0.5 if dropout_p else None,
        "dropout_p": dropout_p,
    }


def backward(args, grad, indices, up, gate):
    names = ("input", "up_weight", "gate_weight", "down_weight")
    given = {name: args[name] for name in (*names, "dropout_keep", "activation", "dropout_p")}
    return aten.ffn_backward(grad, indices=indices, up=up, gate=gate, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_tensor_is_larger_than_the_budget(gated, dtype, monkeypatch):
    monkeypatch.setattr(module, "HIDDEN_BUDGET", BUDGET)
    args = forward_args(gated=gated, dtype=dtype)
    with LargestTensor() as largest:
        output, *saved = aten.ffn_forward(**args)
    assert largest.numel == BUDGET, largest.op
    with LargestTensor() as largest:
        backward(args, output, *saved)
    assert largest.numel == BUDGET, largest.op


@pytest.mark.parametrize("tokens_a_chunk", [0, 1, 4, 9, 100])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_chunk_size_does_not_change_the_result(gated, dropout_p, tokens_a_chunk, monkeypatch):
    args = forward_args(tokens=9, gated=gated, dropout_p=dropout_p)
    grad = torch.randn(9, OUTPUT)

    def run():
        output, indices, up, gate = aten.ffn_forward(**args)
        order = indices.argsort(-1)
        kept = (x.gather(-1, order) if x.numel() else x for x in (up, gate))
        return output, *kept, *backward(args, grad, indices, up, gate), indices.gather(-1, order)

    *expected, expected_indices = run()
    monkeypatch.setattr(module, "HIDDEN_BUDGET", tokens_a_chunk * HIDDEN)
    *actual, indices = run()
    assert indices.equal(expected_indices)
    for x, y in zip(actual, expected, strict=True):
        assert_near(x, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_needs_only_what_was_kept(activation):
    """Pre-activations of the kept units, k a token, give the gradient that the dense FFN has there."""
    args = forward_args(tokens=9, activation=activation, dtype=torch.float64)
    output, indices, up, gate = aten.ffn_forward(**args)
    assert indices.shape == up.shape == gate.shape == (9, KEPT)
    leaves = {name: x.clone().requires_grad_() for name, x in args.items() if isinstance(x, torch.Tensor)}
    dense_up = torch.nn.functional.linear(leaves["input"], leaves["up_weight"], leaves["up_bias"])
    dense_gate = torch.nn.functional.linear(leaves["input"], leaves["gate_weight"], leaves["gate_bias"])
    hidden = ACTIVATIONS[activation].function(dense_gate) * dense_up
    kept = torch.zeros_like(hidden, dtype=torch.bool).scatter(-1, indices.long(), True)
    expected = torch.where(kept, hidden, 0) @ leaves["down_weight"].T
    assert_near(output, expected)
    grad = torch.randn_like(output)
    names = ("input", "up_weight", "up_bias", "gate_weight", "gate_bias", "down_weight")
    wanted = torch.autograd.grad(expected, [leaves[name] for name in names], grad)
    for actual, expected_grad in zip(backward(args, grad, indices, up, gate), wanted, strict=True):
        assert_near(actual, expected_grad)


def test_plain_ffn_has_empty_gate_results():
    args = forward_args(tokens=9, gated=False)
    output, indices, up, gate = aten.ffn_forward(**args)
    assert gate.shape == (9, 0)
    _, _, _, gate_weight, gate_bias, _ = backward(args, output, indices, up, gate)
    assert gate_weight.numel() == gate_bias.numel() == 0
