"""Tables of measured figures: on screen, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality import Interval

Cell = str | int | float | Interval


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, what was done, and rows by name."""

    title: str
    note: str
    rows: Mapping[str, Mapping[str, Cell]]

    def markdown(self) -> str:
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        lines = [f"## {self.title}", "", self.note, "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for name, row in self.rows.items():
            cells = [name.replace("|", "\\|"), *(_text(row.get(column, "")) for column in columns)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def _text(cell: Cell) -> str:
    if isinstance(cell, Interval):
        return f"{_text(cell.value)} ({_text(cell.low)} to {_text(cell.high)})"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def save(tables: Sequence[Table], heading: str, folder: Path, name: str) -> list[Path]:
    """Writes all tables to NAME.md and NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / f"{name}.md", folder / f"{name}.json"
    text.write_text("\n\n".join([f"# {heading}", *(table.markdown() for table in tables)]) + "\n")
    data.write_text(json.dumps({"setting": heading, "tables": [_plain(table) for table in tables]}, indent=1) + "\n")
    return [text, data]


def _plain(table: Table) -> dict[str, Any]:
    rows = {
        name: {column: dataclasses.asdict(x) if isinstance(x, Interval) else x for column, x in row.items()}
        for name, row in table.rows.items()
    }
    return {"title": table.title, "note": table.note, "rows": rows}
