"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their original Python or binary files; nothing in them is run."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, final

import numpy as np
import numpy.typing as npt

from sslcli.data.arrays import Arrays
from sslcli.data.source import I64, U8
from sslcli.errors import DataError

PIXELS = 3 * 32 * 32

PYTHON_FOLDERS: dict[int, str] = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
BINARY_FOLDERS: dict[int, str] = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}
TRAIN: dict[int, tuple[str, ...]] = {10: tuple(f"data_batch_{i}" for i in range(1, 6)), 100: ("train",)}
TEST: dict[int, tuple[str, ...]] = {10: ("test_batch",), 100: ("test",)}


def open_cifar(root: Path, classes: Literal[10, 100], split: Literal["train", "test"], download: bool) -> Arrays:
    """One split, in the order of its files; `root` holds the files or the folder they unpack into."""
    root = root.expanduser()
    if download:
        from sslcli import dist  # brings torch along, which reading does not need

        if dist.local_rank() == 0 and found_in(root, classes) is None:
            _download(root, classes)
        dist.barrier()
    found = found_in(root, classes)
    if found is None:
        raise DataError(
            f"no CIFAR-{classes} files in `{root}`",
            hint=f"unpack `{PYTHON_FOLDERS[classes]}` there, or, with a network, set `data.source.download=true`",
        )
    folder, binary = found
    files = [folder / (f"{stem}.bin" if binary else stem) for stem in (TRAIN if split == "train" else TEST)[classes]]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"`{folder}` lacks {', '.join(f'`{name}`' for name in missing)}", hint="unpack CIFAR again")
    parts = [_read_binary(file, classes) if binary else _read_python(file, classes) for file in files]
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    names = _binary_names(folder, classes) if binary else _python_names(folder, classes)
    return Arrays(images, labels, names)


def found_in(root: Path, classes: int) -> tuple[Path, bool] | None:
    """The folder that holds the files, `root` itself or the one they unpack into, and whether they are binary."""
    stem = TRAIN[classes][0]
    for folder in (root, root / PYTHON_FOLDERS[classes], root / BINARY_FOLDERS[classes]):
        if _is_cifar(folder / stem, classes):
            return folder, False
        if (folder / f"{stem}.bin").is_file():
            return folder, True
    return None


def _is_cifar(file: Path, classes: int) -> bool:
    """CIFAR-100's files are called `train` and `test`, as anything may be: its `meta` must lie beside them."""
    return file.is_file() and (classes == 10 or (file.parent / "meta").is_file())


def _download(root: Path, classes: int) -> None:
    from torchvision import datasets  # imports slowly, and is needed once

    kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    try:
        root.mkdir(parents=True, exist_ok=True)
        kind(root=str(root), download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot download CIFAR-{classes} to `{root}`: {reason}",
            hint=f"fetch it elsewhere and unpack `{PYTHON_FOLDERS[classes]}` there",
        ) from None


