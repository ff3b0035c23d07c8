"""Any file of weights, opened without trust: tensors by dotted name, and what else it says, as plain data.

Read are safetensors, torch's files (zip, and the form before torch 1.6, whatever they are called), and pickles with
NumPy arrays. Tensors of torch's files are mapped from the disk, not copied, and changing them does not change the file.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sslcli.convert import _pickle
from sslcli.convert._layout import Facts
from sslcli.convert._pickle import Storage, TensorAt, Thing, Unreadable
from sslcli.errors import WeightsError

TRAINING = {
    "optimizer", "optimizers", "optimizer_state", "optimizer_states", "optimizer_state_dict", "opt", "scaler",
    "fp16_scaler", "scaler_state", "grad_scaler", "loss_scaler", "amp", "scheduler", "schedulers", "lr_scheduler",
    "lr_schedulers", "scheduler_state", "param_schedulers", "callbacks", "loops", "message_hub", "ema_updater",
}  # fmt: skip
"""Keys at the top of a checkpoint that hold what is needed to go on training, and nothing of the network."""

_MAGIC = 0x1950A86A20F9469CFC6C
_MOST = 300_000
"""Values that a file may hold, counted with repetition: fewer than memory, more than any checkpoint."""

_WORDS = 1_000_000
"""Bytes of the longest description that is read beside a file."""

DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
_BY_NAME = {str(dtype): dtype for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32)}


@dataclass(frozen=True, slots=True)
class Opened:
    """What is in a file."""

    path: Path
    container: str
    """`safetensors`, `torch (zip)`, `torch (before 1.6)` or `pickle`."""
    tops: tuple[str, ...]
    """Keys at the top."""
    tensors: dict[str, Tensor]
    """By dotted name, without what is only needed for training on."""
    facts: Facts
    """Numbers, words and short lists, by dotted name."""
    training: tuple[str, ...] = ()
    """Keys at the top with the state of training."""
    things: tuple[str, ...] = ()
    """Classes and functions that the file names and that were left alone."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a safetensors file."""


def open_file(path: Path) -> Opened:
    """The content of a file; no code from it is run.

    Raises:
        WeightsError: it is missing, damaged, or no file of weights.
    """
    if not path.is_file():
        raise WeightsError(f"no file `{path}`")
    with path.open("rb") as file:
        head = file.read(64)
    if path.suffix == ".safetensors" or (len(head) > 8 and head[8:9] == b"{" and head[:1] != b"\x80"):
        return _safetensors(path)
    if not head:
        raise WeightsError(f"`{path}` is empty", hint="copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"`{path}` is a pointer of Git LFS, not the file it stands for", hint="fetch it with `git lfs pull`"
        )
    if head.lstrip()[:1] == b"<":
        raise WeightsError(f"`{path}` is a web page, not a file of weights", hint="the download failed; try it again")
    try:
        return _zipped(path) if head[:2] == b"PK" else _pickled(path)
    except Unreadable as error:
        raise WeightsError(
            f"`{path}` is no file of weights, or is cut short: {error}",
            hint="ssl reads safetensors, files of torch.save, and pickles of NumPy arrays",
        ) from error


def _safetensors(path: Path) -> Opened:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"`{path}` is not a whole safetensors file: {error}", hint="copy or download it again"
        ) from error
    return Opened(path, "safetensors", (), tensors, Facts(_beside(path)), metadata=metadata)


def _zipped(path: Path) -> Opened:
    """A file of torch.save since 1.6: `data.pkl` and one entry per storage, none of them compressed."""
    if not zipfile.is_zipfile(path):
        raise Unreadable("the end of the zip file is missing")
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in entries:
            raise Unreadable("a zip file without `data.pkl`")
        if any(name.startswith("code/") for name in entries):
            raise Unreadable("it is a TorchScript program; save its `state_dict()` instead")
        packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if packed or sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise Unreadable("its entries are compressed, which torch never does: they could unpack to any size")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise Unreadable("its numbers have their bytes in the order of another machine")
        try:
            content = _pickle.read(io.BytesIO(archive.read(entries["data.pkl"])))
        except (zipfile.BadZipFile, EOFError) as error:
            raise Unreadable(str(error)) from error
        places = {
            name.removeprefix("data/"): (_start(file, info), info.file_size)
            for name, info in entries.items()
            if name.startswith("data/")
        }
    return _gathered(path, "torch (zip)", content, places)


