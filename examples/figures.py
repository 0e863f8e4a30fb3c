"""What the benchmarks share: options, the figures of a row, a table on the screen, and JSON and a plot on disk."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from topk_fx.lowering.cpu import build

from measure import Measurement

RESULTS = Path(__file__).parent / "results"
MEBIBYTE = 2**20


def parse_options(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    output: str,
    quick: Mapping[str, Any],
    rounds: int = 7,
) -> argparse.Namespace:
    """Adds the options that every benchmark has, parses, and sets the number of threads and the seed.

    Args:
        parser: with the options of the one benchmark.
        arguments: of the command line.
        output: the default name of the JSON file in examples/results.
        quick: the defaults under --quick.
        rounds: how often each rival is called if nothing else is said.
    """
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each rival is called")
    parser.add_argument(
        "--threads", type=int, default=1, help="1 also makes the clock the CPU time, else it is the wall"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="JSON; the plot goes beside it")
    parser.add_argument("--quick", action="store_true", help="sizes that show no more than that it runs")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**quick)
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", f"examples/{parser.prog}", *given])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def summarise(measurements: Mapping[str, Measurement], baseline: str, topk: str) -> dict[str, dict[str, float | None]]:
    """For each rival the median and the quartiles of its times in milliseconds, and of two ratios, round by round.

    `ratio` is its time over the baseline's, `topk_ratio` top-k's time over its own: below 1 where top-k is faster.
    `extra_mebibytes` is how far memory rose during a call, None where that is unknown.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name, measurement in measurements.items():
        extra = measurement.extra_bytes
        found[name] = {
            **_quartiles("milliseconds", [seconds * 1e3 for seconds in measurement.seconds]),
            **_quartiles("ratio", measurement.time_ratios(measurements[baseline])),
            **_quartiles("topk_ratio", measurements[topk].time_ratios(measurement)),
            "extra_mebibytes": None if extra is None else round(extra / MEBIBYTE, 1),
        }
    return found


def _quartiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return {name: round(middle, 4), f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}


def table(label: str, rivals: Mapping[str, Mapping[str, Any]], baseline: str, topk: str) -> str:
    """A row for each rival: median time, its ratio to the baseline with quartiles, top-k's ratio to it, memory."""
    width = max(map(len, rivals)) + 2
    lines = [f"\n{label}", f"  {'':{width}}{'ms':>10}  {'/ ' + baseline:26}{topk + ' / it':20}{'extra MiB':>10}"]
    for name, x in rivals.items():
        ratio = f"x{x['ratio']:.2f}  ({x['ratio_low']:.2f} to {x['ratio_high']:.2f})"
        memory = "unknown" if x["extra_mebibytes"] is None else f"{x['extra_mebibytes']:,.1f}"
        share = f"x{x['topk_ratio']:.2f}"
        lines.append(f"  {name:{width}}{x['milliseconds']:10.2f}  {ratio:26}{share:20}{memory:>10}")
    return "\n".join(lines)


def write(options: argparse.Namespace, baseline: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The rows, by their labels, as JSON with what they were measured by; and a plot, if matplotlib is installed."""
    hidden = ("output", "command", "quick")
    facts = {
        "command": options.command,
        "machine": machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "clock": clock(options.threads),
        "options": {name: x for name, x in vars(options).items() if name not in hidden},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in facts.items()]
    text = ",\n  ".join(json.dumps({"label": label, **row}) for label, row in rows.items())
    options.output.write_text("{\n" + "".join(lines) + f' "rows": [\n  {text}\n ]\n}}\n', encoding="utf-8")
    print(f"\nFigures: {options.output}")
    if not has_matplotlib():
        return
    from charts import save_ratios

    plot = options.output.with_suffix(".png")
    save_ratios(plot, heading(options), baseline, {label: row["rivals"] for label, row in rows.items()})
    print(f"Plot: {plot}")


def has_matplotlib() -> bool:
    """Whether there will be a plot; if not, it is said why."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    print("No plot: matplotlib is not installed (pip install '.[plots]').")
    return False


def heading(options: argparse.Namespace) -> str:
    setting = f"{options.threads} thread(s), {clock(options.threads)}, medians of {options.rounds} rounds in turns"
    return f"{machine()}\n{setting}"


def clock(threads: int) -> str:
    return "CPU time" if threads == 1 else "wall time"


def machine() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {build.current_instruction_set()}, torch {torch.__version__}"
