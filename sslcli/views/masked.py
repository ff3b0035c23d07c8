"""One random crop with a mask, and where a target network wants it, the same crop once more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sslcli.config.views import Interpolation, Masked, MultiBlockMask, Normalize
from sslcli.views import colour, reference
from sslcli.views.kind import Seen
from sslcli.views.masks import block_sizes, draw_blocks, draw_masks
from sslcli.views.params import Boxes, Colours, Ints, boxes, colours
from sslcli.views.resize import Pixels, resize_crop, resize_crops


@final
@dataclass(frozen=True, slots=True)
class MaskedViews:
    """What is handed on is the crop, the crop at the target's size if there is a target, the mask, and any blocks."""

    cfg: Masked
    seed: int

    def crop(self, image: Pixels, index: int, epoch: int) -> list[npt.NDArray[Any]]:
        """The one crop (3, s, s) uint8, again (3, t, t) for a target, a mask (N,) bool, and any blocks (T, M)."""
        box = self._boxes(_one(index), epoch, image.shape[:2])
        crops = [resize_crop(image, box, 0, size, how) for size, how, _ in self._looks]
        return [*crops, *(masks[0] for masks in self._masks(_one(index), epoch))]

    def crop_batch(self, images: Tensor, index: Ints, epoch: int) -> list[Tensor]:
        """`crop` of images of one size on one device, stacked."""
        image_size = images.shape[1:3] if images.shape[-1] == 3 else images.shape[2:]
        box = self._boxes(index, epoch, image_size)
        crops = [resize_crops(images, box, size, how) for size, how, _ in self._looks]
        masks = (torch.from_numpy(masks).to(images.device, non_blocking=True) for masks in self._masks(index, epoch))
        return [*crops, *masks]

    def finish(self, crops: Sequence[Tensor], index: Ints, epoch: int) -> list[Tensor]:
        """Recolour and standardise the crops, with equal draws: (B, 3, s, s) uint8 to float32; masks stay."""
        looks = self._looks
        pixels, masks = crops[: len(looks)], crops[len(looks) :]
        draws = colours(self.seed, epoch, 0, index, self.cfg.crop)
        done = [colour.finish(crop, draws, units) for crop, (_, _, units) in zip(pixels, looks, strict=True)]
        return [*done, *masks]

    def reference(self, image: Pixels, index: int, epoch: int) -> list[npt.NDArray[Any]]:
        """The crops of one image as PIL and torchvision make them, each (3, s, s) float32, its mask and any blocks."""
        box = self._boxes(_one(index), epoch, image.shape[:2])
        draws: Colours = colours(self.seed, epoch, 0, _one(index), self.cfg.crop)
        out: list[npt.NDArray[Any]] = []
        for size, how, units in self._looks:
            picture = reference.resized_crop(Image.fromarray(image), box, size, how)
            out.append(reference.standardised(reference.recoloured(picture, draws), units))
        return [*out, *(masks[0] for masks in self._masks(_one(index), epoch))]

    def arrange(self, rendered: Sequence[Tensor], index: Ints, epoch: int) -> Seen:
        """The first crop is the view, another one the target."""
        looks = len(self._looks)
        view, *targets = rendered[:looks]
        mask, *blocks = rendered[looks:]
        masked = self.cfg.masked
        if isinstance(self.cfg.mask, MultiBlockMask):
            masked = mask.shape[1] - block_sizes(self.cfg.mask, self.seed, epoch, self._across).visible
        return Seen([view], masks=mask, targets=targets, masked=masked, blocks=blocks[0] if blocks else None)

    @property
    def _looks(self) -> list[tuple[int, Interpolation, Normalize]]:
        """Size, filter and units of every rendering of the crop."""
        crop, target = self.cfg.crop, self.cfg.target
        first = (crop.size, crop.interpolation, self.cfg.normalize)
        return [first] if target is None else [first, (target.size, target.interpolation, target.normalize)]

    def _boxes(self, index: Ints, epoch: int, image_size: Sequence[int]) -> Boxes:
        return boxes(self.seed, epoch, 0, index, self.cfg.crop, *image_size)

    @property
    def _across(self) -> int:
        """Patches along a side of the crop."""
        return self.cfg.crop.size // self.cfg.patch

    def _masks(self, index: Ints, epoch: int) -> list[npt.NDArray[Any]]:
        """Masks (B, N) and, where masks have them, blocks (B, T, M)."""
        if isinstance(self.cfg.mask, MultiBlockMask):
            return list(draw_blocks(self.cfg.mask, self.seed, epoch, index, self._across))
        return [draw_masks(self.cfg.mask, self.seed, epoch, index, self.cfg.crop.size, self.cfg.patch)]


def _one(index: int) -> Ints:
    return np.array([index])
