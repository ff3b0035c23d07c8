"""Is a set of images fit to learn from? Unreadable ones, doubles, what leaks into the evaluation, and plain facts."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from PIL import Image

from sslcli.data.source import I64, U8, Source, UnreadableImage
from sslcli.data.workers import each

U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]
AT_ONCE = 64
"""Images of one task."""
FEW = 256
"""So few images are looked at in this process: others would take longer to start."""
BANDS = 4
"""Bands of 16 bits in a 64-bit hash: hashes that differ in fewer bits than there are bands agree in one of them."""
SIDE, KEPT = 32, 8
FLAT = 2.0
"""Standard deviation of grey levels below which an image shows nothing to compare."""

ROW = np.dtype(
    [
        ("readable", "?"), ("flat", "?"), ("height", "<i4"), ("width", "<i4"), ("kind", "<i2"), ("look", "<u8"),
        ("pixels", [("a", "<u8"), ("b", "<u8")]), ("mean", "<f4", 3), ("square", "<f4", 3),
    ]
)  # fmt: skip
"""What is kept of an image: 60 bytes, whatever its size."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of every image of a source."""

    rows: Rows
    """(N,) of `ROW`."""
    kinds: tuple[str, ...]
    """What `kind` counts in."""
    reasons: dict[int, str]
    """Why images cannot be read, by number."""


