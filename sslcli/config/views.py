"""How an image is looked at, as data: one flat record per kind of crop, operations in a fixed order.

The order is crop, flip, rotate, jitter, grey, blur, solarize, normalize; so two presets differ by numbers only.
"""

from abc import ABC, abstractmethod
from math import ceil, sqrt
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sslcli.config.base import Settings
from sslcli.config.types import Count, Fraction, Index, NonNegative, Positive

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the smaller number comes first (got {list(pair)})")
    return pair


Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]


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
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Turn about the centre by an angle drawn from [-x, x] degrees; nearest neighbour, black corners."""
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


class EvalView(Settings):
    """The one deterministic view that evaluation and extraction use: resize the shorter side, crop the centre."""

    resize: Count | None = 256
    """Length of the shorter side after resizing, in pixels; null, with `squeeze` only: no such step."""
    size: Count = 224
    """Side of the central crop in pixels; without meaning under `squeeze`."""
    squeeze: tuple[Count, Count] | None = None
    """Height and width in pixels that the whole image is then resized to, whatever its proportions, instead of cropping
    its centre."""
    interpolation: Interpolation = "bilinear"
    """Resampling filter, antialiased."""
    normalize: Normalize = Normalize()
    """What the network sees: (x / 255 - mean) / std."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what the network sees, in pixels."""
        return self.squeeze or (self.size, self.size)

    @model_validator(mode="after")
    def _one_size(self) -> "EvalView":
        if self.resize is None and self.squeeze is None:
            raise ValueError("`resize: null` needs `squeeze`, because a crop is cut from a resized image")
        return self


class ViewChange(Settings):
    """What a protocol fixes of the view that goes with the weights; what is absent stays the weights' own."""

    resize: Count | None = None
    """Length of the shorter side after resizing, in pixels."""
    size: Count | None = None
    """Side of the central crop in pixels."""
    squeeze: tuple[Count, Count] | None = None
    """Height and width in pixels that the whole image is resized to instead of cropping its centre: after `resize`, or
    at once where `resize` is absent."""
    interpolation: Interpolation | None = None
    """Resampling filter, antialiased."""
    normalize: Normalize | None = None
    """What the network sees: (x / 255 - mean) / std. The weights' own is right unless they come from elsewhere."""

    def applied_to(self, view: EvalView) -> EvalView:
        """The view with these changes."""
        named = {key: value for key, value in self if value is not None}
        if self.squeeze is not None:
            named["resize"] = self.resize
        return view.model_copy(update=named)


class ViewKind(Settings, ABC):
    """Base of every kind of views: what the engine asks of any of them."""

    normalize: Normalize = Normalize()
    """What the network sees: (x / 255 - mean) / std."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Views per image, as the method gets them."""

    @property
    @abstractmethod
    def eval_view(self) -> EvalView:
        """The evaluation view that goes with these training views."""

    @property
    def units_of_targets(self) -> Normalize:
        """What target networks see of levels in [0, 1], where the views come with targets."""
        return self.normalize

    def pair(self) -> "Crops | None":
        """Settings that draw the first two views alone, as they are among all; None where no views are compared."""
        return None

    @abstractmethod
    def shrunk(self, side: int) -> Self:
        """The same kind with nothing larger than `side` pixels: for proofs in miniature."""


class Crops(ViewKind):
    """Random crops, in groups that may differ (BYOL's two, SwAV's 2 + 6)."""

    name: Literal["crops"] = "crops"
    groups: Annotated[tuple[CropGroup, ...], Field(min_length=1)]
    """The kinds of crop; views are numbered group by group."""

    @property
    def count(self) -> int:
        """Views per image."""
        return sum(group.repeat for group in self.groups)

    @property
    def eval_view(self) -> EvalView:
        """As large as the largest crop."""
        return _as_large_as(max(self.groups, key=lambda g: g.size), self.normalize)

    def pair(self) -> "Crops | None":
        """The first two crops."""
        groups, missing = [], 2
        for group in self.groups:
            groups.append(group.model_copy(update={"repeat": min(missing, group.repeat)}))
            missing -= groups[-1].repeat
            if not missing:
                return self.model_copy(update={"groups": tuple(groups)})
        return None

    def twice(self) -> "Crops":
        """The first kind of crop, drawn twice."""
        return self.model_copy(update={"groups": (self.groups[0].model_copy(update={"repeat": 2}),)})

    def shrunk(self, side: int) -> Self:
        """Every crop at most `side` pixels."""
        return self.model_copy(update={"groups": tuple(_at_most(group, side) for group in self.groups)})


