"""Checks and times the Triton kernels on the GPU that is there, in less than nine minutes.

    python examples/gpu_check.py              # tests, sanitizer, benchmarks; the figures go to examples/results/
    python examples/gpu_check.py --only benchmarks

The rivals are called in turns, so that a change of the GPU's clock meets them all; a time is the median of the rounds
and is given with the range of the rounds' ratios. Decoding is timed as a CUDA graph, as a server would run it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import topk_fx  # noqa: F401  (registers the ops)

ROOT = Path(__file__).parents[1]
TOPK, FLASH, CUDNN, FLEX, ATEN, DENSE = "topk_fx", "flash", "cuDNN", "FlexAttention", "chunked ATen", "dense"
LONGEST_OF_ATEN = 4096
ROUNDS = 5

SANITIZED = """
from triton_cases import CASES, check
for case in CASES[:3] + CASES[-7:-5]:
    check(case, "cuda")
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tests", "sanitizer", "benchmarks"], help="one part of the check")
    parser.add_argument("--output", type=Path, default=ROOT / "examples" / "results", help="folder of the figures")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing was checked.")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    parts = {"tests": run_tests, "sanitizer": run_sanitizer, "benchmarks": lambda: run_benchmarks(options.output)}
    failed = [name for name, part in parts.items() if options.only in (None, name) and not part()]
    print(f"Failed: {', '.join(failed)}" if failed else "All parts passed.")
    return len(failed)


