"""Compiles C++ on first use, for the processor at hand, with Inductor's toolchain and in its cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from topk_fx.compat import CppBuildError, start_building_cpp
from topk_fx.errors import LoweringUnavailableError

SOURCES = Path(__file__).parent / "sources"

_X86 = ("-march=x86-64", "-mtune=native")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (
        *_X86,
        *(
            "-mavx512f",
            "-mavx512dq",
            "-mavx512vl",
            "-mavx512bw",
            "-mfma",
            "-mf16c",
            "-mpopcnt",
            "-mbmi",
            "-mavx512bf16",
            "-mavx512vnni",
        ),
        *("-mprefer-vector-width=512", "-DTOPK_AVX512", "-DTOPK_AVX512_BF16", "-DTOPK_AVX512_VNNI"),
    ),
    "avx512": (
        *_X86,
        *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"),
        *("-mprefer-vector-width=512", "-DTOPK_AVX512"),
    ),
    "avx2": (*_X86, "-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi", "-DTOPK_AVX2"),
    "portable": _X86 if platform.machine() in ("x86_64", "AMD64") else (),
}
"""The compiler's options for each instruction set, best first. They come after Inductor's own and so win over these.
Every processor with AVX512-BF16 so far has AVX512-VNNI too."""

_forced: str | None = None


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """While entered, kernels are built for this instruction set, whatever the processor could do."""
    global _forced
    if name not in supported_instruction_sets():
        raise LoweringUnavailableError(
            f"this processor has no {name}; it has {', '.join(supported_instruction_sets())}"
        )
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def current_instruction_set() -> str:
    """The best instruction set of this processor, or the one that is forced."""
    return _forced or supported_instruction_sets()[0]


def current_defines() -> frozenset[str]:
    """What the sources are told of the instruction set: the names of their macros."""
    return _defines_of(current_instruction_set())


@functools.cache
def _defines_of(instructions: str) -> frozenset[str]:
    return frozenset(x[2:] for x in INSTRUCTION_SETS[instructions] if x.startswith("-D"))


@functools.cache
def supported_instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this processor has, best first."""
    has_avx512 = torch.cpu._is_avx512_supported()
    found = {
        "avx512_bf16": has_avx512 and torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported(),
        "avx512": has_avx512,
        "avx2": torch.cpu._is_avx2_supported(),
        "portable": True,
    }
    return tuple(name for name in INSTRUCTION_SETS if found[name])


def start(code: str, defines: tuple[str, ...] = ()) -> None:
    """Begins to compile what `load` will be asked for, beside the caller; what goes wrong is raised by `load`."""
    with contextlib.suppress(LoweringUnavailableError):
        _started(code, defines, current_instruction_set())


def load(code: str, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library compiled from C++ that may include files of `sources`.

    Raises:
        LoweringUnavailableError: there is no compiler, or it cannot build this.
    """
    return _load(code, defines, current_instruction_set())


@functools.lru_cache(maxsize=4096)
def _load(code: str, defines: tuple[str, ...], instructions: str) -> ctypes.CDLL:
    with _unavailable():
        library: Any = _started(code, defines, instructions)()
    return library


@functools.lru_cache(maxsize=4096)
def _started(code: str, defines: tuple[str, ...], instructions: str) -> Callable[[], Any]:
    # Loops are vectorised, straight code is not: that would put the bit masks of the filter together in vectors.
    options = (
        "-ftree-loop-vectorize",
        "-fno-tree-slp-vectorize",
        "-fno-math-errno",
        "-std=c++20",
        "-w",
        *INSTRUCTION_SETS[instructions],
    )
    with _unavailable():
        return start_building_cpp(_expand(code), (*options, *(f"-D{define}" for define in defines)), _Beside)


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except CppBuildError as error:
        raise LoweringUnavailableError(f"the C++ kernels cannot be built: {error}") from error


class _Beside:
    """A run of the compiler in a thread of its own, while Inductor generates code in that of the caller."""

    def __init__(self, compile: Callable[[], Any]) -> None:
        self._process = os.getpid()
        self._future: Future[Any] = Future()
        threading.Thread(target=self._run, args=(compile,), name="topk_fx build").start()

    def _run(self, compile: Callable[[], Any]) -> None:
        try:
            self._future.set_result(compile())
        except BaseException as error:
            self._future.set_exception(error)

    def result(self) -> Any:
        """Waits for it. A process that was forked meanwhile has no such thread, and goes on to compile by itself."""
        return self._future.result() if os.getpid() == self._process else None


def _expand(code: str, seen: set[str] | None = None) -> str:
    """The code with the files of `sources` that it includes in their places, each once."""
    seen = set() if seen is None else seen

    def included(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        text = (SOURCES / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _expand(text, seen)

    return re.sub(r'^#include "([\w.]+)"$', included, code, flags=re.MULTILINE)


@functools.cache
def why_unavailable() -> str:
    """Why nothing can be compiled here, or ""."""
    try:
        _load('extern "C" int answer() { return 42; }\n', (), "portable")
    except LoweringUnavailableError as error:
        return str(error)
    return ""
