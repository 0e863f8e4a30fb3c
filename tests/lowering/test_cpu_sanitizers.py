"""AddressSanitizer and UndefinedBehaviorSanitizer report nothing of the C++ kernels; `sanitized.py` says on which calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from topk_fx.lowering.cpu import build
from torch._inductor.cpp_builder import get_cpp_compiler

PROGRAM = Path(__file__).with_name("sanitized.py")


def library(name: str) -> str:
    """Where the compiler of the kernels keeps a library of its own, or ""."""
    found = subprocess.run([get_cpp_compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 and Path(found.stdout.strip()).is_absolute() else ""


def preloaded() -> str:
    """What a process needs before its first allocation, or ""; the second, as torch throws C++ exceptions."""
    if build.why_unavailable():
        return ""
    libraries = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    return f"{libraries[0]} {libraries[2]}" if all(libraries) else ""


PRELOADED = preloaded()
pytestmark = pytest.mark.skipif(not PRELOADED, reason="the C++ compiler has no libasan and libubsan (GCC has)")


def run(what: str) -> subprocess.CompletedProcess[str]:
    paths = [str(PROGRAM.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "LD_PRELOAD": PRELOADED,
        # Python frees not all of its memory when it ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return subprocess.run(
        [sys.executable, "-P", PROGRAM, what], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.parametrize("instructions", build.supported_instruction_sets())
def test_sanitizers_report_nothing(instructions):
    found = run(instructions)
    assert found.returncode == 0, found.stderr[-6000:]
    assert found.stdout.count("calls without a report") == 2


@pytest.mark.parametrize(
    ("fault", "report"),
    [("write_beyond_a_tensor", "heap-buffer-overflow"), ("signed_overflow", "signed integer overflow")],
)
def test_sanitizers_report_a_fault(fault, report):
    found = run(fault)
    assert found.returncode != 0
    assert report in found.stderr, found.stderr[-2000:]
    assert "not reported" not in found.stdout
