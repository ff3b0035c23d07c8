"""Pictures of clusters: which images a clustering run, or k-means over its features, puts together."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from sslcli.config.views import EvalView
from sslcli.data.part import Part
from sslcli.data.source import I64, Source, UnreadableImage
from sslcli.engine import checkpoint
from sslcli.engine.show import plain
from sslcli.errors import UserError
from sslcli.features.compute import of_network
from sslcli.features.table import Told
from sslcli.features.weights import Weights
from sslcli.seeds import permutation, permuted, seed_of
from sslcli.views import Row, page


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which cluster each of some images is in."""

    labels: I64
    """(N,) numbers of clusters; -1 for images that are in none."""
    origin: str
    """Who put them there."""


def of_run(run: Path) -> Clusters | None:
    """The clusters that the method of a run keeps in its newest checkpoint; None if it keeps none."""
    state = checkpoint.read(checkpoint.meant(run))
    return of_state(state["method"], state["facts"]["images"], state["preset"]["method"]["name"])


def of_state(method: Mapping[str, Any], images: int, name: str) -> Clusters | None:
    """The whole numbers, one for each image, that a method keeps under the name `labels`."""
    for key, value in method.items():
        if key.rpartition(".")[2] == "labels" and value.shape == (images,) and not value.is_floating_point():
            return Clusters(value.cpu().numpy().astype(np.int64), f"`{name}`")
    return None


def of_features(
    weights: Weights, source: Source, clusters: int, *, limit: int, seed: int, progress: Told | None
) -> Clusters:
    """k-means over the features of up to `limit` images, scaled to unit length; the others are in no cluster.

    Raises:
        UserError: there are fewer images than clusters.
    """
    from sklearn.cluster import KMeans

    some = np.sort(permutation(len(source), seed_of(seed, "clusters"))[:limit])
    table = of_network(
        weights.backbone, Part(source, some), weights.manifest.view, ["pooled"], what="weights",
        digest=weights.digest, batch_size=64, workers=None, progress=progress,
    )  # fmt: skip
    assert table is not None, "one process has them all"
    rows = table.features["pooled"]
    if len(rows) < clusters:
        raise UserError(f"{len(rows)} images cannot form {clusters} clusters", hint="lower `--k`")
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = np.full(len(source), -1, dtype=np.int64)
    labels[some[table.index]] = KMeans(clusters, n_init=1, random_state=seed).fit(rows).labels_
    return Clusters(labels, f"k-means of {len(rows)} images")


def clusters_page(
    found: Clusters,
    source: Source,
    view: EvalView,
    *,
    rows: int,
    columns: int,
    pick: Literal["largest", "random"],
    seed: int,
) -> Image.Image:
    """Some images of some clusters, one cluster a row; which images is a function of the seed."""
    counts = np.bincount(found.labels[found.labels >= 0])
    used = np.flatnonzero(counts)
    if pick == "largest":
        order = used[np.argsort(-counts[used], kind="stable")]
    else:
        order = used[permutation(len(used), seed_of(seed, "clusters"))]
    sheet = []
    for cluster in order[:rows]:
        members, pictures = np.flatnonzero(found.labels == cluster), []
        for position in range(len(members)):
            with suppress(UnreadableImage):
                place = permuted(position, len(members), seed_of(seed, "cluster", int(cluster)))
                pictures.append(source.read(int(members[place])))
            if len(pictures) == columns:
                break
        if pictures:
            sheet.append(Row(f"cluster {cluster}\n{counts[cluster]} images", plain(pictures, view), view.normalize))
    captions = [f"of {len(used)} clusters of {found.origin}", *[""] * (columns - 1)]
    return page(sheet, captions)
