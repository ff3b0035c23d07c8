"""Features are computed once per weights, images and view: kept beside the run, read back a piece at a time.

An entry is a folder named after everything its rows depend on, with one array per tap in it. Arrays are mapped, not
read: memory holds the rows in use. Any entry may be deleted at any time.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from sslcli import __version__, dist
from sslcli.config.views import EvalView
from sslcli.data.source import Source
from sslcli.engine.look import F32, Room, in_memory
from sslcli.features.table import FeatureTable, TableMeta

FOLDER = "features"
"""Name of the cache in a run folder, or beside a weights file."""
SPARE = 2**30
"""Bytes that the cache leaves free on its disk."""

Compute = Callable[[Sequence[str], Room], FeatureTable | None]
"""Makes the table of some taps; asked on all ranks, answered on the main one."""

_META = "meta.json"
_FACTS = ("index", "labels", "targets", "cameras")


@dataclass(slots=True)
class Cache:
    """A folder of entries, and what happened to them in this job."""

    folder: Path
    notes: list[str] = field(default_factory=list)
    """What a user may want to know, one line each; only of the main rank."""


def remembered(
    cache: Cache | None, source: Source, view: EvalView, taps: Sequence[str], who: Mapping[str, Any], compute: Compute
) -> FeatureTable | None:
    """The table of these taps: what the cache lacks is computed, in one pass, and kept. None on all but the main rank.

    Args:
        cache: where entries lie; None: nothing is read or kept.
        source: the images.
        view: how they are looked at.
        taps: the features wanted.
        who: what looks at the images, as plain data that changes whenever its answers do.
        compute: makes the table of taps that are lacking.

    Raises:
        DataError: the images cannot be read.
    """
    if cache is None:
        return compute(taps, in_memory)
    entry = cache.folder / _key(source, view, who) if dist.is_main() else None
    held = None if entry is None else _load(entry, taps)
    lacking = dist.broadcast_object([tap for tap in taps if held is None or tap not in held.features])
    if not lacking:
        if held is not None:
            cache.notes.append(f"features of {len(held)} images were there already, in `{entry}`")
        return held
    rooms = _Rooms(entry)
    try:
        made = compute(lacking, rooms)
        if made is None or entry is None:
            return None
        if held is not None and not np.array_equal(held.index, made.index):
            rooms.reason = "an image could be read in one pass only"
            common = np.intersect1d(held.index, made.index)
            held, made = held.of_images(common), made.of_images(common)
        elif rooms.keep(made):
            cache.notes.append(f"features of {len(made)} images are kept in `{entry}`")
    finally:
        rooms.close()
    if rooms.reason:
        cache.notes.append(f"features of {len(made)} images are not kept: {rooms.reason}")
    if held is not None:
        made.features.update(held.features)
    return made


class _Rooms:
    """Where features go while they are computed: files of the entry under temporary names; memory if that fails."""

    def __init__(self, entry: Path | None) -> None:
        self._entry = entry
        self._temporary: dict[str, Path] = {}
        self.reason = ""
        """Why something is not kept; empty when nothing is wrong."""

    def __call__(self, name: str, rows: int, width: int) -> F32:
        if self._entry is None or self.reason:
            return in_memory(name, rows, width)
        path = self._entry / f".{_file(name)}.{os.getpid()}.tmp"
        try:
            self._entry.mkdir(parents=True, exist_ok=True)
            self._temporary[name] = path
            return _reserved(path, (rows, width))
        except OSError as error:
            self.reason = f"`{self._entry}`: {error.strerror or error}"
            return in_memory(name, rows, width)

    def keep(self, table: FeatureTable) -> bool:
        """Give the files of a finished table their names; whether that was possible."""
        if self._entry is None or self.reason:
            return False
        try:
            facts = {"index": table.index, "labels": table.labels, "targets": table.targets, "cameras": table.cameras}
            for name, values in facts.items():
                if values is not None:
                    self._write(f"{name}.npy", values)
            for name, path in self._temporary.items():
                path.replace(self._entry / _file(name))
            temporary = self._entry / f".{_META}.{os.getpid()}.tmp"
            temporary.write_text(table.meta.model_dump_json(), encoding="utf-8")
            temporary.replace(self._entry / _META)  # last: an entry without it is none
        except OSError as error:
            self.reason = f"`{self._entry}`: {error.strerror or error}"
            return False
        self._temporary.clear()
        return True

    def close(self) -> None:
        """Remove what was not kept."""
        for path in self._temporary.values():
            with suppress(OSError):
                path.unlink()  # an array mapped from it stays readable

    def _write(self, name: str, values: npt.NDArray[np.int64]) -> None:
        assert self._entry is not None
        temporary = self._entry / f".{name}.{os.getpid()}.tmp"
        with temporary.open("wb") as file:
            np.save(file, values)
        temporary.replace(self._entry / name)


def _reserved(path: Path, shape: tuple[int, int]) -> F32:
    """A mapped array of zeros whose place on the disk is taken: a disk that fills up later would kill the process."""
    needed = 4 * shape[0] * shape[1]
    free = shutil.disk_usage(path.parent).free
    if free < needed + SPARE:
        raise OSError(f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if sys.platform == "linux":
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped


def _load(entry: Path, taps: Sequence[str]) -> FeatureTable | None:
    """Those of the taps that an entry holds; None where it holds none, or is damaged."""
    try:
        meta = TableMeta.model_validate_json((entry / _META).read_bytes())
        facts = {name: np.load(entry / f"{name}.npy") for name in _FACTS if (entry / f"{name}.npy").is_file()}
        index = facts["index"]
        rows = {}
        for tap in taps:
            if (entry / _file(tap)).is_file():
                mapped = np.load(entry / _file(tap), mmap_mode="c")  # writing to it changes no file
                if mapped.ndim != 2 or len(mapped) < len(index):
                    return None
                rows[tap] = mapped[: len(index)]
    except (OSError, ValueError, EOFError, KeyError, ValidationError):
        return None
    if not rows:
        return None
    return FeatureTable(
        features=rows, index=index, labels=facts.get("labels"), targets=facts.get("targets"),
        cameras=facts.get("cameras"), meta=meta,
    )  # fmt: skip


def _file(tap: str) -> str:
    return f"{tap.replace(os.sep, '_')}.tap.npy"


def _key(source: Source, view: EvalView, who: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that change with everything that features depend on but the tap."""
    says = {
        "who": who,
        "images": source.stamp(),
        "unreadable": source.on_error,
        "view": view.model_dump(mode="json"),
        "device": dist.device().type,
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:32]
