"""The evaluation job of evaluators that train a classifier: weights and a protocol in, a report out."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sslcli import dist
from sslcli.config import choice
from sslcli.config.data import AnySource, Data
from sslcli.config.presets import EvalPreset
from sslcli.config.supervised import TrainedConfig, TunedConfig
from sslcli.config.views import EvalView
from sslcli.contracts import Backbone, RunFacts
from sslcli.data.source import I64, Source
from sslcli.engine import machine
from sslcli.engine.classifier import Classifier, TrainedEvaluator, Training, set_drop_path
from sslcli.engine.record import Watcher
from sslcli.engine.supervised import Job, Trained, predicted, train
from sslcli.errors import DataError, SslError
from sslcli.evaluate._job import (
    LEARNED,
    Outcome,
    Passes,
    Protocol,
    are_own,
    folder_of,
    images_of,
    marks,
    mean_of,
    normalised,
    opened,
    outcome_of,
)
from sslcli.features.table import Scores, numbers_in
from sslcli.features.weights import Weights, digest_of, network

FOLDER = "eval"
"""Below a run, or beside weights: what training evaluations leave behind."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """What is the same for all seeds."""

    weights: Weights
    preset: EvalPreset
    cfg: TrainedConfig
    judge: TrainedEvaluator
    configs: tuple[AnySource, AnySource]
    train: Source
    test: Source
    truth: I64
    """(N,) labels of the test images, in the numbering of the training images."""
    view: EvalView


def evaluate(
    weights: Weights,
    protocol: Protocol,
    *,
    seeds: int = 1,
    passes: Passes,
    watcher: Watcher | None = None,
    draw: Callable[[Path], None] | None = None,
) -> Outcome | None:
    """Train on a network by a protocol and judge it after the last epoch; all ranks take part. None on all but one.

    What was interrupted goes on where it stopped, when the same is asked for again.

    Args:
        weights: what is judged.
        protocol: how.
        seeds: how many seeds, from the protocol's on, to train with; metrics are means over them.
        passes: who is told of each pass over test images.
        watcher: who looks on while training.
        draw: called now and then with the folder of the training, to refresh its pictures.

    Raises:
        DataError: images or labels are missing, classes do not fit, or training and test images are the same.
        UserError: the network, batch and data do not fit together.
        StoppedOnRequest: a signal stopped the training after writing a checkpoint.
    """
    setting = _setting(weights, protocol)
    own = are_own(weights, setting.configs, setting.judge)
    label = protocol.label() + marks(weights, None if own else setting.test.fingerprint())
    home = folder_of(weights) / FOLDER / label
    found: list[Scores] = []
    for seed in range(protocol.preset.seed, protocol.preset.seed + seeds):
        folder = home / f"{_short(weights.digest, setting.train.fingerprint())}-seed{seed}"
        scores = _with_seed(setting, seed, folder, passes, watcher, draw)
        if scores is not None:
            found.append(scores)
    if not found:
        return None
    outcome = outcome_of(
        weights, protocol, setting.judge, {LEARNED: mean_of(found, protocol.preset.seed)}, _facts(setting),
        own=own, seeds=seeds,
    )  # fmt: skip
    notes = (*normalised(setting.view, weights.manifest.view), f"training: {home}")
    return replace(outcome, warnings=(*outcome.warnings, *_partly(weights)), notes=notes)


def _setting(weights: Weights, protocol: Protocol) -> _Setting:
    """Everything checked that can be checked before hours of training.

    Raises:
        DataError: see `evaluate`.
    """
    preset, cfg = protocol.preset, protocol.preset.evaluator
    assert isinstance(cfg, TrainedConfig)
    judge: TrainedEvaluator = choice.build("sslcli.evaluate", cfg)(cfg)
    configs = images_of(weights, preset, judge)
    whole, test = opened(configs, judge)
    used = judge.part(whole)
    labels, truth = used.labels, test.labels
    assert labels is not None and truth is not None  # noqa: PT018  # checked when they were opened
    _check_classes(whole, labels, cfg)
    view = cfg.test_view(weights.manifest.view)
    view = view if preset.view is None else preset.view.applied_to(view)
    return _Setting(
        weights, preset, cfg, judge, configs, used, test, numbers_in(whole.classes, test.classes)[truth], view
    )


def _check_classes(whole: Source, labels: I64, cfg: TrainedConfig) -> None:
    """Refuse labels that leave a classifier with outputs that are never trained, or another number than expected.

    Raises:
        DataError: with the class that is missing.
    """
    classes = whole.classes
    if cfg.classes is not None and len(classes) != cfg.classes:
        raise DataError(
            f"this protocol is for {cfg.classes} classes, the training images have {len(classes)}",
            hint="use the protocol without a data set in its name, or `-o evaluator.classes=null`",
        )
    if len(classes) < 2:
        raise DataError("the training images are all of one class", hint="a classifier needs two classes or more")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise DataError(
            f"the training labels go from {low} to {high}, but there are {len(classes)} classes",
            hint="labels count the classes from 0",
        )
    counts = np.bincount(labels, minlength=len(classes))
    if (counts == 0).any():
        missing = int((counts == 0).argmax())
        raise DataError(
            f"{int((counts == 0).sum())} of the {len(classes)} classes have no training image, first of them "
            f"`{classes[missing]}` (number {missing})",
            hint="remove the empty class, or number the labels without gaps",
        )


def _with_seed(
    setting: _Setting,
    seed: int,
    folder: Path,
    passes: Passes,
    watcher: Watcher | None,
    draw: Callable[[Path], None] | None,
) -> Scores | None:
    weights, preset, cfg = setting.weights, setting.preset, setting.cfg
    data = Data(source=setting.configs[0], batch_size=cfg.batch_size, drop_last=cfg.drop_last, workers=preset.workers)
    settled = preset.model_copy(update={"seed": seed, "train": setting.configs[0], "test": setting.configs[1]})
    job = Job(
        recipe=cfg.recipe(data, seed),
        source=setting.train,
        crops=cfg.crop.views(setting.view.size, setting.view.normalize),
        rand_augment=cfg.crop.rand_augment,
        classifier=lambda facts: _classifier(setting, _fresh(weights), facts),
        said=settled,
        identity={
            "evaluator": cfg.model_dump(mode="json"),
            "view": setting.view.model_dump(mode="json"),
            "seed": seed,
            "weights": weights.digest,
        },
        facts=_rows(setting),
    )
    trained = train(job, folder, again=machine.command(), watcher=watcher, draw=draw)
    if setting.judge.frozen:
        _check_unmoved(trained.classifier, weights)
    ema = trained.classifier.slow is not None
    judged = _judged(setting, trained, passes(f"test images, seed {seed}"), slow=ema)
    without = (
        _judged(setting, trained, passes(f"test images, seed {seed}, without averaging"), slow=False) if ema else None
    )
    if judged is None:
        return None
    metrics, unread = judged
    run = {
        "steps": trained.at.total,
        "lr": trained.lr,
        "arithmetic": trained.precision,
        "ranks": dist.world(),
        "seconds": round(trained.seconds, 1),
        "memory_gb": round(trained.memory_gb, 2),
        "folder": str(folder),
    }
    extra = {} if without is None else {"without_ema": without[0]}
    return Scores(metrics=metrics, details={"training": run, "test_unreadable": unread, **extra})


def _fresh(weights: Weights) -> Backbone:
    """The network once more: every seed begins with the weights as they are."""
    backbone = network(weights.manifest.backbone)
    backbone.load_state_dict(weights.backbone.state_dict())
    return backbone


def _classifier(setting: _Setting, backbone: Backbone, facts: RunFacts) -> Classifier:
    cfg = setting.cfg
    tuned = cfg if isinstance(cfg, TunedConfig) else None
    if tuned is not None:
        set_drop_path(backbone.trunk, tuned.drop_path)
    return Classifier(
        backbone,
        facts,
        reads=setting.judge.reads(backbone),
        classes=len(setting.train.classes),
        side=setting.view.size,
        training=Training(
            std=setting.view.normalize.std,
            lighting=cfg.crop.lighting,
            erase=cfg.crop.erase,
            mix=None if tuned is None else tuned.mix,
            smoothing=0.0 if tuned is None else tuned.smoothing,
            ema=None if tuned is None else tuned.ema,
        ),
        std=cfg.head_std,
        frozen=setting.judge.frozen,
        at_once=setting.preset.batch_size,
    )


def _judged(
    setting: _Setting, trained: Trained, told: Callable[[int, int], None] | None, *, slow: bool
) -> tuple[dict[str, float], int] | None:
    """Shares, in percent, of test images whose class is the likeliest or among five; how many could not be read."""
    rows, kept, unread = predicted(
        trained, setting.test, setting.view, batch_size=setting.preset.batch_size, workers=setting.preset.workers,
        progress=told, slow=slow,
    )  # fmt: skip
    if not dist.is_main():
        return None
    right = setting.truth[kept]
    several = len(rows) > 1
    found: dict[str, float] = {}
    for top in (1, 5):
        for name, likely in rows.items():
            hit = (likely[:, :top] == right[:, None]).any(axis=1)
            found[f"top{top}_{name}" if several else f"top{top}"] = 100.0 * float(hit.mean())
    return found, unread


def _check_unmoved(classifier: Classifier, weights: Weights) -> None:
    """Make sure that a frozen network is still the one that was to be judged, statistics of batch norms included.

    Raises:
        SslError: it is not.
    """
    now = digest_of(dict(classifier.backbone.trunk.state_dict()))
    if now != digest_of(dict(weights.backbone.trunk.state_dict())):
        raise SslError(
            "the frozen network has changed while its classifier was trained: the result would mean nothing",
            hint="please report this with the command and the log",
        )


def _partly(weights: Weights) -> tuple[str, ...]:
    match = weights.match
    if match.whole:
        return ()
    kept = len(match.missing) + len(match.misshapen)
    return (f"{kept} of {match.matched + kept} tensors of the network are not from the file: they are as initialised",)


def _facts(setting: _Setting) -> dict[str, Any]:
    parts = {"train": (setting.configs[0], setting.train), "test": (setting.configs[1], setting.test)}
    facts: dict[str, Any] = {
        name: {
            "source": config.model_dump(mode="json"),
            "fingerprint": source.fingerprint(),
            "images": len(source),
            "classes": len(source.classes),
        }
        for name, (config, source) in parts.items()
    }
    return {**facts, "view": setting.view.model_dump(mode="json")}


def _rows(setting: _Setting) -> tuple[tuple[str, str], ...]:
    """What is said at the start of a training."""
    manifest, view = setting.weights.manifest, setting.view
    norm = view.normalize
    whose = "the weights' own" if norm == manifest.view.normalize else "not the weights' own"
    return (
        ("evaluation", setting.cfg.name + (", frozen network" if setting.judge.frozen else ", whole network")),
        ("weights", f"{manifest.method}, step {manifest.step}: {setting.weights.file}"),
        ("normalisation", f"mean {_numbers(norm.mean)}, deviation {_numbers(norm.std)}: {whose}"),
        ("test images", f"{len(setting.test)}; {view.resize} -> {view.size} pixels, {view.interpolation}"),
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _short(*names: str) -> str:
    return hashlib.sha256("\0".join(names).encode()).hexdigest()[:8]
