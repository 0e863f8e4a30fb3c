"""Hard cases for the Triton kernels, small for the interpreter and large for a GPU, and what they must agree with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable

import numpy
import torch
from topk_fx.lowering import aten, triton
from topk_fx.lowering.triton import availability
from torch import Tensor

INF = math.inf
CAUSAL_WINDOW = "keep(and(le(j, i), gt(j, sub(i, 9))), -inf)"


def why_not_interpreted() -> str:
    """Why Triton's interpreter cannot run the kernels here, or ""."""
    if not availability.is_interpreted():
        return "TRITON_INTERPRET is not 1"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(map(int, version.split(".")[:2])) < (3, 7) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        return f"the interpreter of triton {version} needs numpy < 2.4"
    return ""


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention. Lengths are for the interpreter; on a GPU they are `factor` times as long, and k too.

    operands: (batch, heads, queries, keys, generator) -> the operands. data: "normal", "integers" (which tie), "zeros".
    """

    name: str
    score: str = ""
    operands: Callable[..., list[Tensor]] = lambda *_: []
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    queries: int = 18
    keys: int = 45
    depth: int = 16
    value_size: int = 16
    k: int = 5
    dtype: torch.dtype = torch.float32
    data: str = "normal"
    scale: float = 0.25
    zero_empty_rows: bool = False
    dropout_p: float = 0.0
    permuted: bool = False
    factor: int = 20

    def __str__(self) -> str:
        return self.name


def boolean_mask(*shape: str) -> Callable[..., list[Tensor]]:
    def make(sizes: dict[str, int], generator: torch.Generator) -> list[Tensor]:
        return [torch.rand([sizes.get(n, 1) for n in shape], generator=generator) > 0.4]

    return make


def bias(*shape: str, dtype: torch.dtype = torch.float32) -> Callable[..., list[Tensor]]:
    def make(sizes: dict[str, int], generator: torch.Generator) -> list[Tensor]:
        return [torch.randn([sizes.get(n, 1) for n in shape], generator=generator).to(dtype)]

    return make


def constant(value: float | bool) -> Callable[..., list[Tensor]]:
    return lambda sizes, generator: [torch.full((1, 1, 1, sizes["k"]), value)]


def partly_infinite(sizes: dict[str, int], generator: torch.Generator) -> list[Tensor]:
    x = torch.zeros(1, 1, 1, sizes["k"])
    x[..., 3], x[..., 5] = INF, -INF
    return [x]


CASES = [
    Case("grouped heads, ragged tiles", heads=4, key_heads=2, k=7),
    Case("causal", "causal", queries=40, keys=40),
    Case("causal, more keys than queries", "causal", queries=20, keys=70, batch=2),
    Case("causal, more queries than keys", "causal", queries=50, keys=20),
    Case("ties", data="integers", keys=70),
    Case("causal ties", "causal", data="integers", queries=40, keys=40),
    Case("all scores equal", data="zeros", keys=300, queries=17, factor=5),
    Case("negative scale", scale=-1.0),
    Case("fewer keys than k", k=60),
    Case("one key", keys=1, factor=1),
    Case("odd head sizes", depth=5, value_size=9),
    Case("boolean mask", "mask($0)", boolean_mask("1", "1", "q", "k")),
    Case("boolean mask for heads", "mask($0)", boolean_mask("b", "h", "1", "k"), batch=2, heads=2, key_heads=2, queries=17),
    Case("rows without keys, NaN", "mask($0)", constant(False), queries=17),
    Case("rows without keys, zero", "mask($0)", constant(False), queries=17, zero_empty_rows=True),
    Case("rows of added -inf", "add($0)", constant(-INF), queries=17),
    Case("infinite biases", "add($0)", partly_infinite, queries=17),
    Case("causal and padding", "keep(and(le(j, i), $0), -inf)", boolean_mask("1", "1", "1", "k"), queries=40, keys=40),
    Case("window", CAUSAL_WINDOW, queries=40, keys=40, k=12, factor=10),
    Case("bias", "add($0)", bias("1", "h", "q", "k"), heads=2, key_heads=1, queries=17),
    Case("bfloat16 bias", "add($0)", bias("b", "1", "q", "1", dtype=torch.bfloat16), batch=2, queries=17),
    Case("soft cap", "div(2.0) tanh mul(2.0) causal", queries=40, keys=40),
    Case("linear bias", "add(mul($0, sub(j, i))) causal", bias("1", "h", "1", "1"), heads=2, key_heads=2, queries=20, keys=40),
    Case("bias of buckets", "add(lookup($0, minimum(abs(sub(i, j)), 7)))", lambda s, g: [torch.randn(1, s["h"], 1, 8, generator=g)]),
    Case("sink", "sink($0)", bias("1", "h", "1", "1"), heads=2, key_heads=2, queries=17),
    Case("head mask", "softmax mul($0)", bias("1", "h", "1", "1"), heads=2, key_heads=2, queries=17),
    Case("dropout", "causal", queries=20, keys=40, dropout_p=0.3),
    Case("permuted layout", permuted=True, heads=4, key_heads=2, queries=17),
    Case("bfloat16", dtype=torch.bfloat16, depth=32),
    Case("float16, causal", "causal", dtype=torch.float16, queries=40, keys=40),
    Case("decode", heads=4, key_heads=2, queries=1, keys=300, factor=20),
    Case("decode, several queries", "causal", heads=4, key_heads=2, queries=3, keys=130, data="integers"),
    Case("decode, all scores equal", queries=2, keys=300, k=40, data="zeros", factor=5),
    Case("decode, masked", "mask($0)", boolean_mask("b", "1", "1", "k"), batch=2, queries=1, keys=200),
    Case("decode, sink", "sink($0)", bias("1", "h", "1", "1"), queries=1, keys=100),
    Case("decode, infinite biases", "add($0)", constant(INF), queries=1, keys=100),
    Case("decode, NaN", "add($0)", constant(math.nan), queries=1, keys=100),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    operands: list[Tensor]
    grad: Tensor
    dropout_keep: Tensor | None
    k: int


def inputs_of(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """The case's tensors; on a GPU longer, and with larger head sizes."""
    factor = 1 if device == "cpu" else case.factor
    generator = torch.Generator().manual_seed(seed)
    keys, k = case.keys * factor, case.k * min(factor, 10)
    queries = case.queries * factor if case.queries > 3 else case.queries
    depth, value_size = (x if device == "cpu" else 4 * x for x in (case.depth, case.value_size))

    def draw(*shape: int) -> Tensor:
        if case.data == "zeros":
            return torch.zeros(shape)
        if case.data == "integers":
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    def tensor(heads: int, length: int, size: int, like: Callable[..., Tensor] = draw) -> Tensor:
        x = like(case.batch, heads, length, size).to(device, case.dtype)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if case.permuted else x

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = {"b": case.batch, "h": case.heads, "q": queries, "k": keys}
    operands = case.operands(sizes, generator) if case.score else []
    keep = None
    if case.dropout_p:
        keep = torch.rand(case.batch, case.heads, queries, min(k, keys), generator=generator) >= case.dropout_p
    return Inputs(
        tensor(case.heads, queries, depth),
        tensor(case.key_heads, keys, depth),
        tensor(case.key_heads, keys, value_size, normal),
        [x.to(device) for x in operands],
        tensor(case.heads, queries, value_size, normal),
        None if keep is None else keep.to(device),
        k,
    )


