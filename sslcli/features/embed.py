"""Features in the plane, for people to look at: which images does a network find alike?"""

from typing import Literal, final

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from sslcli.data.source import U8, Source
from sslcli.errors import DataError, UserError
from sslcli.features.table import F32, I64
from sslcli.seeds import permutation, seed_of

FIRST = 50
"""Principal components that features are reduced to before t-SNE, as its authors advise."""


@final
class Few(Source):
    """Some images of a source, in its order."""

    def __init__(self, whole: Source, rows: I64) -> None:
        self._whole = whole
        self.rows = rows
        self.labels = None if whole.labels is None else whole.labels[rows]
        self.targets = None if whole.targets is None else whole.targets[rows]
        self.classes = whole.classes
        self.on_error = whole.on_error

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> U8:
        """The image (H, W, 3)."""
        return self._whole.read(int(self.rows[index]))

    def name(self, index: int) -> str:
        """What the whole source calls it."""
        return self._whole.name(int(self.rows[index]))

    def resident(self) -> U8 | None:
        """The images, where the whole source holds them."""
        held = self._whole.resident()
        return None if held is None else held[self.rows]

    def fingerprint(self) -> str:
        """Digest of the whole source's and of which images these are."""
        return f"{seed_of(self._whole.fingerprint(), self.rows.tobytes().hex()):016x}"

    def stamp(self) -> str:
        """Digest of the whole source's stamp and of which images these are."""
        return f"{seed_of(self._whole.stamp(), self.rows.tobytes().hex()):016x}"


def few(source: Source, count: int, seed: int) -> Source:
    """At most so many images of a source, drawn by the seed; the source itself where it has no more."""
    if len(source) <= count:
        return source
    return Few(source, np.sort(permutation(len(source), seed_of(seed, "few"))[:count]).astype(np.int64))


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
