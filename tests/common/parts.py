"""Pieces that tests of several rooms use: a command, a backbone that does nothing, a watcher."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typer.testing import CliRunner

from sslcli.cli import app
from sslcli.contracts import Backbone, Progress
from sslcli.engine.record import Note


def ran(*words: str | Path) -> Any:
    """The result of a command of ssl that succeeds."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


class Still(Backbone):
    """Rows (B, D) instead of images; as they are, or through a layer."""

    def __init__(self, dim: int, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk, self.dim = trunk or nn.Identity(), dim

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.trunk(images)
        return rows

    def maps(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def tap_names(self) -> tuple[str, ...]:
        return ()


class Listener:
    """Hears everything; at a given step it asks this process to stop, as a scheduler would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.lines: list[str] = []
        self.notes: list[Note] = []
        self.stop_at = stop_at

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, note: Note, at: Progress, eta: float) -> None:
        self.notes.append(note)
        if note.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