def check(case: Case, device: str = "cpu", seed: int = 0) -> None:
    """Selection, weights, output and gradients are those of the definition, in float64, NaN where it has NaN."""
    x = inputs_of(case, device, seed)
    inputs = (x.query, x.key, x.value, x.operands)
    why = triton.why_not(*inputs, case.score, x.k)
    assert not why, why
    settings = (case.score, case.scale)
    output, indices, weights = triton.attention_forward(
        *inputs, *settings, x.k, x.dropout_keep, case.dropout_p, case.zero_empty_rows
    )
    assert (output.dtype, indices.dtype, weights.dtype) == (x.value.dtype, torch.int32, torch.float32)
    exact = [_double(t) for t in (x.query, x.key, x.value)]
    exact_operands = [_double(t) for t in x.operands]
    expected, expected_indices, _ = aten.attention_forward(
        *exact, exact_operands, *settings, x.k, None, 0.0, case.zero_empty_rows
    )
    assert indices.sort(-1).values.equal(expected_indices.sort(-1).values), "other keys are kept"
    if x.dropout_keep is None:
        assert_near(output, expected, case.dtype)
    needs_grad = [False] * len(x.operands)
    grads = triton.attention_backward(
        x.grad, *inputs, *settings, indices, weights, case.dropout_p, needs_grad
    )  # fmt: skip
    expected_grads = aten.attention_backward(
        _double(x.grad), *exact, exact_operands, *settings, indices, weights.double(), case.dropout_p, needs_grad
    )
    for grad, like, wanted in zip(grads, (x.query, x.key, x.value), expected_grads, strict=True):
        assert grad.dtype == like.dtype
        assert_near(grad, wanted, case.dtype)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """NaN in the same places, and elsewhere the same up to the rounding of the result and of float32 sums."""
    assert found.isnan().equal(expected.isnan())
    difference = (found.double() - expected).nan_to_num()
    size = expected.nan_to_num().norm() + 1e-12
    assert difference.norm() / size < {torch.float32: 1e-5}.get(dtype, 1e-2)
