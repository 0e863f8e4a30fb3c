"""What happened to each candidate of a graph, and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Site:
    """One softmax, attention call or FFN of a graph.

    Attributes:
        kind: "attention" or "ffn".
        rewritten: whether a top-k op stands in its place now.
        reason: why not, as a snake_case code; "" if rewritten.
        detail: a sentence for the model's owner.
        where: the module path, such as "model.layers.0.self_attn"; "" if tracing recorded none.
        number: which of the attention and FFN sites at that path it is, from 0 in graph order; `sites=` knows it as
            "model.layers.0#1". 0 for what is no site.
        node: the name of the graph's node that the candidate was found by.
        shapes: sizes by name, as text: {"query": "[2, 8, 1024, 64]", ...}; empty if tracing recorded none.
        k: keys kept per query or units kept per token, as text; "" if not rewritten.
        lowering: what computes the op, and "" if not rewritten.
        dense_bytes: of the scores (or hidden units) that the dense form holds; None if sizes are symbolic.
        topk_bytes: of what the top-k op keeps of them for the backward; None if sizes are symbolic.
        mask_bytes: of masks and biases that reach the op as tensors of queries x keys; None if sizes are symbolic.
    """

    kind: str
    rewritten: bool
    reason: str = ""
    detail: str = ""
    where: str = ""
    node: str = ""
    shapes: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    k: str = ""
    lowering: str = ""
    dense_bytes: int | None = None
    topk_bytes: int | None = None
    mask_bytes: int | None = None
    number: int = 0


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """Every candidate of one graph (with its child graphs), in graph order. `print` it for a table.

    Attributes:
        sites: the candidates.
        graph: what was searched.
        unmatched: globs of the option `sites` that match the path of no candidate.
    """

    sites: tuple[Site, ...] = ()
    graph: str = "graph"
    unmatched: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __add__(self, other: RewriteReport) -> RewriteReport:
        unmatched = tuple(glob for glob in self.unmatched if glob in other.unmatched)
        return RewriteReport(self.sites + other.sites, self.graph, unmatched)

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.rewritten)

    @property
    def left_dense(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.rewritten)

    def __str__(self) -> str:
        unmatched = [f"sites={glob!r} matches none of these paths" for glob in self.unmatched if self.sites]
        return "\n".join([self.summary(), *_table(self.sites), *unmatched])

    def summary(self) -> str:
        """One line: how many candidates of each kind were rewritten, and the reasons for the others."""
        if not self.sites:
            return f"topk_fx: {self.graph}: no softmax, attention call or FFN found; nothing was changed"
        parts = []
        for kind in ("attention", "ffn"):
            sites = [site for site in self.sites if site.kind == kind]
            if sites:
                parts.append(f"{sum(site.rewritten for site in sites)} of {len(sites)} {kind} sites rewritten")
        reasons = Counter(site.reason for site in self.left_dense)
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        return f"topk_fx: {self.graph}: {'; '.join(parts)}" + (f"; left dense: {left}" if left else "")


_COLUMNS = ("where", "kind", "shapes", "k", "dense", "top-k", "mask", "what was done")


def _table(sites: tuple[Site, ...]) -> list[str]:
    """One row for all sites that differ in their node alone, and no column of masks where none is a tensor."""
    if not sites:
        return []
    counts = Counter(map(_row, sites)).items()
    rows = [_COLUMNS, *((where if count == 1 else f"{where} ({count}x)", *row) for (where, *row), count in counts)]
    if not any(site.rewritten and site.mask_bytes for site in sites):
        column = _COLUMNS.index("mask")
        rows = [(*row[:column], *row[column + 1 :]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _row(site: Site) -> tuple[str, ...]:
    done = f"rewritten, {site.lowering}" if site.rewritten else f"left dense: {site.reason}"
    if site.detail:
        done += f" ({site.detail})"
    return (
        site.where or site.node,
        site.kind,
        ", ".join(f"{name} {shape.replace(' ', '')}" for name, shape in site.shapes.items()),
        site.k,
        _bytes(site.dense_bytes),
        _bytes(site.topk_bytes) if site.rewritten else "",
        _bytes(site.mask_bytes) if site.rewritten and site.mask_bytes else "",
        done,
    )


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
