"""From a description of views to what draws them: a host part for loader workers, a device part for the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sslcli.config.views import CropGroup, Crops, EvalView
from sslcli.views import colour, reference
from sslcli.views.params import Boxes, Colours, Ints, boxes, colours
from sslcli.views.resize import Pixels, apply_bands, as_arrays, as_planes, central_band, resize_crop, resize_crops


def build(cfg: Crops, seed: int) -> "CropViews":
    """The views a run with this seed trains on."""
    return CropViews(cfg, seed)


def build_eval(cfg: EvalView) -> "EvalLook":
    """The one view that evaluation and extraction use."""
    return EvalLook(cfg)


@final
@dataclass(frozen=True, slots=True)
class CropViews:
    """Random views of images: functions of (seed, epoch, view, image index) alone.

    `finish(crop(...))` is the fast reading, `reference` the slow one; both use the same draws.
    """

    cfg: Crops
    seed: int

    @property
    def count(self) -> int:
        """Views per image."""
        return self.cfg.count

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
            together = torch.cat([crops[view] for view in views])
            parts = torch.split(colour.finish(together, draws, self.cfg.normalize), len(index))
            done.update(zip(views, parts, strict=True))
        return [done[view] for view in range(self.count)]

    def reference(self, image: Pixels, index: int, epoch: int) -> list[npt.NDArray[np.float32]]:
        """The views of one image (H, W, 3) uint8 as PIL and torchvision make them: each (3, s, s) float32."""
        out = []
        for view, group in enumerate(self._groups):
            box = self._boxes(view, _one(index), epoch, image.shape[:2])
            picture = reference.resized_crop(Image.fromarray(image), box, group.size, group.interpolation)
            picture = reference.recoloured(picture, self._colours(view, _one(index), epoch))
            out.append(reference.standardised(picture, self.cfg.normalize))
        return out

    @property
    def _groups(self) -> list[CropGroup]:
        """The group of every view."""
        return [group for group in self.cfg.groups for _ in range(group.repeat)]

    def _boxes(self, view: int, index: Ints, epoch: int, image_size: Sequence[int]) -> Boxes:
        return boxes(self.seed, epoch, view, index, self._groups[view], *image_size)

    def _colours(self, view: int, index: Ints, epoch: int) -> Colours:
        return colours(self.seed, epoch, view, index, self._groups[view])


@final
@dataclass(frozen=True, slots=True)
class EvalLook:
    """Resize the shorter side, crop the centre; where the image is too small, black surrounds it."""

    cfg: EvalView

    def crop(self, image: Pixels) -> Pixels:
        """One image (H, W, 3) uint8: (3, size, size) uint8."""
        down, across = self._spans(image.shape[:2])
        # Resizing only what the crop keeps equals resizing everything first, and stays affordable for a thin strip.
        box = (across.begin, down.begin, across.end, down.end)
        kept = Image.fromarray(image).resize((across.count, down.count), reference.FILTERS[self.cfg.interpolation], box)
        out = np.zeros((3, self.cfg.size, self.cfg.size), dtype=np.uint8)
        out[:, down.place, across.place] = np.asarray(kept).transpose(2, 0, 1)
        return out

    def crop_batch(self, images: Tensor) -> Tensor:
        """`crop` of images of one size on one device, (B, H, W, 3) or (B, 3, H, W) uint8: (B, 3, size, size) uint8."""
        if images.device.type == "cpu":
            return torch.from_numpy(np.stack([self.crop(image) for image in as_arrays(images)]))
        return self.crop_by_bands(as_planes(images))

    def crop_by_bands(self, planes: Tensor) -> Tensor:
        """The same by matrix products, for images (3, B, H, W) float32: equal to within one grey level."""
        spans = self._spans(planes.shape[2:])
        down, across = spans
        rows, columns = (
            central_band(span.source, span.resized, span.first, span.count, self.cfg.interpolation)
            .to(planes.device, non_blocking=True)
            .expand(planes.shape[1], -1, -1)
            for span in spans
        )
        shape = (planes.shape[1], 3, self.cfg.size, self.cfg.size)
        out = torch.zeros(shape, dtype=torch.uint8, device=planes.device)
        out[:, :, down.place, across.place] = apply_bands(planes, rows, columns)
        return out

    def finish(self, crops: Tensor) -> Tensor:
        """Standardise crops (B, 3, s, s) uint8: float32."""
        return colour.standardise_(crops.float(), self.cfg.normalize)

    def _spans(self, image_size: Sequence[int]) -> tuple["_Span", "_Span"]:
        """What is kept of an image's height and width."""
        height, width = image_size
        resized = shorter_side(height, width, self.cfg.resize)
        return _Span(height, resized[0], self.cfg.size), _Span(width, resized[1], self.cfg.size)


@dataclass(frozen=True, slots=True)
class _Span:
    """The central `size` pixels of a line that is resized from `source` to `resized` pixels."""

    source: int
    resized: int
    size: int

    @property
    def first(self) -> int:
        """First pixel of the resized line that is kept."""
        return round(max(self.resized - self.size, 0) / 2)

    @property
    def count(self) -> int:
        """How many pixels are kept."""
        return min(self.resized, self.size)

    @property
    def place(self) -> slice:
        """Where they stand in the output."""
        start = max(self.size - self.resized, 0) // 2
        return slice(start, start + self.count)

    @property
    def begin(self) -> float:
        """Where they begin in the source."""
        return self.first * self.source / self.resized

    @property
    def end(self) -> float:
        """Where they end in the source."""
        return min((self.first + self.count) * self.source / self.resized, self.source)


def shorter_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after resizing the shorter side to `size`; the longer side is rounded down."""
    longer = int(size * max(height, width) / min(height, width))
    return (longer, size) if width <= height else (size, longer)


def _one(index: int) -> Ints:
    return np.array([index])
