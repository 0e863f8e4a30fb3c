"""How a kernel is started: at once, or, while Inductor lowers a graph, as a call of the code that it generates."""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from topk_fx.compat import inductor_autotunes

from .arguments import device_of

Choice = Mapping[str, Any]
"""Constants of a kernel, `num_warps` among them, in the place of those that it is launched with."""


class Launch(Protocol):
    """Starts a kernel on the device of its first argument.

    Args:
        kernel: a `triton.jit` function.
        grid: how many programs.
        arguments: its first ones: tensors, numbers, and tuples of these.
        constants: the others, which are `tl.constexpr`, and options such as `num_warps`.
        choices: what else Inductor may try, under `max_autotune`. It runs a kernel on its arguments again and again, so
            that there are none for one that adds to them.
    """

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        choices: Sequence[Choice] = (),
    ) -> None: ...


def launch_now(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    choices: Sequence[Choice] = (),
) -> None:
    with device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def launch_in_graph(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    choices: Sequence[Choice] = (),
) -> None:
    """Records the launch in the graph that `make_fx` traces.

    Inductor writes a kernel's text into the code that it generates. It knows neither arguments that are tuples nor
    constants that are functions, and hands a float over in 64 bits. So what is recorded is a kernel that has tensors
    and integers for arguments and calls the other.
    """
    named = {name: value for name, value in constants.items() if name in kernel.arg_names}
    tried = tuple(choices) if inductor_autotunes() else ()
    tuned = tuple(sorted({name for choice in tried for name in choice if name in named}))
    flat: dict[str, Any] = {}
    values = [_flattened(name, x, flat) for name, x in zip(kernel.arg_names, arguments, strict=False)]
    values += [f"{name}={name if name in tuned else _literal(value)}" for name, value in named.items()]
    functions = {kernel, *(value for value in named.values() if _is_function(value))}
    parameters = ", ".join([*flat, *(f"{name}: tl.constexpr" for name in tuned)])
    launches = [{**constants, **choice} for choice in ({}, *tried)]
    configurations = tuple(tuple((name, launch[name]) for name in (*tuned, "num_warps")) for launch in launches)
    entry = _entry(kernel, parameters, ", ".join(values), frozenset(functions), configurations)
    torch.library.wrap_triton(entry)[grid](*flat.values())


def _flattened(name: str, x: Any, flat: dict[str, Any]) -> str:
    """The text of an argument, made of the names of its tensors and integers, which are added to `flat`."""
    if isinstance(x, tuple):
        return f"({''.join(_flattened(f'{name}_{n}', y, flat) + ', ' for n, y in enumerate(x))})"
    if isinstance(x, float):
        return _literal(x)
    flat[name] = x
    return name


def _literal(x: Any) -> str:
    import triton.language as tl

    if _is_function(x):
        return str(x.__name__)
    if isinstance(x, float):
        return repr(x) if math.isfinite(x) else f'float("{x}")'
    return f"tl.{x.name.replace('bf', 'bfloat').replace('fp', 'float')}" if isinstance(x, tl.dtype) else repr(x)


def _is_function(x: Any) -> bool:
    from triton import JITFunction

    return isinstance(x, JITFunction)


@functools.cache
def _entry(
    kernel: Any,
    parameters: str,
    values: str,
    functions: frozenset[Any],
    configurations: tuple[tuple[tuple[str, int], ...], ...],
) -> Any:
    """A kernel with `parameters` that calls another with `values`; one object for all launches that are alike."""
    import triton
    import triton.language as tl

    name = f"topk_fx_{kernel.__name__}"
    source = f"def {name}({parameters}):\n    {kernel.__name__}({values})\n"
    file = f"<{name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # Triton reads a kernel's text
    module = types.ModuleType("topk_fx_kernels")
    module.__dict__.update({function.__name__: function for function in functions}, tl=tl)
    exec(compile(source, file, "exec"), module.__dict__)
    entry = triton.jit(module.__dict__[name])
    stages = 2 if torch.version.hip else 3  # what a launch has that names none
    found = [dict(configuration) for configuration in configurations]
    configs = [triton.Config(x, num_warps=x.pop("num_warps"), num_stages=stages) for x in found]
    return triton.autotune(configs, key=[])(entry)
