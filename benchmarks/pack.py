"""Images per second of one core: a pack of raw pixels, files, and the usual per-image pipeline of two views.

    python benchmarks/pack.py --data FOLDER [--images 200] [--size 256]

Processor time of one thread, the best of several rounds; files and pack are in the page cache.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

from sslcli.config.views import Blur, CropGroup, Crops, Jitter
from sslcli.data import guess_source, open_source
from sslcli.data.pack import How, pack
from sslcli.data.part import Part
from sslcli.views import build


def rate(work: Callable[[int], object], images: int, rounds: int) -> float:
    """Images per second of processor time, in the best round."""
    best = float("inf")
    for _round in range(rounds):
        begun = time.process_time()
        for index in range(images):
            work(index)
        best = min(best, time.process_time() - begun)
    return images / best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    whole = open_source(guess_source(arguments.data))
    count = min(arguments.images, len(whole))
    source = Part(whole, np.arange(count))
    two = T.Compose(
        [
            T.RandomResizedCrop(224, scale=(0.2, 1.0)),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    jitter = Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    group = CropGroup(repeat=2, size=224, scale=(0.2, 1.0), jitter=jitter, grey=0.2, blur=Blur())
    views = build(Crops(groups=(group,)), 0)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for encoding in ("raw", "jpeg"):
            pack(source, Path(folder) / encoding, How(encoding=encoding, size=arguments.size), workers=0)
            found[encoding] = open_source(guess_source(Path(folder) / encoding))

        def piped(index: int) -> object:
            image = Image.fromarray(source.read(index))
            return two(image), two(image)

        rows = [
            ("PIL and torchvision, two views from files", rate(piped, count, arguments.rounds)),
            ("files, decoded", rate(source.read, count, arguments.rounds)),
            ("JPEG pack, decoded", rate(found["jpeg"].read, count, arguments.rounds)),
            ("raw pack", rate(found["raw"].read, count, arguments.rounds)),
            (
                "raw pack and two crops (loader's share)",
                rate(lambda i: views.crop(found["raw"].read(i), i, 0), count, 3),
            ),
        ]
    for name, speed in rows:
        print(f"{name:<45} {speed:8.0f} images/s   {speed / rows[0][1]:6.1f} x")


if __name__ == "__main__":
    main()
