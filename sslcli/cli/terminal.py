"""News and progress of this process on stderr."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

    from sslcli.contracts import Progress as RunProgress
    from sslcli.engine.record import Note

EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""


class Terminal:
    """Prints news and progress to stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._console.is_terminal:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), console=self._console, transient=True)

    def say(self, text: str) -> None:
        """One line of news."""
        self._console.print(text, markup=False)

    def progress(self, note: "Note", at: "RunProgress", eta: float) -> None:
        """The run has come this far."""
        from sslcli.engine.record import line_of

        line = line_of(note, at, eta)
        if self._bar is None:
            self._console.print(line, markup=False)
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=at.total)
        self._bar.update(self._task, completed=at.step, description=line.replace("[", r"\["))

    def pause(self) -> None:
        """Take the bar away until there is progress again."""
        if self._bar is not None and self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        sys.stderr.flush()


class Passes:
    """Progress of passes over images, or of what else takes long: a bar on a terminal, a line now and then elsewhere.

    Only the main rank speaks.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal or os.environ.get("RANK", "0") != "0",
        )

    def __enter__(self) -> "Passes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, title: str) -> Callable[[int, int], None] | None:
        """Who is told how far the pass of this title is; up to a comma the title ends with what is counted."""
        if os.environ.get("RANK", "0") != "0":
            return None
        self._bar.start()
        task = self._bar.add_task(title, total=None, rate="")
        what = title.partition(",")[0].rpartition(" ")[2]
        begun = said = time.monotonic()

        def told(done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            rate = done / max(now - begun, 1e-9)
            text = f"{rate:.0f} {what}/s" if rate >= 10 else f"{rate:.1f} {what}/s"
            self._bar.update(task, completed=done, total=total, rate=text)
            if done >= total:
                self._bar.stop()
                self._bar.remove_task(task)
                return
            if not self._console.is_terminal and now - said > EVERY:
                said = now
                eta = (total - done) / rate
                self._console.print(f"{title}: {done}/{total}, {text}, {eta:.0f} s to go", markup=False)

        return told
