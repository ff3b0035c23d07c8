"""How an image is looked at, as data: one flat record per kind of crop, operations in a fixed order.

The order is crop, flip, jitter, grey, blur, solarize, normalize; so two presets differ by numbers only.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from sslcli.config.base import Settings
from sslcli.config.types import Count, Fraction, NonNegative, Positive

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the smaller number comes first (got {list(pair)})")
    return pair


Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
Interpolation = Literal["bilinear", "bicubic"]


class Jitter(Settings):
    """Colour jitter: the four operations in random order, each with a random strength."""

    p: Fraction = 0.8
    """Probability that an image is jittered at all."""
    brightness: NonNegative = 0.4
    """Factor drawn from [max(0, 1 - x), 1 + x]."""
    contrast: NonNegative = 0.4
    """Factor drawn from [max(0, 1 - x), 1 + x]."""
    saturation: NonNegative = 0.4
    """Factor drawn from [max(0, 1 - x), 1 + x]."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Shift drawn from [-x, x] turns of the hue circle."""


class Blur(Settings):
    """Gaussian blur."""

    p: Fraction = 0.5
    """Probability."""
    sigma: Range = (0.1, 2.0)
    """Standard deviation in pixels of the crop, drawn uniformly."""


class Solarize(Settings):
    """Invert every value at or above a threshold."""

    p: Fraction = 0.2
    """Probability."""
    threshold: Annotated[int, Field(ge=0, le=255)] = 128
    """Values from here on become 255 - value."""


class Normalize(Settings):
    """Per-channel standardisation of values in [0, 1]."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green, blue."""
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    """Standard deviation of red, green, blue."""


class CropGroup(Settings):
    """One kind of random crop and what happens to its colours."""

    repeat: Count = 1
    """How many views of this kind each image gives."""
    size: Count = 224
    """Side of the square output in pixels."""
    scale: Range = (0.08, 1.0)
    """Area of the crop as a share of the image."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the crop, drawn log-uniformly."""
    interpolation: Interpolation = "bilinear"
    """Resampling filter, antialiased."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    jitter: Jitter | None = None
    """Colour jitter."""
    grey: Fraction = 0.0
    """Probability of turning grey."""
    grey_first: bool = False
    """Turn grey before the jitter instead of after it (MoCo v1, NPID)."""
    blur: Blur | None = None
    """Gaussian blur."""
    solarize: Solarize | None = None
    """Solarization."""

    @model_validator(mode="after")
    def _scale_is_a_share(self) -> "CropGroup":
        if self.scale[1] > 1:
            raise ValueError(f"`scale` is a share of the image's area, at most 1 (got {self.scale[1]})")
        return self


class Crops(Settings):
    """Random crops, in groups that may differ (BYOL's two, SwAV's 2 + 6)."""

    name: Literal["crops"] = "crops"
    groups: Annotated[tuple[CropGroup, ...], Field(min_length=1)]
    """The kinds of crop; views are numbered group by group."""
    normalize: Normalize = Normalize()
    """What the network sees: (x / 255 - mean) / std."""

    @property
    def count(self) -> int:
        """Views per image."""
        return sum(group.repeat for group in self.groups)


AnyViews = Annotated[Crops, Field(discriminator="name")]


class EvalView(Settings):
    """The one deterministic view that evaluation and extraction use: resize the shorter side, crop the centre."""

    resize: Count = 256
    """Length of the shorter side after resizing, in pixels."""
    size: Count = 224
    """Side of the central crop in pixels."""
    interpolation: Interpolation = "bilinear"
    """Resampling filter, antialiased."""
    normalize: Normalize = Normalize()
    """What the network sees: (x / 255 - mean) / std."""


def eval_view_for(views: Crops) -> EvalView:
    """The evaluation view that goes with a set of training views.

    Crops of 160 px and more get the ImageNet habit of cropping 7/8 of the resized side (256 -> 224); smaller images
    (CIFAR, digits) are used whole.
    """
    group = max(views.groups, key=lambda g: g.size)
    resize = round(group.size * 8 / 7) if group.size >= 160 else group.size
    return EvalView(resize=resize, size=group.size, interpolation=group.interpolation, normalize=views.normalize)
