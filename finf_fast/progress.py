"""Progress for people, once the work has lasted two seconds: a bar at a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

PATIENCE = 2.0  # seconds before a bar appears; anything shorter needs none
EVERY = 30.0  # seconds between two lines, where they go to a file


class Progress:
    """Counts finished samples and shows rate and remaining time.

    Args:
        total: samples to do.
        title: what is being done.
        show: None decides by whether standard error is a terminal; True writes lines where it is none; a callable is
            given ``(done, total)`` instead.
    """

    def __init__(self, total: int, title: str, show: bool | Callable[[int, int], None] | None = None):
        self._total, self._title, self._done, self._bar = total, title, 0, None
        self._call = show if callable(show) else None
        self._wanted = self._call is None and (sys.stderr.isatty() if show is None else bool(show))
        self._since = time.monotonic()
        self._next_line = self._since + PATIENCE

    def __enter__(self) -> Progress:
        return self

    def advance(self, count: int) -> None:
        """Notes ``count`` more samples done."""
        self._done += count
        if self._call is not None:
            self._call(self._done, self._total)
        elif self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif self._wanted and time.monotonic() > self._next_line and self._done < self._total:
            self._open() if sys.stderr.isatty() else self._write()

    def reach(self, done: int, total: int) -> None:
        """Notes that ``done`` of ``total`` are finished."""
        self._total = total
        self.advance(done - self._done)

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _rate(self) -> str:
        return f"{self._done / max(time.monotonic() - self._since, 1e-9):,.1f}/s"

    def _write(self) -> None:
        spent = time.monotonic() - self._since
        left = spent * (self._total - self._done) / max(self._done, 1)
        line = f"{self._title}: {self._done:,} of {self._total:,}, {self._rate()}, {left:,.0f} s left"
        print(line, file=sys.stderr, flush=True)
        self._next_line = time.monotonic() + EVERY

    def _open(self) -> None:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
        )
        self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._title, total=self._total, completed=self._done, rate=self._rate())
        self._bar.start()
