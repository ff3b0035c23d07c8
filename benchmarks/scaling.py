"""How images per second grow with workers and with the batch.

- loader: JPEG files to two views of 224 pixels by so many worker processes, in seconds of the clock, once they
  run. `ssl` hands over what a processor does where an accelerator does the rest, decode and two crops;
  `pil` is the papers' pipeline, torchvision v1 on PIL images in torch's DataLoader, which leaves nothing to do.
- step: SimCLR on images of 32 pixels, images to updated weights, on one thread, in processor time; `plain` is the
  papers' loop.

    python benchmarks/scaling.py --jpegs DIR --small DIR [--workers N ...] [--batch N ...] [--images N] [--rounds N]

A folder of few JPEG files is read over and over. Prints Markdown.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from contest import contest, images_in
from peers import Ours, endless, loaded, many, plain_simclr, two_views
from torch.utils.data import DataLoader, Dataset
from views import crops, opened, pil_view

from sslcli.backbones.resnet import Config, ResNet
from sslcli.config.data import Folder
from sslcli.data import open_source
from sslcli.data.loader import Loader
from sslcli.views import build

NETWORK = {"depth": 10, "width": 16, "stem": "small"}


class Files(Dataset[Any]):
    """JPEG files to two views by PIL and torchvision."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._look = pil_view(224, blur=True)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = opened(self._files[index])
        return self._look(image), self._look(image)


def rate(epoch: Callable[[int], Iterable[Any]], batch: int, rounds: int) -> float:
    """Images per second of the best epoch, after one that starts the workers."""
    best = 0.0
    for number in range(rounds + 1):
        begun = time.perf_counter()
        batches = sum(1 for _ in epoch(number))
        if number > 0:
            best = max(best, batches * batch / (time.perf_counter() - begun))
    return best


def many_files(folder: Path, count: int, out: Path) -> list[Path]:
    """So many links to the JPEG files of a folder."""
    files = images_in(folder, (".jpg", ".jpeg"))
    links = [out / f"{number:06}.jpg" for number in range(count)]
    for number, link in enumerate(links):
        os.symlink(files[number % len(files)].resolve(), link)
    return links


def loading(folder: Path, files: list[Path], batch: int, workers: int, rounds: int) -> tuple[float, float]:
    """Images per second by ssl and by PIL, the best of some rounds."""
    views, source = build(crops(224, blur=True), 0), open_source(Folder(path=folder))
    with closing(Loader(source, batch_size=batch, seed=0, look=views.crop, workers=workers)) as loader:
        ours = rate(loader.epoch, batch, rounds)
    others = DataLoader(
        Files(files),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return ours, rate(lambda _: others, batch, rounds)


def stepping(folder: Path, batch: int, rounds: int) -> tuple[float, float]:
    """Images per second and core of a whole step, by ssl and by a plain loop."""
    network = ResNet(Config.model_validate(NETWORK))
    batches = endless(loaded(images_in(folder)[: 8 * batch], two_views(32), batch, 32))
    plain = plain_simclr(network, network.dim, batches)
    steps = max(1, 512 // batch)
    with closing(Ours(folder, "simclr", NETWORK, batch, 32)) as ours:
        entries: dict[str, tuple[int, Callable[[], object]]] = {
            "ssl": (batch * steps, many(ours.step, steps)),
            "plain": (batch * steps, many(plain, steps)),
        }
        found = contest(entries, rounds)
    return found["ssl"], found["plain"]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jpegs", type=Path, required=True)
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[n for n in (0, 1, 2, 4, 8, 16) if n <= _cores()])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| workers | batch | ssl, images/s | pil, images/s | ssl / pil |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = many_files(given.jpegs, given.images, folder)
        for workers in given.workers:
            for batch in given.batch:
                ours, pil = loading(folder, files, batch, workers, given.rounds)
                print(f"| {workers} | {batch} | {ours:,.0f} | {pil:,.0f} | {ours / pil:.1f} |", flush=True)
    print("\n| batch | ssl, images/s per core | plain | ssl / plain |\n| --- | --- | --- | --- |")
    for batch in given.batch:
        ours, plain = stepping(given.small, batch, given.rounds)
        print(f"| {batch} | {ours:,.0f} | {plain:,.0f} | {ours / plain:.2f} |", flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
