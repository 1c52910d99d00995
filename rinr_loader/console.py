"""How the commands speak: results on standard output, progress and warnings on standard error; rich on a terminal, plain elsewhere."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

# A plain line of progress comes with each tenth of the work, but no sooner and no later than this many seconds after the last.
SOONEST, LATEST = 10.0, 300.0


def tell(message: str) -> None:
    """Print a line for people on standard error."""
    _print(Console(stderr=True), message)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    tell(f"warning: {message}")


def result(text: str) -> None:
    """Print a line of the result on standard output."""
    _print(Console(), text)


def result_json(value: object) -> None:
    """Print the whole result as JSON on standard output; paths become text."""
    _print(Console(), json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str))


def result_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output: the first column to the left, the others to the right."""
    console = Console()
    if console.is_terminal:
        table = Table(*columns)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        _print(console, "  ".join(cells).rstrip())


def _print(console: Console, text: str) -> None:
    # What is printed holds keys and paths: nothing in it is markup, and no line is broken where a reader would want to copy it.
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def bytes_text(count: float) -> str:
    """A number of bytes in words: `812 B`, `14.6 kB`, `3.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_text(seconds: float) -> str:
    """A duration in words: `42 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def psnr_text(psnr: float | None) -> str:
    """A PSNR in words, `-` where there is none."""
    return "-" if psnr is None else f"{psnr:.1f} dB"


class Meter:
    """Progress of one job: a bar on a terminal, a few lines elsewhere. May be called from several threads.

    Args:
        label: What is being done.
        unit: What is counted.
    """

    def __init__(self, label: str, unit: str = "images") -> None:
        self._label, self._unit = label, unit
        self._started = self._told = time.monotonic()
        self._told_done = 0
        self._lock = threading.Lock()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}", markup=False))
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task(label, total=None, note="") if self._bar else None

    def __enter__(self) -> Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, total: int, *, before: int = 0, note: str = "") -> None:
        """Tell how far the job is.

        Args:
            done: How many are done.
            total: Of how many.
            before: Those of `done` that were done before this job began: they do not count for the rate.
            note: What else to show.
        """
        with self._lock:
            now = time.monotonic()
            rate = (done - before) / max(now - self._started, 1e-9)
            parts = [f"{rate:.2f} {self._unit}/s"] if done > before else []
            parts += [f"{time_text((total - done) / rate)} left"] if done > before and done < total else []
            text = ", ".join([*parts, *([note] if note else [])])
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=done, total=total, note=text)
            elif self._due(done, total, before, now):
                self._told, self._told_done = now, done
                tell(f"{self._label}: {done}/{total} {self._unit}, {text}" if text else f"{self._label}: {done}/{total} {self._unit}")

    def _due(self, done: int, total: int, before: int, now: float) -> bool:
        waited, more = now - self._told, done - max(self._told_done, before)
        if done == self._told_done:
            return False
        return done == total or waited >= LATEST or (waited >= SOONEST and more >= total / 10)
