"""The Triton kernels on a GPU: the definition, races, CUDA graphs, and whole compiled models."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from topk_fx.lowering import aten, triton
from topk_fx.lowering.triton.availability import is_interpreted
from torch import nn
from torch._inductor.utils import run_and_get_code
from triton_cases import CASES, assert_near, check, inputs_of

import topk_fx

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(is_interpreted(), reason="kernels are interpreted: run with TRITON_INTERPRET=0"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_the_definition(case):
    for seed in range(3):
        check(case, "cuda", seed)


@pytest.mark.parametrize("case", CASES[:8:3], ids=str)
def test_repeated_calls_give_the_same_bits(case):
    x = inputs_of(case, "cuda")
    arguments = (x.query, x.key, x.value, x.operands, case.score, case.scale, x.k, None, 0.0, False)
    first = triton.attention_forward(*arguments)
    for _ in range(20):
        assert all(a.equal(b) for a, b in zip(triton.attention_forward(*arguments), first, strict=True))


def test_deterministic_gradients_have_the_same_bits_each_time():
    x = inputs_of(CASES[1], "cuda")
    query = x.query.requires_grad_()

    def gradient():
        output = topk_fx.attention(query, x.key, x.value, k=x.k, is_causal=True)
        return torch.autograd.grad(output, query, x.grad)[0]

    fast = gradient()
    torch.use_deterministic_algorithms(True)
    try:
        ordered = [gradient() for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(g.equal(ordered[0]) for g in ordered)
    torch.testing.assert_close(ordered[0], fast, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """Self-attention with a residual."""

    def __init__(self, heads: int = 4, depth: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(heads * depth, 3 * heads * depth)

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1)
        )
        return x + F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_trains_as_the_dense_one_with_every_key(mode, dtype):
    model = Block().to("cuda", dtype)
    x = torch.randn(2, 700, 256, device="cuda", dtype=dtype)
    expected = torch.autograd.grad(model(x).float().square().sum(), list(model.parameters()))
    options = {"k": "all", "lowering": "triton"} | ({"mode": mode} if mode else {})
    compiled = torch.compile(model, backend="topk", options=options)
    for _ in range(3):  # with CUDA graphs: warm up, record, replay
        found = torch.autograd.grad(compiled(x).float().square().sum(), list(model.parameters()))
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() / b.norm() < tolerance
    assert [site.lowering for site in topk_fx.reports()[-1].sites] == ["triton"]


def test_generated_code_launches_the_kernels():
    model, x = Block().to("cuda"), torch.randn(2, 700, 256, device="cuda")
    compiled = torch.compile(model, backend="topk", options={"k": 20, "lowering": "triton"})
    _, parts = run_and_get_code(lambda: compiled(x).square().sum().backward())
    code = "\n".join(parts)
    assert all(re.search(rf"topk_fx_{name}_\d+\.run\(", code) for name in ("group_maxima", "attend", "gradients"))
    assert not re.search(r"torch\.ops\.topk_fx\.\w+\.default\(", code)


def test_package_of_aot_inductor_computes_what_the_program_does(tmp_path):
    model, x = Block().to("cuda").eval(), torch.randn(2, 700, 256, device="cuda")
    program, report = topk_fx.rewrite(torch.export.export(model, (x,)), k=20, lowering="triton")
    assert [site.lowering for site in report] == ["triton"]
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), program.module()(x))


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "units"), [(1, 32768), (16, 5000), (33, 130)])
def test_ffn_agrees_with_float64(tokens, units, dtype, by_columns):
    """Small integers, whose hidden units are exact and many of them equal."""
    x, up, gate = (
        torch.randint(-3, 4, shape, device="cuda").to(dtype) for shape in ((tokens, 200), (units, 200), (units, 200))
    )
    down = torch.randn(units, 77, device="cuda").to(dtype).T
    down = down if by_columns else down.contiguous()
    arguments = (x, up, None, gate, None, down, "relu", units // 10, None, 0.0)
    output, indices, *pre_activations = triton.ffn_forward(*arguments)
    exact = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
    expected, expected_indices, *_ = aten.ffn_forward(*exact)
    assert indices.equal(expected_indices.sort(-1).values)
    assert_near(output, expected, dtype)
    grad = torch.randn_like(output)
    found = triton.ffn_backward(grad, x, up, gate, down, indices, *pre_activations, None, "relu", 0.0)
    wanted = aten.ffn_backward(
        grad.double(), *(t.double() for t in (x, up, gate, down)), indices, *(t.double() for t in pre_activations),
        None, "relu", 0.0,
    )  # fmt: skip
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, dtype)


def test_memory_does_not_grow_with_the_square_of_the_length():
    rises = []
    for length in (8192, 16384):
        query, key, value = (torch.randn(1, 2, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        topk_fx.attention(query, key, value, k=64, is_causal=True)
        rises.append(torch.cuda.max_memory_allocated() - before)
    assert rises[1] < 2.8 * rises[0]  # marks take a bit for each query and key
