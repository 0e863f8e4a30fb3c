"""Training through torch.compile(backend="topk"): gradients, checkpoints, autocast, DDP and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import KeepingTopK, assert_same, drawn, values_and_gradients
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import topk_fx

SIZE, HEADS, K = 12, 3, 3


class Layer(nn.Module):
    """Self-attention with a learned bias of heads and keys, and an FFN, each with a residual and a norm."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.bias = nn.Parameter(drawn(HEADS, 1, 9))
        self.up, self.down = nn.Linear(SIZE, 20), nn.Linear(20, SIZE)
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) + self.bias
        weights = self.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype))
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norms[0](x))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    def __init__(self, is_checkpointed: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(**options) for _ in range(2))
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.is_checkpointed else layer(x)
        return x


X = drawn(2, 9, SIZE)


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Of the input and each parameter, of a loss that weighs every output differently; and the output itself."""
    x = X.clone().requires_grad_()
    output = run(x)
    (output.float() * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), "x": x.grad, **found}


def reference_gradients(k: Any = K, **options: Any) -> dict[str, Tensor]:
    model = Model(**options)
    with KeepingTopK(k):
        return gradients(model, model)


def assert_all_rewritten(sites: int) -> None:
    found = [site for report in topk_fx.reports() for site in report if site.kind == "attention"]
    assert [site.reason for site in found] == [""] * sites


@pytest.mark.parametrize("k", [K, 1.0, "all"])
def test_gradients_of_every_parameter_are_the_references(k: Any) -> None:
    model = Model()
    run = torch.compile(model, backend="topk", fullgraph=True, options={"k": k, "inner": "aot_eager"})
    found = gradients(model, run)
    assert len(found) == 2 + len(dict(model.named_parameters()))
    assert_same(found, reference_gradients(k))
    if k != 1.0:  # a share of 1 covers all keys, and stays dense
        assert_all_rewritten(2)


def test_optimizer_takes_the_steps_of_the_reference() -> None:
    def train(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (run(X) - drawn(*X.shape, seed=1)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    model, dense = Model(), Model()
    run = torch.compile(model, backend="topk", options={"k": K, "inner": "aot_eager"})
    losses = train(model, run)
    with KeepingTopK(K):
        expected = train(dense, dense)
    assert_same(losses, expected)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("ffn_k", [None, "all"], ids=["attention", "attention_and_ffn"])
def test_checkpointed_layers_have_the_references_gradients(inner: str, ffn_k: Any) -> None:
    model = Model(is_checkpointed=True)
    run = torch.compile(model, backend="topk", fullgraph=True, options={"k": K, "ffn_k": ffn_k, "inner": inner})
    assert_same(gradients(model, run), reference_gradients())
    assert_all_rewritten(2)


def test_layers_compiled_inside_a_checkpoint_have_the_references_gradients() -> None:
    """The checkpoint is eager and around the compiled layer, which it runs a second time."""
    model = Model()

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    options = {"k": K, "ffn_k": "all", "inner": "eager"}
    layers = [torch.compile(layer, backend="topk", options=options) for layer in model.layers]
    assert_same(gradients(model, run), reference_gradients())


def test_autocast_gives_lower_precision_outputs_and_full_precision_gradients() -> None:
    def run_under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(x)

    model, dense = Model(), Model()
    run: Callable[[Tensor], Tensor] = dense.layers[0].attend
    expected = gradients(dense, run_under_autocast)
    options = {"k": "all", "inner": "aot_eager"}
    run = torch.compile(model.layers[0].attend, backend="topk", fullgraph=True, options=options)
    found = gradients(model, run_under_autocast)
    assert_all_rewritten(1)
    assert found["output"].dtype == torch.bfloat16
    for name, gradient in found.items():
        if gradient is not None and name != "output":
            assert gradient.dtype == torch.float32
    names = [name for name, gradient in expected.items() if gradient is not None]
    assert names == [name for name, gradient in found.items() if gradient is not None]
    scale = {name: expected[name].float().abs().max() for name in names}
    assert_same(
        {name: found[name].float() / scale[name] for name in names},
        {name: expected[name].float() / scale[name] for name in names},
        torch.bfloat16,
    )


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_autocast_of_queries_and_keys_of_two_dtypes_is_rewritten(dtypes: tuple[torch.dtype, ...]) -> None:
    """As of a query that a parameter has scaled and a key that comes from a layer."""
    inputs = [drawn(2, 9, 4, seed=n).to(dtype) for n, dtype in enumerate((*dtypes, torch.float32))]
    run = torch.compile(attend, backend="topk", fullgraph=True, options={"k": "all", "inner": "aot_eager"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (output, gradients), expected = (values_and_gradients(model, inputs) for model in (run, attend))
    assert_all_rewritten(1)
    assert [x.dtype for x in gradients] == [x.dtype for x in inputs]
    assert_same((output, gradients), expected, torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def test_gradient_scaler_and_half_precision_model_train() -> None:
    model = Model().bfloat16()
    run = torch.compile(model, backend="topk", fullgraph=True, options={"k": K, "inner": "aot_eager"})
    output = run(X.bfloat16())
    output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
    assert_all_rewritten(2)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("bucket", ["one_bucket", "bucket_a_layer"])
def test_data_parallel_model_has_the_references_gradients(
    process_group: None, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo splits the graph where DDP's buckets end, and gives the backend each part."""
    if bucket == "bucket_a_layer":
        monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2000)
    model = DistributedDataParallel(Model(), bucket_cap_mb=25 if bucket == "one_bucket" else 0.002)
    run = torch.compile(model, backend="topk", options={"k": K, "inner": "aot_eager"})
    assert_same(gradients(model, run), reference_gradients())
    assert_all_rewritten(2)
    assert (len(topk_fx.reports()) > 1) == (bucket == "bucket_a_layer")


