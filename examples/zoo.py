"""The zoo: every Hugging Face architecture that can be built tiny, compiled with backend="topk", against dense.

    python examples/zoo.py                       # all of them; the table is written to examples/results/zoo.md
    python examples/zoo.py llama bert t5 --attention sdpa

Every floating-point output with k="all" is compared with that of the model as it is, NaN included. The rewritten graph
runs uncompiled (inner="eager"), since what is asked here is what is found and whether it is right, not how fast it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import multiprocessing
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tiny_models
import topk_fx

RESULTS = Path(__file__).parent / "results" / "zoo.md"
TOLERANCE = 1e-4
"""The largest difference that counts as rounding, as a share of the largest magnitude of a tensor (at least 1)."""

NOT_ATTENTION = {
    "not_attention", "softmax_not_over_keys", "product_not_over_keys", "value_is_vector", "result_unused",
}  # fmt: skip
"""Reasons of a softmax that is none of attention, which is rightly left: routers, pooling, classifiers, dead code."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of an architecture with one implementation of attention.

    Attributes:
        problem: "not built", "wrong", "crashed", "dense fails too", "timed out", "died", or "" if all is well.
        detail: a sentence on the problem.
        difference: the largest of all outputs, as a share of the largest magnitude of a tensor.
    """

    architecture: str
    attention: str
    problem: str = ""
    detail: str = ""
    sites: tuple[topk_fx.Site, ...] = ()
    difference: float | None = None
    seconds: float = 0.0

    def of_kind(self, kind: str) -> list[topk_fx.Site]:
        """The sites of a kind, without each softmax that is no attention."""
        return [s for s in self.sites if s.kind == kind and not (kind == "attention" and s.reason in NOT_ATTENTION)]

    def count(self, kind: str) -> str:
        sites = self.of_kind(kind)
        return f"{sum(site.rewritten for site in sites)} of {len(sites)}"

    @property
    def ran(self) -> bool:
        return self.problem in ("", "wrong")


def run(architecture: str, attention: str) -> Result:
    """Builds a model, runs it dense and with every key kept, and compares."""
    start = time.perf_counter()
    result = Result(architecture, attention)

    def ended(**facts: Any) -> Result:
        sites = tuple(site for report in topk_fx.reports() for site in report)
        return dataclasses.replace(result, sites=sites, seconds=time.perf_counter() - start, **facts)

    try:
        model, inputs = tiny_models.build(architecture, attention)
    except tiny_models.NotBuilt as error:
        return ended(problem="not built", detail=str(error))
    expected = floats_of(model, inputs)
    try:
        found = floats_of(torch.compile(model, backend="topk", options={"k": "all", "inner": "eager"}), inputs)
    except Exception as error:
        problem = "crashed" if _runs_with_dynamo(model, inputs) else "dense fails too"
        return ended(problem=problem, detail=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    difference = largest_difference(found, expected)
    if difference <= TOLERANCE:
        return ended(difference=difference)
    again = largest_difference(floats_of(model, inputs), expected)
    detail = f"; two dense runs differ by {again:.1e}" if again > TOLERANCE else ""
    return ended(problem="wrong", detail=f"the outputs differ by {difference:.1e}{detail}", difference=difference)


def floats_of(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Every floating-point tensor that a model gives, drawing the same random numbers each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = tree_leaves(model(**inputs))
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """As a share of the largest magnitude of a tensor; infinite where shapes, or the places of NaN or inf, differ."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    largest = 0.0
    for x, y in zip(found, expected, strict=True):
        finite = y.isfinite()
        if not torch.equal(x[~finite], y[~finite]) and not torch.equal(x[~finite].isnan(), y[~finite].isnan()):
            return float("inf")
        if finite.any():
            magnitude = max(1.0, y[finite].abs().max().item())
            difference = (x[finite].double() - y[finite].double()).abs().max().item() / magnitude
            largest = max(largest, difference if difference == difference else float("inf"))
    return largest


def _runs_with_dynamo(model: nn.Module, inputs: dict[str, Any]) -> bool:
    torch._dynamo.reset()
    try:
        floats_of(torch.compile(model, backend="eager"), inputs)
    except Exception:
        return False
    return True


def run_all(cases: Sequence[tuple[str, str]], jobs: int, limit: float) -> Iterator[Result]:
    """The result of each case as it ends; each runs in a process of its own, which is ended after `limit` seconds."""
    context = multiprocessing.get_context("fork")  # after the imports, which take longer than most of the models
    waiting = list(reversed(cases))
    running: dict[Connection, tuple[tuple[str, str], Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(theirs, case))
            process.start()
            theirs.close()
            running[ours] = (case, process, time.perf_counter() + limit)
        ready = wait(list(running), timeout=1)
        for connection, (case, process, deadline) in list(running.items()):
            is_late = time.perf_counter() > deadline
            if connection not in ready and not is_late:
                continue
            try:
                result = (
                    connection.recv() if connection in ready else Result(*case, "timed out", f"after {limit:.0f} s")
                )
            except EOFError:
                process.join()
                result = Result(*case, "died", f"its process ended with code {process.exitcode}")
            process.kill()
            process.join()
            del running[connection]
            yield result


def _send(connection: Connection, case: tuple[str, str]) -> None:
    try:
        result = run(*case)
    except Exception as error:
        result = Result(*case, "dense fails too", f"{type(error).__name__}: {error}"[:200])
    connection.send(result)


def table(results: Sequence[Result]) -> str:
    """The summary, the misses by reason, and a row for each architecture, as Markdown."""
    by_name: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda r: (r.architecture, r.attention)):
        by_name[result.architecture].append(result)
    return "\n".join([*_summary(by_name), "", *_misses(by_name), "", *_rows(by_name), "", *_not_built(by_name), ""])


