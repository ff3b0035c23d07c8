"""Images that are in memory at one size."""

from hashlib import blake2b
from typing import final

import numpy as np

from sslcli.data.source import I64, U8, Source


@final
class Arrays(Source):
    """Images (N, H, W, 3) uint8 with labels (N,) that count in `classes`, if there are any."""

    def __init__(self, images: U8, labels: I64 | None = None, classes: tuple[str, ...] = ()) -> None:
        self._images = np.require(images, requirements=["C", "W"])  # torch warns of arrays it could not write to
        self.labels = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> U8:
        """The image (H, W, 3)."""
        return np.array(self._images[index])

    def name(self, index: int) -> str:
        """`images[index]`."""
        return f"images[{index}]"

    def resident(self) -> U8:
        """The images themselves."""
        return self._images

    def fingerprint(self) -> str:
        """Digest of the shape, the pixels and the labels."""
        digest = blake2b(repr(self._images.shape).encode(), digest_size=8)
        digest.update(self._images.data)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()
