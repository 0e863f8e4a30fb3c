"""The paper's figures of time and memory, ours beside theirs, in half an hour on two cores.

    python examples/benchmark_paper.py                                   # attention, FFN and a 12-layer model, on a CPU
    python examples/benchmark_paper.py --parts attention --k 64 --lengths 2048 4096 8192 16384 32768
    python examples/benchmark_paper.py --device cuda --gibibytes 40 --lengths 2048 4096 10240 20480 40960 61440

Forward and backward of three things, as in the paper: causal attention of 12 heads of 64, its queries, keys and
values given, against the length; an FFN of 768 with ReLU against its hidden size; and a model of 12 such layers of
both, with top-k in its attention alone, against the length; of the model's rivals SDPA is compiled by Inductor, as
top-k is. Each point is measured in a fresh process: after a call that warms up, the time of a call, and how far memory
rises in it above what is resident, gradients included. A rival is left out from the size on where it would take more
than --gibibytes or --seconds, by its last size and quadratic growth. "paper's code" is written in the manner of the
paper's code, in examples/paper_code.py; the columns "paper" are read from the paper's own plots, in float32 on a GPU
of 2021. Growth is the least-squares slope of log(memory) over log(size). Figures go to
examples/results/cpu_paper.md and .json, and a plot, laid out as the paper's, beside them.
"""

from __future__ import annotations

import argparse
import functools
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import figures
import paper_code
from byte_model import ByteModel
from measure import measure_in_turns
from paper_figures import PAPER
from tables import Table, save

HEADS, DEPTH, LAYERS = 12, 64, 12
SIZE = HEADS * DEPTH
VANILLA, CHUNKED, SDPA, PAPERS, TOPK = "vanilla", "chunked dense", "SDPA", "paper's code", "top-k"
QUICK = {
    "lengths": [64, 128, 256], "model_lengths": [16, 32], "hidden": [64, 128], "tokens": 64, "k": [8], "ffn_k": [16],
    "layers": 1, "rounds": 1, "fit_from": 1,
}  # fmt: skip

Call = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    tables, panels = [], {}
    for part in options.parts:
        points = measure_part(part, options)
        panels[part] = points
        tables += [points_table(part, points, options), growth_table(part, points, options)]
        for table in tables[-2:]:
            print(f"\n{table.markdown()}", flush=True)
    where = (
        figures.machine() if options.device == "cpu" else f"{torch.get_device_module(options.device).get_device_name()}"
    )
    clock = "CPU time of one thread" if clock_of(options) is time.process_time else "wall time"
    heading = f"float32, {where}, {options.threads} thread(s), {clock}, medians of {options.rounds}"
    paths = save(tables, f"{heading}: {options.command}", options.output.parent, options.output.name)
    if figures.has_matplotlib():
        from charts import save_growth

        paths.append(options.output.with_suffix(".png"))
        save_growth(paths[-1], f"{heading}\ndotted: the paper's own, on a GPU of 2021", PARTS, panels, PAPER)
    for path in paths:
        print(f"Written: {path}")