def _summary(by_name: dict[str, list[Result]]) -> list[str]:
    def count(fits: Any) -> int:
        return sum(any(r.ran or r.problem == "crashed" for r in rs) and fits(rs) for rs in by_name.values())

    def sites(rs: list[Result], kind: str = "attention") -> list[topk_fx.Site]:
        return [site for r in rs for site in r.of_kind(kind)]

    def has(kind: str) -> int:
        return count(lambda rs: bool(sites(rs, kind)))

    def whole(kind: str, *expected: str) -> int:
        """How many have all sites of a kind rewritten, or left for an expected reason."""
        return count(
            lambda rs: bool(sites(rs, kind)) and all(x.rewritten or x.reason in expected for x in sites(rs, kind))
        )

    masks = count(lambda rs: any(site.mask_bytes for site in sites(rs)))
    found = [site for rs in by_name.values() for site in sites(rs)]
    attentions = sorted({r.attention for rs in by_name.values() for r in rs})
    return [
        "# Tiny models of Hugging Face architectures",
        "",
        f"Written by `make zoo` with torch {torch.__version__.partition('+')[0]} and transformers "
        f'{transformers.__version__}: `backend="topk"`, `k="all"`, `inner="eager"`, '
        f"attention {' and '.join(attentions)}.",
        "",
        "| architectures | |",
        "|---|---|",
        f"| in transformers with a model class | {len(tiny_models.architectures())} |",
        f"| tried in this run | {len(by_name)} |",
        f"| built and run | {count(lambda rs: True)} |",
        f"| with softmax attention | {has('attention')} |",
        f"| all of their attention rewritten | {whole('attention')} |",
        f"| with FFNs | {has('ffn')} |",
        f"| all of their FFNs rewritten, but for those of experts | {whole('ffn', 'moe_experts')} |",
        f"| outputs that differ from dense by more than {TOLERANCE:.0e} | {count(lambda rs: _has(rs, 'wrong'))} |",
        f"| crashes that dense does not have | {count(lambda rs: _has(rs, 'crashed'))} |",
        f"| a mask or bias of queries x keys left | {masks} |",
        "",
        f"{sum(site.rewritten for site in found)} of {len(found)} attention sites are rewritten.",
    ]


def _has(results: Sequence[Result], problem: str) -> bool:
    return any(r.problem == problem for r in results)


def _misses(by_name: dict[str, list[Result]]) -> list[str]:
    """What was left dense, by reason, with the names of the architectures."""
    names: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, results in by_name.items():
        for result in results:
            for site in result.sites:
                if not site.rewritten:
                    kind = "no attention" if site.reason in NOT_ATTENTION and site.kind == "attention" else site.kind
                    names[kind, site.reason].add(name)
                elif site.mask_bytes:
                    names["mask left", "of queries x keys"].add(name)
            if result.problem in ("wrong", "crashed", "timed out", "died", "dense fails too"):
                names[result.problem, result.detail].add(name)
    lines = ["| left dense, or wrong | reason | architectures |", "|---|---|---|"]
    return lines + [f"| {kind} | {_cell(why)} | {', '.join(sorted(x))} |" for (kind, why), x in sorted(names.items())]


def _rows(by_name: dict[str, list[Result]]) -> list[str]:
    lines = [
        "| architecture | attention | attention sites | FFN sites | difference | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for results in by_name.values():
        for r in results:
            if r.problem == "not built":
                continue
            counts = [
                f"{sum(s.rewritten for s in r.of_kind(kind))} of {len(r.of_kind(kind))}"
                for kind in ("attention", "ffn")
            ]
            difference = r.problem if r.difference is None else f"{r.difference:.0e}"
            lines.append(f"| {' | '.join([r.architecture, r.attention, *counts, difference, f'{r.seconds:.0f}'])} |")
    return lines


def _not_built(by_name: dict[str, list[Result]]) -> list[str]:
    lines = ["Not built:", ""]
    for name, results in by_name.items():
        if all(r.problem == "not built" for r in results):
            lines.append(f"- {name}: {_cell(results[0].detail.removeprefix(f'{name}: '))}")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", help="model types of transformers; by default all")
    parser.add_argument("--attention", nargs="+", choices=("eager", "sdpa"), default=("eager", "sdpa"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one may take")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = arguments.architectures or tiny_models.architectures()
    cases = [(name, attention) for name in names for attention in arguments.attention]
    torch.set_num_threads(1)  # before any thread is there: a process that has some must not be forked
    warnings.simplefilter("ignore")
    torch._logging.set_logs(dynamo=logging.ERROR)  # not where a model breaks the graph
    run("llama", "eager")  # so that what the first compile imports is imported once
    torch._dynamo.reset()
    topk_fx.clear_reports()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for result in run_all(cases, arguments.jobs, arguments.limit):
        results.append(result)
        if len(results) % 50 == 0:
            arguments.output.write_text(table(results))  # so that a run which is ended leaves what it found
        what = f"{result.problem}: {result.detail}" if result.problem else f"{result.count('attention')} rewritten"
        print(f"{len(results)} of {len(cases)}: {result.architecture} ({result.attention}): {what}", flush=True)
    arguments.output.write_text(table(results))
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
