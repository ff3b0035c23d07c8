"""How many images per second does each stage of a run make, alone and together, and which of them bounds it?"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

import torch

from sslcli import dist
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Batch
from sslcli.data.loader import HostBatch
from sslcli.engine import loop
from sslcli.engine.plan import Parts, assembled

FEW = 3
"""Batches that are timed at least."""


class Stage(StrEnum):
    """What is timed."""

    LOADER = "loader"
    """Reading, decoding and the host part of the views."""
    VIEWS = "views"
    """The device part of the views, transfer included, on one host batch."""
    STEP = "step"
    """Forward and backward pass and update, on one device batch: the compute floor."""
    RUN = "run"
    """All of them, as `ssl pretrain` runs them."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a benchmark found."""

    preset: PretrainPreset
    """As it ran here."""
    device: str
    rates: dict[Stage, float]
    """Images per second and process of each stage that was timed."""

    @property
    def bound(self) -> Stage | None:
        """The slowest single stage, where all were timed."""
        if Stage.RUN not in self.rates:
            return None
        return min((stage for stage in self.rates if stage is not Stage.RUN), key=lambda stage: self.rates[stage])

    @property
    def of_the_floor(self) -> float | None:
        """The whole run's rate over the step's alone, where both were timed."""
        if Stage.RUN not in self.rates or Stage.STEP not in self.rates:
            return None
        return self.rates[Stage.RUN] / self.rates[Stage.STEP]


def bench(preset: PretrainPreset, stage: Stage, *, seconds: float, told: Callable[[Stage], None]) -> Found:
    """Time one stage of a preset, or for `run` each stage alone and then all together.

    Args:
        preset: the experiment; nothing of it is written.
        stage: what is wanted.
        seconds: how long each stage is timed, after a warm-up.
        told: called before each stage.

    Raises:
        UserError: the preset does not fit data or machine.
    """
    rates: dict[Stage, float] = {}
    with closing(assembled(preset)) as parts:
        for each in Stage if stage is Stage.RUN else (stage,):
            told(each)
            rates[each] = rate(work_of(each, parts), warmup=warmup_of(each, parts), seconds=seconds)
    return Found(parts.preset, _device(), rates)


def work_of(stage: Stage, parts: Parts) -> Iterator[int]:
    """Endless work of a stage; each item is a number of images done, perhaps still under way on the device."""
    match stage:
        case Stage.LOADER:
            return (len(batch.index) for batch in _host(parts))
        case Stage.VIEWS:
            held = next(_host(parts))
            return (len(parts.feed.on_device(held, 0).index) for _ in count())
        case Stage.STEP:
            ready = next(_batches(parts))
            return (_step(parts, ready) for _ in count())
        case Stage.RUN:
            return (_step(parts, batch) for batch in _batches(parts))


def warmup_of(stage: Stage, parts: Parts) -> int:
    """Batches before the clock starts: the first, and those that loader processes make ahead."""
    workers = parts.preset.data.workers or 0
    return 1 + (2 * workers if stage in (Stage.LOADER, Stage.RUN) else 0)


def rate(work: Iterator[int], *, warmup: int, seconds: float) -> float:
    """Images per second of endless work, over at least `seconds` and `FEW` batches."""
    for _ in range(warmup):
        next(work)
    _wait()
    begun, images, batches = time.perf_counter(), 0, 0
    while batches < FEW or time.perf_counter() - begun < seconds:
        images += next(work)
        batches += 1
    _wait()
    return images / (time.perf_counter() - begun)


def advice(found: Found) -> str:
    """What to change, in a sentence or two, from the stage that bounds the run."""
    data, run = found.preset.data, found.preset.run
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    match found.bound:
        case Stage.LOADER if (data.workers or 0) < cores and found.device != "cpu":
            return f"the loader bounds the run: try `-o data.workers={cores}`, one for each core"
        case Stage.LOADER:
            return "the loader bounds the run: pack the images once with `ssl data pack`, or use smaller files"
        case Stage.VIEWS if run.views == "fast" and found.device == "cpu":
            return "the views bound the run: on a CPU blur and hue cost most; a larger network would hide them"
        case Stage.VIEWS:
            return "the views bound the run: the fast reading on a GPU is the remedy (`-o run.views=fast`)"
        case Stage.STEP if found.device == "cpu":
            return "the network bounds the run, as it should; a GPU, a smaller network or smaller crops make it faster"
        case Stage.STEP if not run.compile:
            return "the network bounds the run, as it should; `-o run.compile=true` may make it faster"
        case Stage.STEP:
            return "the network bounds the run, as it should"
        case _:
            return ""


def _step(parts: Parts, batch: Batch) -> int:
    loop.step(parts.training, batch, parts.at, parts.preset)
    return len(batch.index)


def _host(parts: Parts) -> Iterator[HostBatch]:
    for epoch in count():
        yield from parts.feed.loader.epoch(epoch)


def _batches(parts: Parts) -> Iterator[Batch]:
    for _ in count():
        yield from parts.feed.epoch(parts.at, None)


def _wait() -> None:
    """Wait until the device has done all it was told."""
    if dist.device().type == "cuda":
        torch.cuda.synchronize()


def _device() -> str:
    return torch.cuda.get_device_name() if dist.device().type == "cuda" else "cpu"