class Rotations(ViewKind):
    """One random crop in its four quarter turns: as it is, then 90, 180, 270 degrees counter-clockwise."""

    name: Literal["rotations"] = "rotations"
    crop: CropGroup = CropGroup()
    """The crop that is turned; its `repeat` is 1."""

    @property
    def count(self) -> int:
        """Four turns."""
        return 4

    @property
    def eval_view(self) -> EvalView:
        """As large as the crop."""
        return _as_large_as(self.crop, self.normalize)

    def shrunk(self, side: int) -> Self:
        """The crop at most `side` pixels."""
        return self.model_copy(update={"crop": _at_most(self.crop, side)})

    @model_validator(mode="after")
    def _one_crop(self) -> "Rotations":
        if self.crop.repeat != 1:
            raise ValueError(f"`crop.repeat` is 1: one crop is turned four times (got {self.crop.repeat})")
        if self.crop.rotate:
            raise ValueError("`crop.rotate` is for views of kind `crops` alone")
        return self


class Patches(ViewKind):
    """Nine patches of an image: one in each cell of a 3 x 3 grid laid over a random square, row by row.

    A cell measures `size // 3`, a patch what `gap` and `jitter` leave of it.
    """

    name: Literal["patches"] = "patches"
    resize: Count = 292
    """Length of the image's shorter side after resizing, in pixels."""
    size: Count = 255
    """Side of the random square that the grid divides, in pixels."""
    gap: Index = 0
    """Pixels that always lie between neighbouring patches, so that no line runs on from one to the next."""
    jitter: Index = 21
    """How far a patch may move within its cell, in pixels: right and down by 0 to `jitter`, drawn uniformly."""
    interpolation: Interpolation = "bilinear"
    """Resampling filter, antialiased."""
    grey: Fraction = 0.66
    """Probability that all patches of an image turn grey, so that colour fringes do not give their places away."""

    @property
    def count(self) -> int:
        """Nine patches."""
        return 9

    @property
    def cell(self) -> int:
        """Side of a cell in pixels."""
        return self.size // 3

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.cell - self.gap - self.jitter

    @property
    def eval_view(self) -> EvalView:
        """The centre of the resized image, as large as the grid."""
        return EvalView(resize=self.resize, size=self.size, interpolation=self.interpolation, normalize=self.normalize)

    def shrunk(self, side: int) -> Self:
        """A grid of at most `side` pixels."""
        size = min(self.size, side)
        share = size // 16
        return self.model_copy(
            update={
                "resize": min(self.resize, size + 2 * share),
                "size": size,
                "gap": min(self.gap, share),
                "jitter": min(self.jitter, share),
            }
        )

    @model_validator(mode="after")
    def _fits(self) -> "Patches":
        if self.size > self.resize:
            raise ValueError(f"`size` {self.size} does not fit into an image resized to {self.resize} (`resize`)")
        if self.patch < 1:
            raise ValueError(
                f"`gap` {self.gap} and `jitter` {self.jitter} leave nothing of a cell of {self.cell} pixels, `size` / 3"
            )
        return self


