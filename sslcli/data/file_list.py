"""Images named in a text file: `path`, `path label`, or the columns of a CSV file."""

import csv
import os
from array import array
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sslcli.data.files import Files, Names, size_of
from sslcli.data.source import I64
from sslcli.errors import DataError

LOOKED_AT = 100  # how many files are looked for at once; a missing one among many is met when it is read

COLUMNS = {"path": "path", "label": "label", "id": "label", "camera": "camera", "part": "part"}
"""What the first row of a CSV file may call a column, and what is meant."""


class Row(NamedTuple):
    """One image of a list."""

    path: str
    label: str | None = None
    camera: str | None = None
    part: str | None = None


def open_list(path: Path, root: Path | None, on_error: Literal["skip", "stop"], part: str | None = None) -> Files:
    """The images of a list, in its order; relative paths start from `root`, or from the list's own folder.

    A text file has one image a line: a path (spaces and all), and a whole number after the last space if every line has
    one. A `.csv` file has a column of paths and perhaps one of labels, which may be words. A first row that names the
    columns is a heading; with it there may also be `camera` (a word or number), and `part`, whose word tells which rows
    are wanted where `part` is given. `id` is another name for `label`.
    """
    path = path.expanduser()
    start = root.expanduser() if root is not None else path.parent
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = _csv_rows(file, path) if path.suffix.lower() == ".csv" else _lines(file, path)
            if part is not None:
                rows = _of_part(rows, part, path)
            seen = _Seen()
            cameras = array("q")
            names = Names(_names(rows, seen, cameras))
    except OSError as error:
        raise DataError(f"cannot read list `{path}`: {error.strerror}") from None
    except csv.Error as error:
        raise DataError(f"list `{path}` is no CSV file: {error}") from None
    if not len(names):
        raise DataError(f"list `{path}` names no image" + ("" if part is None else f" of part `{part}`"))
    looked = min(LOOKED_AT, len(names))
    if all(size_of(os.path.join(os.fsencode(start), names[index])) < 0 for index in range(looked)):
        raise DataError(
            f"none of the first {looked} images of list `{path}` exists, e.g. `{start / os.fsdecode(names[0])}`",
            hint="relative paths start from the list's folder; set `data.source.root` to start elsewhere",
        )
    labels, classes = seen.contiguous()
    return Files(
        start,
        names,
        labels=labels,
        classes=classes,
        cameras=np.frombuffer(cameras, np.int64) if cameras else None,
        on_error=on_error,
    )


def parts_of(path: Path) -> tuple[str, ...]:
    """The words in the column `part` of a CSV file; none where it has no such column or cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return tuple(dict.fromkeys(row.part for row in _csv_rows(file, path) if row.part is not None))
    except (OSError, csv.Error, DataError):  # said when the list is opened
        return ()


def _of_part(rows: Iterator[Row], part: str, path: Path) -> Iterator[Row]:
    for row in rows:
        if row.part is None:
            raise DataError(
                f"list `{path}` has no column `part`", hint="name it in the first row, e.g. `path,label,camera,part`"
            )
        if row.part == part:
            yield row


class _Seen:
    """Words, numbered in the order they are first met."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.numbers = array("q")

    def add(self, word: str | None) -> None:
        if word is not None:
            self.numbers.append(self.words.setdefault(word, len(self.words)))

    def contiguous(self) -> tuple[I64 | None, tuple[str, ...]]:
        """Numbers (N,) that count in the sorted words: by value if all are whole numbers, else by name."""
        if not self.numbers:
            return None, ()
        ordered = sorted(self.words, key=int) if all(map(_is_whole, self.words)) else sorted(self.words)
        place = np.empty(len(ordered), dtype=np.int64)
        place[[self.words[word] for word in ordered]] = np.arange(len(ordered))
        return place[np.frombuffer(self.numbers, dtype=np.int64)], tuple(ordered)


def _names(rows: Iterator[Row], labels: _Seen, cameras: "array[int]") -> Iterator[bytes]:
    """Pass the names on and put labels and cameras aside."""
    for row in rows:
        labels.add(row.label)
        if row.camera is not None:
            cameras.append(_number_of(row.camera))
        yield os.fsencode(row.path)


@cache
def _number_of(camera: str) -> int:
    """A number that is the same for a camera in every list, whatever other cameras are there."""
    return int.from_bytes(blake2b(camera.encode("utf-8", "surrogateescape"), digest_size=7).digest())


def _lines(file: Iterator[str], path: Path) -> Iterator[Row]:
    labelled: bool | None = None
    for number, raw in enumerate(file, 1):
        line = raw.strip()
        if not line:
            continue
        *before, last = line.rsplit(maxsplit=1)
        has = bool(before) and _is_whole(last)
        labelled = has if labelled is None else labelled
        if labelled and not has:
            raise DataError(f"{path}:{number}: no label at the end of `{line}`, but the lines before have one")
        if has and not labelled:
            raise DataError(
                f"{path}:{number}: `{line}` ends in a number, but the lines before do not",
                hint="give every line a label or none; a path that ends so can be written in a `.csv` file",
            )
        yield Row(before[0], str(int(last))) if labelled else Row(line)


def _csv_rows(file: Iterator[str], path: Path) -> Iterator[Row]:
    reader = csv.reader(file, skipinitialspace=True)
    columns: list[str] = []
    for row in reader:
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if not columns:
            named = [COLUMNS.get(cell, "") for cell in cells]
            heading = "path" in named and "" not in named and len(set(named)) == len(named)
            columns = named if heading else ["path", "label"][: len(cells)]
            if heading:
                continue
        if len(cells) != len(columns) or "" in cells:
            wanted = f"`{','.join(columns)}`" if len(columns) > 2 else "`path` or `path,label`"
            raise DataError(f"{path}:{reader.line_num}: expected {wanted} in every row, found `{','.join(row)}`")
        found = dict(zip(columns, cells, strict=True))
        yield Row(found["path"], found.get("label"), found.get("camera"), found.get("part"))


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
