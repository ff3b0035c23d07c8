"""Every image below a folder, with first-level sub-folders as classes where that makes sense."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from sslcli.data.decode import SUFFIXES
from sslcli.data.files import Files, Names, printable
from sslcli.errors import DataError


class _Ignored:
    """What lies beside the images."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.first = ""

    def add(self, name: bytes) -> None:
        base = os.path.basename(name)
        kind = "hidden" if base.startswith(b".") else printable(os.path.splitext(base)[1].lower()) or "no suffix"
        self.kinds[kind] += 1
        self.first = self.first or printable(name)

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def in_words(self) -> str:
        """How many files of which kinds, e.g. `3 files that are no images (2 .txt, 1 hidden)`."""
        common = self.kinds.most_common(5)
        kinds = ", ".join(f"{count} {kind}" for kind, count in common) + (
            ", ..." if len(self.kinds) > len(common) else ""
        )
        return (
            f"1 file that is no image ({kinds})"
            if self.total == 1
            else f"{self.total} files that are no images ({kinds})"
        )


def open_folder(path: Path, labels: bool | None, on_error: Literal["skip", "stop"]) -> Files:
    """The images below a folder in the order of their names, folder by folder.

    Hidden files are passed over, links followed. `labels` says whether first-level sub-folders are classes; None means
    that they are if every image lies in one and there are at least two.
    """
    path = path.expanduser()
    if not os.path.isdir(path):  # unlike Path.is_dir, False where a folder above may not be entered
        raise DataError(f"`{path}` is not a folder" if os.path.exists(path) else f"folder `{path}` does not exist")
    ignored = _Ignored()
    names = Names(_images(os.fsencode(path), b"", (), ignored))
    if not len(names):
        raise _nothing(path, ignored)

    tops = Counter(name.partition(b"/")[0] if b"/" in name else b"" for name in _each(names))  # in order of the names
    if labels is True and b"" in tops:
        raise DataError(
            f"`{path}` has images outside of any class folder, e.g. `{printable(names[0])}`",
            hint="move them into one, or set `data.source.labels=false`",
        )
    labelled = labels is True or (labels is None and b"" not in tops and len(tops) > 1)
    return Files(
        path,
        names,
        labels=np.repeat(np.arange(len(tops)), list(tops.values())) if labelled else None,
        classes=tuple(printable(top) for top in tops) if labelled else (),
        on_error=on_error,
        ignored=ignored.total,
        remark=f"left out {ignored.in_words()}, e.g. `{ignored.first}`" if ignored.total else "",
    )


def _images(folder: bytes, below: bytes, above: tuple[tuple[int, int], ...], ignored: _Ignored) -> Iterator[bytes]:
    """Names of the images below `folder`, each starting with `below`; `above` holds the folders on the way down."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot look into folder `{printable(folder)}`: {error.strerror}") from None
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that contains it
        return
    folders = []
    for entry in entries:
        name = below + entry.name
        if entry.is_dir():
            if not entry.name.startswith(b"."):
                folders.append(name)
        elif _is_image(entry):
            yield name
        else:
            ignored.add(name)
    for name in folders:
        yield from _images(os.path.join(folder, os.path.basename(name)), name + b"/", (*above, here), ignored)


def _is_image(entry: "os.DirEntry[bytes]") -> bool:
    """Whether a file promises to be an image; a broken link does too, so that it is reported and not overlooked."""
    named = not entry.name.startswith(b".") and os.path.splitext(entry.name)[1].lower() in SUFFIXES
    return named and (entry.is_file() or entry.is_symlink())


def _each(names: Names) -> Iterator[bytes]:
    return (names[index] for index in range(len(names)))


def _nothing(path: Path, ignored: _Ignored) -> DataError:
    if not ignored.total:
        return DataError(f"no image in `{path}`: there are no files in it", hint="point to a folder with images in it")
    suffixes = " ".join(sorted(suffix.decode() for suffix in SUFFIXES))
    return DataError(
        f"no image in `{path}`: only {ignored.in_words()}", hint=f"images are known by their suffix: {suffixes}"
    )
