"""Looking on at a run from a terminal: its own, or another one."""

import json
import math
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sslcli.runs.folder import Run, Status

Rows = Sequence[dict[str, Any]]

SILENT = 120.0
"""Seconds without a sign of life that are worth a word: a run gives one every 15."""
LOST = 300.0
"""Seconds without one after which a run on another machine is taken for dead."""
BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"healthy": "green", "warning": "yellow", "collapsed": "red", "failed": "red", "died": "red", "lost": "red"}


def follow(path: Path, every: float) -> "Status | None":
    """Show a run of another process until it ends, and return its last word; None where there is none.

    One screen that renews itself where stdout is a terminal, elsewhere a line whenever something has changed.
    """
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        return _until_the_end(path, every, _lines())
    with Live(console=console, auto_refresh=False) as live:
        return _until_the_end(path, every, lambda run, rows: live.update(screen(run, rows), refresh=True))


def _until_the_end(path: Path, every: float, show: "Callable[[Run, Rows], None]") -> "Status | None":
    from sslcli.runs.folder import METRICS, Run

    tail = Tail(path / METRICS)
    while True:
        run = Run(path)
        tail.refresh()
        show(run, tail.rows)
        if run.status is None or condition(run.status)[0] != "running":
            return run.status
        time.sleep(every)


def _lines() -> "Callable[[Run, Rows], None]":
    before = ""

    def show(run: "Run", rows: Rows) -> None:
        nonlocal before
        now = line(run.status) if run.status else ""
        if now != before:
            print(now, flush=True)
            before = now

    return show


class Tail:
    """The rows of a metrics file that grows; every look reads only what is new."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = path
        self._file = -1
        self._read = 0

    def refresh(self) -> None:
        """Take in new rows; a file that a resumed run has written anew is read from the start."""
        try:
            with self._path.open("rb") as file:
                found = self._path.stat().st_ino
                if found != self._file:
                    self.rows, self._file, self._read = [], found, 0
                file.seek(self._read)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._read += len(whole) + len(end)
        for text in whole.splitlines():
            try:
                self.rows.append(json.loads(text))
            except json.JSONDecodeError:
                continue


def condition(status: "Status") -> tuple[str, str]:
    """The state a run is really in, and what there is to say about it.

    `died` where its process on this machine is gone; `lost` where that cannot be seen and it has long been silent.
    """
    state = status.now
    if state == "died":
        return state, f"its process {status.pid} is gone"
    if state != "running":
        return state, status.message
    silence = f"no sign of life for {status.age:.0f} s from process {status.pid} on {status.host}"
    if status.age > LOST and status.host != socket.gethostname():
        return "lost", silence
    return state, silence if status.age > SILENT else ""


def line(status: "Status") -> str:
    """Where a run stands, in one line."""
    from sslcli.engine.record import clock

    state, remark = condition(status)
    parts = [f"epoch {status.epoch:.2f}/{status.epochs:g}", f"step {status.step}/{status.total}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.health is not None:
        parts.append(status.health)
    if status.knn is not None:
        parts.append(f"knn {status.knn:.1f} %")
    if state == "running" and status.images_per_second is not None and status.eta_seconds is not None:
        parts += [f"{status.images_per_second:.0f} img/s", f"eta {clock(status.eta_seconds)}"]
    if state != "running" or remark:
        parts.append(f"{state}: {remark}" if remark else state)
    return "  ".join(parts)


def screen(run: "Run", rows: Rows) -> RenderableType:
    """Where a run stands, on one screen."""
    from sslcli.engine.record import clock

    status = run.status
    if status is None:
        return Text(f"{run.path}: no readable status")
    state, remark = condition(status)
    table = Table.grid(padding=(0, 2))
    table.add_row("run", Text(str(run.path)))
    table.add_row("method", Text(f"{run.named('method')} on {run.named('backbone')}"))
    table.add_row("state", Text(f"{state}  {remark}".strip(), style=COLOURS.get(state, "")))
    table.add_row("epoch", f"{status.epoch:.2f} of {status.epochs:g}")
    table.add_row("step", f"{status.step} of {status.total}")
    if state == "running" and status.eta_seconds is not None:
        table.add_row("eta", clock(status.eta_seconds))
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), float) and math.isfinite(row["loss"])]
    if losses:
        table.add_row("loss", f"{losses[-1]:.4f}  {sparkline(losses, 40)}")
    if status.health is not None:
        table.add_row("health", Text(f"{status.health}  {status.advice}", style=COLOURS.get(status.health, "")))
    if status.knn is not None:
        table.add_row("knn", f"{status.knn:.1f} %, on a few training images")
    for name, value in rows[-1].items() if rows else ():
        if isinstance(value, float) and name not in ("epoch", "loss"):
            table.add_row(name, f"{value:.4g}")
    return Group(table, ProgressBar(total=status.total, completed=status.step, width=60))


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` characters: each the mean of its share of the values, from lowest to highest."""
    width = min(width, len(values))
    shares = [values[len(values) * k // width : len(values) * (k + 1) // width] for k in range(width)]
    means = [sum(share) / len(share) for share in shares]
    low, high = min(means), max(means)
    return "".join(
        BARS[int((mean - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0] for mean in means
    )