def _planes(rows: U8) -> U8:
    """Images (N, 32, 32, 3) of rows (N, 3072) that hold all reds, all greens, all blues."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _labels(values: npt.NDArray[Any], classes: int, file: Path) -> I64:
    labels = values.astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"`{file}` has labels outside of 0 to {classes - 1}: it is no CIFAR-{classes} file")
    return labels


def _read_binary(file: Path, classes: int) -> tuple[U8, I64]:
    """Records of a label byte (CIFAR-100: a coarse and a fine one) and 3072 pixels."""
    head = 1 if classes == 10 else 2
    data = np.fromfile(file, dtype=np.uint8)
    if not len(data) or len(data) % (head + PIXELS):
        raise DataError(f"`{file}` is damaged: {len(data)} bytes are no whole number of {head + PIXELS}-byte records")
    rows = data.reshape(-1, head + PIXELS)
    return _planes(rows[:, head:]), _labels(rows[:, head - 1], classes, file)


def _binary_names(folder: Path, classes: int) -> tuple[str, ...]:
    file = folder / ("batches.meta.txt" if classes == 10 else "fine_label_names.txt")
    names = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return _checked_names(names, classes)


def _read_python(file: Path, classes: int) -> tuple[U8, I64]:
    content = _plain(file)
    data = content.get("data")
    given = content.get("labels" if classes == 10 else "fine_labels")
    if not isinstance(data, _Array) or not isinstance(given, list) or not all(type(value) is int for value in given):
        raise DataError(f"`{file}` is no CIFAR-{classes} file: it lacks its images or labels")
    if data.shape != (len(given), PIXELS) or data.kind != "u1" or len(data.content) != len(given) * PIXELS:
        raise DataError(f"`{file}` is damaged: {len(given)} labels for images of shape {data.shape}")
    rows = np.frombuffer(data.content, dtype=np.uint8).reshape(data.shape)
    if data.by_columns:
        rows = np.frombuffer(data.content, dtype=np.uint8).reshape(data.shape[::-1]).T
    return _planes(np.ascontiguousarray(rows)), _labels(np.array(given), classes, file)


def _python_names(folder: Path, classes: int) -> tuple[str, ...]:
    file = folder / ("batches.meta" if classes == 10 else "meta")
    names = _plain(file).get("label_names" if classes == 10 else "fine_label_names") if file.is_file() else None
    return _checked_names([_text(name) for name in names] if isinstance(names, list) else [], classes)


def _checked_names(names: list[str], classes: int) -> tuple[str, ...]:
    return tuple(names) if len(names) == classes else tuple(str(number) for number in range(classes))


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _plain(file: Path) -> dict[str, Any]:
    """The dictionary in a pickle of plain data; arrays come as `_Array`."""
    try:
        with file.open("rb") as opened:
            content = _PlainUnpickler(opened, file).load()
    except DataError:
        raise
    except Exception as error:  # damaged pickles make the reader raise almost anything
        raise DataError(f"`{file}` is damaged: {' '.join(str(error).split())}", hint="unpack CIFAR again") from None
    if not isinstance(content, dict):
        raise DataError(f"`{file}` is no CIFAR file: it holds no dictionary")
    return {_text(key): value for key, value in content.items()}


@final
class _Array:
    """What a pickled NumPy array says of itself; stands in for it, so that none of NumPy runs."""

    shape: tuple[int, ...] = ()
    kind: str = ""
    by_columns: bool = False
    content: bytes = b""

    def __setstate__(self, state: tuple[int, tuple[int, ...], "_Kind", bool, bytes]) -> None:
        _, self.shape, kind, self.by_columns, content = state
        self.kind = kind.name
        self.content = content if isinstance(content, bytes) else b""


@final
class _Kind:
    """What a pickled NumPy dtype says of itself."""

    def __init__(self, name: bytes | str, *_: object) -> None:
        self.name = _text(name)

    def __setstate__(self, state: object) -> None:
        """Byte order and padding, which single bytes do not have."""


def _new_array(*_: object) -> _Array:
    return _Array()


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into old pickles."""
    if encoding != "latin1":
        raise ValueError(f"text encoded as {encoding}")
    return text.encode("latin-1")


STAND_INS: dict[tuple[str, str], Callable[..., object] | type] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encoded,
}
"""All that CIFAR's pickles refer to, and what they get."""


@final
class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, text, bytes, numbers and arrays; refuses whatever else a pickle asks for."""

    def __init__(self, opened: IO[bytes], file: Path) -> None:
        super().__init__(opened, encoding="bytes")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for a name that CIFAR's files use."""
        try:
            return STAND_INS[module, name]
        except KeyError:
            self._refuse(f"{module}.{name}")

    def _refuse(self, wanted: str) -> NoReturn:
        raise DataError(
            f"`{self._file}` is refused: it asks to run `{wanted}`, which CIFAR's files never do",
            hint="do not use this file; fetch CIFAR again from its authors",
        )