def run_tests() -> bool:
    """The tests that are marked `gpu`, several at a time, as compiling keeps one core busy each."""
    print("\nTests", flush=True)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "tests/lowering/test_triton_on_gpu.py"]
    command += ["--numprocesses", str(min(8, os.cpu_count() or 1)), "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, env=_environment()).returncode == 0


def run_sanitizer() -> bool:
    """A few cases under compute-sanitizer's memory check, if it is installed."""
    program = shutil.which("compute-sanitizer")
    print(f"\nSanitizer: {program or 'compute-sanitizer is not installed'}", flush=True)
    if program is None:
        return True
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--error-exitcode", "1", sys.executable, "-c", SANITIZED]
    run = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    print("\n".join(run.stdout.splitlines()[-3:]), run.stderr[-500:])
    return run.returncode == 0


def _environment() -> dict[str, str]:
    return dict(os.environ) | {"TRITON_INTERPRET": "0"}


# --- benchmarks


@dataclasses.dataclass(frozen=True)
class Row:
    """The times of a task by rival, in milliseconds, round by round; and how far memory rose during a call, in MiB."""

    task: str
    length: int
    k: int
    detail: str
    milliseconds: dict[str, list[float]]
    mebibytes: dict[str, float]

    def median(self, rival: str) -> float:
        return statistics.median(self.milliseconds[rival])

    def ratios(self, rival: str) -> list[float]:
        mine = self.milliseconds[TOPK]
        return [theirs / own for theirs, own in zip(self.milliseconds[rival], mine, strict=True)]

    def __str__(self) -> str:
        cells = [f"{self.task:<9} {self.length:>7,} {self.k:>4} {self.detail:<13} {TOPK} {self.median(TOPK):8.3f} ms"]
        cells.append(f"{self.mebibytes[TOPK]:6,.0f} MiB")
        for rival in self.milliseconds:
            if rival != TOPK:
                ratios = self.ratios(rival)
                speed = f"x{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                cells.append(f"{rival} {self.median(rival):.3f} ms {speed} {self.mebibytes[rival]:,.0f} MiB")
        return " | ".join(cells)


def run_benchmarks(folder: Path) -> bool:
    """bfloat16, 32 heads, D 128, causal; FFNs are SwiGLU 4096 -> 14336. "x1.50": the rival takes half as long again."""
    print("\nBenchmarks: bfloat16, 32 heads, D 128; decoding without, the others with a causal mask", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{torch.cuda.get_device_name().replace(' ', '_').lower()}.json"
    rows: list[Row] = []
    start = time.perf_counter()

    def add(row: Row) -> None:
        rows.append(row)
        print(f"[{time.perf_counter() - start:4.0f} s] {row}", flush=True)
        write_figures(rows, path)

    for batch, key_heads in ((1, 32), (1, 8), (16, 8)):
        for length in (4096, 16384, 65536, 131072):
            if batch * length <= 2**20:
                add(decode(length, 64, batch, key_heads))
    for k in (32, 128, 256):
        add(decode(65536, k, 1, 8))
    for tokens in (1, 4, 16):
        for by_columns in (False, True):
            add(ffn(tokens, by_columns))
    for length in (1024, 4096, 16384, 65536, 131072):
        add(forward(length, 64))
    for k in (32, 128, 256):
        add(forward(16384, k))
    for length in (1024, 4096, 16384, 65536):
        add(training(length, 64))
    for k in (32, 128, 256):
        add(training(16384, k))
    print(f"Figures: {path}")
    return True


def write_figures(rows: Sequence[Row], path: Path) -> None:
    facts = {
        "command": "python examples/gpu_check.py",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "setting": run_benchmarks.__doc__,
    }
    table = [json.dumps(dataclasses.asdict(row)) for row in rows]
    path.write_text(json.dumps(facts, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(table) + "\n ]\n}\n")


def forward(length: int, k: int) -> Row:
    query, key, value = _inputs(1, 32, 32, length, length)
    rivals = _rivals(query, key, value, k, is_causal=True)
    return _measure("forward", length, k, "", {name: functools.partial(_no_grad, f) for name, f in rivals.items()})


def training(length: int, k: int) -> Row:
    inputs = [x.requires_grad_() for x in _inputs(1, 32, 32, length, length)]
    grad = torch.randn_like(inputs[0])

    def step(function: Callable[[], Tensor]) -> None:
        torch.autograd.grad(function(), inputs, grad)

    rivals = _rivals(*inputs, k, is_causal=True)
    return _measure("training", length, k, "", {name: functools.partial(step, f) for name, f in rivals.items()})


def decode(length: int, k: int, batch: int, key_heads: int) -> Row:
    query, key, value = _inputs(batch, 32, key_heads, 1, length)
    rivals = _rivals(query, key, value, k, is_causal=False)
    graphs = {name: _as_graph(functools.partial(_no_grad, f)) for name, f in rivals.items()}
    detail = f"B {batch}, {key_heads} of K"
    return _measure("decode", length, k, detail, {name: graph.replay for name, graph in graphs.items()}, repeat=20)


def ffn(tokens: int, by_columns: bool) -> Row:
    """A tenth of the units kept; the down weight as `nn.Linear` has it, or by columns."""
    model, units = 4096, 14336
    x, up, gate = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((tokens, model), *[(units, model)] * 2)
    )
    down = torch.randn(units, model, device="cuda", dtype=torch.bfloat16).T
    down = down if by_columns else down.contiguous()

    def topk(lowering: str) -> Tensor:
        return torch.ops.topk_fx.ffn(x, up, None, gate, None, down, None, "silu", units // 10, lowering=lowering)

    rivals: dict[str, Callable[[], Tensor]] = {
        TOPK: lambda: topk("triton"),
        DENSE: lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
    }
    graphs = {name: _as_graph(functools.partial(_no_grad, f)) for name, f in rivals.items()}
    calls = {name: graph.replay for name, graph in graphs.items()}
    return _measure("FFN", tokens, units // 10, "by columns" if by_columns else "by rows", calls, repeat=20)


def _inputs(batch: int, heads: int, key_heads: int, queries: int, keys: int) -> list[Tensor]:
    shapes = ((batch, heads, queries, 128), (batch, key_heads, keys, 128), (batch, key_heads, keys, 128))
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]


def _rivals(query: Tensor, key: Tensor, value: Tensor, k: int, is_causal: bool) -> dict[str, Callable[[], Tensor]]:
    is_grouped = key.size(1) != query.size(1)
    score = "causal" if is_causal else ""

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=is_grouped)

    def topk(lowering: str) -> Tensor:
        scale = query.size(-1) ** -0.5
        return torch.ops.topk_fx.attention(query, key, value, [], score, scale, k, lowering=lowering)

    rivals: dict[str, Callable[[], Tensor]] = {
        TOPK: lambda: topk("triton"),
        FLASH: lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        CUDNN: lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    if is_causal and query.size(2) in (4096, 16384, 65536):
        mask = _causal_block_mask(query.size(2))
        rivals[FLEX] = lambda: _compiled_flex()(query, key, value, block_mask=mask)
    if is_causal and query.size(2) <= LONGEST_OF_ATEN:
        rivals[ATEN] = lambda: topk("aten")
    return rivals


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _causal_block_mask(length: int) -> Any:
    return create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, device="cuda", _compile=True)


def _no_grad(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


def _as_graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _measure(
    task: str, length: int, k: int, detail: str, calls: dict[str, Callable[[], object]], repeat: int = 1
) -> Row:
    """Calls each rival once to warm up and once for its memory, then times all of them in turns."""
    row = Row(task, length, k, detail, {}, {})
    for name, call in list(calls.items()):
        try:
            call()
        except RuntimeError as error:
            print(f"    {name} cannot run {task} of {length:,}: {str(error).splitlines()[0]}")
            del calls[name]
            continue
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        row.mebibytes[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    for name in calls:
        row.milliseconds[name] = []
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeat):
                call()
            end.record()
            torch.cuda.synchronize()
            row.milliseconds[name].append(start.elapsed_time(end) / repeat)
    torch.cuda.empty_cache()
    return row


if __name__ == "__main__":
    raise SystemExit(main())
