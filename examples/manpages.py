"""A labelled retrieval task that Debian machines have: a manual page's one-line NAME, and its DESCRIPTION."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

SECTIONS = ("man2", "man3", "man4", "man5", "man7")
SHORTEST = 300
"""Characters that a description must have."""


def load_pairs(count: int, folder: Path = Path("/usr/share/man")) -> list[tuple[str, str]]:
    """At most so many pairs of (what the page says that it is about, its description), evenly spread by name."""
    pairs: dict[str, str] = {}
    for path in sorted(path for section in SECTIONS for path in (folder / section).glob("*.gz")):
        sections = _sections(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
        _, dash, summary = sections.get("NAME", "").partition(" - ")
        description = sections.get("DESCRIPTION", "")
        if dash and len(description) >= SHORTEST:
            pairs.setdefault(summary.strip(), description)
    found = list(pairs.items())
    step = max(1.0, len(found) / count)
    return [found[int(n * step)] for n in range(min(count, len(found)))]


def _sections(source: str) -> dict[str, str]:
    """Plain text by the heading above it."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in source.splitlines():
        if line.startswith(".SH"):
            heading = line[3:].strip().strip('"')
        elif not line.startswith(("'", '.\\"')):
            found.setdefault(heading, []).append(_plain(line))
    return {heading: re.sub(r"\s+", " ", " ".join(lines)).strip() for heading, lines in found.items()}


def _plain(line: str) -> str:
    if line.startswith("."):
        macro, _, rest = line[1:].partition(" ")
        if macro not in ("B", "I", "BR", "BI", "IR", "IB", "RB", "RI", "SM", "SB"):
            return ""
        words = re.findall(r'"([^"]*)"|(\S+)', rest)
        joint = " " if macro in ("B", "I", "SM") else ""
        line = joint.join(quoted or word for quoted, word in words)
    line = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[+-]?\d|\\[&/,:%]", "", line)
    line = re.sub(r"\\\((aq|dq|cq|oq)", "'", line).replace("\\-", "-").replace("\\ ", " ").replace("\\e", "\\")
    return re.sub(r"\\\(..|\\\[\w+\]|\\.", "", line)
