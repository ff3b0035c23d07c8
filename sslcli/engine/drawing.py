"""Pictures of a run in progress, drawn by a process of their own: a thread would take turns with the training."""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sslcli.errors import SslError

EVERY = 120.0
"""Seconds between pictures, at least."""
CODE = (
    "import importlib as i, pathlib as p, sys; getattr(i.import_module(sys.argv[1]), sys.argv[2])(p.Path(sys.argv[3]))"
)


class Drawing:
    """Draws now and then, never twice at once; `draw` is a function of a module and gets the run folder."""

    def __init__(self, draw: Callable[[Path], None], folder: Path) -> None:
        self._draw = draw
        self._folder = folder
        self._begun = -math.inf
        self._process: subprocess.Popen[str] | None = None

    def refresh(self) -> None:
        """Begin a new picture, unless one is under way or the last is recent.

        Raises:
            SslError: the last one could not be drawn.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._settle()
        if time.monotonic() - self._begun < EVERY:
            return
        self._begun = time.monotonic()
        words = [self._draw.__module__, self._draw.__qualname__, str(self._folder)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", CODE, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def finish(self) -> None:
        """Draw the last picture, here and now.

        Raises:
            SslError: the one before could not be drawn.
        """
        self._settle()
        self._draw(self._folder)

    def _settle(self) -> None:
        """Wait for the process, if there is one, and see how it went."""
        process, self._process = self._process, None
        if process is None:
            return
        _, errors = process.communicate()
        if process.returncode > 0:  # less than 0: a signal that was meant for all of us
            raise SslError(errors.strip().rpartition("\n")[2] or f"exit code {process.returncode}")
