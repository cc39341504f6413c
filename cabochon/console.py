"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere; the same numbers in both."""

from __future__ import annotations

import sys
import unicodedata
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console as Rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cabochon.files import encodable

RECENT = 20
"""steps the time left is estimated from"""


class Console:
    """Prints a line for the first step, the last and every `every`th, with the keys in `shown` that the row has."""

    def __init__(self, shown: Sequence[str], every: int, out: Rich | None = None) -> None:
        # Lines are never wrapped or coloured where they go into a file; rich would cut them at 80 columns.
        live = sys.stdout.isatty()
        self.out = out or Rich(soft_wrap=True, highlight=False, markup=False, no_color=not live)
        self.shown, self.every = tuple(shown), every
        self._first, self._total = 1, 0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._bar: Progress | None = None

    def start(self, done: int, total: int) -> None:
        """Steps `done` + 1 to `total` are about to run."""
        self._first, self._total = done + 1, total
        if self.out.is_terminal:
            text, left = TextColumn("{task.description}"), TextColumn("{task.fields[left]}")
            self._bar = Progress(text, BarColumn(), MofNCompleteColumn(), left, console=self.out, transient=True)
            self._bar.add_task("starting", total=total, completed=done, left="")
            self._bar.start()

    def step(self, step: int, row: Mapping[str, Any], seconds: float) -> None:
        """A step is over and took `seconds`."""
        if step > self._first:  # the first one compiles
            self._recent.append(seconds)
        numbers = "  ".join(f"{name} {_short(row[name])}" for name in self.shown if row.get(name) is not None)
        left = self.time_left(step)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=numbers, left=left)
        if step in (self._first, self._total) or step % self.every == 0:
            self.line(f"step {step:>{len(str(self._total))}}/{self._total}  {numbers}  {left}".rstrip())

    def time_left(self, step: int) -> str:
        """Such as `3m20s left`, from the latest steps; empty while nobody knows."""
        if not self._recent or step >= self._total:
            return ""
        return f"{duration((self._total - step) * sum(self._recent) / len(self._recent))} left"

    def line(self, text: str) -> None:
        self.out.print(encodable(text))
        if not self.out.is_terminal:
            self.out.file.flush()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """`42s`, `3m20s`, `2h05m`"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02}m"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def one_line(text: str, width: int) -> str:
    """One line of at most `width` characters: model text can neither break the table nor command the terminal."""
    safe = "".join("⏎" if c == "\n" else c if unicodedata.category(c)[0] != "C" else "�" for c in text)
    return safe if len(safe) <= width else safe[: width - 1] + "…"
