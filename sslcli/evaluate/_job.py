"""The evaluation job: weights and a protocol in, a report out. Evaluators themselves see tables of features only."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sslcli.config import choice
from sslcli.config.data import AnySource
from sslcli.config.presets import EvalPreset
from sslcli.config.views import EvalView
from sslcli.contracts import Report
from sslcli.data import open_source, other_split
from sslcli.data.source import Source, UnreadableImage
from sslcli.engine import checkpoint, machine
from sslcli.engine.classifier import TrainedEvaluator
from sslcli.engine.look import Room
from sslcli.errors import DataError, UserError
from sslcli.features.baselines import centred, raw_pixels, untrained
from sslcli.features.cache import FOLDER, Cache, remembered
from sslcli.features.compute import of_network
from sslcli.features.table import FeatureTable, Scores, TableEvaluator, Told, numbers_in
from sslcli.features.weights import Weights

LEARNED, UNTRAINED, RAW = "learned", "untrained", "raw pixels"

Passes = Callable[[str], Told | None]
"""Called with the title of each pass, which ends with what is counted (`images`); gives who wants to know how far it
is."""

Judge = TableEvaluator | TrainedEvaluator

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
    notes: tuple[str, ...] = ()
    """What happened on the way, one line each."""


def evaluate(
    weights: Weights, protocol: Protocol, *, floors: bool, passes: Passes, seeds: int = 1, cached: bool = True
) -> Outcome | None:
    """Judge weights by a protocol; all ranks extract features, the main one judges. None on the others.

    Args:
        weights: what is judged.
        protocol: how.
        floors: judge raw pixels and the untrained network too.
        passes: who is told of each pass over images.
        seeds: how many seeds, from the protocol's on, to draw with; metrics are means over them.
        cached: use features that are kept beside the weights, and keep those that are computed.

    Raises:
        DataError: images or labels are missing, or the same images are to be used for training and test.
        UserError: many seeds for an evaluator that draws nothing.
    """
    preset, judge = protocol.preset, _judge(protocol.preset)
    check_seeds(judge, seeds)
    configs = images_of(weights, preset, judge)
    sources = opened(configs, judge)
    own_view = weights.manifest.view
    view = own_view if preset.view is None else preset.view.applied_to(own_view)
    cache = Cache(folder_of(weights) / FOLDER) if cached else None

    def learned(source: Source, told: Told | None) -> FeatureTable | None:
        def compute(taps: Sequence[str], room: Room) -> FeatureTable | None:
            return of_network(
                weights.backbone, source, view, taps, what="weights", digest=weights.digest,
                batch_size=preset.batch_size, workers=preset.workers, progress=told, room=room,
            )  # fmt: skip

        return remembered(cache, source, view, judge.taps, {"weights": weights.digest}, compute)

    def fresh(source: Source, told: Told | None) -> FeatureTable | None:
        def compute(taps: Sequence[str], room: Room) -> FeatureTable | None:
            return untrained(
                weights.manifest.backbone, source, view, taps, seed=preset.seed,
                batch_size=preset.batch_size, workers=preset.workers, progress=told, room=room,
            )  # fmt: skip

        who = {"untrained": weights.manifest.backbone, "seed": preset.seed}
        return remembered(cache, source, view, judge.taps, who, compute)

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
        pair = _numbered_alike(train, test, judge)
        compared = centred(*pair) if name == RAW else pair
        columns[name] = _scored(judge, *compared, preset.seed, seeds, name=name, passes=passes)
        if name == LEARNED:
            facts = _facts_of(*pair, configs)
    if not columns:
        return None
    own = are_own(weights, configs, judge)
    outcome = outcome_of(weights, protocol, judge, columns, facts, own=own, seeds=seeds)
    return replace(outcome, notes=(*normalised(view, own_view), *(() if cache is None else cache.notes)))


def evaluate_tables(
    weights: Weights,
    protocol: Protocol,
    train: FeatureTable,
    test: FeatureTable,
    *,
    passes: Passes = lambda title: None,
    seeds: int = 1,
) -> Outcome:
    """Judge features that `ssl features` stored.

    Args:
        weights: whose features they are.
        protocol: how.
        train: the training images' features.
        test: the test images' features.
        passes: who is told how far it is, where it takes time.
        seeds: as in `evaluate`.

    Raises:
        DataError: the tables are not of these weights, lack labels, or are of the same images.
        UserError: many seeds for an evaluator that draws nothing.
    """
    judge = _judge(protocol.preset)
    check_seeds(judge, seeds)
    for name, table in (("training", train), ("test", test)):
        if table.meta.weights != weights.digest:
            raise DataError(
                f"the {name} features are not those of `{weights.file}`", hint="make them again with `ssl features`"
            )
    if train.digest() == test.digest() and not judge.same_images:
        raise _same("both tables are of the same images")
    pair = _numbered_alike(train, test, judge)
    columns = {LEARNED: _scored(judge, *pair, protocol.preset.seed, seeds, name=LEARNED, passes=passes)}
    trained_on = weights.manifest.source
    own = trained_on is not None and train.meta.source == trained_on.fingerprint
    return outcome_of(weights, protocol, judge, columns, _facts_of(*pair, None), own=own, seeds=seeds)


def folder_of(weights: Weights) -> Path:
    """Where what belongs to weights is kept: their run, or the folder their file lies in."""
    return weights.run or weights.file.parent


def check_seeds(judge: TableEvaluator, seeds: int) -> None:
    """Refuse many seeds where none is used.

    Raises:
        UserError: the evaluator draws nothing.
    """
    if seeds > 1 and not judge.draws:
        raise UserError("this evaluation draws nothing: every seed gives the same result", hint="leave out `--seeds`")


def _scored(
    judge: TableEvaluator,
    train: FeatureTable,
    test: FeatureTable,
    seed: int,
    seeds: int,
    *,
    name: str,
    passes: Passes,
) -> Scores:
    """What the evaluator finds; of many seeds the mean of each metric and its deviation over them."""
    train.check_finite("the training images")
    if test is not train:
        test.check_finite("the test images")
    found = []
    for one in range(seed, seed + seeds):
        told = passes(f"{name}: {judge.counts}") if judge.counts else None
        found.append(judge.score(train, test, one) if told is None else judge.score(train, test, one, told))
    return mean_of(found, seed)


def mean_of(found: Sequence[Scores], first: int) -> Scores:
    """Means over draws with seeds that follow each other from `first`, and their deviations."""
    if len(found) == 1:
        return found[0]
    values = {name: np.array([scores.metrics[name] for scores in found]) for name in found[0].metrics}
    return Scores(
        metrics={name: float(each.mean()) for name, each in values.items()},
        details={**found[0].details, "by_seed": {str(first + i): scores.metrics for i, scores in enumerate(found)}},
        spread={name: float(each.std()) for name, each in values.items()},
    )


def _numbered_alike(
    train: FeatureTable, test: FeatureTable, judge: TableEvaluator
) -> tuple[FeatureTable, FeatureTable]:
    """Both tables with labels that count in the same classes."""
    classes = train.meta.classes
    if judge.new_classes:
        classes = (*classes, *(name for name in test.meta.classes if name not in set(classes)))
    return train.counted_in(classes), test.counted_in(classes)


def normalised(view: EvalView, own: EvalView) -> tuple[str, ...]:
    """Says so where images are not normalised as the weights expect."""
    if view.normalize == own.normalize:
        return ()
    return (
        f"images are normalised with mean {list(view.normalize.mean)} and deviation {list(view.normalize.std)}, "
        f"but the weights were trained with {list(own.normalize.mean)} and {list(own.normalize.std)}",
    )


def _judge(preset: EvalPreset) -> TableEvaluator:
    made: TableEvaluator = choice.build("sslcli.evaluate", preset.evaluator)(preset.evaluator)
    return made


def _own(weights: Weights, judge: Judge) -> tuple[AnySource, AnySource | None]:
    """The images that the weights were trained on, and the test images that belong to them."""
    train = weights.preset().data.source
    return train, train if judge.same_images else other_split(train)


def are_own(weights: Weights, configs: tuple[AnySource, AnySource], judge: Judge) -> bool:
    """Whether these are the images that the weights were trained on, and the test images that belong to them."""
    return weights.manifest.preset is not None and configs == _own(weights, judge)


def images_of(weights: Weights, preset: EvalPreset, judge: Judge) -> tuple[AnySource, AnySource]:
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


def opened(configs: tuple[AnySource, AnySource], judge: Judge) -> tuple[Source, Source]:
    """Both sources, once it is certain that they can be used: the pass over them may take long."""
    train = open_source(configs[0])
    test = train if judge.same_images else open_source(configs[1])
    for source, config in zip((train, test), configs, strict=True):
        if source.labels is None and source.targets is not None and not judge.many_classes:
            raise DataError(
                f"the images of {_named(config)} may show several classes each, and this evaluation needs one label",
                hint="`ssl eval svm` judges such images",
            )
        if source.labels is None and source.targets is None:
            raise DataError(
                f"the images of {_named(config)} have no labels, and an evaluation needs them",
                hint="sort them into one folder per class and point to it with `--data DIR`",
            )
    if test is not train and _alike(train, test):
        raise _same(f"{_named(configs[0])} and {_named(configs[1])} hold the same images")
    if not judge.new_classes:
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


def outcome_of(
    weights: Weights,
    protocol: Protocol,
    judge: Judge,
    columns: Mapping[str, Scores],
    facts: Mapping[str, Any],
    *,
    own: bool,
    seeds: int,
) -> Outcome:
    environment = machine.environment()
    manifest, learned = weights.manifest, columns[LEARNED]
    warnings = _warnings(columns, judge.headline)
    details = {
        "protocol_hash": protocol.fingerprint(),
        "settings": protocol.preset.evaluator.model_dump(mode="json"),
        "seed": protocol.preset.seed,
        "seeds": seeds,
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
        "spread": learned.spread,
        "floors": {name: scores.metrics for name, scores in columns.items() if name != LEARNED},
        "warnings": list(warnings),
        "versions": {name: environment[name] for name in _VERSIONS},
        "command": machine.command(),
    }
    label = protocol.label() + marks(weights, None if own else facts["test"]["fingerprint"])
    return Outcome(
        report=Report(protocol=label, metrics=learned.metrics, details=details),
        columns=dict(columns),
        warnings=warnings,
        folder=folder_of(weights),
    )


def marks(weights: Weights, other_images: str | None) -> str:
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
