"""Looking on at a run from the terminal: a bar where there is a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

if TYPE_CHECKING:
    from sslcli.contracts import Progress as RunProgress
    from sslcli.engine.record import Note


class Terminal:
    """Prints news and progress to stderr."""

    def __init__(self) -> None:
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

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        sys.stderr.flush()
