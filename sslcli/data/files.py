"""Images that are files, named compactly: millions of them cost a few dozen bytes each."""

import os
from array import array
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Literal, final

import numpy as np

from sslcli.data.decode import kind_of, read_image
from sslcli.data.source import I64, U8, Source, UnreadableImage

SMALL_SIDE = 96
SMALL_BYTES = 512 * 2**20
"""Images of one size no larger than this, and together no more, are decoded once and kept: their views are made whole
batches at a time, several times faster than one by one."""


@final
class Names:
    """File names as one run of bytes, so that loader processes share them without copying."""

    def __init__(self, names: Iterable[bytes]) -> None:
        blob, ends = bytearray(), array("q", [0])
        for name in names:
            blob += name
            ends.append(len(blob))
        self.blob = bytes(blob)
        self.ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.blob[self.ends[index] : self.ends[index + 1]]


@final
class Files(Source):
    """Image files below a folder, decoded when they are asked for."""

    def __init__(
        self,
        root: Path,
        names: Names,
        *,
        labels: I64 | None = None,
        classes: tuple[str, ...] = (),
        targets: I64 | None = None,
        cameras: I64 | None = None,
        on_error: Literal["skip", "stop"] = "skip",
        ignored: int = 0,
        remark: str = "",
    ) -> None:
        self._root = os.fsencode(root)
        self._names = names
        self.labels = labels
        self.classes = classes
        self.targets = targets
        self.cameras = cameras
        self.on_error = on_error
        self.ignored = ignored
        self.remark = remark
        self._held: U8 | None = None
        self._hold_tried = False

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> U8:
        """The image (H, W, 3), decoded with Pillow."""
        if self._held is not None:
            return np.array(self._held[index])
        return read_image(self._path(index), self.name(index))

    def name(self, index: int) -> str:
        """The path below the folder, printable whatever bytes it has."""
        return printable(self._names[index])

    def kind(self, index: int) -> str:
        """Format and mode of the file, whatever its name."""
        return kind_of(self._path(index), self.name(index))

    def resident(self) -> U8 | None:
        """Small images of one size, decoded by the first call; None for all others, or if one cannot be read."""
        if not self._hold_tried:
            self._held = self._decoded()
            self._hold_tried = True
        return self._held

    def fingerprint(self) -> str:
        """Digest of the names below the folder, the sizes of the files and the labels; nothing is read."""
        digest = blake2b(self._names.blob, digest_size=8)
        digest.update(self._names.ends.tobytes())
        sizes = array("q", (size_of(self._path(index)) for index in range(len(self))))
        digest.update(sizes.tobytes())
        for known in (self.labels, self.targets, self.cameras):
            if known is not None:
                digest.update(known.tobytes())
        return digest.hexdigest()

    def stamp(self) -> str:
        """Digest of the fingerprint and the times at which the files were written."""
        times = array("q", (written(self._path(index)) for index in range(len(self))))
        return blake2b(self.fingerprint().encode() + times.tobytes(), digest_size=8).hexdigest()

    def _path(self, index: int) -> bytes:
        return os.path.join(self._root, self._names[index])

    def _decoded(self) -> U8 | None:
        try:
            first = self.read(0)
            if max(first.shape) > SMALL_SIDE or first.nbytes * len(self) > SMALL_BYTES:
                return None
            images = np.empty((len(self), *first.shape), dtype=np.uint8)
            for index in range(len(self)):
                image = self.read(index)
                if image.shape != first.shape:
                    return None
                images[index] = image
        except UnreadableImage:
            return None
        return images


def size_of(path: bytes) -> int:
    """Bytes of a file; -1 when it is not there."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: a name no file can have
        return -1


def written(path: bytes) -> int:
    """When a file was last written, in nanoseconds; -1 when it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        return -1


def printable(name: bytes) -> str:
    """A file name as text that any terminal and any JSON file can hold."""
    return name.decode("utf-8", "backslashreplace")
