"""What tests of the passes share: the ways to trace a model, and the dense model in which a softmax keeps k keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

import topk_fx
from topk_fx.testing import graph_text

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""By the coarsest dtype that a model computes in: sums of some tens of terms of order one, each rounded once."""


def assert_same(actual: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    """Equal up to the rounding of `dtype`; NaN equals NaN."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def drawn(*shape: int, seed: int = 20210613) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
_SDPA = F.scaled_dot_product_attention


class KeepingTopK(TorchFunctionMode):
    """Runs eager code with softmax as reference.topk_softmax, and SDPA as reference.attention."""

    def __init__(self, k: topk_fx.config.Keep) -> None:
        super().__init__()
        self.k = k

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAXES:
            return self._softmax(func, *args, **kwargs)
        if func is _SDPA:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
            return topk_fx.reference.attention(**dict(zip(names, args, strict=False)), **kwargs, k=self.k)
        if func is F.multi_head_attention_forward:  # a mode does not see what its own call of a function calls
            with (
                mock.patch.object(F, "softmax", self._seen(F.softmax)),
                mock.patch.object(F, "scaled_dot_product_attention", self._seen(_SDPA)),
            ):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _seen(self, func: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.__torch_function__(func, (), args, kwargs)

    def _softmax(self, func: Any, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(_SOFTMAXES[0]).bind(scores, *args[:1], **kwargs)
        dim, dtype = bound.arguments["dim"], bound.arguments.get("dtype")
        kept = topk_fx.reference.topk_softmax(scores.transpose(dim, -1), self.k).transpose(dim, -1)
        return kept.to(scores.dtype if dtype is None else dtype)


def leaves(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Copies of the inputs, floating ones as leaves that require gradients."""
    return tuple(
        x.detach().clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs
    )


def values_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradient of each floating input (0 if unused) for a fixed, uneven gradient of the output."""
    arguments = leaves(inputs)
    output = function(*arguments)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    return output.detach(), list(torch.autograd.grad(output, wanted, weights, materialize_grads=True))


class Calling(nn.Module):
    """A function as a module: what torch.export takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Trace:
    """A model traced once, to be rewritten in several ways."""

    program: fx.GraphModule | ExportedProgram

    @property
    def text(self) -> str:
        return graph_text(self.program)

    def rewrite(self, validate: Any = True, **options: Any) -> tuple[Callable[..., Any], topk_fx.RewriteReport, str]:
        """The rewritten model, to be called as the model is, the report and the text of its graph."""
        program, report = topk_fx.rewrite(self.program, validate=validate, **options)
        return self.callable(program), report, graph_text(program)

    def callable(self, program: Any) -> Callable[..., Any]:
        return program.module() if isinstance(program, ExportedProgram) else program


class DynamoTrace(Trace):
    """Traced by torch.compile, which calls whatever was rewritten last."""

    def __init__(self, model: Callable[..., Any], inputs: Sequence[Any], **options: Any) -> None:
        torch._dynamo.reset()
        self.graphs: list[fx.GraphModule] = []
        self.compiled = torch.compile(model, backend=self._record, fullgraph=True, **options)
        self.running: Callable[..., Any] | None = None
        self.compiled(*inputs)
        (self.program,) = self.graphs

    def _record(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return lambda *args: (self.running or graph)(*args)

    def callable(self, program: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.running = program
            result = self.compiled(*args)
            assert len(self.graphs) == 1, "a call was traced anew, and so ran the dense graph"
            return result

        return run


class ExportTrace(Trace):
    def __init__(self, model: Callable[..., Any], inputs: Sequence[Any], **options: Any) -> None:
        module = model if isinstance(model, nn.Module) else Calling(model)
        self.program = torch.export.export(module, tuple(inputs), **options)


class StrictExportTrace(ExportTrace):
    def __init__(self, model: Callable[..., Any], inputs: Sequence[Any]) -> None:
        super().__init__(model, inputs, strict=True)


class DecomposedExportTrace(ExportTrace):
    """Core ATen: products are bmm of joined batches, and SDPA is a softmax whose empty rows are filled."""

    def __init__(self, model: Callable[..., Any], inputs: Sequence[Any]) -> None:
        super().__init__(model, inputs)
        self.program = self.program.run_decompositions()


class SymbolicTrace(Trace):
    """Traced by torch.fx.symbolic_trace, which records no shapes."""

    def __init__(self, model: Callable[..., Any], inputs: Sequence[Any] = ()) -> None:
        self.program = fx.symbolic_trace(model)


TRACERS = {"dynamo": DynamoTrace, "export": ExportTrace, "strict_export": StrictExportTrace}
"""The tracers that record shapes."""
