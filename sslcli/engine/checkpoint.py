"""The state of a run on disk: plain tensors and data, written whole or not at all.

One file, `step_XXXXXXXX.pt`; of a sharded run (`run.shard`) a folder, `step_XXXXXXXX.dcp`, into which every rank writes
its shares (torch.distributed.checkpoint, as safetensors), and which is read as one whatever the number of ranks.
"""

import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcli import __version__, dist
from sslcli.config.presets import Keep
from sslcli.errors import SslError, WeightsError

FORMAT = 1
State = dict[str, Any]

FILE, FOLDER = ".pt", ".dcp"
REST = "rest.pt"
"""What is no tensor, in the folder of a sharded run; written last."""
TENSOR = "__tensor__"
"""Key that stands, in the rest, for a tensor of that name."""


def file_name(step: int, *, shared: bool = False) -> str:
    """Name of the checkpoint after so many steps."""
    return f"step_{step:08d}{FOLDER if shared else FILE}"


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint by its name: a file, or the folder of a sharded run."""
    return path.suffix == FOLDER if path.is_dir() else path.suffix == FILE


def step_of(path: Path) -> int:
    """The step in a checkpoint's file name."""
    return int(path.stem.removeprefix("step_"))


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint under a temporary name, then rename it: `path` holds the old file or the whole new one.

    Raises:
        SslError: the disk is full or the folder cannot be written; nothing that was there has changed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": __version__, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise SslError(
            f"cannot write checkpoint `{path}`: {reason}",
            hint="free some space, then run the same command again: earlier checkpoints are whole",
        ) from error


def write_shared(path: Path, state: Mapping[str, Any]) -> None:
    """Write the checkpoint folder of a sharded run; all ranks must call this, each with its shares.

    As with `write`, `path` holds the old checkpoint, the whole new one, or (between two renamings) none.

    Raises:
        SslError: some rank could not write.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    tensors: dict[str, Tensor] = {}
    rest = _apart(state, "", tensors)
    try:
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        dist.writers_meet()
        dist.write_shares(temporary, tensors)
        if dist.is_main():
            write(temporary / REST, {**rest, "shapes": {name: list(x.shape) for name, x in tensors.items()}})
            remove(path)
            temporary.replace(path)
    except OSError as error:
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise SslError(
            f"cannot write checkpoint `{path}`: {error.strerror or error}",
            hint="free some space, then run the same command again: earlier checkpoints are whole",
        ) from error
    dist.writers_meet()


def _apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Nested state without its tensors, which go into `tensors` by their dotted names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _apart(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_apart(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]
    return value


def _together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_apart`."""
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {key: _together(item, tensors) for key, item in value.items()}
    return [_together(item, tensors) for item in value] if isinstance(value, list) else value


