"""What the training programs share: a dense and a top-k model that take the same steps in turns, for several seeds.

Both start from the same weights and see the same batches, and each step of one is followed by that of the other, so
that a slow spell of the machine meets both.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import figures
import topk_fx
from measure import measure_call
from tables import Cell, Table, save

VANILLA = "vanilla"
DTYPES = ("float32", "bfloat16", "float16")

Batch = tuple[Tensor, ...]
Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        make_model: of one seed's weights; the global generator has been seeded.
        batches: without end, of one seed.
        loss: of the model's output and a batch; the model is called with the batch's first tensor.
        evaluate: the scores of a compiled model on data that no batch holds.
    """

    make_model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[Tensor, Batch], Tensor]
    evaluate: Callable[[Callable[..., Tensor]], Scores]


@dataclasses.dataclass
class Rival:
    """One model, compiled once, that is trained anew for each seed."""

    model: nn.Module
    run: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    seconds: list[float] = dataclasses.field(default_factory=list)
    scores: dict[int, Scores] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of one rival: scores by seed and step, seconds of all steps, memory that one step takes."""

    scores: dict[int, dict[int, Scores]]
    seconds: list[float]
    extra_bytes: int | None

    @property
    def first_score(self) -> str:
        """The name of the score that the course and the plot show."""
        course = next(iter(self.scores.values()))
        return next(iter(course[max(course)]))

    def final(self, score: str) -> list[float]:
        """The score after the last step, a value for each seed."""
        return [course[max(course)][score] for course in self.scores.values()]


def parse_options(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    presets: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Any],
) -> argparse.Namespace:
    """Adds the options that both programs have, and parses.

    Args:
        parser: with the options of the one program.
        arguments: of the command line.
        presets: other defaults by the name of a flag, "quick" and "full".
        defaults: of the options added here.
    """
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and batches")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="samples of a step")
    parser.add_argument("--k", type=int, nargs="+", help="keys kept; each is a rival of its own")
    parser.add_argument("--lr", type=float, help="the largest of a one-cycle schedule of AdamW")
    parser.add_argument("--size", type=int, help="of the model")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--evaluations", type=int, default=5, help="how often the course is looked at")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or another of torch's")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of autocast; weights stay float32")
    parser.add_argument("--threads", type=int, default=1, help="on cpu 1 makes the clock the CPU time, else the wall")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="compiler of all rivals")
    parser.add_argument("--output", type=Path, default=figures.RESULTS / Path(parser.prog).stem, help="without suffix")
    for name in presets:
        parser.add_argument(f"--{name}", action="store_true", help=PRESETS[name])
    parser.set_defaults(**defaults)
    chosen = parser.parse_args(arguments)
    for name, preset in presets.items():
        if getattr(chosen, name):
            parser.set_defaults(**preset)
    options = parser.parse_args(arguments)
    if options.steps < options.evaluations or options.evaluations < 1:
        parser.error(f"--evaluations {options.evaluations} must be from 1 to --steps, which is {options.steps}")
    if options.size % options.heads:
        parser.error(f"--size {options.size} must be a multiple of --heads {options.heads}")
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", f"examples/{parser.prog}", *given])
    torch.set_num_threads(options.threads)
    return options


PRESETS = {
    "quick": "sizes that show no more than that it runs",
    "full": "the published sizes, for a GPU (give --device cuda --dtype bfloat16); what else is given still holds",
}


def train(task: Task, options: argparse.Namespace) -> dict[str, Result]:
    """Trains all rivals for each seed, and says what became of them."""
    torch.compiler.reset()
    scores: dict[str, dict[int, dict[int, Scores]]] = {}
    seconds: dict[str, list[float]] = {}
    extra_bytes: dict[str, int | None] = {}
    names = {VANILLA: None, **{f"top-k, k={k}": k for k in options.k}}
    compiled: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {}
    with tqdm(total=len(options.seeds) * options.steps, unit="step", leave=False) as bar:
        for seed in options.seeds:
            rivals: dict[str, Rival] = {}
            for name, k in names.items():
                torch.manual_seed(seed)
                fresh = task.make_model().to(options.device)
                if name not in compiled:
                    compiled[name] = fresh, compile_model(fresh, k, options)
                model, run = compiled[name]
                model.load_state_dict(fresh.state_dict())
                rivals[name] = _rival(model, run, options)
            batch = _train_seed(task, seed, rivals, options, bar)
            for name, rival in rivals.items():
                scores.setdefault(name, {})[seed] = rival.scores
                # The first step compiles.
                seconds.setdefault(name, []).extend(rival.seconds[1:])
                step = functools.partial(_step, task, rival, batch, options)
                extra_bytes[name] = measure_call(step, torch.device(options.device).type).extra_bytes
            bar.write(f"seed {seed}: " + "; ".join(f"{name} {_shown(r.scores)}" for name, r in rivals.items()))
    return {name: Result(scores[name], seconds[name], extra_bytes[name]) for name in names}


def compile_model(model: nn.Module, k: int | None, options: argparse.Namespace) -> Callable[..., Tensor]:
    """`model` under torch.compile: as it is, or with top-k attention."""
    if k is None:
        return torch.compile(model, backend=options.inner, dynamic=False)
    return torch.compile(model, backend="topk", dynamic=False, options={"k": k, "inner": options.inner})


def _rival(model: nn.Module, run: Callable[..., Tensor], options: argparse.Namespace) -> Rival:
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps + 1)
    return Rival(model, run, optimizer, schedule)


def _train_seed(task: Task, seed: int, rivals: dict[str, Rival], options: argparse.Namespace, bar: Any) -> Batch:
    """The rivals now hold their scores and times; the last batch is returned."""
    looked_at = {round(options.steps * n / options.evaluations) for n in range(1, options.evaluations + 1)}
    batches = task.batches(seed)
    for step in range(1, options.steps + 1):
        batch = tuple(x.to(options.device) for x in next(batches))
        for name, rival in rivals.items():
            topk_fx.clear_reports()
            rival.seconds.append(_step(task, rival, batch, options))
            if name != VANILLA:
                _check_rewritten(options.layers)
            rival.schedule.step()
            if step in looked_at:
                rival.model.eval()
                with torch.no_grad(), _autocast(options):
                    rival.scores[step] = task.evaluate(rival.run)
                rival.model.train()
                bar.set_description(f"seed {seed}, {name}: {_shown(rival.scores)}")
        bar.update()
    return batch


def _check_rewritten(layers: int) -> None:
    """What was compiled in this step, if anything was, has top-k attention in every layer."""
    for report in topk_fx.reports():
        sites = [site for site in report.sites if site.kind == "attention"]
        if [site.rewritten for site in sites] != [True] * layers:
            raise RuntimeError(f"attention of {layers} layers should have been rewritten, but:\n{report}")


def _step(task: Task, rival: Rival, batch: Batch, options: argparse.Namespace) -> float:
    """Takes one training step and returns its seconds."""
    clock = clock_of(options)
    start = clock()
    with _autocast(options):
        loss = task.loss(rival.run(batch[0]), batch)
    rival.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(rival.model.parameters(), 1.0)
    rival.optimizer.step()
    if options.device != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.device == "cpu" and options.threads == 1 else time.perf_counter


def _autocast(options: argparse.Namespace) -> torch.autocast:
    dtype = getattr(torch, options.dtype)
    kind = torch.device(options.device).type
    return torch.autocast(kind, dtype if options.dtype != "float32" else None, enabled=options.dtype != "float32")


def _shown(scores: dict[int, Scores]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores[max(scores)].items())


def tabulate(results: Mapping[str, Result], note: str) -> list[Table]:
    """Scores with their spread, time and memory; each seed's scores; and the course of the first score."""
    return [
        Table("Over all seeds", note, {name: _summary(results, name) for name in results}),
        Table(
            "Each seed",
            "After the last step.",
            {
                f"{name}, seed {seed}": dict(course[max(course)])
                for name, result in results.items()
                for seed, course in result.scores.items()
            },
        ),
        Table("Course", f"Mean over the seeds: {results[VANILLA].first_score}, by step.", _course(results)),
    ]


