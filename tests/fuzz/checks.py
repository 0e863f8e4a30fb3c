"""What must hold of every program: k="all" is the original, a finite k the reference, and what stays dense says why."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from programs import Keeping, Program
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import topk_fx
from topk_fx.backend import topk_backend
from topk_fx.export import copy_graph_module
from topk_fx.testing import graph_text

K = 2
EXACT_TOLERANCE = 1e-9
"""Of float64 results, relative to the largest: roundings of 1e-16, some hundred of them, and cancellation."""
NEAR = 1e-6
"""Scores closer than this may change places by rounding."""


class NotAProgram(Exception):
    """PyTorch itself does not run or trace a program."""


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A traced program after the pass: how to call it and the one before, the report, and both graphs as text."""

    original: Callable[..., Any]
    run: Callable[..., Any]
    report: topk_fx.RewriteReport
    before: str
    after: str
    module: fx.GraphModule
    received: Callable[[], Sequence[Tensor]]


Outcome = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""The floating-point outputs, and the gradient of each floating-point input."""

outcomes: Counter[str] = Counter()
"""How many programs were run, and what became of their sites."""


def check(program: Program) -> None:
    """Runs a program as it is and rewritten, and compares; NotAProgram if PyTorch cannot run it."""
    inputs = program.values()
    with _not_a_program((RuntimeError, IndexError, TypeError, ValueError)):
        expected = outcome(program.model(), inputs)
    with _not_a_program(Exception):
        trace = _TRACERS[program.tracer](program, inputs)
    outcomes["programs"] += 1
    for k in ("all", K):
        rewritten = trace(k)
        check_report(program, rewritten)
        actual = outcome(rewritten.run, inputs)
        if rewritten.report.rewritten and k == "all":
            check_graph(rewritten)
        if k == "all" or not rewritten.report.rewritten:
            outcomes["rewritten" if rewritten.report.rewritten else "dense"] += k == "all"
            compare(program, actual, expected, program.model(), inputs)
        elif not rewritten.report.left_dense and program.coarsest == torch.float64:
            keeping = Keeping(K)
            reference = outcome(program.reference(keeping), inputs)
            # Which keys a row of NaN keeps is not defined, and so not whose gradients are NaN.
            is_defined = all(x.isfinite().all() for x in reference[0])
            if keeping.nearest > NEAR and not program.special and is_defined:
                outcomes["compared at finite k"] += 1
                compare(program, actual, reference, program.reference(Keeping(K)), inputs)
    if program.dynamic:
        check_other_sizes(program, trace("all"))


def check_report(program: Program, rewritten: Rewritten) -> None:
    report = rewritten.report
    assert len(report) >= program.softmaxes, f"{program.softmaxes} candidates, but the report has {len(report)}"
    for site in report.left_dense:
        outcomes[site.reason] += 1
        assert site.reason
        assert site.detail
    if not report.rewritten:
        assert rewritten.before == rewritten.after


def check_graph(rewritten: Rewritten) -> None:
    """The graph is sound, and can be traced again with the op in it."""
    rewritten.module.graph.lint()
    again = make_fx(rewritten.module, tracing_mode="fake", _allow_non_fake_inputs=True)(*rewritten.received())
    ops = [str(node.target) for node in again.graph.nodes if str(node.target).startswith("topk_fx.")]
    assert len(ops) == len(rewritten.report.rewritten)


def check_other_sizes(program: Program, rewritten: Rewritten) -> None:
    """A graph of symbolic sizes computes the same at others, where the one before the pass does."""
    longer = program.values(longer=2)
    try:
        expected = outcome(program.model(), longer)
        compare(program, outcome(rewritten.original, longer), expected, program.model(), longer)
    except (AssertionError, RuntimeError):
        return  # tracing took a size for a number
    outcomes["compared at other sizes"] += 1
    compare(program, outcome(rewritten.run, longer), expected, program.model(), longer)


def outcome(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Outcome:
    arguments = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    result = function(*arguments)
    outputs = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if x.is_floating_point()]
    total = sum((x.double() * _weights(x)).sum() for x in outputs)
    wanted = [x for x in arguments if x.requires_grad]
    if not isinstance(total, Tensor) or not total.requires_grad:
        return tuple(x.detach() for x in outputs), ()
    gradients = torch.autograd.grad(total, wanted, materialize_grads=True)
    return tuple(x.detach() for x in outputs), gradients


def _weights(x: Tensor) -> Tensor:
    return torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape)


def compare(
    program: Program, actual: Outcome, expected: Outcome, model: Callable[..., Any], inputs: Sequence[Tensor]
) -> None:
    """Equal up to rounding. In less than float64 the original's own error against float64 is the measure.

    `model` is what gave `expected` for the inputs.
    """
    values, gradients = actual
    for x, y in zip(values, expected[0], strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
    if program.coarsest == torch.float64:
        _near(values, expected[0], EXACT_TOLERANCE, "value")
        if not program.special:
            given = expected[1]
            if all(x.isfinite().all() for x in expected[0]):
                # Masked keys add 0 times infinity to the gradients of the original, and nothing to those of an op that
                # never keeps them.
                gradients = tuple(torch.where(y.isnan(), y, x) for x, y in zip(gradients, given, strict=True))
            else:
                # Of a row of NaN, the op has gradients of NaN for the keys that it keeps, masked ones not among them. The
                # original has NaN for all; or for one alone, if an exponential without a shift is infinite.
                pairs = list(zip(gradients, given, strict=True))
                gradients = tuple(torch.where(x.isnan() | y.isnan(), torch.nan, x) for x, y in pairs)
                given = tuple(torch.where(x.isnan() | y.isnan(), torch.nan, y) for x, y in pairs)
            try:
                _near(gradients, given, EXACT_TOLERANCE, "gradient")
            except AssertionError:
                noise = _noise(model, inputs, given)
                for x, y, n in zip(gradients, given, noise, strict=True):
                    if not ((x - y).abs() <= 100 * n).all():
                        _near([x], [y], EXACT_TOLERANCE, "gradient")
        return
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = outcome(program.exact(), doubled)
    eps = torch.finfo(program.coarsest).eps
    _no_worse(values, expected[0], exact[0], eps, "value")
    if not program.special:
        _no_worse(gradients, expected[1], exact[1], eps, "gradient")


def _noise(model: Callable[..., Any], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """How much rounding of the inputs changes each gradient at most: much, where numbers near 1e38 cancel out."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.zeros((), dtype=torch.float64) for _ in gradients]
    for _ in range(4):
        rounded = [
            x * (1 + 1e-15 * torch.randn(x.shape, generator=generator, dtype=x.dtype)) if x.is_floating_point() else x
            for x in inputs
        ]
        again = outcome(model, rounded)[1]
        noise = [torch.maximum(n, (x - y).abs().max()) for n, x, y in zip(noise, again, gradients, strict=True)]
    return noise