def test_distributed_tensors_stay_dense(process_group: None) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    inputs = [drawn(2, 9, 4, seed=n) for n in range(3)]
    sharded = [distribute_tensor(x, mesh, [Shard(0)]) for x in inputs]
    up, down = (distribute_tensor(drawn(*shape), mesh, [Shard(0)]) for shape in ((16, 4), (4, 16)))

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.linear(F.linear(attend(q, k, v), up).relu(), down)

    run = torch.compile(model, backend="topk", options={"k": K, "ffn_k": 2, "inner": "aot_eager"})
    assert_same(run(*sharded).full_tensor(), model(*sharded).full_tensor())
    assert [s.reason for report in topk_fx.reports() for s in report] == ["distributed_tensor"] * 2


# Dropout. With the identity for values, an attention puts out its weights: what was dropped is 0, the rest is doubled.


def weights_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.5) @ v


def weights_of_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, scale=1.0)


def weights_of_checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(weights_of, q, k, v, use_reentrant=False)


KEYS = 40


@pytest.mark.parametrize(
    ("model", "inner"),
    [
        (weights_of, "aot_eager"),
        (weights_of, "eager"),
        (weights_of_sdpa, "aot_eager"),
        (weights_of_sdpa, "eager"),
        (weights_of_checkpointed, "aot_eager"),  # run eagerly, Dynamo's checkpoint does not restore the generator
    ],
)
def test_dropout_acts_on_kept_probabilities_and_in_the_backward_alike(model: Callable[..., Tensor], inner: str) -> None:
    q, k = drawn(2, 2, 30, 4, seed=1), drawn(2, 2, KEYS, 4, seed=2)
    v = torch.eye(KEYS).expand(2, 2, KEYS, KEYS).clone().requires_grad_()
    run = torch.compile(model, backend="topk", fullgraph=True, options={"k": 10, "inner": inner})
    weights = run(q, k, v)
    assert_all_rewritten(1)
    undropped = topk_fx.reference.topk_softmax(q @ k.transpose(-2, -1), 10)
    is_kept = weights != 0
    assert_same(weights[is_kept], 2 * undropped[is_kept])
    assert 0.4 < is_kept.sum() / (undropped != 0).sum() < 0.6
    assert not torch.equal(run(q, k, v), weights)

    weights.backward(undropped.cos())  # any gradient that differs everywhere
    assert_same(v.grad, weights.detach().transpose(-2, -1) @ undropped.cos())


def test_dropout_is_drawn_from_torchs_generator() -> None:
    inputs = (drawn(2, 30, 4, seed=1), drawn(2, KEYS, 4, seed=2), drawn(2, KEYS, 4, seed=3))
    run = torch.compile(weights_of, backend="topk", options={"k": 10, "inner": "aot_eager"})
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(run(*inputs))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_dropout_compiled_by_inductor_is_that_of_its_backward() -> None:
    q, k = drawn(2, 2, 30, 4, seed=1), drawn(2, 2, KEYS, 4, seed=2)
    v = torch.eye(KEYS).expand(2, 2, KEYS, KEYS).clone().requires_grad_()
    weights = torch.compile(weights_of, backend="topk", fullgraph=True, options={"k": 10})(q, k, v)
    undropped = topk_fx.reference.topk_softmax(q @ k.transpose(-2, -1), 10)
    is_kept = weights != 0
    assert_same(weights[is_kept], 2 * undropped[is_kept])
    weights.backward(undropped.cos())
    assert_same(v.grad, weights.detach().transpose(-2, -1) @ undropped.cos())


# Transforms of torch.func inside what is compiled.


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_functional_gradient_inside_the_compiled_function_is_the_references(inner: str) -> None:
    """Tracing records values of one level of the transform; of views of them, nothing can be made anew."""
    model = Model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    run = torch.compile(torch.func.grad(loss), backend="topk", fullgraph=True, options={"k": K, "inner": inner})
    found = run(parameters, X)
    assert_all_rewritten(2)
    with KeepingTopK(K):
        model(X).square().sum().backward()
    scale = max(p.grad.abs().max() for p in model.parameters())
    for name, p in model.named_parameters():
        assert_same(found[name] / scale, p.grad / scale)


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_functional_gradient_of_a_model_with_parameters_is_an_error_only_in_the_backward(inner: str) -> None:
    """They require gradients, so AOTAutograd traces the second derivative, which may never be asked for."""
    model = Model()

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: model(x).square().sum())(x)

    options = {"k": K, "ffn_k": "all", "inner": inner}
    found = torch.compile(gradient, backend="topk", fullgraph=True, options=options)(X)
    assert_all_rewritten(2)
    with KeepingTopK(K):
        expected = gradient(X)
    scale = expected.detach().abs().max()
    assert_same(found.detach() / scale, expected.detach() / scale)
    with pytest.raises(topk_fx.errors.UnsupportedDerivativeError, match="topk_fx::attention has no second derivative"):
        found.sum().backward()


def test_second_derivative_is_a_clear_error() -> None:
    inputs = [drawn(3, 5, 4, seed=n).requires_grad_() for n in range(3)]
    run = torch.compile(weights_of, backend="topk", options={"k": 2, "inner": "eager"})
    (gradient,) = torch.autograd.grad(run(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(topk_fx.errors.UnsupportedDerivativeError, match="topk_fx::attention has no second derivative"):
        gradient.sum().backward()