def _summary(results: Mapping[str, Result], name: str) -> dict[str, Cell]:
    result, vanilla = results[name], results[VANILLA]
    row: dict[str, Cell] = {}
    course = next(iter(result.scores.values()))
    for score in course[max(course)]:
        values = result.final(score)
        differences = [mine - theirs for mine, theirs in zip(values, vanilla.final(score), strict=True)]
        row[score] = f"{statistics.mean(values):.4f} ± {_deviation(values):.4f}"
        row[f"{score}, least to most"] = f"{min(values):.4f} to {max(values):.4f}"
        if name != VANILLA:
            row[f"{score}, less vanilla's"] = f"{statistics.mean(differences):+.4f} ± {_deviation(differences):.4f}"
    ratios = [mine / theirs for mine, theirs in zip(result.seconds, vanilla.seconds, strict=True)]
    row["step, ms"] = statistics.median(result.seconds) * 1e3
    row["of vanilla's"] = statistics.median(ratios)
    row["memory of a step, MiB"] = "unknown" if result.extra_bytes is None else result.extra_bytes / figures.MEBIBYTE
    return row


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def _course(results: Mapping[str, Result]) -> dict[str, dict[str, Cell]]:
    score = results[VANILLA].first_score
    found: dict[str, dict[str, Cell]] = {}
    for name, result in results.items():
        steps = next(iter(result.scores.values()))
        found[name] = {
            str(step): statistics.mean(course[step][score] for course in result.scores.values()) for step in steps
        }
    return found


def write(results: Mapping[str, Result], setting: str, note: str, options: argparse.Namespace) -> None:
    """Prints the tables, and writes them as OUTPUT.md and OUTPUT.json, and a plot if matplotlib is installed."""
    clock = "CPU time of one thread" if clock_of(options) is time.process_time else "wall time"
    where = figures.machine() if options.device == "cpu" else f"{options.device}, torch {torch.__version__}"
    heading = f"{setting}; {options.dtype}, {where}, {clock}: {options.command}"
    found = tabulate(results, note)
    for table in found[:2]:
        print(f"\n{table.markdown()}")
    for path in save(found, heading, options.output.parent, options.output.name):
        print(f"\nWritten: {path}")
    if figures.has_matplotlib():
        from charts import save_courses

        plot = options.output.with_suffix(".png")
        score = results[VANILLA].first_score
        courses = {
            name: [{step: x[score] for step, x in course.items()} for course in result.scores.values()]
            for name, result in results.items()
        }
        save_courses(plot, f"{setting}\n{where}", score, courses)
        print(f"Written: {plot}")
