"""What a run leaves behind while it goes: metrics, status, log, pictures. Only rank 0 writes."""

import json
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sslcli import dist
from sslcli.config.base import Settings
from sslcli.config.presets import as_data
from sslcli.config.yaml_file import dump
from sslcli.contracts import Progress
from sslcli.engine import machine
from sslcli.engine.drawing import Drawing
from sslcli.engine.health import Verdict
from sslcli.engine.loggers import Logger, first_line, open_logger
from sslcli.errors import StoppedOnRequest

METRICS, HEALTH = "metrics.jsonl", "health.jsonl"
BEAT = 15.0
"""Seconds between signs of life in `status.json`, however long a step takes."""


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
    health: str = ""
    """What the latest look at the features found, in a few words."""


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
    """The run folder, as its run writes it. Nothing here makes the run wait for a picture or a service."""

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        watcher: Watcher,
        *,
        draw: Callable[[Path], None] | None = None,
        tensorboard: bool = True,
        loggers: Sequence[str] = (),
        again: str | None = None,
    ) -> None:
        self.folder = folder
        self.again = again or f"ssl resume {folder}"
        """The command that continues the run."""
        self.at: Progress | None = None
        """How far the run has come."""
        self._batch_size = batch_size
        self._watcher = watcher if dist.is_main() else Silent()
        self._drawing = Drawing(draw, folder) if draw is not None and dist.is_main() else None
        self._wanted = (*(["tensorboard"] if tensorboard else []), *loggers) if dist.is_main() else ()
        self._loggers: dict[str, Logger] = {}
        self._state, self._message = "", ""
        self._last: dict[str, Any] = {}
        self._health: tuple[Verdict, str] | None = None
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="record")

    def open(self, preset: Settings, at: Progress) -> None:
        """Write what is known at the start; forget metrics of steps that will be taken again.

        Raises:
            UserError: a service that is to get the metrics cannot be used.
        """
        if not dist.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "preset.yaml", dump(as_data(preset)))
        write_text(self.folder / "env.json", json.dumps(machine.environment(), indent=2) + "\n")
        with (self.folder / "command.txt").open("a", encoding="utf-8") as file:
            file.write(f"{_now()}  {machine.command()}\n")
        _forget_after(self.folder / METRICS, at.step)
        _forget_after(self.folder / HEALTH, at.step)
        for name in self._wanted:
            self._loggers[name] = open_logger(name, self.folder, preset, at.step)
        self.status("running", at)
        self._heart.start()

    def say(self, text: str) -> None:
        """One line for the terminal and the log."""
        self._watcher.say(text)
        if dist.is_main() and self.folder.is_dir():
            self._log(text)

    def reached(self, at: Progress) -> None:
        """The run has come this far."""
        self.at = at

    def note(self, note: Note, at: Progress) -> None:
        """Metrics of the last few steps."""
        if not dist.is_main():
            return
        eta = (at.total - at.step) * self._batch_size / note.images_per_second
        row = {**asdict(note), **note.scalars, "time": _now()}
        del row["scalars"], row["health"]
        _append(self.folder / METRICS, row)
        self._publish({name: value for name, value in row.items() if isinstance(value, float)}, note.step)
        self._last |= {"loss": note.loss, "images_per_second": note.images_per_second, "eta_seconds": round(eta)}
        self.status("running", at)
        if self._health is not None:
            note = replace(note, health=self._health[1])
        self._log(line_of(note, at, eta))
        self._watcher.progress(note, at, eta)
        self._picture(Drawing.refresh)

    def health(self, verdict: Verdict, vitals: Mapping[str, float], at: Progress) -> None:
        """What a look at the features found; the terminal hears of it when the verdict changes."""
        if not dist.is_main():
            return
        finite = {name: value if math.isfinite(value) else None for name, value in vitals.items()}
        row = {"step": at.step, "epoch": _epochs(at.step, at), "health": verdict.word, "advice": verdict.advice}
        _append(self.folder / HEALTH, {**row, **finite, "time": _now()})
        self._publish({f"health/{name}": value for name, value in vitals.items()}, at.step)
        words = verdict.word + (f"  knn {vitals['knn']:.1f} %" if "knn" in vitals else "")
        before, self._health = self._health, (verdict, words)
        self._last |= {"health": verdict.word, "advice": verdict.advice, "knn": finite.get("knn")}
        self.status("running", at)
        values = "  ".join(f"{name} {value:.4g}" for name, value in vitals.items())
        self._log(f"health at step {at.step}: {verdict.word}  {values}")
        if verdict.advice and (before is None or before[0] != verdict):
            self.say(f"warning: health at step {at.step}: {verdict.word}: {verdict.advice}")
        elif before is not None and before[0].word != verdict.word:
            self.say(f"health at step {at.step}: {verdict.word} again")

    def status(self, state: str, at: Progress, message: str = "") -> None:
        """Refresh `status.json`: what the run is doing, as of now."""
        with self._writing:
            self.at, self._state, self._message = at, state, message
        self._write_status()

    def skipped(self, found: Mapping[int, str], names: Callable[[int], str]) -> None:
        """Write the list of unreadable images that any rank met, and say so."""
        rows = dist.gather_objects({index: f"{names(index)}\t{reason}" for index, reason in found.items()})
        merged = {index: row for part in rows for index, row in part.items()}
        if dist.is_main() and merged:
            path = self.folder / "skipped.txt"
            write_text(path, "".join(f"{merged[i]}\n" for i in sorted(merged)))
            self.say(f"warning: {len(merged)} unreadable images were replaced by others; `{path}` names them")

    def close(self) -> None:
        """Finish event files, services and curves."""
        self._closed.set()
        if self._heart.is_alive():
            self._heart.join()
        self._aside.shutdown()
        for name in list(self._loggers):
            self._reach(name, lambda logger: logger.close(self._state == "finished"))
        if (self.folder / METRICS).is_file():
            self._picture(Drawing.finish)

    def __enter__(self) -> "Record":
        return self

    @contextmanager
    def failures_told(self, at: Progress) -> Iterator[None]:
        """Set the state to `interrupted` or `failed`, with the reason, when what is done here ends so.

        `at` is where the run stood before. A stop that was asked for is none of the two.
        """
        try:
            yield
        except StoppedOnRequest:
            raise
        except BaseException as error:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.status(state, self.at or at, str(error).partition("\n")[0] or type(error).__name__)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            self._write_status()

    def _write_status(self) -> None:
        with self._writing:
            at = self.at
            if at is None or not dist.is_main() or not self.folder.is_dir():
                return
            known = {
                "state": self._state,
                "step": at.step,
                "total": at.total,
                "epoch": _epochs(at.step, at),
                "epochs": _epochs(at.total, at),
                **self._last,
                "updated": _now(),
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "message": self._message,
            }
            write_text(self.folder / "status.json", json.dumps(known, indent=2) + "\n")

    def _log(self, text: str) -> None:
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{_now()}  {text}\n")

    def _publish(self, values: Mapping[str, float], step: int) -> None:
        for name in list(self._loggers):
            self._aside.submit(self._reach, name, lambda logger: logger.scalars(values, step))

    def _reach(self, name: str, call: Callable[[Logger], None]) -> None:
        """Talk to a service; one that fails is given up, for its sake no run of days ends."""
        logger = self._loggers.get(name)
        if logger is None:
            return
        try:
            call(logger)
        except Exception as error:
            del self._loggers[name]
            self.say(f"warning: `{name}` gets no more metrics: {first_line(error)}")

    def _picture(self, act: Callable[[Drawing], None]) -> None:
        """Refresh the pictures; if they cannot be drawn, they are given up too."""
        if self._drawing is None:
            return
        try:
            act(self._drawing)
        except Exception as error:
            self._drawing = None
            self.say(f"warning: no more pictures are drawn: {first_line(error)}")


def line_of(note: Note, at: Progress, eta: float) -> str:
    """One line of a training log."""
    parts = [
        f"epoch {note.epoch:.2f}/{at.total / at.steps_per_epoch:g}",
        f"step {note.step}/{at.total}",
        f"loss {note.loss:.4f}",
        *(f"{name} {value:.4g}" for name, value in note.scalars.items()),
        *([note.health] if note.health else []),
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


def _epochs(step: int, at: Progress) -> float:
    return round(step / at.steps_per_epoch, 4)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


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
