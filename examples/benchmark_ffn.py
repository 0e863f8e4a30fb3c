"""Times the top-k FFN of few tokens on the processor against dense ones, in about a minute.

    python examples/benchmark_ffn.py                                # SwiGLU 2048 -> 8192, a tenth kept, one thread
    python examples/benchmark_ffn.py --form plain --dtypes float32 --tokens 1 2 --rounds 25

All are called in turns in one process, so that a slow spell of the machine meets them all. With one thread the clock is
the process's CPU time, which other processes disturb least; with more it is the wall. A ratio is the median of the
rounds' ratios to torch's dense FFN, and is given with their quartiles. "every unit kept" tells what the kernel buys by
reading memory faster, without selecting anything. The figures go to examples/results/cpu_ffn.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from topk_fx.lowering.cpu import build
from torch import Tensor

import topk_fx
from topk_fx.config import kept_count

RESULTS = Path(__file__).parent / "results" / "cpu_ffn.json"
DENSE = "torch, dense"
FORMS = {"gated": "silu", "plain": "gelu"}

Calls = Mapping[str, Callable[[], Tensor]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, default="gated", help="SwiGLU, or up, GELU, down")
    parser.add_argument("--model", type=int, default=2048, help="size of input and output")
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--keep", type=float, default=0.1, help="share of the hidden units that is kept")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(heading(options), flush=True)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        weights = draw_weights(options, getattr(torch, dtype))
        for tokens in options.tokens:
            calls = rivals(weights, torch.randn(tokens, options.model).to(getattr(torch, dtype)), options)
            check(calls)
            row = {"dtype": dtype, "tokens": tokens, "rivals": summarise(measure(calls, options))}
            rows.append(row)
            print(table(row), flush=True)
    facts = {"machine": machine(), "options": {name: x for name, x in vars(options).items() if name != "output"}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**facts, "rows": rows}, indent=1, default=str) + "\n")
    print(f"written to {options.output}")


def draw_weights(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Weights by the names of `topk_fx.ffn`, as nn.Linear holds them."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)

    return {
        "up_weight": draw(options.hidden, options.model),
        "gate_weight": draw(options.hidden, options.model) if options.form == "gated" else None,
        "down_weight": draw(options.model, options.hidden),
    }


def rivals(weights: dict[str, Tensor | None], input: Tensor, options: argparse.Namespace) -> Calls:
    """What competes, each ready to be called."""
    up, gate, down = (weights[name] for name in ("up_weight", "gate_weight", "down_weight"))
    assert up is not None
    assert down is not None
    by_columns = down.T.contiguous().T
    kept = kept_count(options.keep, options.hidden)

    def dense(x: Tensor) -> Tensor:
        if gate is None:
            return F.linear(F.gelu(F.linear(x, up)), down)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def topk(down_weight: Tensor, lowering: str, k: int = kept) -> Tensor:
        rest = (gate, None, down_weight, None, FORMS[options.form], k)
        return torch.ops.topk_fx.ffn(input, up, None, *rest, lowering=lowering)

    compiled = torch.compile(dense)
    return {
        DENSE: lambda: dense(input),
        "Inductor, dense": lambda: compiled(input),
        "top-k, ATen": lambda: topk(down, "aten"),
        "every unit kept, C++": lambda: topk(down, "cpu", options.hidden),
        "top-k, C++": lambda: topk(down, "cpu"),
        "top-k, C++, down weight by columns": lambda: topk(by_columns, "cpu"),
    }


def check(calls: Calls) -> None:
    """The lowerings agree; this warms all rivals up, too."""
    found = {name: call() for name, call in calls.items()}
    expected = found["top-k, ATen"]
    for name, output in found.items():
        if name.startswith("top-k"):
            torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@torch.no_grad()
def measure(calls: Calls, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def summarise(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """For each rival the median of its times, and median and quartiles of their ratios to the dense FFN's."""
    found = {}
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, seconds[DENSE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found[name] = {
            "milliseconds": round(statistics.median(times) * 1e3, 3),
            "ratio": round(middle, 3),
            "ratio_low": round(low, 3),
            "ratio_high": round(high, 3),
        }
    return found


def heading(options: argparse.Namespace) -> str:
    clock = "CPU time" if options.threads == 1 else "wall time"
    kept = kept_count(options.keep, options.hidden)
    return (
        f"{FORMS[options.form]} FFN, {options.form}, {options.model} -> {options.hidden}, {kept} units kept, "
        f"{options.threads} thread(s), {clock} of {options.rounds} rounds\n{machine()}"
    )


def machine() -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {build.current_instruction_set()}, torch {torch.__version__}, topk_fx {_version()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version() -> str:
    return str(getattr(topk_fx, "__version__", "from source"))


def table(row: Mapping[str, Any]) -> str:
    lines = [f"\n{row['dtype']}, {row['tokens']} token(s)"]
    for name, x in row["rivals"].items():
        ratios = f"x{x['ratio']:.2f}  ({x['ratio_low']:.2f} to {x['ratio_high']:.2f})"
        lines.append(f"  {name:36}{x['milliseconds']:9.2f} ms  {ratios}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
