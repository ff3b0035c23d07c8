"""What a run leaves behind while it goes: metrics, status, log, pictures. Only rank 0 writes."""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sslcli import dist
from sslcli.config.presets import PretrainPreset, as_data
from sslcli.config.yaml_file import dump
from sslcli.contracts import Progress
from sslcli.engine import machine


@dataclass(frozen=True, slots=True)
class Note:
    """Averages over the steps since the last note."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    images_per_second: float
    data_wait: float
    memory_gb: float
    scalars: Mapping[str, float] = field(default_factory=dict)


class Watcher(Protocol):
    """Whoever looks on: the terminal, or nobody."""

    def say(self, text: str) -> None:
        """One line of news."""
        ...

    def progress(self, note: Note, at: Progress, eta: float) -> None:
        """The run has come this far; `eta` in seconds."""
        ...


class Silent:
    """A watcher that does not look."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def progress(self, note: Note, at: Progress, eta: float) -> None:
        """Show nothing."""


def write_text(path: Path, text: str) -> None:
    """Write a small file whole: under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Record:
    """The run folder, as its run writes it."""

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        watcher: Watcher,
        *,
        draw: Callable[[Path], None] | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.folder = folder
        self._batch_size = batch_size
        self._watcher = watcher if dist.is_main() else Silent()
        self._draw = draw if dist.is_main() else None
        self._tensorboard = tensorboard and dist.is_main()
        self._events: Any = None
        self._drawn = 0.0
        self._last: dict[str, Any] = {}

    def open(self, preset: PretrainPreset, at: Progress) -> None:
        """Write what is known at the start; forget metrics of steps that will be taken again."""
        if not dist.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "preset.yaml", dump(as_data(preset)))
        write_text(self.folder / "env.json", json.dumps(machine.environment(), indent=2) + "\n")
        with (self.folder / "command.txt").open("a", encoding="utf-8") as file:
            file.write(f"{_now()}  {machine.command()}\n")
        _forget_after(self.folder / "metrics.jsonl", at.step)
        if self._tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._events = SummaryWriter(self.folder / "tensorboard", purge_step=at.step + 1)
        self.status("running", at)

    def say(self, text: str) -> None:
        """One line for the terminal and the log."""
        self._watcher.say(text)
        if dist.is_main() and self.folder.is_dir():
            with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{_now()}  {text}\n")

    def note(self, note: Note, at: Progress) -> None:
        """Metrics of the last few steps."""
        if not dist.is_main():
            return
        eta = (at.total - at.step) * self._batch_size / note.images_per_second
        row = {**asdict(note), **note.scalars, "time": _now()}
        del row["scalars"]
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._events is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, note.step)
        self._last = {"loss": note.loss, "images_per_second": note.images_per_second, "eta_seconds": round(eta)}
        self.status("running", at)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{_now()}  {line_of(note, at, eta)}\n")
        self._watcher.progress(note, at, eta)
        if self._draw is not None and time.monotonic() - self._drawn > 30:
            self._draw(self.folder)
            self._drawn = time.monotonic()

    def status(self, state: str, at: Progress, message: str = "") -> None:
        """Refresh `status.json`: what the run is doing, as of now."""
        if not dist.is_main() or not self.folder.is_dir():
            return
        known = {
            "state": state,
            "step": at.step,
            "total": at.total,
            "epoch": round(at.step / at.steps_per_epoch, 4),
            "epochs": round(at.total / at.steps_per_epoch, 4),
            **self._last,
            "updated": _now(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "message": message,
        }
        write_text(self.folder / "status.json", json.dumps(known, indent=2) + "\n")

    def skipped(self, found: Mapping[int, str], names: Callable[[int], str]) -> None:
        """Write the list of unreadable images that any rank met, and say so."""
        rows = dist.gather_objects({index: f"{names(index)}\t{reason}" for index, reason in found.items()})
        merged = {index: row for part in rows for index, row in part.items()}
        if dist.is_main() and merged:
            path = self.folder / "skipped.txt"
            write_text(path, "".join(f"{merged[i]}\n" for i in sorted(merged)))
            self.say(f"warning: {len(merged)} unreadable images were replaced by others; `{path}` names them")

    def close(self) -> None:
        """Finish the event files and the curves."""
        if self._events is not None:
            self._events.close()
        if self._draw is not None and (self.folder / "metrics.jsonl").is_file():
            self._draw(self.folder)

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def line_of(note: Note, at: Progress, eta: float) -> str:
    """One line of a training log."""
    parts = [
        f"epoch {note.epoch:.2f}/{at.total / at.steps_per_epoch:g}",
        f"step {note.step}/{at.total}",
        f"loss {note.loss:.4f}",
        *(f"{name} {value:.4g}" for name, value in note.scalars.items()),
        f"lr {note.lr:.3g}",
        f"grad {note.grad_norm:.3g}",
        f"{note.images_per_second:.0f} img/s",
        f"data wait {100 * note.data_wait:.0f} %",
        f"mem {note.memory_gb:.1f} GB",
        f"eta {clock(eta)}",
    ]
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def _forget_after(path: Path, step: int) -> None:
    """Keep only metrics of steps up to `step`; drop a last line that was cut short."""
    if not path.is_file():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)
