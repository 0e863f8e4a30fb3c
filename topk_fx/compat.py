"""What differs between torch 2.11 and 2.15, and every torch internal that topk_fx stands on, in one place."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import _SingleLevelFunction

from .config import nearest
from .errors import ConfigError

Compiled = Callable[..., Any]


_outer_grad_mode = contextvars.ContextVar("_outer_grad_mode", default=False)


class SingleLevelFunction(_SingleLevelFunction):
    """The base of an autograd.Function that is an op's Autograd kernel, so that it records one level at a time.

    `torch.autograd.Function.apply` hands over to functorch while one of its transforms is active; an op's kernel is
    called when functorch has already peeled off its level, and must record on that level alone.
    """

    @classmethod
    def run(cls, *args: Any) -> Any:
        """`apply`, allowed while a functorch transform is active; where there is nothing to record, `forward` alone."""
        token = _outer_grad_mode.set(torch.is_grad_enabled())
        try:
            if not _is_recorded(args):  # in a decoding step, recording nothing takes longer than a kernel
                return cls.forward(*args)
            with enable_single_level_autograd_function():
                return cls.apply(*args)  # type: ignore[attr-defined]
        finally:
            _outer_grad_mode.reset(token)


def _is_recorded(inputs: Sequence[Any]) -> bool:
    """Whether autograd follows any of the inputs: for a gradient, or in forward mode for a tangent."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


@contextlib.contextmanager
def below_autograd() -> Iterator[None]:
    """Around the call of an op in the forward of its `SingleLevelFunction`.

    What the Function switched off for its own level is on again for functorch's levels below, which record themselves.
    """
    forward_mode = torch.autograd.forward_ad._set_fwd_grad_enabled(True)
    with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(_outer_grad_mode.get()), forward_mode:
        yield


def _gradient_of_clamp_at_its_bound() -> float:
    x = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        return torch.autograd.grad(x.clamp(min=0), x)[0].item()


CLAMP_PASSES_AT_BOUNDS = _gradient_of_clamp_at_its_bound() == 1
"""Whether a number at a bound of `torch.clamp` has its gradient: in torch 2.13 it has, in 2.15 it has not. There, where
the bound is a tensor, the two share it, as those of `maximum` do."""


class SpecializedError(Exception):
    """Tracing took a symbolic size for a certain number; the message says which and where."""


