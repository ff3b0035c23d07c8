"""A whole pretraining step, images to updated weights, side by side with peers.

One process, one thread, processor time, the contestants in turn, the best of some rounds. The same network, batch,
crops, colours, loss, optimiser and images for all. Up to 64 pixels the images are held in memory, as each tool holds
them; larger views are cut from files that every contestant decodes anew, as it does by itself.

- `ssl`: loader, views and step of `ssl pretrain`, as it runs them;
- `plain`: a loop as the papers' repositories write it, views by torchvision on PIL images;
- `lightly`: its own transform, heads, losses and helpers in the loop of its documentation, where it is installed;
- `solo-learn`: its transforms and methods under Lightning's Trainer, as it runs them, where it is installed. It trains
  a linear classifier beside each method, and its MoCo is symmetric: both views are queries, twice the work.

    python benchmarks/peers.py --images DIR [--method simclr|moco] [--depth N --width N --stem STEM] [--batch N]
        [--size N] [--steps N] [--rounds N]
"""

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from contest import contest, images_in, installed
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sslcli.backbones.resnet import Config, ResNet
from sslcli.config.load import load
from sslcli.data.decode import read_image
from sslcli.engine import loop
from sslcli.engine.plan import assembled

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)
TEMPERATURE, MOMENTUM, QUEUE, DIM = 0.2, 0.99, 4096, 128
LR, DECAY = 2e-3, 1e-2
LARGEST_KEPT = 64
"""Largest view, in pixels, whose images are held in memory."""

Views = Callable[[Image.Image], Any]
Step = Callable[[], object]


class Pictures(Dataset[Any]):
    """Images as PIL has them, looked at by a transform: small ones held in memory, others decoded at every look."""

    def __init__(self, files: list[Path], look: Views, size: int) -> None:
        kept = size <= LARGEST_KEPT
        self._images = [Image.fromarray(read_image(os.fsencode(file), file.name)) if kept else file for file in files]
        self._look = look

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        image = self._images[index]
        return self._look(Image.open(image).convert("RGB") if isinstance(image, Path) else image)


def two_views(size: int) -> Views:
    """Two looks at an image by torchvision."""
    look = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda image: (look(image), look(image))


def loaded(files: list[Path], look: Views, batch: int, size: int) -> DataLoader[Any]:
    """Full batches in random order, by torch."""
    return DataLoader(Pictures(files, look, size), batch_size=batch, shuffle=True, drop_last=True)


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches for ever."""
    for _ in count():
        yield from loader


def nt_xent(one: Tensor, other: Tensor) -> Tensor:
    """SimCLR's loss over 2B projections."""
    z = F.normalize(torch.cat([one, other]), dim=1)
    similar = z @ z.T / TEMPERATURE
    similar.fill_diagonal_(-torch.inf)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(one)))


def plain_simclr(network: nn.Module, dim: int, batches: Iterator[Any]) -> Step:
    """SimCLR, written out."""
    head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, DIM))
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=LR, weight_decay=DECAY)

    def step() -> None:
        one, other = next(batches)
        loss = nt_xent(head(network(one)), head(network(other)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain_moco(network: nn.Module, dim: int, batches: Iterator[Any]) -> Step:
    """MoCo v2, written out."""
    query = nn.Sequential(network, nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, DIM))
    key = copy.deepcopy(query)
    optimizer = torch.optim.AdamW(query.parameters(), lr=LR, weight_decay=DECAY)
    queue, place = F.normalize(torch.randn(DIM, QUEUE), dim=0), 0

    def step() -> None:
        nonlocal place
        one, other = next(batches)
        q = F.normalize(query(one), dim=1)
        with torch.no_grad():
            for slow, fast in zip(key.parameters(), query.parameters(), strict=True):
                slow.data = slow.data * MOMENTUM + fast.data * (1 - MOMENTUM)
            order = torch.randperm(len(other))
            k = F.normalize(key(other[order]), dim=1)[order.argsort()]
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.clone()], dim=1) / TEMPERATURE
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))
        queue[:, place : place + len(k)] = k.T
        place = (place + len(k)) % QUEUE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def lightly_simclr(network: nn.Module, dim: int, batches: Iterator[Any]) -> Step:
    """SimCLR as lightly's documentation writes it."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    head, criterion = SimCLRProjectionHead(dim, dim, DIM), NTXentLoss(temperature=TEMPERATURE)
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=LR, weight_decay=DECAY)

    def step() -> None:
        one, other = next(batches)
        loss = criterion(head(network(one)), head(network(other)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lightly_moco(network: nn.Module, dim: int, batches: Iterator[Any]) -> Step:
    """MoCo as lightly's documentation writes it."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum

    head = MoCoProjectionHead(dim, dim, DIM)
    slow, slow_head = copy.deepcopy(network), copy.deepcopy(head)
    deactivate_requires_grad(slow)
    deactivate_requires_grad(slow_head)
    criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(QUEUE, DIM))
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=LR, weight_decay=DECAY)

    def step() -> None:
        one, other = next(batches)
        update_momentum(network, slow, MOMENTUM)
        update_momentum(head, slow_head, MOMENTUM)
        q = head(network(one))
        with torch.no_grad():
            mixed, order = batch_shuffle(other)
            k = batch_unshuffle(slow_head(slow(mixed)), order)
        loss = criterion(q, k)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lightly_views(size: int) -> Views:
    """Two looks by lightly's own transform, the same operations and numbers."""
    from lightly.transforms import SimCLRTransform

    look: Views = SimCLRTransform(
        input_size=size, cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.4, cj_hue=0.1, min_scale=0.2,
        gaussian_blur=0.0, normalize={"mean": list(MEAN), "std": list(STD)},
    )  # fmt: skip
    return look


