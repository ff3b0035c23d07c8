"""Crops with timm's RandAugment on top: for fine-tuning, whose recipes are written in timm's words."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sslcli.errors import PresetError
from sslcli.seeds import seeded
from sslcli.views import reference
from sslcli.views.crops import CropViews
from sslcli.views.kind import Seen
from sslcli.views.params import Ints
from sslcli.views.resize import Pixels, as_arrays


@final
@dataclass
class AugmentedCrops:
    """One random crop of each image, mirrored or not, then RandAugment: a function of (seed, epoch, image).

    timm's operations are used as they are, in the order of its `create_transform`: crop, flip, RandAugment.
    """

    views: CropViews
    words: str
    """E.g. `rand-m9-mstd0.5-inc1`: magnitude 9, deviation 0.5, strength that grows with the magnitude."""

    @cached_property
    def transform(self) -> Any:
        """Timm's RandAugment, with grey of the normalisation's mean around what it shifts or turns.

        Raises:
            PresetError: timm does not understand the words.
        """
        from timm.data.auto_augment import posterize, rand_augment_transform

        group, mean = self.views.cfg.groups[0], self.views.cfg.normalize.mean
        params = {
            "translate_const": int(group.size * 0.45),
            "img_mean": tuple(min(255, round(255 * x)) for x in mean),
            "interpolation": reference.FILTERS[group.interpolation],
        }
        try:
            made = rand_augment_transform(self.words, params)
        except (AssertionError, ValueError, IndexError, KeyError) as error:
            raise PresetError(
                f"`crop.rand_augment`: timm does not understand `{self.words}`", hint="e.g. `rand-m9-mstd0.5-inc1`"
            ) from error
        for operation in made.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = posterized
        return made

    def crop(self, image: Pixels, index: int, epoch: int) -> list[Pixels]:
        """Crop, resize, mirror and augment one image (H, W, 3) uint8: one view (3, s, s) uint8."""
        (plain,) = self.views.crop(image, index, epoch)
        with seeded(self.views.seed, "augment", epoch, index):
            changed = self.transform(Image.fromarray(np.ascontiguousarray(plain.transpose(1, 2, 0))))
        return [np.ascontiguousarray(np.asarray(changed).transpose(2, 0, 1))]

    def crop_batch(self, images: Tensor, index: Ints, epoch: int) -> list[Tensor]:
        """`crop` of images of one size, (B, H, W, 3) uint8, one by one: one view (B, 3, s, s) uint8."""
        rows = zip(as_arrays(images.cpu()), index.tolist(), strict=True)
        crops = np.stack([self.crop(image, number, epoch)[0] for image, number in rows])
        return [torch.from_numpy(crops).to(images.device)]

    def finish(self, crops: Sequence[Tensor], index: Ints, epoch: int) -> list[Tensor]:
        """Standardise crops (B, 3, s, s) uint8, on their device: one view, float32."""
        return self.views.finish(crops, index, epoch)

    def reference(self, image: Pixels, index: int, epoch: int) -> list[npt.NDArray[np.float32]]:
        """`finish(crop(...))` of one image (H, W, 3) uint8: one view (3, s, s) float32."""
        (changed,) = self.crop(image, index, epoch)
        return [reference.standardised(Image.fromarray(changed.transpose(1, 2, 0)), self.views.cfg.normalize)]

    def arrange(self, rendered: Sequence[Tensor], index: Ints, epoch: int) -> Seen:
        """The one view."""
        return Seen(list(rendered))


def posterized(image: Image.Image, bits: int, **rest: Any) -> Image.Image:
    """The upper `bits` bits of every value; of none, black.

    timm asks for none at high magnitudes, which Pillow refuses since version 13.
    """
    return ImageOps.posterize(image, bits) if 0 < bits < 8 else image if bits >= 8 else image.point(lambda value: 0)