def trace_to_aten(function: Callable[..., Any], values: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """A function of fake values, traced to the ATen calls that it makes above autograd and autocast.

    Args:
        mode: the fake mode of the values, with which their symbolic sizes are kept.

    Raises:
        SpecializedError: the graph holds for fewer sizes than the values stand for, and nobody would check that. While
            Dynamo compiles it does, by the guards that it installs afterwards.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    known = len(mode.shape_env.guards) if mode.shape_env is not None else 0
    with mode, torch.no_grad():
        traced = make_fx(function, pre_dispatch=True)(*values)
    guards = mode.shape_env.guards[known:] if mode.shape_env is not None else []
    if guards and TracingContext.try_get() is None:
        raise SpecializedError("; ".join(str(guard.expr) for guard in guards))
    return traced


def no_recompile_limit() -> contextlib.AbstractContextManager[None]:
    """Lets Dynamo trace one function as often as it is asked to."""
    from torch._dynamo.utils import disable_cache_limit

    return disable_cache_limit()


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """Lets operations run on real tensors inside tracing: no fake, proxy or functional mode is active."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one level of a transform of torch.func, which shows no storage."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one sample of those that torch.vmap maps, at any level of the transforms around it."""
    while is_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor below all levels of torch.func.grad, vjp and jvp around it, which has the same shape and dtype."""
    while is_wrapped(tensor) and not torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor; its package is not imported to tell."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def hint_of(number: Any) -> Any:
    """The value with which a symbolic number was traced, without a guard on it; None if it has none."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return number
    return number.node.hint if number.node.has_hint() else None


def expand_mode(mode: str) -> dict[str, Any]:
    """The Inductor options that a mode of torch.compile stands for; ConfigError if there is no such mode."""
    if mode == "default":
        return {}
    from torch._inductor import list_mode_options

    modes = {"default": {}, **list_mode_options()}
    if mode not in modes:
        raise ConfigError(
            f"mode={mode!r} is not accepted: give one of {', '.join(map(repr, modes))}.{nearest(str(mode), modes)}"
        )
    return dict(modes[mode])


def compile_with(
    inner: str, module: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any], identity: str
) -> Compiled:
    """Compiles a rewritten graph: with Inductor under `options`, or with a debugging backend."""
    if inner == "eager":
        return module.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, list(inputs))
    from torch._inductor.compile_fx import compile_fx

    from .cache_identity import with_identity

    return compile_fx(module, inputs, config_patches=with_identity(options, identity))  # type: ignore[return-value]


class CppBuildError(Exception):
    """C++ could not be compiled; the message is the reason in a few words."""


def start_building_cpp(
    code: str, flags: Sequence[str], submit: Callable[[Callable[[], Any]], Any]
) -> Callable[[], Any]:
    """Compiles C++ with Inductor's compiler and options into its cache, unless it is there.

    `flags` come after Inductor's own; `submit` runs the compiler, beside the caller or at once. Returns what waits for
    the shared library (ctypes.CDLL). Both raise CppBuildError.
    """
    with _build_errors():
        # 2.13 and later can be told that no vector instructions are needed; else they are looked for, by compiling.
        load = _cpp_cache().load_async
        known = inspect.signature(load).parameters
        options = {"needs_vec_isa": False} if "needs_vec_isa" in known else {}
        wait = load(code, submit_fn=submit, extra_flags=tuple(flags), **options)

    def library() -> Any:
        with _build_errors():
            return wait()

    return library


@contextlib.contextmanager
def _build_errors() -> Iterator[None]:
    """Turns what Inductor raises where C++ cannot be built into CppBuildError."""
    from torch._inductor import exc

    try:
        yield
    except exc.InvalidCxxCompiler as error:
        raise CppBuildError("no working C++ compiler was found; Inductor looks for g++ and clang++, or $CXX") from error
    except exc.CppCompileError as error:
        raise CppBuildError(f"the compiler failed: {str(error)[-2000:]}") from error
    except OSError as error:
        raise CppBuildError(str(error)) from error


@functools.cache
def _cpp_cache() -> Any:
    from torch._inductor.codecache import CppCodeCache

    class KernelCache(CppCodeCache):
        """Libraries that neither include nor link PyTorch."""

        cache: dict[str, Any] = {}  # noqa: RUF012
        cache_clear = staticmethod(cache.clear)
        cpp_compile_command_flags: dict[str, Any] = {"include_pytorch": False, "shared": True}  # noqa: RUF012

    return KernelCache


INDUCTOR_VIEWS_BOOLS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether Inductor lowers the view of a boolean tensor as bytes: that of torch 2.11 fails at it."""


def inductor_autotunes() -> bool:
    """Whether Inductor has been asked to try kernels: `max_autotune`."""
    from torch._inductor import config

    return bool(config.max_autotune)


def register_inductor_lowering(op: Any, lower: Callable[[Sequence[Any], Sequence[Any]], Any]) -> None:
    """Has Inductor ask `lower` what to put in the place of a call of an op, where it would else call the op itself.

    `lower` is given the arguments as Inductor holds them and as fake values, and returns what stands for the results,
    or None for a call of the op.
    """
    from torch._inductor import lowering as inductor
    from torch._library.utils import get_layout_constraint_tag

    call = inductor.fallback_handler(op, add_to_fallback_set=False)
    names = [argument.name for argument in op._schema.arguments]

    def lowering(*args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
        found = lower(arguments, _values_of_lowered_call(len(args), names))
        return call(*args, **kwargs) if found is None else found

    constraint = inductor.tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
    inductor.add_needs_realized_inputs(op)
    if constraint is not None:
        inductor.add_layout_constraint(op, constraint)
    inductor.register_lowering(op, type_promotion_kind=None)(lowering)


def _values_of_lowered_call(positional: int, names: Sequence[str]) -> list[Any]:
    """The arguments of the call that Inductor lowers, fake."""
    from torch._inductor.virtualized import V

    node = V.graph.current_node
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: x.meta["val"])
    return [*args, *(kwargs[name] for name in names[positional:] if name in kwargs)]


def lower_as_graph(function: Callable[..., Any], arguments: Sequence[Any], values: Sequence[Any]) -> Any:
    """While Inductor lowers a call: traces a function of its fake arguments, and lowers that graph in its place.

    Args:
        function: may launch Triton kernels by `torch.library.wrap_triton`.
        arguments: of the call, as Inductor holds them.
        values: the same, fake.
    """
    from torch._inductor import ir
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import process_subgraph_nodes
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import _pytree as pytree

    leaves, spec = pytree.tree_flatten(list(values))
    places = [n for n, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

    def on_tensors(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return function(*pytree.tree_unflatten(filled, spec))

    with V.fake_mode:
        traced = make_fx(on_tensors, decomposition_table=select_decomp_table())(*(leaves[n] for n in places))
    held = pytree.tree_leaves(list(arguments), is_leaf=lambda x: isinstance(x, ir.IRNode))
    # The launches are written for these strides; Inductor would only see to their order.
    inputs = [ir.ExternKernel.require_exact_strides(held[n], leaves[n].stride()) for n in places]
    with _accesses_of_each_kernel_found_once():
        return process_subgraph_nodes(traced, inputs)


@contextlib.contextmanager
def _accesses_of_each_kernel_found_once() -> Iterator[None]:
    """Inductor compiles a kernel to see what it reads and writes, twice for each launch: 60 ms each time."""
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    name = "identify_accessed_tensors" if hasattr(wrap, "identify_accessed_tensors") else "identify_mutated_tensors"
    find = getattr(wrap, name)

    def find_once(kernel: Any, kwargs: dict[str, Any], *rest: Any) -> Any:
        key = (kernel, *((name, _kind_of_argument(x)) for name, x in kwargs.items()))
        if any(rest) or key not in _accesses:
            _accesses[key] = find(kernel, kwargs, *rest)
        return _accesses[key]

    setattr(wrap, name, find_once)
    try:
        yield
    finally:
        setattr(wrap, name, find)


_accesses: dict[Any, Any] = {}


def _kind_of_argument(x: Any) -> Any:
    """Of a tensor its dtype, on which a kernel's code depends; a number is its own."""
    dtype = x.get_dtype() if hasattr(x, "get_dtype") else getattr(x, "dtype", None)
    return x if dtype is None else dtype
