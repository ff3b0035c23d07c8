"""Floors: what is to be had without learning. A number of learned features means little without them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sslcli.config.views import EvalView, Normalize
from sslcli.data.source import Source
from sslcli.engine.look import Room, in_memory
from sslcli.features.compute import of_function, of_network
from sslcli.features.table import FeatureTable, Told
from sslcli.features.weights import network

RAW_SIDE = 32
"""Most pixels a side of the images that the raw-pixel floor compares."""


def raw_pixels(
    source: Source,
    view: EvalView,
    taps: Sequence[str],
    *,
    batch_size: int,
    workers: int | None,
    progress: Told | None = None,
) -> FeatureTable | None:
    """The pixels themselves in [0, 1], at most 32 x 32 of them in three colours, under the names of `taps`."""

    def apply(images: Tensor) -> dict[str, Tensor]:
        return {tap: images.flatten(1) for tap in taps}

    return of_function(
        apply, source, small(view), what="raw pixels", digest=None, batch_size=batch_size, workers=workers,
        progress=progress,
    )  # fmt: skip


def untrained(
    backbone: Mapping[str, Any],
    source: Source,
    view: EvalView,
    taps: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    workers: int | None,
    progress: Told | None = None,
    room: Room = in_memory,
) -> FeatureTable | None:
    """What the same network says before it has learned anything; its batch norms know no statistics yet."""
    return of_network(
        network(backbone, seed=seed).eval().requires_grad_(False), source, view, taps, what="untrained", digest=None,
        batch_size=batch_size, workers=workers, progress=progress, room=room,
    )  # fmt: skip


def centred(train: FeatureTable, test: FeatureTable) -> tuple[FeatureTable, FeatureTable]:
    """Both tables without the mean of the training rows: the cosine of pixels says little while all are positive."""
    means = {tap: rows.mean(axis=0) for tap, rows in train.features.items()}
    return (
        replace(train, features={tap: rows - means[tap] for tap, rows in train.features.items()}),
        replace(test, features={tap: rows - means[tap] for tap, rows in test.features.items()}),
    )


def small(view: EvalView) -> EvalView:
    """The same part of the image in at most 32 x 32 pixels, with values in [0, 1]."""
    longest = max(view.shape)
    side = min(RAW_SIDE, longest)
    return EvalView(
        size=side,
        resize=None if view.resize is None else max(side, round(view.resize * side / longest)),
        squeeze=None
        if view.squeeze is None
        else (max(1, round(view.squeeze[0] * side / longest)), max(1, round(view.squeeze[1] * side / longest))),
        interpolation=view.interpolation,
        normalize=Normalize(mean=(0, 0, 0), std=(1, 1, 1)),
    )
