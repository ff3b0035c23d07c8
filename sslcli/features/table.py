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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from sslcli.config.base import Settings
from sslcli.config.types import Count, Index
from sslcli.config.views import EvalView
from sslcli.errors import DataError, SslError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_PREFIX = "features_"


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
            DataError: the images have none.
        """
        if self.labels is None:
            raise DataError("these images have no labels", hint="sort them into one folder per class")
        return self.labels

    def counted_in(self, classes: tuple[str, ...]) -> "FeatureTable":
        """The same rows with labels that count in `classes`, matched by name.

        Raises:
            DataError: there are no labels, or a class of that name is not among `classes`.
        """
        labels = self.known_labels()
        if classes == self.meta.classes:
            return self
        place = numbers_in(classes, self.meta.classes)
        return replace(self, labels=place[labels], meta=self.meta.model_copy(update={"classes": classes}))

    def digest(self) -> str:
        """SHA-256 of everything in the table but the names, as 64 hexadecimal digits."""
        found = hashlib.sha256(json.dumps(self.meta.model_dump(mode="json"), sort_keys=True).encode())
        for name in sorted(self.features):
            found.update(f"{name}{self.features[name].shape}".encode())
            found.update(np.ascontiguousarray(self.features[name]).data)
        found.update(self.index.tobytes())
        if self.labels is not None:
            found.update(self.labels.tobytes())
        return found.hexdigest()

    def save(self, path: Path) -> None:
        """Write an `.npz` that NumPy reads without pickle: `features_<tap>`, `index`, `labels`, `names`, `meta`.

        Raises:
            SslError: the file cannot be written; what was there before is untouched.
        """
        arrays: dict[str, npt.NDArray[Any]] = {f"{_PREFIX}{name}": rows for name, rows in self.features.items()}
        arrays["index"] = self.index
        if self.labels is not None:
            arrays["labels"] = self.labels
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


@dataclass(frozen=True, slots=True)
class TableEvaluator:
    """What an evaluator of stored features gives to its caller: `build` of such a module makes one."""

    score: Callable[[FeatureTable, FeatureTable, int], Scores]
    """From training table, test table (labels in the same numbering) and seed."""
    taps: tuple[str, ...]
    """The features it reads."""
    headline: str
    """The metric that stands for all when one number is wanted."""
    same_images: bool = False
    """Whether it wants the same images for training and test, because it leaves out the one it judges."""


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