def solo_views(size: int) -> Views:
    """What solo-learn's data set hands on: an index, two looks by its own transform, a label."""
    from omegaconf import OmegaConf
    from solo.data.pretrain_dataloader import (
        FullTransformPipeline,
        NCropAugmentation,
        build_transform_pipeline,
    )

    chances = {"grayscale": 0.2, "gaussian_blur": 0.0, "solarization": 0.0, "equalization": 0.0, "horizontal_flip": 0.5}
    cfg = {
        "crop_size": size,
        "mean": MEAN,
        "std": STD,
        "rrc": {"enabled": True, "crop_min_scale": 0.2, "crop_max_scale": 1.0},
        "color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
        **{name: {"prob": chance} for name, chance in chances.items()},
    }
    look = FullTransformPipeline([NCropAugmentation(build_transform_pipeline("own", OmegaConf.create(cfg)), 2)])
    return lambda image: (0, look(image), 0)


def solo(method: str, network: Callable[[], ResNet], loader: DataLoader[Any], steps: int) -> Step:
    """So many steps of solo-learn's method under a Trainer of Lightning, from its start."""
    import lightning.pytorch as pl
    from omegaconf import OmegaConf
    from solo.methods.base import BaseMethod
    from solo.methods.mocov2plus import MoCoV2Plus
    from solo.methods.simclr import SimCLR

    def backbone(_: str) -> nn.Module:
        made = network()
        made.num_features = made.dim
        return made

    BaseMethod._BACKBONES["ours"] = backbone
    dim = network().dim
    cfg = {
        "method": method,
        "backbone": {"name": "ours"},
        "data": {"dataset": "own", "num_classes": 10, "num_large_crops": 2, "num_small_crops": 0},
        "max_epochs": 100,
        "optimizer": {
            "name": "adamw",
            "batch_size": loader.batch_size,
            "lr": LR,
            "weight_decay": DECAY,
            "classifier_lr": LR,
        },
        "scheduler": {"name": "none"},
        "momentum": {"base_tau": MOMENTUM, "final_tau": 1.0},
        "method_kwargs": {
            "proj_hidden_dim": dim,
            "proj_output_dim": DIM,
            "temperature": TEMPERATURE,
            "queue_size": QUEUE,
        },
    }
    module = {"simclr": SimCLR, "moco": MoCoV2Plus}[method](OmegaConf.create(cfg)).to(memory_format=torch.channels_last)
    off = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"), False
    )

    def fit() -> None:
        pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, **off).fit(module, loader)

    return fit


class Ours:
    """The engine's step on what its loader and views deliver."""

    def __init__(self, folder: Path, method: str, backbone: dict[str, Any], batch: int, size: int) -> None:
        name = {"simclr": "simclr-cifar10-cpu", "moco": "mocov2-cifar10-cpu"}[method]
        given = [
            f"data.source={{name: folder, path: {folder}}}",
            f"data.batch_size={batch}",
            f"run.batch_norm={batch}",
            f"views.groups.0.size={size}",
            f"backbone={{name: resnet, {', '.join(f'{key}: {value}' for key, value in backbone.items())}}}",
        ]
        parts = assembled(load("pretrain", name, [*given, "run.views=fast"]).preset)
        self._preset, self._training, self._at = parts.preset, parts.training, parts.at
        self._batches = self._endless(parts.feed)
        self.close = parts.close

    def step(self) -> None:
        """One update."""
        loop.step(self._training, next(self._batches), self._at, self._preset)
        self._at = self._at.next()

    def _endless(self, feed: Any) -> Iterator[Any]:
        while True:
            yield from feed.epoch(self._at, None)


def many(step: Step, count: int) -> Step:
    """So many steps."""
    return lambda: [step() for _ in range(count)]


def main() -> None:
    """Print images per second of each contestant and our ratio over it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--method", choices=("simclr", "moco"), default="simclr")
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--stem", choices=("small", "cifar", "imagenet"), default="small")
    parser.add_argument("--size", type=int, default=32, help="of the views, in pixels")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    backbone = {"depth": given.depth, "width": given.width, "stem": given.stem}

    def network() -> ResNet:
        return ResNet(Config.model_validate(backbone))

    files = images_in(given.images)[: 8 * given.batch]
    method = cast(Literal["simclr", "moco"], given.method)
    ours = Ours(given.images, method, backbone, given.batch, given.size)
    entries = {"ssl": (given.steps, many(ours.step, given.steps))}

    def enter(name: str, make: Callable[[nn.Module, int, Iterator[Any]], Step], look: Views) -> None:
        made = network().train()
        step = make(made, made.dim, endless(loaded(files, look, given.batch, given.size)))
        entries[name] = given.steps, many(step, given.steps)

    enter("plain", {"simclr": plain_simclr, "moco": plain_moco}[method], two_views(given.size))
    if installed("lightly"):
        enter("lightly", {"simclr": lightly_simclr, "moco": lightly_moco}[method], lightly_views(given.size))
    if installed("solo"):
        steps = 4 * given.steps  # a Trainer's start should not count
        loader = loaded(files, solo_views(given.size), given.batch, given.size)
        entries["solo-learn"] = steps, solo(method, network, loader, steps)
    with closing(ours):
        found = contest({name: (given.batch * steps, work) for name, (steps, work) in entries.items()}, given.rounds)
    rows = {
        name: {"img/s per core": round(rate), "ssl / it": round(found["ssl"] / rate, 2)} for name, rate in found.items()
    }
    print(json.dumps({"method": method, **backbone, "size": given.size, "batch": given.batch, **rows}))


if __name__ == "__main__":
    main()
