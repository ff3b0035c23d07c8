"""The job of evaluations that train: a classifier and labelled images in, a trained classifier out.

It runs on the loop of pretraining, so order, views, optimisers, schedules, checkpoints, resuming and the number of
ranks mean the same here.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslcli import dist
from sslcli.config.base import Settings
from sslcli.config.presets import as_data
from sslcli.config.supervised import Recipe
from sslcli.config.views import Crops, EvalView
from sslcli.contracts import Progress, RunFacts
from sslcli.data.source import I64, Source
from sslcli.engine import checkpoint, loop, machine
from sslcli.engine.build import facts_of, feed_of, images_per_rank, loader_of, training_of
from sslcli.engine.classifier import Classifier, in_words_of_an_evaluation
from sslcli.engine.look import features_of
from sslcli.engine.plan import check_batch
from sslcli.engine.pretrain import stop_signals
from sslcli.engine.record import Record, Silent, Watcher, table
from sslcli.engine.resume import differences, found_in, writable
from sslcli.errors import UserError
from sslcli.seeds import seed_here, seed_of
from sslcli.views import AugmentedCrops, CropViews, Views, build_eval

KEEP_LAST = 2
"""Checkpoints of an evaluation that stay."""
LOGS = 50
"""Log lines of an evaluation, about."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained, on what."""

    recipe: Recipe
    source: Source
    """Training images, with labels."""
    crops: Crops
    """How they are looked at: one view."""
    rand_augment: str | None
    classifier: Callable[[RunFacts], Classifier]
    """Makes the classifier, not yet trained."""
    said: Settings
    """The protocol as carried out, for the folder."""
    identity: Mapping[str, Any]
    """What must be the same when training goes on: settings, weights."""
    facts: tuple[tuple[str, str], ...]
    """Rows to print at the start."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A classifier at the end of its training."""

    classifier: Classifier
    """In evaluation mode, on its device."""
    at: Progress
    lr: float
    """Effective base learning rate."""
    precision: str
    """Arithmetic of the network."""
    seconds: float
    """How long this process trained; 0 where it found everything done."""
    memory_gb: float
    """Most memory of the device, or of the process on a CPU."""


