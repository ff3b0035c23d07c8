"""Looking at a few training images now and then, without the training noticing."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sslcli import dist, seeds
from sslcli.config import presets
from sslcli.config.views import Crops
from sslcli.contracts import Batch, Method, Progress
from sslcli.data.source import I64, Source, UnreadableImage
from sslcli.engine import health
from sslcli.engine.record import Record
from sslcli.errors import CollapsedError
from sslcli.nn.norm import statistics_of_the_batch
from sslcli.views import build, build_eval

AT_ONCE = 64
"""Images that are passed together at least, so that their statistics mean something where training batches are tiny."""
CANDIDATES = 100_000
"""Images from which those that vote are chosen."""
PER_CLASS = 20
"""Images that a class needs for its members to find each other among `K` neighbours."""
K, TEMPERATURE = 20, 0.07
PATIENCE = 2
"""Looks in a row that must find the features collapsed before a run is stopped."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The images looked at, as they lie in memory."""

    plain: Tensor
    """(M, 3, s, s) uint8: every image as evaluation looks at it."""
    measured: Tensor
    """(M,) bool: which rows of `plain` are measured."""
    voting: Tensor
    """(M,) bool: which rows of `plain` vote for each other; none without labels."""
    labels: Tensor
    """(V,) int64: their classes, numbered from 0."""
    index: Tensor
    """(P,) int64: images of which there are two views."""
    views: list[Tensor]
    """Two, each (P, 3, s, s) uint8: as training crops them; none where training does not crop."""


