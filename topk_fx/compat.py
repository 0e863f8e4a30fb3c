"""What differs between torch 2.11 and 2.15, and every torch internal that topk_fx stands on, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd.function import _SingleLevelFunction

from .config import nearest
from .errors import ConfigError

Compiled = Callable[..., Any]


class SingleLevelFunction(_SingleLevelFunction):
    """The base of an autograd.Function that runs inside the dispatcher, below functorch's own levels.

    `torch.autograd.Function.apply` hands over to functorch while one of its transforms is active; an op's kernel is
    called when functorch has already peeled off its level, so that it must record on that level alone.
    """

    @classmethod
    def run(cls, *args: Any) -> Any:
        """`apply`, allowed while a functorch transform is active."""
        with enable_single_level_autograd_function():
            return cls.apply(*args)  # type: ignore[attr-defined]


def expand_mode(mode: str) -> dict[str, Any]:
    """The Inductor options that a mode of torch.compile stands for; ConfigError if there is no such mode."""
    if mode == "default":
        return {}
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise ConfigError(
            f"mode={mode!r} is not accepted: give one of {', '.join(map(repr, ('default', *modes)))}."
            f"{nearest(str(mode), modes)}"
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
