"""SmolLM2-135M under torch.compile(backend="topk"): what is rewritten, and what that does to quality, time and memory.

    make demo                                           everything; under ten minutes on two cores
    python examples/demo.py --skip-timing --k 32 16     quality alone, for other values of k

Prints the rewrite report; perplexity, accuracy and agreement with the dense model; then time and peak memory of a
forward and of a training step, beside eager attention and beside SDPA under Inductor. Saves one plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import smollm2
import topk_fx
from charts import MEBIBYTE, save_charts
from measure import Measurement, measure_in_turns
from quality import Predictions, predict
from rivals import EAGER, SDPA, TOPK, K, compile_with_topk, prepare_forward, prepare_training

SAME_LOG_PROBABILITY = 1e-3
"""Sums of the same float32 numbers in another order move the model's log-probabilities by less than this."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if k = "all" did not give what the dense model gives."""
    start = time.perf_counter()
    options = parse_arguments(arguments)
    setting = f"SmolLM2-135M-Instruct, float32, torch {torch.__version__}, {torch.get_num_threads()} CPU threads"
    print(setting, flush=True)
    model = smollm2.load_model("sdpa")
    tokens = smollm2.documentation_tokens(smollm2.load_tokenizer())
    windows = smollm2.text_windows(tokens, options.windows, options.tokens)

    dense, by_k, reports = compare_quality(model, windows, options.k)
    print_reports(reports, options.full_report)
    agrees = print_quality(dense, by_k, windows)
    tasks = {} if options.skip_timing else measure_tasks(model, tokens, options, start + 60 * options.minutes)
    save_charts(options.output, setting, dense, by_k, tasks)
    print(f"\nPlot: {options.output}    ({(time.perf_counter() - start) / 60:.1f} minutes)")
    return 0 if agrees else 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--k", type=parse_k, nargs="+", default=["all", 256, 128, 64], help='keys kept: a count, a share, or "all"'
    )
    parser.add_argument("--windows", type=int, default=8, help="windows of text for the quality figures")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in each window")
    parser.add_argument("--full-report", action="store_true", help="print a row for every site, not one for all alike")
    parser.add_argument("--skip-timing", action="store_true", help="leave out time and memory")
    parser.add_argument("--timing-k", type=parse_k, default=64, help="k of the timed model")
    parser.add_argument("--forward-tokens", type=int, default=4096, help="length of the timed forward")
    parser.add_argument("--training-tokens", type=int, default=2048, help="length of the timed training step")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each rival, at most")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="fewer rounds are timed if the demo would take longer than this"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "demo.png", help="where the plot goes"
    )
    return parser.parse_args(arguments)


def parse_k(text: str) -> K:
    """The text "all" as it is, "64" as an int, "0.25" as a float; which of them a k may be is for topk_fx to judge."""
    if text == "all":
        return text
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is neither a number nor "all"') from None


def compare_quality(
    model: PreTrainedModel, windows: Tensor, ks: Sequence[K]
) -> tuple[Predictions, dict[K, Predictions], dict[K, list[topk_fx.RewriteReport]]]:
    """What the model predicts unchanged and what it does for each k, with the reports of what was rewritten for it."""
    by_k: dict[K, Predictions] = {}
    reports: dict[K, list[topk_fx.RewriteReport]] = {}
    with tqdm(total=len(windows) * (1 + len(ks)), unit="window", desc="dense", leave=False) as bar:
        dense = predict(model, windows, bar.update)
        for k in ks:
            bar.set_description(f"k={k}")
            topk_fx.clear_reports()
            # Inductor would change the speed, not the numbers that count here, and takes a while to compile.
            torch.compiler.reset()
            by_k[k] = predict(compile_with_topk(model, k=k, inner="eager"), windows, bar.update)
            reports[k] = topk_fx.reports()
    return dense, by_k, reports


def print_reports(reports: Mapping[K, Sequence[topk_fx.RewriteReport]], full: bool) -> None:
    """Prints the reports of the first and of the last k, each with one row for all layers, or, in full, all reports."""
    ks = list(reports)
    for k in ks if full else sorted({ks[0], ks[-1]}, key=ks.index):
        print(f"\nWhat is rewritten with k={k}\n")
        for report in reports[k]:
            print(report if full else merge_layers(report))


def merge_layers(report: topk_fx.RewriteReport) -> str:
    """The report with one row for all the sites that are alike but for a number in their module path."""
    alike = Counter(
        dataclasses.replace(site, where=re.sub(r"\b\d+\b", "*", site.where), node="", number=0) for site in report.sites
    )
    rows = tuple(dataclasses.replace(site, where=f"{site.where} ({count} sites)") for site, count in alike.items())
    table = str(dataclasses.replace(report, sites=rows)).splitlines()[1:]
    return "\n".join([report.summary(), *table])