def _near(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str) -> None:
    for x, y in zip(actual, expected, strict=True):
        finite = y[y.isfinite()].double()
        scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(
            x.double(), y.double(), rtol=0, atol=tolerance * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )


def _no_worse(
    actual: Sequence[Tensor], original: Sequence[Tensor], exact: Sequence[Tensor], eps: float, what: str
) -> None:
    for x, y, z in zip(actual, original, exact, strict=True):
        x, y = x.double(), y.double()
        sound = z.isfinite() & y.isfinite()
        if not sound.any():
            continue
        scale = max(1.0, z[sound].abs().max().item())
        allowed = 4 * (y - z)[sound].abs().max().item() + 16 * eps * scale
        error = (x - z)[sound].abs().max().item()
        assert error <= allowed, f"{what}: off by {error}, the original by {(y - z)[sound].abs().max().item()}"


@contextlib.contextmanager
def _not_a_program(errors: type[Exception] | tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except errors as error:
        raise NotAProgram(f"{type(error).__name__}: {error}") from error


# Traced once, rewritten for each k.


def _rewriting(traced: fx.GraphModule, received: Sequence[Tensor]) -> Callable[[Any], Rewritten]:
    def rewrite(k: Any) -> Rewritten:
        new, report = topk_fx.rewrite(traced, k=k, ffn_k=k)
        return Rewritten(traced, new, report, graph_text(traced), graph_text(new), new, lambda: received)

    return rewrite


def _symbolic(program: Program, inputs: Sequence[Tensor]) -> Callable[[Any], Rewritten]:
    return _rewriting(fx.symbolic_trace(program.model()), inputs)


def _propagated(program: Program, inputs: Sequence[Tensor]) -> Callable[[Any], Rewritten]:
    """The calls that Dynamo records, with fake values as it records them, in a tenth of the time."""
    tracer = fx.Tracer()

    class Torch:
        """torch, with functions that make tensors recorded too."""

        def __getattr__(self, name: str) -> Any:
            function = getattr(torch, name)
            if name not in ("arange", "ones", "zeros", "full", "tensor"):
                return function
            return lambda *args, **kwargs: tracer.create_proxy("call_function", function, args, kwargs)

    model = program.model(torch=Torch())
    traced = fx.GraphModule({}, tracer.trace(model))
    FakeTensorProp(traced, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    return _rewriting(traced, inputs)


def _made(program: Program, inputs: Sequence[Tensor]) -> Callable[[Any], Rewritten]:
    """The calls that torch.export records, likewise."""
    return _rewriting(make_fx(program.model(), tracing_mode="fake", pre_dispatch=True)(*inputs), inputs)


def _exported(program: Program, inputs: Sequence[Tensor]) -> Callable[[Any], Rewritten]:
    model = program.model()

    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return model(*args)

    axes = tuple(dict.fromkeys(found, Dim.AUTO) for found in program.dynamic_axes())
    exported = torch.export.export(Model(), tuple(inputs), dynamic_shapes=(axes,) if program.dynamic else None)

    guards = len(guards_of(exported))

    def rewrite(k: Any) -> Rewritten:
        new, report = topk_fx.rewrite(exported, k=k, ffn_k=k)
        assert len(guards_of(exported)) == guards, f"the pass guards {guards_of(exported)[guards:]}"
        module = new.module()
        return Rewritten(
            exported.module(), module, report, graph_text(exported), graph_text(new), module, lambda: inputs
        )

    return rewrite


def guards_of(exported: ExportedProgram) -> list[Any]:
    """What is assumed of the symbolic sizes of a program."""
    fake: Any = next(node.meta["val"] for node in exported.graph.nodes if "val" in node.meta)
    return fake.fake_mode.shape_env.guards


def _compiled(program: Program, inputs: Sequence[Tensor]) -> Callable[[Any], Rewritten]:
    """By torch.compile, which then calls what the backend gave for the k that was asked for last."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []
    running: list[Callable[..., Any]] = []
    received: list[list[Any]] = []

    def record(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)

        def call(*args: Any) -> Any:
            received.append([x.detach().clone() if isinstance(x, Tensor) else x for x in args])
            return running[-1](*args)

        return call

    arguments = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    for x, axes in zip(arguments, program.dynamic_axes(), strict=True):
        for axis in axes:
            torch._dynamo.maybe_mark_dynamic(x, axis)
    compiled = torch.compile(
        program.model(), backend=record, fullgraph=True, dynamic=None if program.dynamic else False
    )
    running.append(lambda *args: graphs[0](*args))
    compiled(*arguments)
    (graph,) = graphs

    def calling(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            running.append(function)
            result = compiled(*args)
            assert len(graphs) == 1, "traced anew"
            return result

        return run

    def rewrite(k: Any) -> Rewritten:
        copy = copy_graph_module(graph)
        example = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        function = topk_backend(copy, example, options={"k": k, "ffn_k": k, "inner": "eager"})
        report = topk_fx.reports()[-1]
        return Rewritten(
            calling(graph), calling(function), report, graph_text(graph), graph_text(copy), copy, lambda: received[-1]
        )

    return rewrite


_TRACERS = {
    "make_fx": _made,
    "propagated": _propagated,
    "symbolic": _symbolic,
    "export": _exported,
    "dynamo": _compiled,
}
