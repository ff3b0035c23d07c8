"""The evaluation job: weights and a protocol in, a report out. Evaluators themselves see tables of features only."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslcli.config import choice
from sslcli.config.data import AnySource
from sslcli.config.presets import EvalPreset
from sslcli.contracts import Report
from sslcli.data import open_source, other_split
from sslcli.data.source import Source, UnreadableImage
from sslcli.engine import checkpoint, machine
from sslcli.errors import DataError
from sslcli.features.baselines import centred, raw_pixels, untrained
from sslcli.features.compute import Told, of_network
from sslcli.features.table import FeatureTable, Scores, TableEvaluator, numbers_in
from sslcli.features.weights import Weights

LEARNED, UNTRAINED, RAW = "learned", "untrained", "raw pixels"

Passes = Callable[[str], Told | None]
"""Called with the title of each pass over images; gives who wants to know how far it is."""

_VERSIONS = ("ssl", "python", "torch", "numpy", "scikit-learn", "gpus")


@dataclass(frozen=True, slots=True)
class Protocol:
    """A protocol by name: as it is written, and as it is to be carried out."""

    name: str
    frozen: EvalPreset
    """Without overrides."""
    preset: EvalPreset
    """With them."""

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with what the protocol fixes: the evaluator's settings and the view."""
        return _hash(self.preset)

    def label(self) -> str:
        """The name, marked when settings differ from what the protocol fixes: it is another measurement then."""
        return (
            self.name if _hash(self.frozen) == _hash(self.preset) else f"{self.name}@settings-{_hash(self.preset)[:8]}"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an evaluation found."""

    report: Report
    columns: dict[str, Scores]
    """`learned`; and with floors `untrained` and `raw pixels`."""
    warnings: tuple[str, ...]
    folder: Path
    """The run folder the report belongs to, or the folder of the weights."""


def evaluate(weights: Weights, protocol: Protocol, *, floors: bool, passes: Passes) -> Outcome | None:
    """Judge weights by a protocol; all ranks extract features, the main one judges. None on the others.

    Raises:
        DataError: images or labels are missing, or the same images are to be used for training and test.
    """
    preset, judge = protocol.preset, _judge(protocol.preset)
    configs = _images_of(weights, preset, judge)
    sources = _opened(configs, judge)
    view = preset.view or weights.manifest.view

    def learned(source: Source, told: Told | None) -> FeatureTable | None:
        return of_network(
            weights.backbone, source, view, judge.taps, what="weights", digest=weights.digest,
            batch_size=preset.batch_size, workers=preset.workers, progress=told,
        )  # fmt: skip

    def fresh(source: Source, told: Told | None) -> FeatureTable | None:
        return untrained(
            weights.manifest.backbone, source, view, judge.taps, seed=preset.seed,
            batch_size=preset.batch_size, workers=preset.workers, progress=told,
        )  # fmt: skip

    def raw(source: Source, told: Told | None) -> FeatureTable | None:
        return raw_pixels(
            source, view, judge.taps, batch_size=preset.batch_size, workers=preset.workers, progress=told
        )  # fmt: skip

    columns: dict[str, Scores] = {}
    facts: dict[str, Any] = {}
    for name, table_of in {LEARNED: learned, **({UNTRAINED: fresh, RAW: raw} if floors else {})}.items():
        train = table_of(sources[0], passes(f"{name}: training images"))
        test = train if sources[1] is sources[0] else table_of(sources[1], passes(f"{name}: test images"))
        if train is None or test is None:
            continue
        pair = train, test.counted_in(train.meta.classes)
        columns[name] = judge.score(*(centred(*pair) if name == RAW else pair), preset.seed)
        if name == LEARNED:
            facts = _facts_of(*pair, configs)
    if not columns:
        return None
    own = weights.manifest.preset is not None and configs == _own(weights, judge)
    return _outcome(weights, protocol, judge, columns, facts, own=own)


def evaluate_tables(weights: Weights, protocol: Protocol, train: FeatureTable, test: FeatureTable) -> Outcome:
    """Judge features that `ssl features` stored.

    Raises:
        DataError: the tables are not of these weights, lack labels, or are of the same images.
    """
    judge = _judge(protocol.preset)
    for name, table in (("training", train), ("test", test)):
        if table.meta.weights != weights.digest:
            raise DataError(
                f"the {name} features are not those of `{weights.file}`", hint="make them again with `ssl features`"
            )
    if train.digest() == test.digest() and not judge.same_images:
        raise _same("both tables are of the same images")
    columns = {LEARNED: judge.score(train, test.counted_in(train.meta.classes), protocol.preset.seed)}
    trained_on = weights.manifest.source
    own = trained_on is not None and train.meta.source == trained_on.fingerprint
    return _outcome(weights, protocol, judge, columns, _facts_of(train, test, None), own=own)


def _judge(preset: EvalPreset) -> TableEvaluator:
    made: TableEvaluator = choice.build("sslcli.evaluate", preset.evaluator)(preset.evaluator)
    return made


def _own(weights: Weights, judge: TableEvaluator) -> tuple[AnySource, AnySource | None]:
    """The images that the weights were trained on, and the test images that belong to them."""
    train = weights.preset().data.source
    return train, train if judge.same_images else other_split(train)


def _images_of(weights: Weights, preset: EvalPreset, judge: TableEvaluator) -> tuple[AnySource, AnySource]:
    train = preset.train or _own(weights, judge)[0]
    test = train if judge.same_images else preset.test or other_split(train)
    if test is None:
        raise DataError(
            f"it is not known which test images belong to {_named(train)}",
            hint="name them with `--test DIR`, or give `--data DIR` with `train` and `val` folders in it; for kNN "
            "without test images there is `-o evaluator.leave_one_out=true`",
        )
    if train == test and not judge.same_images:
        raise _same(f"{_named(train)} is named for both training and test")
    return train, test


def _opened(configs: tuple[AnySource, AnySource], judge: TableEvaluator) -> tuple[Source, Source]:
    """Both sources, once it is certain that they can be used: the pass over them may take long."""
    train = open_source(configs[0])
    test = train if judge.same_images else open_source(configs[1])
    for source, config in zip((train, test), configs, strict=True):
        if source.labels is None:
            raise DataError(
                f"the images of {_named(config)} have no labels, and an evaluation needs them",
                hint="sort them into one folder per class and point to it with `--data DIR`",
            )
    if test is not train and _alike(train, test):
        raise _same(f"{_named(configs[0])} and {_named(configs[1])} hold the same images")
    numbers_in(train.classes, test.classes)
    return train, test


def _alike(one: Source, other: Source) -> bool:
    """Whether two sources hold the same images; as folders are known by names and sizes only, a few are read."""
    if one.fingerprint() != other.fingerprint():
        return False
    for index in np.unique(np.linspace(0, len(one) - 1, 8, dtype=np.int64)).tolist():
        try:
            if not np.array_equal(one.read(index), other.read(index)):
                return False
        except UnreadableImage:
            continue
    return True


def _same(what: str) -> DataError:
    return DataError(
        f"{what}: the result would show memory, not understanding",
        hint="name other test images with `--test DIR`, or use `-o evaluator.leave_one_out=true` with kNN",
    )


def _named(config: AnySource) -> str:
    path = {"path": "", "root": "", **config.model_dump(mode="json")}
    where = path["path"] or path["root"]
    return f"`{where}`" if where else f"`{config.name}`"


def _facts_of(
    train: FeatureTable, test: FeatureTable, configs: tuple[AnySource, AnySource] | None
) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {}
    for number, (part, table) in enumerate({"train": train, "test": test}.items()):
        facts[part] = {
            "source": None if configs is None else configs[number].model_dump(mode="json"),
            "fingerprint": table.meta.source,
            "images": table.meta.images,
            "skipped": table.meta.skipped,
            "table": table.digest(),
        }
    return {**facts, "view": train.meta.view.model_dump(mode="json")}


def _outcome(
    weights: Weights,
    protocol: Protocol,
    judge: TableEvaluator,
    columns: Mapping[str, Scores],
    facts: Mapping[str, Any],
    *,
    own: bool,
) -> Outcome:
    environment = machine.environment()
    manifest, learned = weights.manifest, columns[LEARNED]
    warnings = _warnings(columns, judge.headline)
    details = {
        "protocol_hash": protocol.fingerprint(),
        "settings": protocol.preset.evaluator.model_dump(mode="json"),
        "seed": protocol.preset.seed,
        "headline": judge.headline,
        "weights": {
            "digest": weights.digest,
            "file": str(weights.file),
            "method": manifest.method,
            "step": manifest.step,
            "epoch": manifest.epoch,
            "trained_on": None if manifest.source is None else manifest.source.fingerprint,
        },
        **facts,
        **learned.details,
        "floors": {name: scores.metrics for name, scores in columns.items() if name != LEARNED},
        "warnings": list(warnings),
        "versions": {name: environment[name] for name in _VERSIONS},
        "command": machine.command(),
    }
    label = protocol.label() + _marks(weights, None if own else facts["test"]["fingerprint"])
    return Outcome(
        report=Report(protocol=label, metrics=learned.metrics, details=details),
        columns=dict(columns),
        warnings=warnings,
        folder=weights.run or weights.file.parent,
    )


def _marks(weights: Weights, other_images: str | None) -> str:
    """What keeps reports apart that would lie in one folder under one name: an earlier step, other images."""
    newest = None if weights.run is None else checkpoint.all_in(weights.run)[-1:]
    final = newest is not None and (not newest or checkpoint.step_of(newest[0]) == weights.manifest.step)
    which = "" if final else f"@{weights.file.stem}"
    return which if other_images is None else f"{which}@data-{other_images[:8]}"


def _warnings(columns: Mapping[str, Scores], headline: str) -> tuple[str, ...]:
    learned = columns[LEARNED].metrics[headline]
    return tuple(
        f"learned features ({learned:.1f} %) do no better than {name} ({columns[name].metrics[headline]:.1f} %) by "
        f"{headline}: {advice}"
        for name, advice in (
            (RAW, "what the network learned is not what tells these classes apart; train longer or on other views"),
            (UNTRAINED, "the run has taught it nothing of use here"),
        )
        if name in columns and learned <= columns[name].metrics[headline]
    )


def _hash(preset: EvalPreset) -> str:
    fixed = preset.model_dump(mode="json", include={"evaluator", "view"})
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]