def train(
    job: Job,
    folder: Path,
    *,
    again: str,
    watcher: Watcher | None = None,
    draw: Callable[[Path], None] | None = None,
) -> Trained:
    """Train a classifier to the end, continuing what the folder holds.

    Args:
        job: what is to be done.
        folder: where checkpoints and metrics go.
        again: the command that continues the training when it is interrupted.
        watcher: who looks on.
        draw: called now and then with the folder, to refresh its pictures.

    Raises:
        UserError: the folder holds another training, cannot be written, or batch and data do not fit.
        DivergedError: the numbers broke.
        StoppedOnRequest: a signal stopped the training after writing a checkpoint.
    """
    found = found_in(folder, "auto")
    stored = None if found is None else found[1]
    writable(folder)
    if stored is not None:
        _check_same(stored, job, folder)
    recipe = _decided(job, stored)
    views = _views(job)
    with in_words_of_an_evaluation():
        check_batch(recipe, len(job.source), dist.world())
        loader = loader_of(recipe, job.source, views)
        facts = facts_of(recipe, images=len(job.source), steps_per_epoch=loader.steps_per_epoch)
        seed_here(recipe.seed, "init")
        classifier = job.classifier(facts)
        classifier.copy_student()
        training, groups = training_of(classifier, recipe)
    at = Progress(step=0, total=facts.total_steps, steps_per_epoch=facts.steps_per_epoch, seed=recipe.seed)
    if stored is not None:
        training.restore(stored)
        at = Progress(**stored["progress"])
    begun = time.perf_counter()
    if not at.done:
        run = recipe.run.model_copy(update={"log_every": max(1, min(50, facts.total_steps // LOGS))})
        recipe = recipe.model_copy(update={"run": run})
        record = Record(folder, recipe.data.batch_size, watcher or Silent(), draw=draw, again=again)
        with closing(loader), record, stop_signals() as stop_asked:
            record.open(job.said, at)
            record.say(_summary(job, recipe, training, facts, groups, at))
            keep = recipe.run.checkpoints.keep
            with record.failures_told(at), closing(checkpoint.Store(folder, keep, facts.steps_per_epoch)) as store:
                feed = feed_of(loader, views, recipe)
                at = loop.fit(
                    training,
                    feed,
                    recipe,
                    at,
                    look=_no_look,
                    monitor=None,
                    record=record,
                    store=store,
                    checkpoint=partial(_state_of, training, job, recipe, facts),
                    stop_asked=stop_asked,
                )
            record.skipped(feed.skipped, job.source.name)
            record.status("finished", at)
    seconds = time.perf_counter() - begun if stored is None or stored["progress"]["step"] < at.total else 0.0
    classifier.eval()
    return Trained(classifier, at, training.lr, recipe.run.precision or "fp32", seconds, loop.memory_gb())


def predicted(
    trained: Trained,
    source: Source,
    view: EvalView,
    *,
    batch_size: int,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
    slow: bool = False,
) -> tuple[dict[str, I64], I64, int]:
    """The likeliest classes (M, 5 or fewer) of all images, best first, by each classifier; which images; unread ones.

    Every image is looked at once. Only the main rank gets rows.
    """
    classifier, device = trained.classifier, dist.device()
    dtype = loop.DTYPES.get(trained.precision)

    def apply(images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return classifier.likeliest(images, slow=slow)

    found = features_of(
        apply,
        source,
        build_eval(view),
        batch_size=batch_size,
        workers=machine.default_workers(source.resident() is not None) if workers is None else workers,
        device=device,
        network=classifier,
        progress=progress,
        everywhere=False,
    )
    return {name: rows.astype(np.int64) for name, rows in found.rows.items()}, found.kept, len(found.skipped)


def _decided(job: Job, stored: checkpoint.State | None) -> Recipe:
    """The recipe with what was left to the machine: a training that goes on keeps its arithmetic."""
    recipe = job.recipe
    precision = recipe.run.precision or (stored["precision"] if stored else machine.default_precision())
    workers = recipe.data.workers
    if workers is None:
        workers = machine.default_workers(job.source.resident() is not None)
    keep = recipe.run.checkpoints.keep.model_copy(update={"last": KEEP_LAST})
    checkpoints = recipe.run.checkpoints.model_copy(update={"keep": keep})
    run = recipe.run.model_copy(update={"precision": precision, "checkpoints": checkpoints})
    return recipe.model_copy(update={"run": run, "data": recipe.data.model_copy(update={"workers": workers})})


def _views(job: Job) -> Views:
    views = CropViews(job.crops, seed_of(job.recipe.seed, "views"))
    if job.rand_augment is None:
        return views
    made = AugmentedCrops(views, job.rand_augment)
    _ = made.transform  # words that timm does not understand are refused here, not in a loader process
    return made


def _check_same(stored: checkpoint.State, job: Job, folder: Path) -> None:
    """Refuse to go on with another evaluation.

    Raises:
        UserError: settings, weights or images differ.
    """
    old = stored.get("identity", {})
    differing = [f"{key}: {a!r} -> {b!r}" for key, a, b in differences(old, dict(job.identity))]
    if stored["source"]["fingerprint"] != job.source.fingerprint():
        differing.append(f"images: {stored['source']['images']} -> {len(job.source)}, or others")
    if differing:
        raise UserError(
            f"`{folder}` holds another evaluation; these differ:\n  " + "\n  ".join(differing),
            hint="remove or rename that folder to start anew",
        )


def _state_of(training: loop.Training, job: Job, recipe: Recipe, facts: RunFacts, at: Progress) -> checkpoint.State:
    progress = asdict(at)
    del progress["part"]
    return {
        "progress": progress,
        "identity": dict(job.identity),
        "said": as_data(job.said),
        "precision": recipe.run.precision,
        "facts": asdict(facts),
        "source": {
            "fingerprint": job.source.fingerprint(),
            "images": len(job.source),
            "classes": list(job.source.classes),
        },
        **training.state(),
    }


def _no_look(features: Callable[[Tensor], Tensor]) -> Tensor:
    raise AssertionError("a classifier looks at no images between epochs")


def _summary(job: Job, recipe: Recipe, training: loop.Training, facts: RunFacts, groups: str, at: Progress) -> str:
    optim, batch = recipe.optim, recipe.data.batch_size
    trained = sum(p.numel() for p in training.method.parameters() if p.requires_grad)
    own = sum(p.numel() for p in training.method.backbone.parameters())
    rule = "" if optim.per is None else f" = {optim.lr:g} x {batch}/{optim.per}"
    at_once = images_per_rank(recipe)
    if isinstance(training.method, Classifier) and training.method.frozen:
        at_once = min(at_once, training.method.at_once)
    rows = [
        *job.facts,
        ("trained", f"{trained:,} parameters; the network has {own:,}"),
        ("images", f"{facts.images} of {len(job.source.classes)} classes; {facts.steps_per_epoch} steps per epoch"),
        ("steps", f"{facts.total_steps}, " + ("from 0" if at.step == 0 else f"resumed at {at.step}")),
        ("batch", f"{batch} on {dist.world()} rank(s), {at_once} per forward pass"),
        ("learning rate", f"{training.lr:g}{rule}, {recipe.schedule.name}"),
        ("arithmetic", f"{recipe.run.precision} on {dist.device()}"),
    ]
    return table(rows) + "\n" + groups
