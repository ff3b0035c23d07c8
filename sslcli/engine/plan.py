"""Before a run: does everything fit together, and what will it take?"""

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from sslcli import dist
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Progress, Recipe, RunFacts
from sslcli.data import open_source
from sslcli.data.source import Source
from sslcli.engine import loop, machine
from sslcli.engine.build import (
    facts_of,
    faster_reading,
    feed_of,
    images_per_rank,
    loader_of,
    method_of,
    training_of,
)
from sslcli.engine.feed import Feed
from sslcli.engine.record import table
from sslcli.engine.resume import state_of
from sslcli.errors import DataError, SslError, UserError
from sslcli.seeds import seed_of
from sslcli.views import Views, build


def check_batch(preset: Recipe, images: int, ranks: int) -> None:
    """Refuse a batch that the ranks cannot share or the images cannot fill.

    Raises:
        UserError: with batch sizes that work.
    """
    batch, shares = preset.data.batch_size, ranks * preset.run.accumulate
    if batch % shares:
        nearest = sorted({max(shares, batch // shares * shares), (batch // shares + 1) * shares})
        raise UserError(
            f"`data.batch_size` {batch} cannot be shared by {ranks} rank(s) in {preset.run.accumulate} slice(s) each",
            hint=f"use {' or '.join(map(str, nearest))}, e.g. `-o data.batch_size={nearest[0]}`",
        )
    count = math.ceil(images * preset.data.fraction)
    if preset.data.drop_last and batch > count:
        raise DataError(
            f"`data.batch_size` {batch} is larger than the data set of {count} image(s)",
            hint=f"use at most {count // shares * shares}, e.g. `-o data.batch_size={count // shares * shares}`"
            if count >= shares
            else "more images are needed",
        )


def summary(
    preset: PretrainPreset,
    source: Source,
    training: loop.Training,
    facts: RunFacts,
    groups: str,
    at: Progress,
) -> str:
    """What is about to happen, in a few lines."""
    own = sum(p.numel() for p in training.method.backbone.parameters())
    trained = sum(p.numel() for p in training.method.parameters() if p.requires_grad)
    rule = "" if preset.optim.per is None else f" = {preset.optim.lr:g} x {preset.data.batch_size}/{preset.optim.per}"
    run, data = preset.run, preset.data
    rows = [
        ("method", f"{preset.method.name}, {trained / 1e6:.2f} M parameters trained"),
        ("backbone", f"{preset.backbone.name}, {own / 1e6:.2f} M parameters"),
        ("images", f"{facts.images} ({data.source.name}); {facts.steps_per_epoch} steps per epoch"),
        ("steps", f"{facts.total_steps}, " + ("from 0" if at.step == 0 else f"resumed at {at.step}")),
        ("batch", f"{data.batch_size} on {dist.world()} rank(s), {images_per_rank(preset)} per forward pass"),
        ("batch norm", f"over {run.batch_norm} images" if run.batch_norm != "global" else "over all images"),
        ("learning rate", f"{training.lr:g}{rule}, {preset.schedule.name}"),
        ("arithmetic", f"{run.precision} on {dist.device()}"),
        ("views", f"{run.views} reading, {data.workers} loader worker(s)"),
    ]
    return table(rows) + "\n" + groups


@dataclass(frozen=True, slots=True)
class Parts:
    """All that a run is made of, ready for its first step, and no run folder."""

    preset: PretrainPreset
    """With everything decided that a machine decides."""
    source: Source
    facts: RunFacts
    training: loop.Training
    groups: str
    """The table of parameter groups."""
    feed: Feed
    at: Progress

    def close(self) -> None:
        """End the loader's processes."""
        self.feed.loader.close()


def decided(preset: PretrainPreset, source: Source) -> tuple[PretrainPreset, Views]:
    """The preset with everything decided that a machine decides, and its views.

    Raises:
        UserError: the preset does not fit these images, or this number of ranks.
    """
    check_batch(preset, len(source), dist.world())
    views = build(preset.views, seed_of(preset.seed, "views"))
    reading = preset.run.views or faster_reading(source, views, preset.data.batch_size)
    return machine.resolved(preset, resident=source.resident() is not None, reading=reading), views


def assembled(preset: PretrainPreset) -> Parts:
    """Build what a preset describes on this machine; the method is in training mode.

    Raises:
        UserError: the preset does not fit data or machine.
    """
    source = open_source(preset.data.source)
    preset, views = decided(preset, source)
    loader = loader_of(preset, source, views)
    facts = facts_of(preset, images=len(source), steps_per_epoch=loader.steps_per_epoch)
    training, groups = training_of(method_of(preset, facts), preset)
    training.method.train()
    at = Progress(step=0, total=facts.total_steps, steps_per_epoch=facts.steps_per_epoch, seed=preset.seed)
    return Parts(preset, source, facts, training, groups, feed_of(loader, views, preset), at)


def dry_run(preset: PretrainPreset, *, steps: int = 2) -> list[tuple[str, str]]:
    """Validate preset, data and machine by taking a few real steps; nothing is written.

    Returns:
        Rows (name, value) to print: parameters, memory, images per second, time and disk needed, learning rate; at
        last, without a name, the table of parameter groups.
    """
    losses, seconds = [], []
    with closing(assembled(preset)) as parts:
        preset, facts, training, feed, at = parts.preset, parts.facts, parts.training, parts.feed, parts.at
        for batch in islice(feed.epoch(at, None), steps):
            begun = time.perf_counter()
            result, _, _ = loop.step(training, batch, at, preset)
            losses.append(float(result.loss))  # waits for the device
            seconds.append(time.perf_counter() - begun + feed.waited)
            feed.waited, at = 0.0, at.next()
    if not all(map(math.isfinite, losses)):
        raise SslError("the loss of the first steps is not finite", hint="try `-o run.precision=fp32`")
    bytes_written = size_of(state_of(training, preset, facts, parts.source, at))
    rate = preset.data.batch_size / min(seconds)
    parameters = sum(p.numel() for p in training.method.parameters())
    trained = sum(p.numel() for p in training.method.parameters() if p.requires_grad)
    return [
        ("images", f"{facts.images} ({preset.data.source.name})"),
        ("parameters", f"{parameters / 1e6:.2f} M, of which {trained / 1e6:.2f} M are trained"),
        ("steps", f"{facts.total_steps} ({facts.steps_per_epoch} per epoch)"),
        ("learning rate", f"{training.lr:g} at a batch of {preset.data.batch_size}"),
        ("arithmetic", f"{preset.run.precision} on {dist.device()}"),
        ("views", f"{preset.run.views} reading, {preset.data.workers} loader worker(s)"),
        ("loss", " ".join(f"{loss:.4f}" for loss in losses)),
        ("memory", f"{loop.memory_gb():.2f} GB"),
        ("speed", f"{rate:.1f} images/s (from {len(seconds)} steps)"),
        ("time", f"about {_duration(facts.total_steps * preset.data.batch_size / rate)}"),
        ("disk", f"about {bytes_written * (preset.run.checkpoints.keep.last + 1) / 1e6:.0f} MB of checkpoints"),
        ("", parts.groups),
    ]  # fmt: skip


def size_of(value: Any) -> int:
    """Bytes of all tensors in nested state."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(size_of(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(size_of(item) for item in value)
    return 0


def _duration(seconds: float) -> str:
    if seconds > 172800:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{seconds / 60:.1f} minutes"