def _start(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where in the file the bytes of a stored entry begin: behind its header, a name and an extra field."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise Unreadable("an entry of the zip file is damaged")
    name, extra = struct.unpack("<HH", header[26:30])
    return int(info.header_offset + 30 + name + extra)


def _pickled(path: Path) -> Opened:
    """A file of torch.save before 1.6 (pickles, then the storages one after the other), or a pickle of anything."""
    storages: dict[str, Storage] = {}
    with path.open("rb") as file:
        content = _pickle.read(file, storages)
        if type(content) is not int or content != _MAGIC:
            return _gathered(path, "pickle", content, {})
        _pickle.read(file)  # version of the form
        _pickle.read(file)  # sizes of integers
        content = _pickle.read(file, storages)
        keys = _pickle.read(file)
        places: dict[str, tuple[int, int]] = {}
        for key in keys if isinstance(keys, list) else ():
            if key not in storages:
                raise Unreadable(f"storage {key} belongs to nothing")
            header = file.read(8)
            size = int.from_bytes(header, "little") * _dtype(storages[key]).itemsize
            if len(header) < 8 or file.tell() + size > path.stat().st_size:
                raise Unreadable(f"the {size} bytes of storage {key} are not all there")
            places[key] = (file.tell(), size)
            file.seek(size, 1)
    return _gathered(path, "torch (before 1.6)", content, places)


def _dtype(storage: Storage) -> torch.dtype:
    if storage.kind not in DTYPES:
        raise Unreadable(f"numbers of the kind `{storage.kind}`")
    return DTYPES[storage.kind]


def _gathered(path: Path, container: str, content: Any, places: Mapping[str, tuple[int, int]]) -> Opened:
    """Everything in nested data, by dotted name."""
    mapped = np.memmap(path, np.uint8, mode="c")  # copy on write: the file stays as it is
    gather = _Gather(lambda at: _tensor(at, mapped, places))
    tops: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    if isinstance(content, Thing) and not _is_module(content):
        content = dict(_members(content))
    if isinstance(content, dict):
        tops = tuple(str(key) for key in content)
        training = tuple(str(key) for key, value in content.items() if str(key) in TRAINING and value)
        content = {key: value for key, value in content.items() if str(key) not in TRAINING}
    gather.take("", content)
    facts = Facts({**gather.values, **_beside(path)})
    return Opened(path, container, tops, gather.tensors, facts, training, tuple(sorted(gather.things)))


def _tensor(at: TensorAt, mapped: "np.memmap[Any, Any]", places: Mapping[str, tuple[int, int]]) -> Tensor:
    stored, dtype = _dtype(at.storage), _BY_NAME.get(at.dtype) or _dtype(at.storage)
    if at.dtype and at.dtype not in _BY_NAME:
        raise Unreadable(f"numbers of the kind `{at.dtype}`")
    start, size = places.get(at.storage.key, (0, -1))
    if at.storage.count * stored.itemsize > size or start + size > len(mapped):
        raise Unreadable(f"the numbers of storage {at.storage.key} are not all there")
    size = at.storage.count * stored.itemsize
    reach = 0 if 0 in at.shape else 1 + at.offset + sum((n - 1) * s for n, s in zip(at.shape, at.stride, strict=True))
    if reach * dtype.itemsize > size:
        raise Unreadable(f"a tensor of shape {at.shape} reaches beyond its storage")
    if 0 in at.shape:
        return torch.zeros(at.shape, dtype=dtype)
    piece = mapped[start : start + size]
    numbers = torch.from_numpy(piece if start % 16 == 0 else piece.copy()).view(dtype)
    return numbers.as_strided(at.shape, at.stride, at.offset)


class _Gather:
    """Walks nested data and sorts what it finds."""

    def __init__(self, bound: Callable[[TensorAt], Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}
        self.things: set[str] = set()
        self._bound = bound
        self._seen = 0
        self._above: set[int] = set()

    def take(self, name: str, value: Any) -> None:
        self._seen += 1
        if self._seen > _MOST:
            raise Unreadable("it refers to itself so often that it never ends")
        if isinstance(value, TensorAt):
            self._put(name, self._bound(value))
        elif isinstance(value, Thing):
            array = _pickle.as_array(value)
            if array is None:
                self._thing(name, value)
            elif array.ndim:
                self._put(name, torch.from_numpy(array.astype(array.dtype.newbyteorder("="))))
            else:
                self.values[name] = array.item()
        elif isinstance(value, dict):
            self._below(name, value, value.items())
        elif isinstance(value, list | tuple):
            if all(isinstance(item, str | int | float | bool | None) for item in value):
                self.values[name] = list(value)
            else:
                self._below(name, value, enumerate(value))
        elif isinstance(value, str | int | float | bool | None):
            self.values[name] = value

    def _thing(self, name: str, thing: Thing) -> None:
        self.things.add(thing.name)
        if len(self._above) < 200:
            self._below(name, thing, _module(thing) if _is_module(thing) else _members(thing))

    def _below(self, name: str, container: Any, items: Iterable[tuple[Any, Any]]) -> None:
        if id(container) in self._above or len(self._above) > 200:
            return
        self._above.add(id(container))
        for key, value in items:
            self.take(f"{name}.{key}" if name else str(key), value)
        self._above.discard(id(container))

    def _put(self, name: str, tensor: Tensor) -> None:
        if name in self.tensors:
            raise Unreadable(f"two tensors are called `{name}`")
        self.tensors[name] = tensor


def _is_module(thing: Thing) -> bool:
    """Whether a whole network was pickled, not its state."""
    return isinstance(thing.state, dict) and {"_parameters", "_buffers", "_modules"} <= thing.state.keys()


def _module(thing: Thing) -> Iterable[tuple[str, Any]]:
    for group in ("_parameters", "_buffers", "_modules"):
        if isinstance(thing.state[group], dict):
            yield from ((str(key), value) for key, value in thing.state[group].items() if value is not None)


def _members(thing: Thing) -> Iterable[tuple[str, Any]]:
    """Attributes and items of an object that was described; its arguments where it has neither."""
    if isinstance(thing.state, dict):
        yield from ((str(key), value) for key, value in thing.state.items())
    for item in thing.items:
        if isinstance(item, tuple) and len(item) == 2:
            yield str(item[0]), item[1]


def _beside(path: Path) -> dict[str, Any]:
    """What Hugging Face's files beside a file say, under `config.` and `preprocessor.`."""
    found: dict[str, Any] = {}
    for name, prefix in (("config.json", "config"), ("preprocessor_config.json", "preprocessor")):
        file = path.with_name(name)
        try:
            told = (
                json.loads(file.read_text(encoding="utf-8")) if file.is_file() and file.stat().st_size < _WORDS else {}
            )
        except (OSError, ValueError):
            continue
        if isinstance(told, dict):
            found |= {f"{prefix}.{key}": value for key, value in told.items()}
    return found
