"""Which images, as data: the closed set of sources, and how they are batched."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sslcli.config.base import Settings
from sslcli.config.types import Count, Fraction, Index, Operational


class _Files(Settings):
    on_error: Literal["skip", "stop"] = "skip"
    """An unreadable image is skipped, counted and written to the skip list, or stops the job."""
    skip: Path | None = None
    """List of images to leave out, one name a line, as `ssl data check` writes it."""


class Folder(_Files):
    """Every image below a folder. Sub-folders of the first level are classes when all images lie in one."""

    name: Literal["folder"] = "folder"
    path: Path
    """The folder; it is searched to any depth."""
    labels: bool | None = None
    """Whether first-level sub-folders are classes; when absent, they are if every image lies in one."""


class FileList(_Files):
    """Images named in a text file, one a line: a path and perhaps a label after the last space; or in a CSV file."""

    name: Literal["list"] = "list"
    path: Path
    """The text file."""
    part: str | None = None
    """Only the rows with this word in the column `part` of a CSV file, e.g. `gallery`; when absent, all rows."""
    root: Path | None = None
    """Folder that relative paths start from; the list's own folder when absent."""


class Packed(_Files):
    """Images that `ssl data pack` has stored: read by number, without opening a file for each."""

    name: Literal["packed"] = "packed"
    path: str
    """The folder, or where a copy of it is served: a URL that fsspec understands (s3://…, https://…)."""
    cache: Path | None = None
    """With a URL: folder that keeps whole shards once they have been needed; when absent, each image is fetched."""


class Npz(Settings):
    """Arrays in a NumPy archive: images as uint8 (N, H, W, 3) or (N, H, W), labels as integers (N,)."""

    name: Literal["npz"] = "npz"
    path: Path
    """The .npz file."""
    images: str = "images"
    """Key of the images."""
    labels: str | None = None
    """Key of the labels; when absent, `labels` is used if the archive has it."""


class Cifar(Settings):
    """CIFAR-10 or CIFAR-100 in its original binary or Python files, read without running anything in them."""

    name: Literal["cifar"] = "cifar"
    classes: Literal[10, 100] = 10
    """CIFAR-10 or CIFAR-100 (fine labels)."""
    root: Path = Path("data/cifar")
    """Folder that holds the extracted files, or the folder that contains theirs."""
    split: Literal["train", "test"] = "train"
    """The 50,000 training or the 10,000 test images."""
    download: bool = False
    """Fetch the files with torchvision when they are absent."""


class Voc(_Files):
    """Images with several classes each, in the layout of Pascal VOC: `JPEGImages` and `ImageSets/Main`."""

    name: Literal["voc"] = "voc"
    path: Path
    """The folder where that begins, or one above it: `VOCdevkit/VOC2007`, `VOCdevkit`, or where that lies."""
    split: Literal["train", "val", "trainval", "test"] = "trainval"
    """Which images; those of `test` belong to `trainval`, those of `val` to `train`."""


class Digits(Settings):
    """scikit-learn's 1,797 real handwritten digits, 8 x 8 pixels, enlarged to 32 x 32: real, small, offline."""

    name: Literal["digits"] = "digits"
    split: Literal["train", "test", "all"] = "train"
    """The first 1,297 or the last 500 digits, or all of them."""


class ColouredDigits(Settings):
    """Handwritten digits in random colour, place and size on a plain colour; made from scikit-learn's digits.

    The class is the only thing that two augmented views of a picture are sure to share. Test pictures use
    handwriting that no training picture shows.
    """

    name: Literal["coloured_digits"] = "coloured_digits"
    split: Literal["train", "test"] = "train"
    """Pictures of the first 1,297 digits, or of the last 500."""
    count: Count = 6000
    """How many pictures to draw."""
    size: Count = 32
    """Side of a picture in pixels."""
    seed: Index = 0
    """Which drawing of the pictures."""


AnySource = Annotated[
    Folder | FileList | Packed | Npz | Cifar | Voc | Digits | ColouredDigits, Field(discriminator="name")
]


class Data(Settings):
    """The images of a pretraining run and how they are batched."""

    source: AnySource
    """Where the images come from."""
    batch_size: Count = 256
    """Images per optimiser step over all ranks together: the same preset is the same experiment on 1 or 8 GPUs."""
    drop_last: bool = True
    """Leave out the last, incomplete batch of an epoch."""
    fraction: Fraction = 1.0
    """Use only this share of the images (a fixed, seeded choice)."""
    workers: Annotated[Index | None, Operational()] = None
    """Loader processes per rank; when absent, chosen for the machine. Images held in memory need none."""
