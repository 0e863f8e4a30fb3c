"""The table of sites that calibrate prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .statistics import SiteStatistics

_COLUMNS = ("site", "kind", "of", "kept", "entries kept", "mass kept", "output error", "share of loss")


def site_table(rows: Sequence[tuple[str, SiteStatistics, int | None, float]]) -> str:
    """A row for each site: its name, statistics, k (None: dense) and expected loss."""
    total = sum(loss for *_, loss in rows)
    cells = [_COLUMNS, *(_row(*row, total) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _row(name: str, site: SiteStatistics, k: int | None, loss: float, total: float) -> tuple[str, ...]:
    unit = "keys" if site.key.kind == "attention" else "units"
    head = (name, site.key.kind, f"{site.total:,} {unit}")
    if k is None:
        return (*head, "dense", "100.0 %", "100.0 %", "0", "0.0 %")
    return (
        *head,
        f"{k:,}",
        _percent(site.kept(k) / site.kept(None)),
        _percent(site.mass_share(k)),
        f"{site.relative_error(k):.1e}",
        _percent(loss / total if total else 0.0),
    )


def kept_shares(rows: Mapping[SiteStatistics, int | None] | Sequence[tuple[SiteStatistics, int | None]]) -> str:
    """Such as "12.3 % of the keys, 40.0 % of the units"."""
    pairs = list(rows.items()) if isinstance(rows, Mapping) else list(rows)
    parts = []
    for kind, noun in (("attention", "keys"), ("ffn", "units")):
        of_kind = [(site, k) for site, k in pairs if site.key.kind == kind]
        if of_kind:
            share = sum(site.kept(k) for site, k in of_kind) / sum(site.kept(None) for site, _ in of_kind)
            parts.append(f"{_percent(share)} of the {noun}")
    return ", ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
