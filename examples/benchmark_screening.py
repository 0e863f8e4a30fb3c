"""Times top-k attention with keys screened in int8 against the same without, and against dense, in some ten minutes.

    python examples/benchmark_screening.py                              # one thread: prefill, then decoding
    python examples/benchmark_screening.py --what decode --lengths 65536 --dtypes bfloat16 --k 64 --rounds 15

Queries and keys are random. All rivals are called in turns in one process. With one thread the clock is the process's
CPU time, which other processes disturb least; with more it is the wall. For decoding the caches are emptied before each
call. A ratio is the median of the rounds' ratios, with their quartiles. The figures go to
examples/results/cpu_screening.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from topk_fx.lowering.cpu import screening
from torch import Tensor

import topk_fx
from figures import machine

RESULTS = Path(__file__).parent / "results" / "cpu_screening.json"
DENSE, PLAIN, SCREENED = "torch, dense", "top-k, plain", "top-k, screened"
DTYPES = ("float32", "bfloat16", "float16")

Calls = Mapping[str, Callable[[], Tensor]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=["prefill", "decode"], default=["prefill", "decode"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, help="default: 4096 and 16384, for decoding 16384 and 65536")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], help="head sizes")
    parser.add_argument("--k", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(machine(), flush=True)
    rows: list[dict[str, Any]] = []
    for what in options.what:
        for facts, calls, empty_caches in {"prefill": prefill, "decode": decode}[what](options):
            counts = check(calls, getattr(torch, facts["dtype"]))
            kept = facts["k"] * max(1, counts.screened)
            seconds = measure(calls, options, empty_caches)
            row = {
                **facts,
                "survivors_per_kept": round(counts.survivors / kept, 2),
                "milliseconds": {name: round(statistics.median(x) * 1e3, 3) for name, x in seconds.items()},
                "screened/plain": ratio(seconds[SCREENED], seconds[PLAIN]),
                "screened/dense": ratio(seconds[SCREENED], seconds[DENSE]),
            }
            rows.append(row)
            print(line(row), flush=True)
    command = shlex.join(
        ["python", "examples/benchmark_screening.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"written to {options.output}")


Case = tuple[dict[str, Any], Calls, Callable[[], object]]


def prefill(options: argparse.Namespace) -> Iterator[Case]:
    """One head, as many queries as keys; dense is SDPA."""
    for dtype in options.dtypes:
        for length in options.lengths or [4096, 16384]:
            for size in options.sizes:
                query, key, value = (torch.randn(1, 1, length, size).to(getattr(torch, dtype)) for _ in range(3))
                for is_causal in (False, True):
                    for k in options.k:
                        facts = {"what": "prefill", "dtype": dtype, "length": length, "size": size, "k": k}
                        arguments = (query, key, value, k, is_causal)
                        yield {**facts, "causal": is_causal}, prefill_calls(*arguments), lambda: None


def prefill_calls(query: Tensor, key: Tensor, value: Tensor, k: int, is_causal: bool) -> Calls:
    def topk(is_screened: bool) -> Tensor:
        with screening.forced(is_screened):
            return topk_fx.attention(query, key, value, k=k, is_causal=is_causal)

    return {
        DENSE: lambda: F.scaled_dot_product_attention(query, key, value, is_causal=is_causal),
        PLAIN: lambda: topk(False),
        SCREENED: lambda: topk(True),
    }


def decode(options: argparse.Namespace) -> Iterator[Case]:
    """One query of eight heads, with eight key heads or two; dense is two products and a softmax."""
    junk = torch.zeros(128 * 2**20, dtype=torch.uint8)
    for dtype in options.dtypes:
        for length in options.lengths or [16384, 65536]:
            for size in options.sizes:
                for key_heads in (8, 2):
                    query = torch.randn(1, 8, 1, size).to(getattr(torch, dtype))
                    key, value = (torch.randn(1, key_heads, length, size).to(query.dtype) for _ in range(2))
                    for k in options.k:
                        facts = {"what": "decode", "dtype": dtype, "length": length, "size": size, "k": k}
                        yield (
                            {**facts, "key_heads": key_heads},
                            decode_calls(query, key, value, k),
                            lambda: junk.add_(1),
                        )


def decode_calls(query: Tensor, key: Tensor, value: Tensor, k: int) -> Calls:
    groups = query.unflatten(1, (key.size(1), -1)).squeeze(-2)
    screened = topk_fx.ScreenedKeys(key)

    def topk(screened_keys: topk_fx.ScreenedKeys | None) -> Tensor:
        return topk_fx.attention(query, key, value, k=k, enable_gqa=True, screened_keys=screened_keys)

    return {
        DENSE: lambda: torch.softmax(groups @ key.mT * query.size(-1) ** -0.5, -1) @ value,
        PLAIN: lambda: topk(None),
        SCREENED: lambda: topk(screened),
    }


def check(calls: Calls, dtype: torch.dtype) -> screening.Counts:
    """Screened and plain agree but for rounding, which can decide between keys of nearly the same score in one row of a
    thousand; this warms all rivals up, too. Returns what became of the screened rows."""
    calls[DENSE]()
    expected = calls[PLAIN]()
    with screening.forced(True) as counts:
        actual = calls[SCREENED]()
    is_other = (actual.float() - expected.float()).abs().amax(-1) > 16 * torch.finfo(dtype).eps
    if is_other.float().mean() > 1e-3:
        raise AssertionError(f"screening changed {is_other.sum()} of {is_other.numel()} rows")
    return counts


@torch.no_grad()
def measure(calls: Calls, options: argparse.Namespace, empty_caches: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            empty_caches()
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios."""
    ratios = [x / y for x, y in zip(mine, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def line(row: Mapping[str, Any]) -> str:
    case = ", ".join(f"{row[name]}" if name in ("what", "dtype") else f"{name} {row[name]}" for name in list(row)[:6])
    ratios = "  ".join(f"{name} x{row[name]['median']:.2f}" for name in ("screened/plain", "screened/dense"))
    return f"{case:66}{row['milliseconds'][SCREENED]:9.2f} ms  {ratios}  survivors {row['survivors_per_kept']} k"


if __name__ == "__main__":
    main()
