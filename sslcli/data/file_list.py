"""Images named in a text file: `path`, `path label`, or the columns of a CSV file."""

import csv
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from sslcli.data.files import Files, Names, size_of
from sslcli.data.source import I64
from sslcli.errors import DataError

LOOKED_AT = 100  # how many files are looked for at once; a missing one among many is met when it is read


def open_list(path: Path, root: Path | None, on_error: Literal["skip", "stop"]) -> Files:
    """The images of a list, in its order; relative paths start from `root`, or from the list's own folder.

    A text file has one image a line: a path (spaces and all), and a whole number after the last space if every line has
    one. A `.csv` file has a column of paths and perhaps one of labels, which may be words; a first row `path,label` is
    a heading.
    """
    path = path.expanduser()
    start = root.expanduser() if root is not None else path.parent
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            pairs = _csv_rows(file, path) if path.suffix.lower() == ".csv" else _lines(file, path)
            seen: dict[str, int] = {}
            numbers = array("q")
            names = Names(_names(pairs, seen, numbers))
    except OSError as error:
        raise DataError(f"cannot read list `{path}`: {error.strerror}") from None
    except csv.Error as error:
        raise DataError(f"list `{path}` is no CSV file: {error}") from None
    if not len(names):
        raise DataError(f"list `{path}` names no image")
    looked = min(LOOKED_AT, len(names))
    if all(size_of(os.path.join(os.fsencode(start), names[index])) < 0 for index in range(looked)):
        raise DataError(
            f"none of the first {looked} images of list `{path}` exists, e.g. `{start / os.fsdecode(names[0])}`",
            hint="relative paths start from the list's folder; set `data.source.root` to start elsewhere",
        )
    labels, classes = _contiguous(numbers, seen) if numbers else (None, ())
    return Files(start, names, labels=labels, classes=classes, on_error=on_error)


def _names(pairs: Iterator[tuple[str, str | None]], seen: dict[str, int], numbers: "array[int]") -> Iterator[bytes]:
    """Pass the names on and put the labels aside, numbered in the order they are first met."""
    for name, label in pairs:
        if label is not None:
            numbers.append(seen.setdefault(label, len(seen)))
        yield os.fsencode(name)


def _lines(file: Iterator[str], path: Path) -> Iterator[tuple[str, str | None]]:
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
        yield (before[0], str(int(last))) if labelled else (line, None)


def _csv_rows(file: Iterator[str], path: Path) -> Iterator[tuple[str, str | None]]:
    reader = csv.reader(file, skipinitialspace=True)
    columns = 0
    for row in reader:
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        first, columns = columns == 0, columns or len(cells)
        if columns > 2 or len(cells) != columns or "" in cells:
            raise DataError(
                f"{path}:{reader.line_num}: expected `path` or `path,label` in every row, found `{','.join(row)}`"
            )
        if first and cells in (["path"], ["path", "label"]):
            continue
        yield cells[0], cells[1] if columns == 2 else None


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()


def _contiguous(numbers: "array[int]", seen: dict[str, int]) -> tuple[I64, tuple[str, ...]]:
    """Labels (N,) that count in the sorted classes: by value if all are whole numbers, else by name."""
    classes = sorted(seen, key=int) if all(map(_is_whole, seen)) else sorted(seen)
    place = np.empty(len(classes), dtype=np.int64)
    place[[seen[name] for name in classes]] = np.arange(len(classes))
    return place[np.frombuffer(numbers, dtype=np.int64)], tuple(classes)