@dataclass(frozen=True, slots=True)
class Doubles:
    """Images that show what another one shows, each with one of those: (P,) numbers."""

    image: I64
    other: I64
    distance: I64
    """Bits in which the perceptual hashes differ; -1 where all pixels are equal."""

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong with a set of images, and what it is like."""

    measured: Measured
    equal: Doubles
    """Images with the same pixels as an earlier one."""
    near: Doubles
    """Images that look like an earlier one."""
    overlap: Doubles = field(default_factory=lambda: Doubles(*(np.zeros(0, dtype=np.int64),) * 3))
    """Images that equal, or look like, one of another set."""

    @property
    def good(self) -> Rows:
        """Rows of the readable images."""
        good: Rows = self.measured.rows[self.measured.rows["readable"]]
        return good

    @property
    def kinds(self) -> dict[str, int]:
        """How many images are stored as what, the most frequent first."""
        counts = Counter(self.measured.kinds[number] for number in self.good["kind"].tolist())
        return dict(counts.most_common())

    @property
    def mean(self) -> list[float]:
        """Mean of red, green, blue in [0, 1], every image counting alike."""
        return [float(value) for value in self.good["mean"].mean(axis=0, dtype=np.float64)]

    @property
    def std(self) -> list[float]:
        """Standard deviation of red, green, blue over all pixels, every image counting alike."""
        squares = self.good["square"].mean(axis=0, dtype=np.float64)
        return [float(np.sqrt(max(square - mean**2, 0.0))) for square, mean in zip(squares, self.mean, strict=True)]


def measure(source: Source, *, workers: int, told: Callable[[int, int], None] | None = None) -> Measured:
    """Read every image once."""
    rows = np.zeros(len(source), dtype=ROW)
    kinds: dict[str, int] = {}
    reasons: dict[int, str] = {}
    starts = range(0, len(source), AT_ONCE)
    for start, (some, names, bad) in zip(
        starts, each(partial(_look, source), starts, 0 if len(source) <= FEW else workers), strict=True
    ):
        some["kind"] = [kinds.setdefault(name, len(kinds)) for name in names]
        rows[start : start + len(some)] = some
        reasons.update(bad)
        if told is not None:
            told(start + len(some), len(source))
    return Measured(rows, tuple(kinds), reasons)


def judge(measured: Measured, near: int, other: Measured | None = None) -> Findings:
    """Find doubles: equal pixels, or perceptual hashes that differ in at most `near` bits; `other` is the evaluation.

    Args:
        measured: the images in question.
        near: from 0 to 3; -1 looks for equal pixels alone.
        other: images that must not be among them.
    """
    equal, twins = _doubles(measured.rows, measured.rows["readable"], near)
    if other is None:
        return Findings(measured, equal, twins)
    both = np.concatenate([other.rows, measured.rows])
    return Findings(measured, equal, twins, _across(both, len(other.rows), near))


def perceptual_hash(image: U8) -> int:
    """64 bits that change little when an image (H, W, 3) is resized, recompressed or slightly recoloured.

    The signs, about their median, of the 8 x 8 lowest frequencies of the grey image at 32 x 32 (pHash: Zauner 2010,
    "Implementation and benchmarking of perceptual image hash functions", section 3.2.1).
    """
    grey = np.asarray(Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    low = _COSINES @ grey @ _COSINES.T  # (8, 8)
    bits = (low > np.median(low)).ravel()
    return int(np.packbits(bits).view(">u8")[0])


_COSINES = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(KEPT)[:, None])  # (8, 32)


def near_pairs(hashes: U64, near: int) -> tuple[I64, I64]:
    """All pairs (i < j) of different rows whose hashes (N,) differ in at most `near` bits, `near` below 4.

    Hashes that close agree in one of four bands of 16 bits, so only those that share a band are compared.
    """
    firsts, seconds = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for band in range(BANDS):
        values = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(values, kind="stable")
        ahead, step = np.arange(len(order)), 0
        while True:
            step += 1
            ahead = ahead[ahead + step < len(order)]
            ahead = ahead[values[order[ahead]] == values[order[ahead + step]]]
            if not len(ahead):
                break
            a, b = order[ahead], order[ahead + step]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= near
            firsts.append(np.minimum(a, b)[close])
            seconds.append(np.maximum(a, b)[close])
    pairs = np.unique(np.stack([np.concatenate(firsts), np.concatenate(seconds)]), axis=1)
    return pairs[0], pairs[1]


def _look(source: Source, start: int) -> tuple[Rows, list[str], dict[int, str]]:
    """Rows, kinds and reasons of the images from `start` on."""
    rows = np.zeros(min(AT_ONCE, len(source) - start), dtype=ROW)
    kinds, bad = [], {}
    for place, row in enumerate(rows):
        index = start + place
        try:
            image = source.read(index)
            kinds.append(source.kind(index))
        except UnreadableImage as error:
            kinds.append("unreadable")
            bad[index] = error.reason
            continue
        row["readable"] = True
        row["height"], row["width"] = image.shape[:2]
        row["pixels"] = tuple(np.frombuffer(_digest(image), dtype="<u8"))
        levels = image.reshape(-1, 3)
        row["mean"] = levels.mean(axis=0) / 255
        row["square"] = np.square(levels, dtype=np.float32).mean(axis=0, dtype=np.float64) / 255**2
        row["flat"] = image.mean(axis=2).std() < FLAT
        row["look"] = perceptual_hash(image)
    return rows, kinds, bad


def _doubles(rows: Rows, readable: npt.NDArray[np.bool_], near: int) -> tuple[Doubles, Doubles]:
    """Images equal to an earlier one, and the others that look like an earlier one."""
    index = np.flatnonzero(readable)
    _, first, group = np.unique(_digests(rows[index]), return_index=True, return_inverse=True)
    leader = index[first[group]]
    again = leader != index
    equal = Doubles(index[again], leader[again], np.full(int(again.sum()), -1, dtype=np.int64))
    if near < 0:
        return equal, Doubles(*(np.zeros(0, dtype=np.int64),) * 3)
    alone = index[~again & ~rows["flat"][index]]
    looks, first, group = np.unique(rows["look"][alone], return_index=True, return_inverse=True)
    p, q = near_pairs(looks, near)
    early, late = np.minimum(first[p], first[q]), np.maximum(first[p], first[q])
    copies = np.flatnonzero(first[group] != np.arange(len(alone)))
    a, b = np.concatenate([first[group[copies]], early]), np.concatenate([copies, late])
    order = np.lexsort([a, b])
    _, place = np.unique(b[order], return_index=True)  # each image once, with the earliest that it looks like
    a, b = alone[a[order][place]], alone[b[order][place]]
    return equal, Doubles(b, a, _bits(rows, a, b))


def _across(rows: Rows, first: int, near: int) -> Doubles:
    """Images from `first` on that equal or look like one before `first`; numbers count from 0 on either side."""
    index = np.flatnonzero(rows["readable"])
    mine = index[index >= first]
    found = np.full(len(rows), -1, dtype=np.int64)
    distance = np.full(len(rows), -1, dtype=np.int64)
    if near >= 0:
        solid = index[~rows["flat"][index]]
        looks, group = np.unique(rows["look"][solid], return_inverse=True)
        owner = np.full(len(looks), -1, dtype=np.int64)  # the first image of the other set that looks so
        theirs = np.flatnonzero(solid < first)[::-1]
        owner[group[theirs]] = solid[theirs]
        nearest = owner.copy()
        p, q = near_pairs(looks, near)
        for one, two in ((p, q), (q, p)):
            new = (owner[one] < 0) & (owner[two] >= 0)
            nearest[one[new]] = owner[two[new]]
        found[solid] = nearest[group]
        with_one = solid[found[solid] >= 0]
        distance[with_one] = _bits(rows, found[with_one], with_one)
    _, leader, same = np.unique(_digests(rows[index]), return_index=True, return_inverse=True)
    earliest = index[leader[same]]
    equal = earliest < first
    found[index[equal]], distance[index[equal]] = earliest[equal], -1
    leaking = mine[found[mine] >= 0]
    return Doubles(leaking - first, found[leaking], distance[leaking])


def _digests(rows: Rows) -> Rows:
    """Digests of the pixels (M,)."""
    return np.ascontiguousarray(rows["pixels"])


def _digest(image: U8) -> bytes:
    """16 bytes that say which pixels an image has, in which shape."""
    digest = blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def _bits(rows: Rows, a: I64, b: I64) -> I64:
    bits: I64 = np.bitwise_count(rows["look"][a] ^ rows["look"][b]).astype(np.int64)
    return bits


def classes_of(source: Source) -> Iterator[tuple[str, int]]:
    """Each class and how many images it has."""
    if source.labels is not None:
        counts = np.bincount(source.labels, minlength=len(source.classes))
        yield from zip(source.classes, counts.tolist(), strict=True)
