"""A table of features on disk: one row per image, and where the rows come from."""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from sslcli.config.base import Settings
from sslcli.config.types import Count, Index
from sslcli.config.views import EvalView
from sslcli.errors import DataError, SslError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Told = Callable[[int, int], None]
"""Called with what is done and what there is to do."""

_PREFIX = "features_"
_BLOCK = 8192  # rows looked at together


class TableMeta(Settings):
    """Where the rows of a table come from."""

    format: Literal[1] = 1
    """Version of the file format."""
    version: str
    """Version of ssl that made the table."""
    what: str
    """What looked at the images: `weights`, `untrained` or `raw pixels`."""
    weights: str | None = None
    """Digest of the weights, where there were any."""
    source: str
    """Fingerprint of the images."""
    images: Count
    """Images in the source."""
    skipped: Index = 0
    """Images that could not be read and have no row."""
    classes: tuple[str, ...] = ()
    """Names that the labels count in."""
    view: EvalView
    """How the images were looked at."""


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """Features of images, in memory."""

    features: dict[str, F32]
    """Per tap (N, D)."""
    index: I64
    """(N,) number of each row's image in its source, ascending."""
    labels: I64 | None
    """(N,) numbers into `meta.classes`, where the source has labels."""
    meta: TableMeta
    names: tuple[str, ...] = ()
    """(N,) name of each row's image, or empty."""
    targets: I64 | None = None
    """(N, C) where images may show several classes: 1 the class is there, 0 it is not, -1 it is hard to tell."""
    cameras: I64 | None = None
    """(N,) which camera took each image, where that is known."""

    def __len__(self) -> int:
        return len(self.index)

    def tap(self, name: str) -> F32:
        """The features (N, D) of one tap.

        Raises:
            DataError: the table lacks it.
        """
        if name not in self.features:
            raise DataError(f"the table has no features `{name}`; it has {_listed(self.features)}")
        return self.features[name]

    def known_labels(self) -> I64:
        """The labels (N,).

        Raises:
            DataError: the images have none, or not one each, or a label is the number of no class.
        """
        if self.labels is None:
            if self.targets is not None:
                raise DataError(
                    "each of these images may show several classes, and this evaluation needs one label each",
                    hint="`ssl eval svm` judges such images",
                )
            raise DataError("these images have no labels", hint="sort them into one folder per class")
        if len(self.labels) and (
            self.labels.min() < 0 or (self.meta.classes and self.labels.max() >= len(self.meta.classes))
        ):
            raise DataError(
                f"the labels go from {self.labels.min()} to {self.labels.max()}, but there are "
                f"{len(self.meta.classes)} classes",
                hint="labels are whole numbers that count the classes from 0",
            )
        return self.labels

    def known_targets(self) -> I64:
        """Which classes each image shows, (N, C): 1, 0, or -1 where that is hard to tell; of labels, one class each.

        Raises:
            DataError: the images have neither.
        """
        if self.targets is not None:
            return self.targets
        labels = self.known_labels()
        classes = len(self.meta.classes) or int(labels.max()) + 1
        of_each: I64 = np.arange(classes)
        return np.equal(labels[:, None], of_each).astype(np.int64)

    def check_finite(self, what: str) -> None:
        """Refuse features that are not numbers; a block of rows at a time, as the table may be larger than memory.

        Raises:
            DataError: `what` holds a value that is not finite.
        """
        for name, rows in self.features.items():
            for first in range(0, len(rows), _BLOCK):
                bad = ~np.isfinite(rows[first : first + _BLOCK]).all(axis=1)
                if bad.any():
                    image = int(self.index[first + int(bad.argmax())])
                    raise DataError(
                        f"the features `{name}` of {what} are not finite, first of image {image}",
                        hint="the network overflows on it: look at the normalisation (`view`), or use another "
                        "checkpoint",
                    )

    def counted_in(self, classes: tuple[str, ...]) -> "FeatureTable":
        """The same rows with labels or targets that count in `classes`, matched by name.

        Raises:
            DataError: there are none, or a class of that name is not among `classes`.
        """
        if classes == self.meta.classes:
            self.known_targets()
            return self
        place = numbers_in(classes, self.meta.classes)
        meta = self.meta.model_copy(update={"classes": classes})
        if self.targets is None:
            return replace(self, labels=place[self.known_labels()], meta=meta)
        targets = np.zeros((len(self), len(classes)), dtype=np.int64)
        targets[:, place] = self.targets
        return replace(self, targets=targets, meta=meta)

    def of_images(self, index: I64) -> "FeatureTable":
        """The rows of these images (M,), numbers in ascending order that all occur."""
        at = np.searchsorted(self.index, index)
        return replace(
            self,
            features={name: rows[at] for name, rows in self.features.items()},
            index=index,
            labels=None if self.labels is None else self.labels[at],
            targets=None if self.targets is None else self.targets[at],
            cameras=None if self.cameras is None else self.cameras[at],
            names=tuple(self.names[i] for i in at) if self.names else (),
        )

    def digest(self) -> str:
        """SHA-256 of everything in the table but the names, as 64 hexadecimal digits."""
        found = hashlib.sha256(json.dumps(self.meta.model_dump(mode="json"), sort_keys=True).encode())
        for name in sorted(self.features):
            found.update(f"{name}{self.features[name].shape}".encode())
            found.update(np.ascontiguousarray(self.features[name]).data)
        found.update(self.index.tobytes())
        for known in self._known().values():
            found.update(known.tobytes())
        return found.hexdigest()

    def _known(self) -> dict[str, I64]:
        """What is known of the images, by name."""
        facts = {"labels": self.labels, "targets": self.targets, "cameras": self.cameras}
        return {name: values for name, values in facts.items() if values is not None}

    def save(self, path: Path) -> None:
        """Write an `.npz` that NumPy reads without pickle.

        It holds `features_<tap>`, `index`, `meta`, and of `labels`, `targets`, `cameras` and `names` what is known.

        Raises:
            SslError: the file cannot be written; what was there before is untouched.
        """
        arrays: dict[str, npt.NDArray[Any]] = {f"{_PREFIX}{name}": rows for name, rows in self.features.items()}
        arrays["index"] = self.index
        arrays |= self._known()
        if self.names:
            arrays["names"] = np.array([name.encode("utf-8", "surrogateescape") for name in self.names])
        arrays["meta"] = np.array(self.meta.model_dump_json())
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                _savez(file, arrays)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise SslError(
                f"cannot write `{path}`: {error.strerror or error}", hint="choose another `--out`"
            ) from error

    @classmethod
    def load(cls, path: Path) -> "FeatureTable":
        """Read a table.

        Raises:
            DataError: the file is missing, damaged, or not a feature table.
        """
        if not path.is_file():
            raise DataError(f"no file `{path}`", hint="make it with `ssl features RUN --data DIR --out FILE.npz`")
        try:
            with path.open("rb") as file:  # NumPy would leave it open when it cannot read it
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ValueError("it holds one array")
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"`{path}` is not a whole .npz file: {error}") from error
        if "meta" not in arrays or "index" not in arrays:
            raise DataError(f"`{path}` is not a table made by `ssl features`: it holds {_listed(arrays)}")
        try:
            meta = TableMeta.model_validate_json(str(arrays["meta"]))
        except ValidationError as error:
            raise DataError(f"`{path}` has a description that this version does not understand: {error}") from None
        rows = {name: len(array) for name, array in arrays.items() if array.ndim}
        if len(set(rows.values())) > 1:
            raise DataError(f"the arrays in `{path}` differ in length: {_listed(rows)}")
        return cls(
            features={name.removeprefix(_PREFIX): rows for name, rows in arrays.items() if name.startswith(_PREFIX)},
            index=arrays["index"],
            labels=arrays.get("labels"),
            targets=arrays.get("targets"),
            cameras=arrays.get("cameras"),
            meta=meta,
            names=tuple(name.decode("utf-8", "surrogateescape") for name in arrays.get("names", ())),
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluator found."""

    metrics: dict[str, float]
    """Values, percentages in [0, 100]."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else a reader should know: settings that had to be changed, choices made."""
    spread: dict[str, float] = field(default_factory=dict)
    """Of metrics that are means over draws, the standard deviation over them (of the population)."""


class Score(Protocol):
    """What judges features."""

    def __call__(self, train: FeatureTable, test: FeatureTable, seed: int, told: Told | None = None) -> Scores:
        """From training table, test table (labels in the same numbering) and seed; `told` hears how far it is."""
        ...


@dataclass(frozen=True, slots=True)
class TableEvaluator:
    """What an evaluator of stored features gives to its caller: `build` of such a module makes one."""

    score: Score
    """What it finds; it is given no `told` unless `counts` says what that would count."""
    taps: tuple[str, ...]
    """The features it reads."""
    headline: str
    """The metric that stands for all when one number is wanted."""
    same_images: bool = False
    """Whether it wants the same images for training and test, because it leaves out the one it judges."""
    draws: bool = False
    """Whether the seed changes its result."""
    many_classes: bool = False
    """Whether an image may show several classes."""
    counts: str = ""
    """What it counts while it works, in one word, e.g. `machines`; empty where that takes no time to speak of."""
    new_classes: bool = False
    """Whether test images may be of classes that no training image shows."""


def numbers_in(classes: Sequence[str], names: Sequence[str]) -> I64:
    """The number in `classes` of each of `names`: a test folder that lacks a class still means the same classes.

    Raises:
        DataError: a name is not among `classes`.
    """
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in number]
    if unknown:
        raise DataError(
            f"class `{unknown[0]}` of the test images is not among the {len(classes)} training classes",
            hint="the folders of a class must have the same name on both sides",
        )
    return np.array([number[name] for name in names], dtype=np.int64)


def _savez(file: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's own signature takes the arrays as keywords


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"