def remove(path: Path) -> None:
    """Remove a checkpoint, if it is there; a folder disappears at once, however long its files take."""
    if path.is_dir():
        dying = path.with_name(f".{path.name}.old")
        shutil.rmtree(dying, ignore_errors=True)
        path.replace(dying)
        shutil.rmtree(dying, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read(path: Path) -> State:
    """A checkpoint's content, on the CPU, in whole tensors; no code from the file is run.

    Raises:
        WeightsError: the file is missing, cut short, not one of ours, or from a newer version.
    """
    if not path.is_dir():
        return _read_file(path)
    rest = _read_file(path / REST)
    shapes = rest.pop("shapes", None)
    try:
        tensors = dist.read_shares(path)
    except OSError as error:
        raise WeightsError(
            f"cannot read checkpoint `{path}`: {error}", hint="use an earlier one of the same folder"
        ) from error
    if {name: list(x.shape) for name, x in tensors.items()} != shapes:
        raise WeightsError(
            f"`{path}` is not a whole checkpoint: a file is missing", hint="use an earlier one of the same folder"
        )
    whole: State = _together(rest, tensors)
    return whole


def _read_file(path: Path) -> State:
    if not path.is_file():
        raise WeightsError(f"no checkpoint `{path}`", hint="give a run folder or a file in its `checkpoints/`")
    if not zipfile.is_zipfile(path):
        raise WeightsError(
            f"`{path}` is not a whole checkpoint: it was cut short, or is another kind of file",
            hint="use an earlier file of the same folder",
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"cannot read checkpoint `{path}`: {reason}", hint="use an earlier file of the same folder"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise WeightsError(f"`{path}` is not a checkpoint of ssl")
    if state["format"] != FORMAT:
        raise WeightsError(
            f"`{path}` has checkpoint format {state['format']}, written by ssl {state['version']}; "
            f"this is ssl {__version__}, which reads format {FORMAT}",
            hint=f"install ssl {state['version']}",
        )
    return state


def all_in(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((path for path in (run / "checkpoints").glob("step_*") if is_checkpoint(path)), key=step_of)


def newest(run: Path) -> Path:
    """The newest checkpoint of a run folder.

    Raises:
        WeightsError: there is none.
    """
    found = all_in(run)
    if not found:
        raise WeightsError(
            f"no checkpoint in `{run}`", hint="the run has not written one yet, or this is no run folder"
        )
    return found[-1]


def meant(what: Path) -> Path:
    """The checkpoint that a path means: the newest of a run folder, otherwise what is there.

    Raises:
        WeightsError: the run folder has none.
    """
    return newest(what) if what.is_dir() and what.resolve().suffix != FOLDER else what


def newest_whole(run: Path) -> tuple[Path, State, list[str]] | None:
    """The newest readable checkpoint of a run folder, its content, and what is wrong with newer ones; None without any.

    Raises:
        WeightsError: there are checkpoints, and not one of them can be read.
    """
    damaged: list[str] = []
    for path in reversed(all_in(run)):
        try:
            return path, read(path), damaged
        except WeightsError as error:
            damaged.append(error.message)
    if damaged:
        raise WeightsError(
            f"none of the checkpoints in `{run}` can be read; the newest: {damaged[0]}",
            hint="start again in another folder with `--out`",
        )
    return None


def set_aside(run: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond a step to `….aside`: the run goes on from there, and they belong to another course.

    Left where they are, they would pass for the newest, and push the new ones out.
    """
    aside: list[Path] = []
    for path in all_in(run):
        if step_of(path) > step:
            target = path.with_name(f"{path.name}.aside")
            if target.is_dir():
                shutil.rmtree(target)
            aside.append(path.replace(target))
    return aside


def to_host(value: Any) -> Any:
    """A copy of nested state with every tensor on the CPU, safe to write while training goes on."""
    if isinstance(value, Tensor):
        return dist.on_host(value)
    if isinstance(value, Mapping):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_host(item) for item in value]
    return value


class Store:
    """Writes a run's checkpoints in the background and keeps the right ones.

    Of a run that is `shared` among ranks, all ranks write, otherwise only the main one.
    """

    def __init__(self, run: Path, keep: Keep, steps_per_epoch: int, *, shared: bool = False) -> None:
        self._folder = run / "checkpoints"
        self._run = run
        self._keep = keep
        self._steps_per_epoch = steps_per_epoch
        self._shared = shared
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: State) -> None:
        """Copy the state and write it in the background; a failure of the previous write is raised here."""
        self.wait()
        self._pending = self._writer.submit(self._write, step, to_host(state))

    def wait(self) -> None:
        """Wait until the last write is on disk.

        Raises:
            SslError: it failed.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Finish writing."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _write(self, step: int, state: State) -> None:
        path = self._folder / file_name(step, shared=self._shared)
        if self._shared:
            write_shared(path, state)
        else:
            write(path, state)
        if dist.is_main():
            point_last_to(path)
            for old in self._superfluous():
                remove(old)

    def _superfluous(self) -> list[Path]:
        older = all_in(self._run)[: -self._keep.last]
        if self._keep.every_epochs is None:
            return older
        stride = self._keep.every_epochs * self._steps_per_epoch
        return [path for path in older if step_of(path) % stride]


def point_last_to(path: Path) -> None:
    """Make `checkpoints/last` lead to this checkpoint."""
    temporary = path.with_name(f".last.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    temporary.replace(path.with_name("last"))
