"""Random crops: a host part for loader workers, a device part for the batch, and a slow reading."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sslcli.config.views import CropGroup, Crops
from sslcli.views import colour, reference
from sslcli.views.kind import Seen
from sslcli.views.params import Boxes, Colours, Ints, angles, boxes, colours
from sslcli.views.resize import Pixels, resize_crop, resize_crops
from sslcli.views.rotate import turned, turned_all


@final
@dataclass(frozen=True, slots=True)
class CropViews:
    """Random views of images: functions of (seed, epoch, view, image index) alone.

    `finish(crop(...))` is the fast reading, `reference` the slow one; both use the same draws.
    """

    cfg: Crops
    seed: int

    def crop(self, image: Pixels, index: int, epoch: int) -> list[Pixels]:
        """Crop, resize and mirror one image (H, W, 3) uint8: for each view (3, s, s) uint8."""
        crops = []
        for view, group in enumerate(self._groups):
            box = self._boxes(view, _one(index), epoch, image.shape[:2])
            crops.append(resize_crop(image, box, 0, group.size, group.interpolation))
        return crops

    def crop_batch(self, images: Tensor, index: Ints, epoch: int) -> list[Tensor]:
        """`crop` of images of one size on one device, (B, H, W, 3) or (B, 3, H, W): per view (B, 3, s, s) uint8."""
        image_size = images.shape[1:3] if images.shape[-1] == 3 else images.shape[2:]
        crops = []
        for view, group in enumerate(self._groups):
            box = self._boxes(view, index, epoch, image_size)
            crops.append(resize_crops(images, box, group.size, group.interpolation))
        return crops

    def finish(self, crops: Sequence[Tensor], index: Ints, epoch: int) -> list[Tensor]:
        """Recolour and standardise what `crop` gave, on its device: for each view (B, 3, s, s) uint8 to float32."""
        done: dict[int, Tensor] = {}
        for size in dict.fromkeys(group.size for group in self._groups):
            views = [view for view, group in enumerate(self._groups) if group.size == size]
            draws = Colours.join([self._colours(view, index, epoch) for view in views])
            together = torch.cat([self._turned(crops[view], view, index, epoch) for view in views])
            parts = torch.split(colour.finish(together, draws, self.cfg.normalize), len(index))
            done.update(zip(views, parts, strict=True))
        return [done[view] for view in range(self.cfg.count)]

    def reference(self, image: Pixels, index: int, epoch: int) -> list[npt.NDArray[np.float32]]:
        """The views of one image (H, W, 3) uint8 as PIL and torchvision make them: each (3, s, s) float32."""
        out = []
        for view, group in enumerate(self._groups):
            box = self._boxes(view, _one(index), epoch, image.shape[:2])
            picture = reference.resized_crop(Image.fromarray(image), box, group.size, group.interpolation)
            picture = turned(picture, float(angles(self.seed, epoch, view, _one(index), group)[0]))
            picture = reference.recoloured(picture, self._colours(view, _one(index), epoch))
            out.append(reference.standardised(picture, self.cfg.normalize))
        return out

    def arrange(self, rendered: Sequence[Tensor], index: Ints, epoch: int) -> Seen:
        """Every crop is a view."""
        return Seen(list(rendered))

    @property
    def _groups(self) -> list[CropGroup]:
        """The group of every view."""
        return [group for group in self.cfg.groups for _ in range(group.repeat)]

    def _boxes(self, view: int, index: Ints, epoch: int, image_size: Sequence[int]) -> Boxes:
        return boxes(self.seed, epoch, view, index, self._groups[view], *image_size)

    def _turned(self, crops: Tensor, view: int, index: Ints, epoch: int) -> Tensor:
        group = self._groups[view]
        return turned_all(crops, angles(self.seed, epoch, view, index, group)) if group.rotate else crops

    def _colours(self, view: int, index: Ints, epoch: int) -> Colours:
        return colours(self.seed, epoch, view, index, self._groups[view])


def _one(index: int) -> Ints:
    return np.array([index])
