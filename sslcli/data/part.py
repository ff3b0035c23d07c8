"""Some of the images of another source."""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import final

import numpy as np

from sslcli.data.source import I64, U8, Source
from sslcli.errors import DataError


@final
class Part(Source):
    """The images `index` (M,) of a source, numbered anew from 0; classes keep their numbers."""

    def __init__(self, whole: Source, index: I64, remark: str = "") -> None:
        self._whole = whole
        self._index = index
        self.labels = None if whole.labels is None else whole.labels[index]
        self.classes = whole.classes
        self.targets = None if whole.targets is None else whole.targets[index]
        self.cameras = None if whole.cameras is None else whole.cameras[index]
        self.on_error = whole.on_error
        self.ignored = whole.ignored
        self.remark = "; ".join(words for words in (whole.remark, remark) if words)
        self._held: U8 | None = None

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> U8:
        """The image (H, W, 3)."""
        return self._whole.read(int(self._index[index]))

    def name(self, index: int) -> str:
        """What the whole source calls it."""
        return self._whole.name(int(self._index[index]))

    def kind(self, index: int) -> str:
        """What it is stored as."""
        return self._whole.kind(int(self._index[index]))

    def verify(self) -> int:
        """Verify the whole source."""
        return self._whole.verify()

    def resident(self) -> U8 | None:
        """A copy of these images, where the whole source has all in memory."""
        if self._held is None and (images := self._whole.resident()) is not None:
            self._held = images[self._index]
        return self._held

    def fingerprint(self) -> str:
        """Digest of the whole source's and of the numbers."""
        return self._digest(self._whole.fingerprint())

    def stamp(self) -> str:
        """Digest of the whole source's stamp and of the numbers."""
        return self._digest(self._whole.stamp())

    def _digest(self, whole: str) -> str:
        digest = blake2b(whole.encode(), digest_size=8)
        digest.update(self._index.astype(np.int64).tobytes())
        return digest.hexdigest()


def without(whole: Source, path: Path) -> Part:
    """A source without the images that a list names: one a line, a tab and anything behind it aside; `#` is a comment.

    Raises:
        DataError: the list cannot be read, names nothing of the source, or leaves nothing of it.
    """
    path = path.expanduser()
    try:
        named = set(_names(path))
    except OSError as error:
        raise DataError(f"cannot read skip list `{path}`: {error.strerror}") from None
    kept = np.array([index for index in range(len(whole)) if whole.name(index) not in named], dtype=np.int64)
    if named and len(kept) == len(whole):
        raise DataError(
            f"skip list `{path}` names none of the {len(whole)} images, which are called like `{whole.name(0)}`",
            hint="make the list of these images: `ssl data check`",
        )
    if not len(kept):
        raise DataError(f"skip list `{path}` leaves none of {len(whole)} images")
    return Part(whole, kept, f"skip list `{path}` leaves out {len(whole) - len(kept)} images")


def _names(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            name = line.rstrip("\r\n").partition("\t")[0]
            if name and not name.startswith("#"):
                yield name