class Monitor:
    """Measures the method's features at a cadence, records what they mean, and stops a run that has collapsed.

    Every rank measures the same images by itself; what the main rank finds counts.

    Args:
        method: on its device.
        source: the training images.
        preset: resolved.
        images_at_once: images of one rank's forward pass in training.
        steps_per_epoch: steps in one pass.
        record: where findings go.
    """

    def __init__(
        self,
        method: Method[Any],
        source: Source,
        preset: presets.PretrainPreset,
        *,
        images_at_once: int,
        steps_per_epoch: int,
        record: Record,
    ) -> None:
        cfg = preset.run.monitor or presets.Monitor(every_epochs=None)
        self._cfg = cfg
        self._every = None if cfg.every_epochs is None else max(1, round(cfg.every_epochs * steps_per_epoch))
        self._method = method
        self._source = source
        self._preset = preset
        self._at_once = max(AT_ONCE, images_at_once)
        self._record = record
        self._stops = preset.run.on_collapse == "stop"
        self._collapsed: list[int] = []
        self._good: int | None = None
        self._plain_view = build_eval(preset.views.eval_view)
        pair = preset.views.pair()
        self._comparing = pair is not None
        if pair is None and isinstance(preset.views, Crops):  # methods of one view have vitals too
            pair = preset.views.twice()
        self._pair = None if pair is None else build(pair, seeds.seed_of(preset.seed, "views"))

    def due(self, at: Progress) -> bool:
        """Whether it is time for a look."""
        return self._every is not None and (at.step % self._every == 0 or at.done)

    def look(self, at: Progress, scalars: Mapping[str, Tensor]) -> None:
        """Measure, judge, record. `scalars` are those of the step just taken; a `spread` among them is judged too.

        Raises:
            CollapsedError: the features have collapsed, not for the first time in a row, and the preset wants to stop.
        """
        begun = perf_counter()
        vitals = self._measure(scalars)
        verdict = health.judge(vitals, comparing=self._comparing, fraction=at.fraction)
        vitals["seconds"] = perf_counter() - begun
        verdict, vitals = dist.broadcast_object((verdict, vitals))
        self._record.health(verdict, vitals, at)
        if verdict.word == "collapsed":
            self._collapsed.append(at.step)
        else:
            self._collapsed, self._good = [], at.step
        if self._stops and len(self._collapsed) >= PATIENCE:
            last = "" if self._good is None else f"; they were not at step {self._good}"
            message = f"the features have collapsed, seen at steps {' and '.join(map(str, self._collapsed))}{last}"
            self._record.status("failed", at, message)
            raise CollapsedError(message, hint=verdict.advice)

    def _measure(self, scalars: Mapping[str, Tensor]) -> health.Vitals:
        sample, method, device = self._sample, self._method, dist.device()
        with undisturbed(method, compiled=self._preset.run.compile):
            network = method.exported()
            blocks = sample.plain.tensor_split(max(1, len(sample.plain) // self._at_once))
            features = torch.cat([network(self._plain_view.finish(block.to(device))).float().cpu() for block in blocks])
            vitals = health.measure(features[sample.measured])
            offered = {name: value for name, value in scalars.items() if name == "spread"}
            if self._pair is not None and sample.views:
                views = self._pair.finish([view.to(device) for view in sample.views], sample.index.numpy(), 0)
                if self._comparing:
                    vitals |= health.measure_pair(*(network(view).float() for view in views))
                offered |= method.vitals(Batch(views=views, index=sample.index.to(device)))
        vitals |= {f"method_{name}": float(value) for name, value in offered.items()}
        if len(sample.labels) > 1:
            vitals["knn"] = health.knn(features[sample.voting], sample.labels, k=K, temperature=TEMPERATURE)
        return vitals

    @cached_property
    def _sample(self) -> Sample:
        """Read once, at the first look: 0.15 MB for each image of 224 px, and as much for each view."""
        source, cfg = self._source, self._cfg
        candidates = np.arange(min(len(source), CANDIDATES))
        order = seeds.permuted(candidates, len(source), seeds.seed_of(self._preset.seed, "monitor"))
        healthy = order[: cfg.images]
        voting = order[:0] if source.labels is None or not cfg.knn else voters(order, source.labels, cfg.knn_images)
        paired = order[:0] if self._pair is None else healthy[: min(len(healthy) // 2, self._at_once)]
        kept, looks = self._read(np.union1d(healthy, voting), frozenset(paired.tolist()))
        votes, both = np.isin(kept, voting), np.isin(kept, paired)
        labels = np.zeros(len(kept), dtype=np.int64) if source.labels is None else source.labels[kept]
        views = zip(*(look[1:] for look, pair in zip(looks, both, strict=True) if pair), strict=True)
        return Sample(
            plain=torch.from_numpy(np.stack([look[0] for look in looks])),
            measured=torch.from_numpy(np.isin(kept, healthy)),
            voting=torch.from_numpy(votes),
            labels=torch.from_numpy(np.unique(labels[votes], return_inverse=True)[1]),
            index=torch.from_numpy(kept[both]),
            views=[torch.from_numpy(np.stack(view)) for view in views],
        )

    def _read(self, wanted: I64, paired: frozenset[int]) -> tuple[I64, list[list[npt.NDArray[Any]]]]:
        """Which of the images can be read, and of each its plain look followed, if paired, by two views."""

        def look(index: int) -> list[npt.NDArray[Any]]:
            try:
                image = self._source.read(index)
            except UnreadableImage:
                return []
            views = [] if self._pair is None or index not in paired else self._pair.crop(image, index, 0)
            return [self._plain_view.crop(image), *views]

        with ThreadPoolExecutor(self._preset.data.workers or 1) as pool:
            looks = list(pool.map(look, wanted.tolist()))
        return wanted[[bool(look) for look in looks]], [look for look in looks if look]


def voters(order: I64, labels: I64, count: int) -> I64:
    """Up to `count` of the images in `order`, of no more classes than give `PER_CLASS` images each."""
    known = labels[order]
    _, first = np.unique(known, return_index=True)
    classes = known[np.sort(first)[: max(2, count // PER_CLASS)]]
    return order[np.isin(known, classes)][:count]


@contextmanager
def undisturbed(method: nn.Module, *, compiled: bool = False) -> Iterator[None]:
    """Evaluation mode without gradient in which nothing is learned, drawn, compiled or left changed.

    Batch norms use the statistics of what passes: the running ones are immature early in a run, and behind the weights
    where those move fast.
    """
    modes = [(module, module.training) for module in method.modules()]
    device = dist.device()
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        statistics_of_the_batch(method),
        torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
    ):
        method.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
