"""Images with several classes each, in the layout of Pascal VOC: one list of images per class and part.

`ImageSets/Main/<class>_<split>.txt` has a line `<image> <mark>` for every image of the split: 1 the class is there, -1
it is not, 0 it is there but hard to see (Everingham et al. 2010, https://doi.org/10.1007/s11263-009-0275-4, section 3).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from sslcli.data.files import Files, Names, size_of
from sslcli.data.source import I64
from sslcli.errors import DataError

LISTS, IMAGES = Path("ImageSets") / "Main", "JPEGImages"
BELOW = (Path(), Path("VOC2007"), Path("VOCdevkit") / "VOC2007")
"""Where the layout may begin below the folder that is named."""
MARKS = {"1": 1, "-1": 0, "0": -1}
"""What a mark in a list means among targets: there, not there, hard to tell."""
LOOKED_AT = 100  # how many images are looked for at once; a missing one among many is met when it is read


def found_in(path: Path) -> Path | None:
    """The folder at or below `path` where the layout begins."""
    places = [path / below for below in BELOW]
    return next((at for at in places if os.path.isdir(at / LISTS) and os.path.isdir(at / IMAGES)), None)


def open_voc(path: Path, split: str, on_error: Literal["skip", "stop"]) -> Files:
    """The images of a split in the order of their numbers, with targets (N, C) over the classes in alphabetical order.

    Without lists per class the images have no targets.

    Raises:
        DataError: the layout is not there, or a list is missing or does not say what it should.
    """
    path = path.expanduser()
    root = found_in(path)
    if root is None:
        raise DataError(
            f"`{path}` has not the layout of Pascal VOC: no `{LISTS}` beside `{IMAGES}`",
            hint="point to the folder that holds them, e.g. `VOCdevkit/VOC2007`",
        )
    images, classes, targets = read_lists(root / LISTS, split)
    names = [f"{IMAGES}/{image}.jpg".encode("utf-8", "surrogateescape") for image in images]
    if all(size_of(os.path.join(os.fsencode(root), name)) < 0 for name in names[:LOOKED_AT]):
        raise DataError(
            f"none of the first {min(LOOKED_AT, len(names))} images of split `{split}` exists, e.g. "
            f"`{root / os.fsdecode(names[0])}`",
            hint="unpack the images of this split too",
        )
    return Files(root, Names(names), classes=classes, targets=targets, on_error=on_error)


def read_lists(folder: Path, split: str) -> tuple[list[str], tuple[str, ...], I64 | None]:
    """Images of a split in ascending order, names of the classes, and targets (N, C): 1, 0, or -1 for hard to tell.

    Raises:
        DataError: there is no list for the split, or one is damaged or names other images than the rest.
    """
    ending = f"_{split}.txt"
    files = sorted(path for path in folder.glob(f"*{ending}") if path.name != ending)
    if not files:
        plain = folder / f"{split}.txt"
        if not plain.is_file():
            raise DataError(
                f"no lists of split `{split}` in `{folder}`", hint="VOC2007 has `train`, `val`, `trainval` and `test`"
            )
        return sorted(set(_words(plain, 1)[0])), (), None
    images: list[str] = []
    columns = []
    for path in files:
        named, marks = _words(path, 2)
        order = np.argsort(np.array(named), kind="stable")
        found = [named[i] for i in order]
        images = images or found
        if found != images:
            odd = sorted(set(found) ^ set(images))
            raise DataError(
                f"list `{path}` does not name the images that `{files[0].name}` names"
                + (f", e.g. `{odd[0]}`" if odd else ": one is named twice"),
                hint="take all lists from one download",
            )
        columns.append(np.array(marks, dtype=object)[order])
    targets = np.array([[MARKS[mark] for mark in column] for column in columns], dtype=np.int64).T
    return images, tuple(path.name.removesuffix(ending) for path in files), np.ascontiguousarray(targets)


def _words(path: Path, count: int) -> tuple[Sequence[str], Sequence[str]]:
    """First words and, of two, second words of the lines of a list; any line end will do."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"cannot read list `{path}`: {error.strerror}") from None
    first, second = [], []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) < count or (count == 2 and words[1] not in MARKS):
            raise DataError(f"{path}:{number}: expected an image and 1, -1 or 0, found `{line.strip()}`")
        first.append(words[0])
        second.append(words[1] if count == 2 else "")
    if not first:
        raise DataError(f"list `{path}` names no image")
    return first, second
