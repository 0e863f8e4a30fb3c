"""The pictures: of the demo (quality against k, time and memory of its rivals), and of a benchmark's ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from measure import Measurement
from quality import Predictions

Measurements = Mapping[str, Mapping[str, Measurement]]
MEBIBYTE = 2**20
ROWS_OF_A_PANEL = 8


def save_charts(
    path: Path, title: str, dense: Predictions, by_k: Mapping[int | float | str, Predictions], tasks: Measurements
) -> None:
    """Writes a PNG.

    Args:
        path: the file; its folder is made.
        title: what was run, on what.
        dense: what the unchanged model predicted.
        by_k: what the rewritten model predicted for each k.
        tasks: for each task the measurement of each rival; if there are none, time and memory are left out.
    """
    rows = 2 if tasks else 1
    figure = Figure(figsize=(11, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    labels = [str(k) for k in by_k]
    perplexities = [predictions.perplexity for predictions in by_k.values()]
    agreements = [100 * predictions.agreement(dense) for predictions in by_k.values()]
    _draw_quality(axes[0][0], "Perplexity (lower is better)", labels, perplexities, dense.perplexity)
    _draw_quality(axes[0][1], "Likeliest token as dense, % of tokens", labels, agreements, 100.0)
    if tasks:
        _draw_times(axes[1][0], tasks)
        _draw_memory(axes[1][1], tasks)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def save_ratios(path: Path, title: str, baseline: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes a PNG with a group of bars per row and a bar per rival: its time as a share of the baseline's.

    Args:
        path: the file; its folder is made.
        title: what was measured, on what.
        baseline: the rival to which the ratios are.
        rows: by their labels what `figures.summarise` returned.
    """
    names = [name for name in dict.fromkeys(name for row in rows.values() for name in row) if name != baseline]
    labels = list(rows)
    panels = [labels[first : first + ROWS_OF_A_PANEL] for first in range(0, len(labels), ROWS_OF_A_PANEL)]
    figure = Figure(figsize=(12, 4 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False, sharey=True)[:, 0], panels, strict=True):
        axes.axhline(1.0, color="grey", linestyle="--", label=baseline)
        for place, name in enumerate(names):
            found = [(group, rows[label][name]) for group, label in enumerate(panel) if name in rows[label]]
            middles = [x["ratio"] for _, x in found]
            lengths = [
                [x["ratio"] - x["ratio_low"] for _, x in found],
                [x["ratio_high"] - x["ratio"] for _, x in found],
            ]
            positions = [group * (len(names) + 1) + place for group, _ in found]
            axes.bar(positions, middles, 1.0, yerr=lengths, capsize=2, color=f"C{place}", label=name)
        centres = [group * (len(names) + 1) + (len(names) - 1) / 2 for group in range(len(panel))]
        axes.set_xticks(centres, panel, rotation=20, ha="right", fontsize="small")
        axes.set(yscale="log", ylabel=f"time / {baseline}")
        axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes.get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    figure.suptitle(f"{title}; whiskers: quartiles", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def save_courses(path: Path, title: str, score: str, courses: Mapping[str, Sequence[Mapping[int, float]]]) -> None:
    """Writes a PNG: for each rival a thin line a seed, of the score by training step, and a thick one of their mean."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, seeds) in enumerate(courses.items()):
        steps = list(seeds[0])
        for values in seeds:
            axes.plot(steps, [values[step] for step in steps], color=f"C{number}", linewidth=0.7, alpha=0.6)
        means = [sum(values[step] for values in seeds) / len(seeds) for step in steps]
        axes.plot(steps, means, color=f"C{number}", linewidth=2.5, label=name)
    axes.set(xlabel="training step", ylabel=score)
    axes.legend(title="thin: each seed", fontsize="small")
    figure.suptitle(title, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def save_growth(
    path: Path,
    title: str,
    parts: Mapping[str, str],
    ours: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]],
    theirs: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]],
) -> None:
    """Writes a PNG: a row for each part, memory on the left and time on the right, a line for each rival.

    Args:
        path: the file; its folder is made.
        title: what was measured, on what.
        parts: what each part is.
        ours: for each part that was measured and each rival, by size: MiB and seconds; solid.
        theirs: published, likewise, in GiB and seconds; dotted.
    """
    figure = Figure(figsize=(12, 4 * len(ours)), layout="constrained")
    for panels, (part, rivals) in zip(figure.subplots(len(ours), 2, squeeze=False), ours.items(), strict=True):
        names = list(dict.fromkeys([*rivals, *theirs[part]]))
        for number, name in enumerate(names):
            mine = [(size, mebibytes / 1024, seconds) for size, (mebibytes, seconds) in rivals.get(name, {}).items()]
            published = [(size, *values) for size, values in theirs[part].get(name, {}).items()]
            for points, style, label in ((mine, "o-", name), (published, "x:", f"{name}, published")):
                for column, axes in enumerate(panels, 1):
                    if points:
                        axes.plot(
                            [x[0] for x in points], [x[column] for x in points], style, color=f"C{number}", label=label
                        )
        for axes, label in zip(panels, ("peak memory, GiB", "time, s"), strict=True):
            axes.set(xscale="log", yscale="log", title=parts[part], ylabel=label)
            axes.set_xlabel("hidden size" if part == "ffn" else "length")
        panels[1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def _draw_quality(axes: Axes, title: str, labels: Sequence[str], values: Sequence[float], dense: float) -> None:
    axes.axhline(dense, color="grey", linestyle="--", label="dense")
    axes.plot(labels, values, marker="o", label='backend="topk"')
    axes.margins(y=0.2)
    axes.set(title=title, xlabel="k, keys kept for each query")
    axes.legend()


def _draw_times(axes: Axes, tasks: Measurements) -> None:
    for position, name, measurement in _bars(tasks):
        median = measurement.median_seconds
        spread = [[median - min(measurement.seconds)], [max(measurement.seconds) - median]]
        axes.bar(position, median, yerr=spread, capsize=4, color=_color(tasks, name))
    _finish_bars(axes, "Seconds (median; whiskers: least and most)", tasks)


def _draw_memory(axes: Axes, tasks: Measurements) -> None:
    for position, name, measurement in _bars(tasks):
        if measurement.extra_bytes is not None:
            axes.bar(position, measurement.extra_bytes / MEBIBYTE, color=_color(tasks, name))
    _finish_bars(axes, "Extra peak memory, MiB", tasks)


def _bars(tasks: Measurements) -> list[tuple[float, str, Measurement]]:
    """Position, rival and measurement of each bar: a group per task, bars side by side in it."""
    return [
        (group * (len(rivals) + 1) + place, name, measurement)
        for group, rivals in enumerate(tasks.values())
        for place, (name, measurement) in enumerate(rivals.items())
    ]


def _color(tasks: Measurements, name: str) -> str:
    names = list(next(iter(tasks.values())))
    return f"C{names.index(name)}"


def _finish_bars(axes: Axes, title: str, tasks: Measurements) -> None:
    width = len(next(iter(tasks.values()))) + 1
    axes.set_xticks([group * width + (width - 2) / 2 for group in range(len(tasks))], list(tasks))
    for name in next(iter(tasks.values())):
        axes.bar(0, 0, color=_color(tasks, name), label=name)
    axes.set(title=title)
    axes.legend()
