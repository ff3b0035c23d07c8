"""Features in the plane, for people to look at: which images does a network find alike?"""

from typing import Literal

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from sslcli.data.part import Part
from sslcli.data.source import Source
from sslcli.errors import DataError, UserError
from sslcli.features.table import F32
from sslcli.seeds import permutation, seed_of

FIRST = 50
"""Principal components that features are reduced to before t-SNE, as its authors advise."""


def few(source: Source, count: int, seed: int) -> Source:
    """At most so many images of a source, drawn by the seed; the source itself where it has no more."""
    if len(source) <= count:
        return source
    return Part(source, np.sort(permutation(len(source), seed_of(seed, "few"))[:count]).astype(np.int64))


def in_plane(rows: F32, method: Literal["tsne", "umap"], *, seed: int, perplexity: float) -> F32:
    """Features (N, D) as points (N, 2): rows near by cosine similarity come to lie near each other.

    Args:
        rows: features.
        method: t-SNE (van der Maaten & Hinton 2008, https://jmlr.org/papers/v9/vandermaaten08a.html) or UMAP (McInnes
            et al. 2018, https://arxiv.org/abs/1802.03426).
        seed: of the start and of every draw.
        perplexity: about how many neighbours count for each image.

    Raises:
        DataError: there are fewer than five images.
        UserError: UMAP is not installed.
    """
    if len(rows) < 5:
        raise DataError(f"{len(rows)} images are too few for a picture of their neighbourhoods", hint="give at least 5")
    unit = np.array(rows, dtype=np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    near = min(perplexity, (len(rows) - 1) / 3)
    if method == "umap":
        return _umap(unit, max(2, round(near)), seed)
    if min(unit.shape) > FIRST:
        unit = PCA(FIRST, random_state=seed).fit_transform(unit)
    points: F32 = TSNE(2, perplexity=near, init="pca", random_state=seed).fit_transform(unit).astype(np.float32)
    return points


def _umap(rows: F32, near: int, seed: int) -> F32:
    try:
        from umap import UMAP
    except ImportError:
        raise UserError(
            "`--method umap` needs the package umap-learn", hint="pip install 'sslcli[umap]', or leave it out for t-SNE"
        ) from None
    points: F32 = UMAP(n_neighbors=near, random_state=seed, n_jobs=1).fit_transform(rows).astype(np.float32)
    return points