PARTS = {
    "attention": "Causal attention, 12 heads x 64, against its length",
    "ffn": "FFN of 768, against its hidden size",
    "model": "12 layers of 768, against the length",
}
FIT_FROM = {"attention": 2048, "ffn": 2048, "model": 512}
Points = dict[str, dict[int, tuple[float, float]]]
"""For each rival by size: MiB and seconds."""


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmark_paper.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384], help="of attention")
    parser.add_argument("--model-lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="of the model")
    parser.add_argument("--hidden", nargs="+", type=int, default=[2048, 4096, 8192, 16384], help="sizes of the FFN")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of the FFN; the paper took 262,144 in chunks of 16,384"
    )
    parser.add_argument(
        "--chunk", type=int, default=1024, help="queries or tokens of a chunk of those rivals that have chunks"
    )
    parser.add_argument("--k", nargs="+", type=int, default=[64, 128], help="keys kept")
    parser.add_argument("--ffn-k", nargs="+", type=int, default=[64, 128, 512], help="hidden units kept")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of a point")
    parser.add_argument("--gibibytes", type=float, default=6.0, help="memory that a call may take")
    parser.add_argument("--seconds", type=float, default=60.0, help="time that a call may take")
    parser.add_argument(
        "--fit-from", type=int, help=f"the least length or hidden size that growth is fitted on; default: {FIT_FROM}"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or another of torch's")
    parser.add_argument("--threads", type=int, default=1, help="on cpu 1 makes the clock the CPU time, else the wall")
    parser.add_argument("--output", type=Path, help="without suffix; default: examples/results/{cpu,gpu}_paper")
    parser.add_argument("--quick", action="store_true", help="sizes that show no more than that it runs")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    options.output = options.output or figures.RESULTS / f"{'cpu' if options.device == 'cpu' else 'gpu'}_paper"
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", f"examples/{parser.prog}", *given])
    return options


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.device == "cpu" and options.threads == 1 else time.perf_counter


def sizes_of(part: str, options: argparse.Namespace) -> list[int]:
    return sorted({"attention": options.lengths, "ffn": options.hidden, "model": options.model_lengths}[part])


def rivals_of(part: str, options: argparse.Namespace) -> list[tuple[str, int]]:
    """Name and k, 0 for dense ones."""
    dense = [(VANILLA, 0), (CHUNKED, 0)] if part == "ffn" else [(VANILLA, 0), (CHUNKED, 0), (SDPA, 0)]
    ks = options.ffn_k if part == "ffn" else options.k
    return dense + [(name, k) for name in (PAPERS, TOPK) for k in ks]


def measure_part(part: str, options: argparse.Namespace) -> Points:
    points: Points = {}
    rivals, sizes = rivals_of(part, options), sizes_of(part, options)
    with tqdm(total=len(rivals) * len(sizes), desc=part, leave=False) as bar:
        for rival, k in rivals:
            name = f"{rival}, k={k}" if k else rival
            points[name] = {}
            for size in sizes:
                bar.set_description(f"{part}, {name}, {size:,}")
                if not _is_within(points[name], size, options):
                    bar.write(f"{part}: {name} is left out from {size:,} on")
                    break
                prepare = functools.partial(prepare_call, part, rival, k, size, options)
                measurement = measure_in_turns(
                    {name: prepare}, options.rounds, math.inf, lambda: None, options.device, clock_of(options)
                )[name]
                if measurement.extra_bytes is None:
                    raise SystemExit("This system does not tell the peak memory of a process.")
                points[name][size] = measurement.extra_bytes / figures.MEBIBYTE, measurement.median_seconds
                bar.update()
    return points


def _is_within(found: Mapping[int, tuple[float, float]], size: int, options: argparse.Namespace) -> bool:
    """Whether a call of this size should stay within the limits, if it grows with the square of the size."""
    if not found:
        return True
    last = max(found)
    mebibytes, seconds = (x * (size / last) ** 2 for x in found[last])
    return mebibytes <= options.gibibytes * 1024 and seconds <= options.seconds


def prepare_call(part: str, rival: str, k: int, size: int, options: argparse.Namespace) -> Call:
    """Runs in the process that measures: makes inputs and weights, warms up, and returns the call."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    call = {"attention": attention_call, "ffn": ffn_call, "model": model_call}[part](rival, k, size, options)
    call()
    return call


def attention_call(rival: str, k: int, length: int, options: argparse.Namespace) -> Call:
    inputs = [torch.randn(1, HEADS, length, DEPTH, device=options.device, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, HEADS, length, DEPTH, device=options.device)
    attend = attention_of(rival, k, options.chunk)
    if rival == TOPK:
        attend = compile_topk(attend, inner="eager", k=k)
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def ffn_call(rival: str, k: int, hidden: int, options: argparse.Namespace) -> Call:
    shapes = ((options.tokens, SIZE), (hidden, SIZE), (SIZE, hidden))
    inputs = [torch.randn(shape, device=options.device) * shape[-1] ** -0.5 for shape in shapes]
    inputs[0] *= SIZE**0.5
    for x in inputs:
        x.requires_grad_()
    grad = torch.randn(options.tokens, SIZE, device=options.device)
    ffn = {
        VANILLA: paper_code.vanilla_ffn,
        CHUNKED: functools.partial(paper_code.chunked_ffn, chunk=options.chunk),
        PAPERS: functools.partial(paper_code.topk_ffn, k=k, chunk=options.chunk),
        TOPK: paper_code.vanilla_ffn,
    }[rival]
    if rival == TOPK:
        ffn = compile_topk(ffn, inner="eager", k="all", ffn_k=k)
    return lambda: torch.autograd.grad(ffn(*inputs), inputs, grad)


def model_call(rival: str, k: int, length: int, options: argparse.Namespace) -> Call:
    model = ByteModel(SIZE, HEADS, options.layers, length).to(options.device)
    attend = attention_of(rival, k, options.chunk)
    for layer in model.layers:
        layer.attend = lambda query, key, value, mask: attend(query, key, value)
    ids = torch.randint(256, (1, length), device=options.device)
    run: Callable[..., Any] = model
    if rival == SDPA:
        run = torch.compile(model, fullgraph=True, dynamic=False)
    elif rival == TOPK:
        run = compile_topk(model, k=k)

    def step() -> None:
        F.cross_entropy(run(ids)[0], ids[0]).backward()
        model.zero_grad(set_to_none=True)

    return step


def attention_of(rival: str, k: int, chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What a rival computes; what top-k is compiled from is SDPA's call."""
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    return {
        VANILLA: paper_code.vanilla_attention,
        CHUNKED: functools.partial(paper_code.chunked_attention, chunk=chunk),
        SDPA: sdpa,
        PAPERS: functools.partial(paper_code.topk_attention, k=k, chunk=chunk),
        TOPK: sdpa,
    }[rival]


def compile_topk(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="topk", fullgraph=True, dynamic=False, options=options)


def points_table(part: str, points: Points, options: argparse.Namespace) -> Table:
    rows: dict[str, dict[str, Any]] = {}
    for name, by_size in points.items():
        for size, (mebibytes, seconds) in by_size.items():
            rows[f"{name}, {size:,}"] = {"MiB": round(mebibytes, 1), "s": seconds}
        for size, (gibibytes, seconds) in PAPER[part].get(name, {}).items():
            row = rows.setdefault(f"{name}, {size:,}", {})
            row |= {"paper: MiB": round(gibibytes * 1024), "paper: s": seconds}
    tokens = f"{options.tokens:,} tokens; the paper's: 262,144. " if part == "ffn" else ""
    return Table(PARTS[part], f"{tokens}Forward and backward: peak memory above what was resident, and time.", rows)


def growth_table(part: str, points: Points, options: argparse.Namespace) -> Table:
    rows: dict[str, dict[str, Any]] = {}
    for name, by_size in points.items():
        sizes = [size for size in by_size if size >= (options.fit_from or FIT_FROM[part])]
        if len(sizes) > 1:
            exponents = [slope(sizes, [by_size[size][n] for size in sizes]) for n in range(2)]
            rows[name] = {"memory": round(exponents[0], 3), "time": round(exponents[1], 3)}
            rows[name]["fitted on"] = f"{sizes[0]:,} to {sizes[-1]:,}"
    return Table(f"{PARTS[part]}: growth", "Exponents: 1 is linear, 2 quadratic.", rows)


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of a least-squares fit of values = constant * sizes ** exponent, on logarithms."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(max(x, 1e-9)) for x in values]).slope


if __name__ == "__main__":
    main()
