"""Images and labels in a NumPy archive; nothing in it is run."""

from pathlib import Path
from typing import IO
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import numpy.typing as npt

from sslcli.data.arrays import Arrays
from sslcli.data.source import I64
from sslcli.errors import DataError


def open_npz(path: Path, images: str, labels: str | None) -> Arrays:
    """The arrays called `images` and `labels`; without a name for the labels, `labels` is used if it is there.

    Class names are taken from an array `classes` of strings that the labels point into, or else are the labels.
    """
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            return _arrays(_archive(file, path), path, images, labels)
    except OSError as error:
        raise DataError(f"cannot read `{path}`: {error.strerror or error}") from None


def _archive(file: IO[bytes], path: Path) -> np.lib.npyio.NpzFile:
    try:
        archive = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, BadZipFile):
        raise DataError(f"`{path}` is not a NumPy archive", hint="write one with `numpy.savez`") from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(
            f"`{path}` holds one array without a name", hint="write it with `numpy.savez(FILE, images=...)`"
        )
    return archive


def _arrays(archive: np.lib.npyio.NpzFile, path: Path, images: str, labels: str | None) -> Arrays:
    pictures = _pictures(_array(archive, images, path, "images"), f"`{images}` of `{path}`")
    key = labels if labels is not None else "labels" if "labels" in archive.files else None
    if key is None:
        return Arrays(pictures)
    given = _array(archive, key, path, "labels")
    if given.shape != (len(pictures),) or given.dtype.kind not in "iu":
        raise DataError(
            f"`{key}` of `{path}` is {_kind(given)}; labels are whole numbers, one for each of {len(pictures)} images"
        )
    names = _array(archive, "classes", path, "labels") if "classes" in archive.files else None
    return Arrays(pictures, *_classes(given, names))


def _array(archive: np.lib.npyio.NpzFile, key: str, path: Path, setting: str) -> npt.NDArray[np.generic]:
    if key not in archive.files:
        raise DataError(
            f"`{path}` has no array `{key}`; it has {', '.join(f'`{name}`' for name in archive.files) or 'none'}",
            hint=f"say which one with `--set data.source.{setting}=NAME`",
        )
    try:
        values: npt.NDArray[np.generic] = archive[key]
    except ValueError:
        raise DataError(
            f"`{key}` of `{path}` holds Python objects, which are not read because they could run anything",
            hint="save it as numbers",
        ) from None
    except (OSError, EOFError, BadZipFile, ZlibError) as error:
        raise DataError(f"`{key}` of `{path}` is damaged: {error}") from None
    return values


def _pictures(values: npt.NDArray[np.generic], what: str) -> npt.NDArray[np.uint8]:
    """Images (N, H, W, 3) of (N, H, W, 3), or of grey (N, H, W) or (N, H, W, 1)."""
    if values.dtype != np.uint8:
        raise DataError(f"{what} is {_kind(values)}; images are uint8", hint="scale to 0..255 and save as uint8")
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim != 4 or values.shape[-1] not in (1, 3) or 0 in values.shape:
        first = values.ndim == 4 and values.shape[1] in (1, 3)
        raise DataError(
            f"{what} has the shape {values.shape}; images are (N, height, width, 3) or (N, height, width)",
            hint="put the channels last: `images.transpose(0, 2, 3, 1)`" if first else None,
        )
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:3], 3)), dtype=np.uint8)


def _classes(given: npt.NDArray[np.generic], names: npt.NDArray[np.generic] | None) -> tuple[I64, tuple[str, ...]]:
    """Labels (N,) and the names they count in: the given ones, or else the sorted labels that occur."""
    present, labels = np.unique(given.astype(np.int64), return_inverse=True)
    if (
        names is not None
        and names.ndim == 1
        and names.dtype.kind == "U"
        and 0 <= present[0] <= present[-1] < len(names)
    ):
        return present[labels], tuple(str(name) for name in names)
    return labels, tuple(str(value) for value in present)


def _kind(values: npt.NDArray[np.generic]) -> str:
    return f"{values.dtype} of shape {values.shape}"