class RandomMask(Settings):
    """Patches hidden one by one (MAE)."""

    name: Literal["random"] = "random"
    ratio: Fraction = 0.75
    """Share of the patches that are hidden; the number that stays visible is rounded down."""

    def count(self, size: int, patch: int) -> int:
        """How many patches are hidden of a crop of so many pixels."""
        patches = (size // patch) ** 2
        return patches - int(patches * (1 - self.ratio))


class GridMask(Settings):
    """Coarse square cells hidden one by one (SimMIM)."""

    name: Literal["grid"] = "grid"
    ratio: Fraction = 0.6
    """Share of the cells that are hidden; their number is rounded up."""
    cell: Count = 32
    """Side of a cell in pixels, a multiple of the patch."""

    def count(self, size: int, patch: int) -> int:
        """How many patches are hidden of a crop of so many pixels."""
        return ceil((size // self.cell) ** 2 * self.ratio) * (self.cell // patch) ** 2


class BlockMask(Settings):
    """Rectangular blocks, one after the other (BEiT, CAE, MaskFeat)."""

    name: Literal["blocks"] = "blocks"
    patches: Count = 75
    """How many patches are to be hidden."""
    least: Count = 16
    """Least area of a block in patches."""
    most: Count | None = None
    """Largest area of a block in patches; `patches` when absent."""
    aspect: Range = (0.3, 1 / 0.3)
    """Height over width of a block, drawn log-uniformly."""
    exact: bool = False
    """Go on until exactly `patches` are hidden (CAE); otherwise stop when no block can be placed (BEiT, MaskFeat)."""

    def count(self, size: int, patch: int) -> int | None:
        """How many patches are hidden of a crop; None where it depends on the image."""
        return self.patches if self.exact else None


def block_size(u: float, scale: Range, aspect: Range, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a block, in patches, as I-JEPA's code has them for one uniform number.

    The same number sets the area and the ratio of height to width, so that larger blocks are taller. A block is lower
    and narrower than the image, and has at least one patch.

    Args:
        u: in [0, 1).
        scale: smallest and largest share of the image.
        aspect: smallest and largest ratio.
        height: rows of patches of the image.
        width: columns of patches of the image.
    """
    share, ratio = (low + u * (high - low) for low, high in (scale, aspect))
    area = int(height * width * share)
    rows, columns = round(sqrt(area * ratio)), round(sqrt(area / ratio))
    return max(min(rows, height - 1), 1), max(min(columns, width - 1), 1)


class MultiBlockMask(Settings):
    """Target blocks that are to be foreseen, and a context block without them, which is all that is shown (I-JEPA).

    The authors draw the sizes of blocks once for every step, and cut all contexts of a GPU's batch to the smallest.
    That an image's mask does not depend on the images beside it, sizes are drawn once for every epoch here, and the
    length of a context is that of the smallest of `among` contexts of these sizes that no image has. Longer ones lose
    their last patches, as in the authors' code, and shorter ones, about one in `among`, are drawn again.
    """

    name: Literal["multiblock"] = "multiblock"
    targets: Count = 4
    """How many target blocks an image has; they may overlap."""
    target_scale: Range = (0.15, 0.2)
    """Area of a target block as a share of the image."""
    target_aspect: Range = (0.75, 1.5)
    """Height over width of a target block."""
    context_scale: Range = (0.85, 1.0)
    """Area of the square context block as a share of the image, before it loses the targets."""
    more_than: Index = 10
    """A context with no more patches than this is drawn again; after each 20 failures it may overlap one target more.
    Targets must be larger too."""
    among: Count = 128
    """How many images share the length of their contexts in the recipe: images per GPU."""

    def count(self, size: int, patch: int) -> None:
        """How many patches are hidden of a crop: as many of each, but it depends on the epoch."""

    def fits(self, across: int) -> bool:
        """Whether blocks of all sizes have enough of the across x across patches."""
        looks = ((self.target_scale, self.target_aspect), (self.context_scale, (1.0, 1.0)))
        sizes = [block_size(u / 1000, *look, across, across) for look in looks for u in range(1001)]
        return across > 1 and min(rows * columns for rows, columns in sizes) > self.more_than

    @model_validator(mode="after")
    def _scales_are_shares(self) -> "MultiBlockMask":
        for name, scale in (("target_scale", self.target_scale), ("context_scale", self.context_scale)):
            if scale[1] > 1:
                raise ValueError(f"`{name}` is a share of the image's patches, at most 1 (got {scale[1]})")
        return self


AnyMask = Annotated[RandomMask | GridMask | BlockMask | MultiBlockMask, Field(discriminator="name")]


class SecondLook(Settings):
    """The same crop once more, at another size and in other units, for a network that makes targets (CAE)."""

    size: Count = 112
    """Side of the square output in pixels."""
    interpolation: Interpolation = "lanczos"
    """Resampling filter, antialiased."""
    normalize: Normalize = Normalize(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    """What that network sees: (x / 255 - mean) / std; as it stands, values in [0, 1]."""


class Masked(ViewKind):
    """One crop of each image, some of whose patches are hidden from the network."""

    name: Literal["masked"] = "masked"
    crop: CropGroup
    """The crop."""
    patch: Count = 16
    """Side of a patch in pixels, as the backbone has it."""
    mask: AnyMask = RandomMask()
    """Which patches are hidden."""
    target: SecondLook | None = None
    """The crop once more, for targets."""

    @property
    def count(self) -> int:
        """One."""
        return self.crop.repeat

    @property
    def masked(self) -> int | None:
        """How many patches are hidden of every image; None where that differs, or depends on the epoch."""
        return self.mask.count(self.crop.size, self.patch)

    @property
    def even(self) -> bool:
        """Whether as many patches are hidden of all images of a batch."""
        return self.masked is not None or isinstance(self.mask, MultiBlockMask)

    @property
    def eval_view(self) -> EvalView:
        """As large as the crop."""
        return _as_large_as(self.crop, self.normalize)

    @property
    def units_of_targets(self) -> Normalize:
        """As the target says."""
        return self.normalize if self.target is None else self.target.normalize

    def shrunk(self, side: int) -> Self:
        """The crop at most `side` pixels, in as large patches, and masks that hide about the same share."""
        size, patch = min(self.crop.size, side), self.patch
        changes: dict[str, object] = {}
        if isinstance(self.mask, GridMask):
            changes = {"cell": max(patch, size // 4)}
        if isinstance(self.mask, BlockMask):
            share = (size / self.crop.size) ** 2
            changes = {
                "patches": max(1, int(self.mask.patches * share)),
                "least": max(1, int(self.mask.least * share)),
                "most": None,
            }
        if isinstance(self.mask, MultiBlockMask):
            changes = {"more_than": int(self.mask.more_than * (size / self.crop.size) ** 2)}
        target = self.target
        if target is not None:
            target = target.model_copy(update={"size": max(1, target.size * size // self.crop.size)})
        return self.model_copy(
            update={
                "crop": _at_most(self.crop, side),
                "mask": self.mask.model_copy(update=changes),
                "target": target,
            }
        )

    @model_validator(mode="after")
    def _fits_together(self) -> "Masked":
        size, patch, mask = self.crop.size, self.patch, self.mask
        if size % patch:
            raise ValueError(f"`patch` must divide `crop.size` (got {patch} and {size})")
        if self.crop.repeat != 1:
            raise ValueError(f"one crop of each image is masked, `crop.repeat` must be 1 (got {self.crop.repeat})")
        if self.crop.rotate:
            raise ValueError("`crop.rotate` is for views of kind `crops` alone")
        if isinstance(mask, GridMask) and (mask.cell % patch or size % mask.cell):
            raise ValueError(f"`mask.cell` must be a multiple of `patch` {patch} and divide {size} (got {mask.cell})")
        if isinstance(mask, BlockMask) and mask.patches >= (size // patch) ** 2:
            raise ValueError(
                f"`mask.patches` must be less than the {(size // patch) ** 2} patches of an image (got {mask.patches})"
            )
        if isinstance(mask, MultiBlockMask) and not mask.fits(size // patch):
            raise ValueError(
                f"of {(size // patch) ** 2} patches, some target or context has no more than `mask.more_than` "
                f"{mask.more_than}: lower it, or raise `mask.target_scale` and `mask.context_scale`"
            )
        return self


AnyViews = Annotated[Crops | Rotations | Patches | Masked, Field(discriminator="name")]


def _as_large_as(group: CropGroup, normalize: Normalize) -> EvalView:
    """An evaluation view of a crop's size, resized by `resize_for` before."""
    return EvalView(
        resize=resize_for(group.size), size=group.size, interpolation=group.interpolation, normalize=normalize
    )


def resize_for(size: int) -> int:
    """Length of the shorter side before a central crop of `size` pixels is cut.

    Crops of 160 px and more get the ImageNet habit of cropping 7/8 of the resized side (256 -> 224); smaller images
    (CIFAR, digits) are used whole.
    """
    return round(size * 8 / 7) if size >= 160 else size


def _at_most(group: CropGroup, side: int) -> CropGroup:
    return group.model_copy(update={"size": min(group.size, side)})
