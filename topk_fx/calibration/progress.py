"""What is going on, on standard error: a bar if tqdm is installed, else a line every few seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 5.0

Advance = Callable[[], object]


@contextlib.contextmanager
def progress(name: str, total: int, shown: bool) -> Iterator[Advance]:
    """Gives the function to call after each of `total` steps."""
    if not shown:
        yield lambda: None
    elif importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        with tqdm(total=total, desc=name, leave=False) as bar:
            yield bar.update
    else:
        yield _Lines(name, total).advance


class _Lines:
    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.last = name, total, 0, time.monotonic()

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            print(f"topk_fx: {self.name}: {self.done}/{self.total}", file=sys.stderr, flush=True)
