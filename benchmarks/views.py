"""Images per second and core of ways to make two training views, side by side.

One process, one thread, processor time, the contestants in turn, the best of some rounds. Two settings:

- JPEG files, or a raw pack of them, to two MoCo v2 views of 224 pixels: decode, crop, colour, blur, standardise;
- images of 32 pixels in memory to two views, without blur and with it.

`pil` is the pipeline of the papers' repositories: torchvision v1 on PIL images. `ssl, host part` is what a processor
does where an accelerator does the rest: decode and two crops. kornia's and lightly's transforms take part where they
are installed.

    python benchmarks/views.py --jpegs DIR --small DIR [--rounds N] [--out FILE.json]

DIR is searched for images, subfolders included. FILE gets every figure, and its ratio to `pil` under `ratio_over_pil`.
"""

import argparse
import json
import os
import platform
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from contest import Contest, contest, images_in, installed
from PIL import Image, ImageFilter
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from sslcli.config.data import Folder
from sslcli.config.load import load
from sslcli.config.views import IMAGENET_MEAN, IMAGENET_STD, Blur, Crops
from sslcli.data import guess_source, open_source
from sslcli.data.decode import read_image
from sslcli.data.loader import Loader
from sslcli.data.pack import How, pack
from sslcli.views import build


class PILBlur:
    """The Gaussian blur of SimCLR and MoCo v2 in their PyTorch repositories: Pillow's, of a random radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur one image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def pil_view(size: int, *, blur: bool) -> Callable[[Image.Image], torch.Tensor]:
    """MoCo v2's view as its repository makes it."""
    return v1.Compose(
        [
            v1.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v1.RandomGrayscale(p=0.2),
            *([v1.RandomApply([PILBlur()], p=0.5)] if blur else []),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def tensor_view(size: int, *, blur: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same by torchvision's second transforms, on uint8 tensors."""
    kernel = max(3, size // 10 // 2 * 2 + 1)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            *([v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=0.5)] if blur else []),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def kornia_view(size: int, *, blur: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same by kornia, on a batch in [0, 1]."""
    from kornia import augmentation as k

    kernel = max(3, size // 10 // 2 * 2 + 1)
    parts: list[Any] = [
        k.RandomResizedCrop((size, size), scale=(0.2, 1.0)),
        k.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        k.RandomGrayscale(p=0.2),
        *([k.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5)] if blur else []),
        k.RandomHorizontalFlip(),
        k.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
    ]
    return torch.nn.Sequential(*parts)


def lightly_views(size: int, *, blur: bool) -> Callable[[Image.Image], Sequence[torch.Tensor]]:
    """Both views by lightly's own transform."""
    from lightly.transforms import MoCoV2Transform

    made: Callable[[Image.Image], Sequence[torch.Tensor]] = MoCoV2Transform(
        input_size=size, gaussian_blur=0.5 if blur else 0.0, sigmas=(0.1, 2.0)
    )
    return made


def opened(file: Path) -> Image.Image:
    """An image file, decoded by PIL."""
    with file.open("rb") as stream:
        return Image.open(stream).convert("RGB")


def of_jpegs(folder: Path) -> Contest:
    """From JPEG files to two views of 224 pixels."""
    files = images_in(folder, (".jpg", ".jpeg"))
    views = build(crops(224, blur=True), 0)
    pil, tensor = pil_view(224, blur=True), tensor_view(224, blur=True)
    index = np.arange(len(files))

    source = open_source(Folder(path=folder))
    loader = Loader(source, batch_size=len(source), seed=0, look=views.crop, workers=0)

    def host() -> list[torch.Tensor]:
        return next(iter(loader.epoch(0))).views

    def decoded(file: Path) -> torch.Tensor:
        return decode_jpeg(read_file(str(file)), mode=ImageReadMode.RGB)

    def each_two(make: Callable[[Any], torch.Tensor], read: Callable[[Path], Any]) -> Callable[[], object]:
        def work() -> object:
            pairs = [(make(image), make(image)) for image in map(read, files)]
            return [torch.stack(view) for view in zip(*pairs, strict=True)]

        return work

    count = len(files)
    found: Contest = {
        "pil": (count, each_two(pil, opened)),
        "torchvision v2": (count, each_two(tensor, decoded)),
        "ssl, host part": (count, host),
        "ssl, whole": (count, lambda: views.finish(host(), index, 0)),
        "ssl, decode alone": (count, lambda: sum(source.read(row).size for row in range(count))),
    }
    if installed("lightly"):
        both = lightly_views(224, blur=True)
        found["lightly"] = (count, lambda: [both(opened(file)) for file in files])
    return found


def of_pack(folder: Path, scratch: Path) -> Contest:
    """The same images from a pack of raw pixels, their shorter side 256."""
    views = build(crops(224, blur=True), 0)
    pack(open_source(Folder(path=folder)), scratch, How(encoding="raw", size=256), workers=0)
    packed = open_source(guess_source(scratch))
    loader = Loader(packed, batch_size=len(packed), seed=0, look=views.crop, workers=0)
    return {
        "ssl, raw pack, read alone": (len(packed), lambda: [packed.read(row) for row in range(len(packed))]),
        "ssl, raw pack, host part": (len(packed), lambda: next(iter(loader.epoch(0)))),
    }


def of_small(images: np.ndarray, *, blur: bool) -> Contest:
    """From images (N, 32, 32, 3) uint8 in memory to two views of 32 pixels."""
    views = build(crops(32, blur=blur), 0)
    pil, tensor = pil_view(32, blur=blur), tensor_view(32, blur=blur)
    pictures = [Image.fromarray(image) for image in images[:256]]
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def two(make: Callable[[Any], torch.Tensor], some: Sequence[Any]) -> Callable[[], object]:
        return lambda: [torch.stack([make(image) for image in some]) for _ in range(2)]

    def ours(batch: int) -> Callable[[], object]:
        index, some = np.arange(batch), torch.from_numpy(images[:batch])
        return lambda: views.finish(views.crop_batch(some, index, 0), index, 0)

    found: Contest = {
        "pil": (len(pictures), two(pil, pictures)),
        "torchvision v2": (len(pictures), two(tensor, planes[:256])),
        **{f"ssl, batches of {batch}": (batch, ours(batch)) for batch in (64, 256, 1024)},
    }
    if installed("kornia"):
        make = kornia_view(32, blur=blur)
        found["kornia, batches of 256"] = (256, lambda: [make(planes[:256].float() / 255) for _ in range(2)])
    if installed("lightly"):
        both = lightly_views(32, blur=blur)
        found["lightly"] = (len(pictures), lambda: [both(image) for image in pictures])
    return found


def crops(size: int, *, blur: bool) -> Crops:
    """MoCo v2's views, at a size."""
    views = load("pretrain", "mocov2-r50-200e", []).preset.views
    group = views.groups[0].model_copy(update={"size": size, "blur": Blur() if blur else None})
    return views.model_copy(update={"groups": (group,)})


def main() -> None:
    """Print a table per setting; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jpegs", type=Path, required=True)
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small = images_in(arguments.small)[:1024]
    pixels = np.stack([read_image(os.fsencode(file), file.name) for file in small])
    with tempfile.TemporaryDirectory() as scratch:
        large = {**of_jpegs(arguments.jpegs), **of_pack(arguments.jpegs, Path(scratch) / "pack")}
        of_large = contest(large, arguments.rounds)
    found = {
        "jpeg to two views of 224 px": of_large,
        "32 px in memory, no blur": contest(of_small(pixels, blur=False), arguments.rounds),
        "32 px in memory, blur": contest(of_small(pixels, blur=True), arguments.rounds),
    }
    ratios = {
        setting: {name: round(rate / rates["pil"], 2) for name, rate in rates.items()}
        for setting, rates in found.items()
    }
    for setting, rates in found.items():
        print(f"\n| {setting} | images/s per core | over pil |\n| --- | --- | --- |")
        for name, rate in rates.items():
            print(f"| {name} | {rate:,.0f} | {ratios[setting][name]:.1f} |")
    if arguments.out is not None:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}
        figures = {
            "images_per_second_per_core": found,
            "ratio_over_pil": ratios,
            "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
            "versions": versions,
        }
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
