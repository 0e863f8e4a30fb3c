"""Proves a site before it is rewritten: its op, at k = "all", beside the nodes that it would replace, on random inputs.

The site is taken out of its graph (`extract`), and a copy of it is rewritten by the same code as the graph will be.
Both forms then run on the same inputs, forward and backward, and the dense one in float64 too: they agree where the
op is as near to either dense run as rounding explains. Dropout is off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from topk_fx.compat import hint_of, real_tensors

from .dialect import Kind, read
from .emit import EmitError
from .extract import Extract, extract
from .rewrite import rewrite_attention, rewrite_ffn
from .sites import AttentionSite, FFNSite
from .values import attribute_of, shape_of, value_of

MOST_BYTES = 2 * 1024**3
"""What the dense form's tensors may take together in float64, beyond which a site is not validated."""

MOST_ENTRIES_BACKWARD = 2**20
"""Scores or hidden units of a site, beyond which only its forward is validated: keeping all, a backward is slow."""

_HALVES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`failure`: the disagreement found; `skipped`: why none could be looked for; both "" for a proven site."""

    failure: str = ""
    skipped: str = ""


@dataclasses.dataclass
class Validator:
    """Validates the sites of one pass; sites of the same nodes, shapes and op are validated once."""

    known: dict[str, Verdict] = dataclasses.field(default_factory=dict)

    def check(self, site: AttentionSite | FFNSite) -> Verdict:
        try:
            dense, replaced = _both_forms(site)
        except EmitError as error:
            return Verdict(skipped=str(error))
        signature = _signature(dense.graph) + _signature(replaced.graph)
        if signature not in self.known:
            try:
                self.known[signature] = _compare(dense, replaced)
            except _Skipped as skipped:
                self.known[signature] = Verdict(skipped=str(skipped))
        return self.known[signature]


class _Skipped(Exception):
    """A site cannot be run; the message says why."""


def _both_forms(site: AttentionSite | FFNSite) -> tuple[Extract, Extract]:
    dense, replaced = extract(site), extract(site)
    for node in list(dense.graph.nodes):
        _drop_nothing(node)
    without_dropout = dataclasses.replace(replaced.site, dropout_p=0.0, dropout_module=None)
    if isinstance(without_dropout, AttentionSite):
        rewrite_attention(without_dropout, "all")
    else:
        rewrite_ffn(without_dropout, "all")
    return dense, replaced


def _drop_nothing(node: fx.Node) -> None:
    call = read(node)
    if call is None:
        return
    if call.kind == Kind.DROPOUT:
        node.replace_all_uses_with(call["input"])
        node.graph.erase_node(node)
    elif call.kind == Kind.ATTENTION and "dropout_p" in node.kwargs:
        node.update_kwarg("dropout_p", 0.0)
    elif call.kind == Kind.ATTENTION and len(node.args) > 4:
        node.update_arg(4, 0.0)


def _signature(graph: fx.Graph) -> str:
    """A graph as text in which the names of its nodes do not appear."""
    number: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), number.__getitem__)
        target = "" if node.op == "placeholder" else node.target
        if node.op == "call_module":
            assert graph.owning_module is not None
            target = graph.owning_module.get_submodule(str(node.target))
        value = value_of(node)
        if isinstance(value, Tensor):
            value = (tuple(value.shape), value.stride(), value.dtype, value.device)
        lines.append(f"{node.op} {target} {arguments} {value}")
        number[node] = f"%{len(number)}"
    return "\n".join(lines)


# Inputs.


@dataclasses.dataclass(frozen=True)
class Case:
    """How bools and integers are drawn: the share of True (of 1), or integers below `integers_below`.

    `empty_rows`: of some rows every bool is True, and of others every one False.
    """

    share_true: float
    integers_below: int = 2
    empty_rows: bool = False


def _cases(dense: Extract) -> list[Case]:
    dtypes = {value.dtype for node in dense.inputs if isinstance(value := value_of(node), Tensor) and node.users}
    if all(dtype.is_floating_point for dtype in dtypes):
        return [Case(0.5)]
    tables = [size for node in dense.graph.nodes if (size := _entries_looked_up(node)) is not None]
    sizes = [hint_of(size) or 0 for node in dense.graph.nodes for size in shape_of(node) or ()]
    most = min([*tables, max([2, *sizes]), torch.iinfo(torch.int8).max])
    return [Case(0.9), Case(0.1), Case(0.5, max(most, 1), empty_rows=True)]


def _entries_looked_up(node: fx.Node) -> int | None:
    """The number of entries of a table that a node reads at integers."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if not any(word in name for word in ("embedding", "index", "gather", "take", "getitem")):
        return None
    shapes = [shape for x in node.all_input_nodes if (shape := shape_of(x))]
    if len(shapes) < 2:
        return None
    sizes = [hint_of(size) or 1 for size in (*shapes[0][:1], *(shapes[1][:1] if "embedding" in name else ()))]
    return max(sizes)


