"""The run folder, read: what a run is, how far it came, what it measured."""

import json
import os
import shlex
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, TypeAdapter, ValidationError

from sslcli.config import yaml_file
from sslcli.config.data import AnySource
from sslcli.config.spelling import nearest
from sslcli.data import other_split
from sslcli.errors import PresetError, UserError
from sslcli.runs import ledger

PRESET, STATUS, METRICS, HEALTH = "preset.yaml", "status.json", "metrics.jsonl", "health.jsonl"
PICTURES = ("views.png", "curves.png")
BACKBONE = "backbone.safetensors"
MANIFEST = "backbone.manifest.json"


class Status(BaseModel):
    """What a run said about itself when it last wrote `status.json`."""

    state: str
    """`running`, `finished`, `stopped`, `failed` or `interrupted`."""
    step: int
    total: int
    epoch: float
    epochs: float
    loss: float | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None
    health: str | None = None
    """`healthy`, `warning` or `collapsed`, as of the latest look at the features."""
    advice: str = ""
    """What to do about it; empty when healthy."""
    knn: float | None = None
    """Top-1 in percent of nearest neighbours among a few training images; no evaluation."""
    updated: AwareDatetime
    pid: int
    host: str
    message: str = ""

    @property
    def now(self) -> str:
        """The state, or `died` where the run says `running` but its process on this machine is gone."""
        if self.state == "running" and self.host == socket.gethostname() and not _alive(self.pid):
            return "died"
        return self.state

    @property
    def age(self) -> float:
        """Seconds since the run last said something."""
        return max(0.0, (datetime.now(UTC) - self.updated).total_seconds())


@dataclass(frozen=True)
class Run:
    """One run folder. Nothing is read before it is asked for; what is missing or damaged reads as empty."""

    path: Path

    @cached_property
    def preset(self) -> dict[str, Any]:
        """The resolved preset, as plain data."""
        try:
            return yaml_file.read(self.path / PRESET).data
        except PresetError:
            return {}

    @cached_property
    def status(self) -> Status | None:
        """The last sign of life."""
        try:
            return Status.model_validate_json((self.path / STATUS).read_bytes())
        except (OSError, ValidationError):
            return None

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, devices and place of the latest start."""
        try:
            found = json.loads((self.path / "env.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One row per log point; see `read_metrics`."""
        return read_metrics(self.path / METRICS)

    @cached_property
    def health(self) -> list[dict[str, Any]]:
        """One row per look at the features; see `read_metrics`."""
        return read_metrics(self.path / HEALTH)

    @cached_property
    def reports(self) -> list[ledger.Entry]:
        """The newest report of each protocol, by name."""
        return ledger.reports(self.path)

    @property
    def commands(self) -> list[str]:
        """The command lines that started or continued the run, oldest first."""
        try:
            lines = (self.path / "command.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        return [line.partition("  ")[2] or line for line in lines]

    @property
    def preset_name(self) -> str | None:
        """The preset that the first command named."""
        for command in self.commands[:1]:
            try:
                words = shlex.split(command)
            except ValueError:
                return None
            for word, following in zip(words, [*words[1:], None], strict=True):
                if word in ("--preset", "-p"):
                    return following
                if word.startswith("--preset="):
                    return word.removeprefix("--preset=")
        return None

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first: files, or folders of a sharded run."""
        folder = self.path / "checkpoints"
        return sorted([*folder.glob("step_*.pt"), *folder.glob("step_*.dcp")])

    @property
    def files(self) -> dict[str, Path]:
        """The pictures and the backbone, where they exist."""
        return {name: self.path / name for name in (*PICTURES, BACKBONE) if (self.path / name).is_file()}

    @property
    def evaluation(self) -> str:
        """The command that judges the run, with `DIR` where the user must name labelled images."""
        about, source = self._learned_from()
        if source is None or not about:
            return f"ssl eval knn {self.path} --train DIR --test DIR"
        command = f"ssl eval {'svm' if source.name == 'voc' else 'knn'} {self.path}"
        return command if other_split(source) is not None else f"{command} --test DIR"

    def _learned_from(self) -> tuple[list[str], AnySource | None]:
        """Names of the classes of the training images, none where they have no labels; and where the images are."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
            source = TypeAdapter[AnySource](AnySource).validate_python(self.preset["data"]["source"])
            return list(manifest["source"]["classes"]), source
        except (OSError, ValueError, KeyError, TypeError):
            return [], None

    def named(self, section: str) -> str:
        """The `name` of a section of the preset, e.g. of `method`; `?` when unknown."""
        found = self.preset.get(section)
        return str(found.get("name", "?")) if isinstance(found, dict) else "?"


def is_run(path: Path) -> bool:
    """Whether a run lives in this folder."""
    return (path / PRESET).is_file() and ((path / STATUS).is_file() or (path / METRICS).is_file())


def open_run(path: Path) -> Run:
    """The run in a folder.

    Raises:
        UserError: there is no such folder, or no run in it; the hint names runs near by.
    """
    if is_run(path):
        return Run(path)
    near = [run.path for run in find_runs(path if path.is_dir() else path.parent)]
    close = nearest(path.name, [run.name for run in near])
    hint = (
        f"did you mean `{next(run for run in near if run.name == close)}`?"
        if close
        else f"there is {', '.join(f'`{run}`' for run in near[:5])}"
        if near
        else "`ssl runs list DIR` shows the runs below a folder"
    )
    if path.is_dir():
        raise UserError(f"`{path}` is not a run folder: it has no `{PRESET}` with a `{STATUS}` beside it", hint=hint)
    raise UserError(f"no run folder `{path}`", hint=hint)


def find_runs(root: Path) -> list[Run]:
    """All runs at or below a folder, sorted by path; a run is not searched for more runs."""
    return [Run(path) for path in sorted(_run_folders(root))]


def _run_folders(root: Path) -> Iterator[Path]:
    for folder, inside, _ in os.walk(root):
        if is_run(Path(folder)):
            inside.clear()
            yield Path(folder)
        else:
            inside[:] = [name for name in inside if not name.startswith(".")]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl` or `health.jsonl`; a missing file has none. A line cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