def print_quality(dense: Predictions, by_k: Mapping[K, Predictions], windows: Tensor) -> bool:
    """Prints a row for each k; returns whether k = "all", if it was run, gives what dense gives."""
    count, length = windows.shape
    print(f"\nQuality without retraining: {count} x {length:,} tokens of Python's documentation")
    print("  accuracy: the model's likeliest token is the one that follows; agreement: it is the dense model's\n")
    print(f"  {'k':>6} {'perplexity':>12} {'of dense':>10} {'accuracy':>10} {'agreement':>10}")
    for k, predictions in {"dense": dense, **by_k}.items():
        ratio = predictions.perplexity / dense.perplexity
        print(
            f"  {k:>6} {predictions.perplexity:>12.3f} {ratio:>9.3f}x {predictions.accuracy:>10.2%}"
            f" {predictions.agreement(dense):>10.2%}"
        )
    if "all" not in by_k:
        return True
    difference = by_k["all"].largest_difference(dense)
    agrees = difference < SAME_LOG_PROBABILITY
    print(
        f"\n  k=all {'agrees' if agrees else 'DOES NOT AGREE'} with dense: over {dense.actual.numel():,} tokens the"
        f" log-probabilities differ by {difference:.1e} at most"
    )
    return agrees


def measure_tasks(
    model: PreTrainedModel, tokens: Tensor, options: argparse.Namespace, deadline: float
) -> dict[str, dict[str, Measurement]]:
    """Measures and prints the forward, then the training step; each may take half of the time left before it."""
    tasks = {
        f"forward, {options.forward_tokens:,} tokens": (prepare_forward, options.forward_tokens),
        f"training step, {options.training_tokens:,} tokens": (prepare_training, options.training_tokens),
    }
    print("\nTime and memory", flush=True)
    print(f'  {EAGER}: the model uncompiled, attn_implementation="eager"')
    print(f'  {SDPA}: attn_implementation="sdpa", torch.compile(backend="inductor")')
    print(f'  {TOPK}: attn_implementation="sdpa", torch.compile(backend="topk", options={{"k": {options.timing_k!r}}})')
    print("  Each runs in a process of its own, compiled before, and they take turns.")
    print("  Memory is the rise of the process's peak resident memory during a call.")
    print("  The forward gives the last token's logits, as prefill does; a step gives the gradients of all weights.")
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        saved_model = Path(folder) / "model.pt"
        torch.save(model, saved_model)
        for tasks_left, (task, (prepare, length)) in zip(range(len(tasks), 0, -1), tasks.items(), strict=True):
            rivals = {
                name: functools.partial(prepare, name, saved_model, tokens[:length].tolist(), options.timing_k)
                for name in (EAGER, SDPA, TOPK)
            }
            now = time.perf_counter()
            share = now + (deadline - now) / tasks_left
            with tqdm(total=len(rivals) * (1 + options.rounds), unit="call", desc=task, leave=False) as bar:
                measured[task] = measure_in_turns(rivals, options.rounds, share, bar.update)
            print_measurements(task, measured[task])
    return measured


def print_measurements(task: str, rivals: Mapping[str, Measurement]) -> None:
    """Prints a row for each rival, then how top-k compares with the others, round by round."""
    rounds = len(rivals[TOPK].samples)
    note = f"{rounds} rounds" if rounds > 1 else "1 round, so without a spread; raise --minutes for more"
    print(f"\n  {task}: seconds ({note})\n")
    print(f"  {'':<16} {'median':>8} {'least':>8} {'most':>8} {'extra peak memory':>20}")
    for name, measurement in rivals.items():
        seconds = measurement.seconds
        print(
            f"  {name:<16} {measurement.median_seconds:>8.2f} {min(seconds):>8.2f} {max(seconds):>8.2f}"
            f" {describe_memory(measurement):>20}"
        )
    print()
    for other in (EAGER, SDPA):
        print(f"  {TOPK} / {other}: {compare(rivals[TOPK], rivals[other])}", flush=True)


def describe_memory(measurement: Measurement) -> str:
    if measurement.extra_bytes is None:
        return "known on Linux only"
    return f"{measurement.extra_bytes / MEBIBYTE:,.0f} MiB"


def compare(mine: Measurement, theirs: Measurement) -> str:
    """Such as "time x1.50 (1.41 to 1.62), memory x0.20": the median of the rounds' ratios, and their range."""
    ratios = mine.time_ratios(theirs)
    text = f"time x{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    if mine.extra_bytes is not None and theirs.extra_bytes:
        text += f", memory x{mine.extra_bytes / theirs.extra_bytes:.2f}"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
