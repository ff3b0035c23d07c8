"""Four quarter turns of one random crop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sslcli.config.views import Crops, Rotations
from sslcli.seeds import F32
from sslcli.views.crops import CropViews
from sslcli.views.kind import Seen
from sslcli.views.params import Ints
from sslcli.views.resize import Pixels


@final
@dataclass(frozen=True, slots=True)
class RotationViews:
    """One crop is drawn and finished as among `Crops`; the turns move whole pixels and come last."""

    cfg: Rotations
    seed: int

    def crop(self, image: Pixels, index: int, epoch: int) -> list[Pixels]:
        """The one crop: (3, s, s) uint8."""
        return self._crops.crop(image, index, epoch)

    def crop_batch(self, images: Tensor, index: Ints, epoch: int) -> list[Tensor]:
        """`crop` of images of one size on one device: (B, 3, s, s) uint8."""
        return self._crops.crop_batch(images, index, epoch)

    def finish(self, crops: Sequence[Tensor], index: Ints, epoch: int) -> list[Tensor]:
        """Recolour and standardise the crop: (B, 3, s, s) uint8 to float32."""
        return self._crops.finish(crops, index, epoch)

    def reference(self, image: Pixels, index: int, epoch: int) -> list[F32]:
        """The crop of one image as PIL and torchvision make it."""
        return self._crops.reference(image, index, epoch)

    def arrange(self, rendered: Sequence[Tensor], index: Ints, epoch: int) -> Seen:
        """View k is the crop turned by k quarters, counter-clockwise."""
        return Seen([torch.rot90(rendered[0], turns, (2, 3)) for turns in range(4)])

    @property
    def _crops(self) -> CropViews:
        return CropViews(Crops(groups=(self.cfg.crop,), normalize=self.cfg.normalize), self.seed)
