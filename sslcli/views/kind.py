"""What every kind of views is to the engine."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sslcli.views.params import Ints
from sslcli.views.resize import Pixels


class Seen(NamedTuple):
    """What a method gets to see of a batch, on its device."""

    views: list[Tensor]
    """Each (B, 3, H, W) float32, standardised."""
    masks: Tensor | None = None
    """(B, N) bool, True where a patch is masked."""
    targets: Sequence[Tensor] = ()
    """Further renderings of the images for target networks, each (B, 3, h, w) float32."""
    masked: int | None = None
    """How many patches are masked of every image, where that is known to be the same number."""
    blocks: Tensor | None = None
    """(B, T, M) int64, numbers of the patches of T target blocks, where masks come with such."""


class Views(Protocol):
    """One kind of views of images: every draw is a function of (seed, epoch, image index) and of what it is for.

    What the host part hands over is a list of arrays that only the kind itself understands. Two readings agree to a few
    grey levels: `finish(crop(...))`, the fast one, and `reference`, with PIL; `arrange` follows either.
    """

    def crop(self, image: Pixels, index: int, epoch: int) -> Sequence[npt.NDArray[np.generic]]:
        """Host part, in loader workers: of one image (H, W, 3) uint8 the arrays that `finish` needs."""
        ...

    def crop_batch(self, images: Tensor, index: Ints, epoch: int) -> list[Tensor]:
        """`crop` of images of one size on one device, (B, H, W, 3) or (B, 3, H, W) uint8, stacked."""
        ...

    def finish(self, crops: Sequence[Tensor], index: Ints, epoch: int) -> list[Tensor]:
        """Device part: colours and standardisation of what `crop` gave for a batch."""
        ...

    def reference(self, image: Pixels, index: int, epoch: int) -> Sequence[npt.NDArray[np.generic]]:
        """What `finish` gives, for one image."""
        ...

    def arrange(self, rendered: Sequence[Tensor], index: Ints, epoch: int) -> Seen:
        """What `finish` or stacked `reference` gave, as the method wants it."""
        ...