def _inputs(extracted: Extract, case: Case, device: torch.device | None) -> dict[str, Any]:
    """A value for each placeholder: the model's own for its buffers and parameters, random ones for all others."""
    generators: dict[torch.device, torch.Generator] = {}
    values = {}
    for placeholder, node in extracted.inputs.items():
        recorded = value_of(placeholder)
        own = attribute_of(node) if node.op == "get_attr" else None
        if isinstance(recorded, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
            values[placeholder.name] = _number(recorded)
        elif isinstance(own, Tensor) and _is_real(own):
            values[placeholder.name] = own.detach() if device is None else own.detach().to(device)
        elif isinstance(recorded, Tensor):
            where = device or recorded.device
            generator = generators.setdefault(where, torch.Generator(where).manual_seed(len(extracted.inputs)))
            values[placeholder.name] = _drawn(recorded, case, where, generator)
        else:
            raise _Skipped(f"tracing recorded no value of {node.name}")
    return values


def _is_real(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"


def _number(x: Any) -> Any:
    hint = hint_of(x)
    if hint is None:
        raise _Skipped(f"the number {x} has no value before the model runs")
    return hint


def _drawn(like: Tensor, case: Case, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random numbers with the shape, the strides and the dtype of a fake tensor."""
    shape, strides = ([_number(n) for n in sizes] for sizes in (like.shape, like.stride()))
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    options: dict[str, Any] = {"generator": generator, "device": device}
    if like.dtype.is_floating_point:
        return torch.randn(count, dtype=torch.float32, **options).to(like.dtype).as_strided(shape, strides)
    if like.dtype.is_complex:
        raise _Skipped(f"an input has dtype {like.dtype}")
    if like.dtype != torch.bool and case.integers_below != 2:
        return torch.randint(case.integers_below, (count,), **options).to(like.dtype).as_strided(shape, strides)
    drawn = torch.rand(count, **options) < case.share_true
    drawn = drawn.as_strided(shape, strides)
    if shape and case.empty_rows and 0 not in strides:
        rows = torch.rand((*shape[:-1], 1), **options)
        drawn = (drawn | (rows < 0.2)) & (rows < 0.8)
    elif shape and 0 not in strides:  # in every row, one of both kinds, if there is room
        drawn[..., -1:] = case.share_true < 0.5
        drawn[..., :1] = case.share_true >= 0.5
    return drawn.to(like.dtype)


# Running.


class _Run(fx.Interpreter):
    """Runs a graph on real tensors; symbolic numbers by their hints.

    Args:
        wide: with every floating-point tensor in float64.
        device: in the place of every device, if given.
    """

    def __init__(self, graph: fx.Graph, wide: bool, device: torch.device | None) -> None:
        super().__init__(graph.owning_module or torch.nn.Module(), graph=graph)
        self.extra_traceback = False
        self.wide, self.device = wide, device

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._widen(super().call_function(target, *self._arguments(args, kwargs)))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.wide and target in ("float", "half", "bfloat16"):
            target = "double"
        return self._widen(super().call_method(target, *self._arguments(args, kwargs)))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._widen(super().call_module(target, *self._arguments(args, kwargs)))

    def _arguments(self, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._argument)
        if self.device is not None and "device" in kwargs:
            kwargs = {**kwargs, "device": self.device}
        return tuple(args), dict(kwargs)

    def _argument(self, x: Any) -> Any:
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return _number(x)
        if isinstance(x, torch.device) and self.device is not None:
            return self.device
        if self.wide and isinstance(x, torch.dtype) and x.is_floating_point:
            return torch.float64
        return x

    def _widen(self, x: Any) -> Any:
        if not self.wide:
            return x
        is_narrow = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.double() if is_narrow else x


@dataclasses.dataclass(frozen=True)
class _Result:
    """Outputs and, by the name of the input, gradients; no gradients if there are none."""

    outputs: tuple[Any, ...]
    gradients: dict[str, Tensor]


def _run(
    graph: fx.Graph, values: dict[str, Any], device: torch.device | None, wide: bool = False, backward: bool = True
) -> _Result:
    leaves = {name: _leaf(value, wide, backward) for name, value in values.items()}
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    with torch.set_grad_enabled(backward):
        outputs = _Run(graph, wide, device).run(*(leaves[name] for name in placeholders))
    output = outputs[0]
    wanted = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
    if not wanted or not output.requires_grad or not bool(output.isfinite().all()):
        return _Result((output.detach(), *outputs[1:]), {})
    cotangent = torch.linspace(-1, 2, output.numel(), device=output.device).view(output.shape).cos().to(output.dtype)
    gradients = torch.autograd.grad(output, list(wanted.values()), cotangent, allow_unused=True, materialize_grads=True)
    return _Result((output.detach(), *outputs[1:]), dict(zip(wanted, gradients, strict=True)))


def _leaf(x: Any, wide: bool, backward: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    if wide and x.is_floating_point():
        count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        x = x.as_strided((count if x.numel() else 0,), (1,)).double().as_strided(x.shape, x.stride())
    return x.detach().requires_grad_(backward and x.is_floating_point())


def _substitute_device(dense: Extract) -> torch.device | None:
    """The CPU, if a device of the site is not there."""
    devices = {value.device for node in dense.graph.nodes if isinstance(value := value_of(node), Tensor)}
    for device in devices:
        try:
            if device.type == "meta":
                return torch.device("cpu")
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            return torch.device("cpu")
    return None


@dataclasses.dataclass(frozen=True)
class _DenseRun:
    """The result of the dense form, and how it was run: under which autocast, and whether backward too."""

    result: _Result
    autocast: torch.autocast
    backward: bool


def _run_dense(dense: Extract, values: dict[str, Any], device: torch.device | None) -> _DenseRun:
    """The dense form, under the autocast with which it gives the dtype that tracing recorded."""
    recorded = [value for node in dense.graph.nodes if isinstance(value := value_of(node), Tensor)]
    output = value_of(dense.site.output)
    kind = (device or output.device).type
    halves = [dtype for dtype in _HALVES if any(value.dtype == dtype for value in recorded)]
    contexts = [torch.autocast(kind, enabled=False), *(torch.autocast(kind, dtype=dtype) for dtype in halves)]
    backwards = (True, False) if _entries(dense.site) <= MOST_ENTRIES_BACKWARD else (False,)
    failure: Exception | None = None
    for context in contexts:
        for backward in backwards:  # forward alone if the model writes to what would be a leaf
            try:
                with context:
                    result = _run(dense.graph, values, device, backward=backward)
            except Exception as error:  # whatever an operation raises
                failure = failure or error
                continue
            if result.outputs[0].dtype == output.dtype:
                return _DenseRun(result, context, backward)
            break
    if failure is not None:
        raise failure
    raise _Skipped(f"the dense form does not give the dtype {output.dtype} that tracing recorded")


def _entries(site: AttentionSite | FFNSite) -> int:
    if isinstance(site, FFNSite):
        shape = None if site.tokens_shape is None else (*site.tokens_shape, site.hidden_size or 1)
    else:
        shape = site.scores_shape
    return math.prod(_number(size) for size in shape or ())


# Comparing.


def _compare(dense: Extract, replaced: Extract) -> Verdict:
    _check_size(dense)
    device = _substitute_device(dense)
    with real_tensors(), torch.inference_mode(False), _untouched_random_state():
        failed: Exception | None = None
        has_run = False
        for case in _cases(dense):
            values = _inputs(dense, case, device)
            try:
                expected = _run_dense(dense, values, device)
            except _Skipped:
                raise
            except Exception as error:  # an index out of range, for example: these inputs are none of the model's
                failed = error
                continue
            has_run = True
            failure = _disagreement(dense, replaced, values, device, expected)
            if failure:
                return Verdict(failure)
        if not has_run:
            raise _Skipped(f"the dense form raises {type(failed).__name__} on random inputs: {failed}")
    return Verdict()


def _disagreement(
    dense: Extract, replaced: Extract, values: dict[str, Any], device: torch.device | None, expected: _DenseRun
) -> str:
    """How the replaced form differs from the dense one on some inputs; "" if it does not."""
    name = dense.site.output.name
    try:
        with expected.autocast:
            found = _run(replaced.graph, values, device, backward=expected.backward)
    except Exception as error:  # whatever the op raises where the dense form does not
        return f"in the place of {name} the op raises {type(error).__name__}: {error}"
    with torch.autocast(expected.result.outputs[0].device.type, enabled=False):
        exact = _run(dense.graph, values, device, wide=True, backward=expected.backward)
    coarsest = max(_floating_dtypes(dense), key=lambda dtype: torch.finfo(dtype).eps)
    for what, x, y, z in _pairs(found, expected.result, exact):
        difference = largest_difference(x, y, z, coarsest)
        if difference:
            return f"with every key or unit kept, {what}{name} differs by {difference}"
    return ""


def _floating_dtypes(dense: Extract) -> set[torch.dtype]:
    dtypes = {value.dtype for node in dense.graph.nodes if isinstance(value := value_of(node), Tensor)}
    return {dtype for dtype in dtypes if dtype.is_floating_point}


def _pairs(found: _Result, dense: _Result, exact: _Result) -> Iterator[tuple[str, Any, Any, Any]]:
    yield "", found.outputs[0], dense.outputs[0], exact.outputs[0]
    for x, y, z in zip(found.outputs[1:], dense.outputs[1:], exact.outputs[1:], strict=True):
        yield "a size read off ", x, y, z
    for name in found.gradients.keys() & dense.gradients.keys() & exact.gradients.keys():
        gradients = [result.gradients[name] for result in (found, dense, exact)]
        if bool(gradients[1].isfinite().all()):  # dense makes NaN of what a row without keys leaves
            yield f"the gradient of {name} through ", gradients[0], gradients[1], gradients[2]


def largest_difference(found: Any, dense: Any, exact: Any, dtype: torch.dtype) -> str:
    """The largest difference that rounding to `dtype` does not explain, as text; "" if there is none.

    Rounding explains a few units of the largest value and, in each row, what the dense form itself differs by from
    its run in float64. NaN must stand where one of the dense runs has it.
    """
    if not isinstance(dense, Tensor):
        return "" if found == dense else f"{found} instead of {dense}"
    if (found.shape, found.dtype) != (dense.shape, dense.dtype):
        return f"{found.dtype}{list(found.shape)} instead of {dense.dtype}{list(dense.shape)}"
    if not found.numel():
        return ""
    found, dense, exact = (x.double() for x in (found, dense, exact))
    finite = exact.where(exact.isfinite(), 0.0)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    rounding = (4 * torch.finfo(dtype).eps + 64 * torch.finfo(accumulated).eps) * max(float(finite.abs().max()), 1e-30)
    spread = (dense - exact).abs().nan_to_num(0.0, 0.0, 0.0)
    spread = spread.amax(-1, keepdim=True) if spread.dim() else spread
    agrees = _near(found, exact, rounding + 4 * spread) | _near(found, dense, rounding + 4 * spread)
    if bool(agrees.all()):
        return ""
    differences = (found - dense).abs()[~agrees]
    if bool(differences.isnan().any()):
        return f"NaN: {int(found.isnan().sum())} values are, and of the dense form's {int(dense.isnan().sum())}"
    return f"up to {float(differences.max()):.2g} in {differences.numel()} of {found.numel()} values"


def _near(x: Tensor, y: Tensor, tolerance: Tensor) -> Tensor:
    return ((x - y).abs() <= tolerance) | (x == y) | (x.isnan() & y.isnan())


def _check_size(dense: Extract) -> None:
    shapes: list[Sequence[Any]] = []
    for node in dense.graph.nodes:
        value = value_of(node)
        if node.op == "placeholder" and value is None:
            raise _Skipped(f"tracing recorded no value of {dense.inputs[node].name}")
        if isinstance(value, Tensor) and (node.users or node.op != "placeholder"):
            shapes.append(value.shape)
    if shape_of(dense.site.output) is None:
        raise _Skipped(f"tracing recorded no shape of {dense.site.output.name}")
    size = 8 * sum(math.prod(_number(n) for n in shape) for shape in shapes)
    if size > MOST_BYTES:
        raise _Skipped(f"the dense form would take {size / 1024**3:.1f} GiB")


@contextlib.contextmanager
def _untouched_random_state() -> Iterator[None]:
    """The process's generators as they were; only those of devices in use are looked at."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if in_use else []):
        yield
