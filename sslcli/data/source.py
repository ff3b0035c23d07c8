"""What a set of images is to everything else: countable, readable one by one, sometimes labelled."""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import numpy.typing as npt

from sslcli.errors import DataError

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


class UnreadableImage(DataError):
    """One image cannot be read; `name` says which and `reason` why, each on one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"cannot read image `{name}`: {reason}",
            hint="repair or remove it, or set `data.source.on_error=skip` to train without it",
        )
        self.name = name
        self.reason = reason


class Source(ABC):
    """Images by number, from 0."""

    labels: I64 | None = None
    """(N,) numbers into `classes`, or None."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty without labels."""
    targets: I64 | None = None
    """(N, C) where an image may show several classes: 1 the class is there, 0 it is not, -1 it is hard to tell."""
    cameras: I64 | None = None
    """(N,) which camera took each image, where that is known: a number that another source has for it too."""
    on_error: Literal["skip", "stop"] = "stop"
    """What becomes of an image that cannot be read."""
    ignored: int = 0
    """Files found beside the images that are none."""
    remark: str = ""
    """What was left out and why, in one line; empty when nothing was."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are, readable or not."""

    @abstractmethod
    def read(self, index: int) -> U8:
        """The image upright as (H, W, 3) RGB, writeable and the caller's own; raises `UnreadableImage`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image: its path below the source, or `images[17]`."""

    def kind(self, index: int) -> str:
        """What the image is stored as, e.g. `JPEG, CMYK`; raises `UnreadableImage`."""
        return "array, RGB"

    def verify(self) -> int:
        """Compare what is stored with its checksums: how many images have one; raises DataError."""
        return 0

    @abstractmethod
    def resident(self) -> U8 | None:
        """All images as (N, H, W, 3) when they are in memory at one size; not to be written to."""

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the images or labels: names and sizes of files, or bytes of arrays."""

    def stamp(self) -> str:
        """Like the fingerprint, but of files it also changes when one was written again."""
        return self.fingerprint()
