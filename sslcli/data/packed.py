"""Images packed into shards: one look into an index, one copy out of a memory map, wherever the shards lie.

A pack is a folder of NumPy arrays, which NumPy alone can read: `shard-00000.npy` and so on hold the bytes of one image
after the other, `index.npy` says where each begins, `names.npy` with `name_ends.npy` what it is called, `pack.json` the
rest.
"""

import io
import json
import os
import time
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt

from sslcli.data.decode import decoded
from sslcli.data.files import SMALL_BYTES, SMALL_SIDE
from sslcli.data.open import MANIFEST
from sslcli.data.source import U8, Source, UnreadableImage
from sslcli.errors import DataError

FORMAT = 1
INDEX = np.dtype(
    [
        ("shard", "<i4"), ("start", "<i8"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4"), ("label", "<i8"),
    ]
)  # fmt: skip
OPEN = 256
"""Shards that a process keeps mapped: each costs a file descriptor, of which there are often only 1,024."""
TRIES, PAUSE = 4, 1.0
"""How often a far shard is asked for, and seconds before the second time; twice as many before each later one."""


class Place:
    """Where the files of a pack are."""

    def __init__(self, root: str, cache: Path | None) -> None:
        self.root = root.rstrip("/")
        self.cache = cache
        self._far: tuple[int, Any, str] | None = None

    @property
    def is_far(self) -> bool:
        """Whether files come through fsspec."""
        return "://" in self.root

    def whole(self, name: str) -> bytes:
        """A small file."""
        if self.is_far:
            return self._fetched(name, None, None)
        try:
            return (Path(self.root).expanduser() / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read `{self.root}/{name}`: {error.strerror}") from None

    def array(self, name: str) -> npt.NDArray[Any]:
        """A NumPy array: mapped where it is near, in memory where it is far."""
        try:
            if self.is_far:
                return np.asarray(np.load(io.BytesIO(self.whole(name)), allow_pickle=False))
            return np.asarray(np.load(Path(self.root).expanduser() / name, mmap_mode="r", allow_pickle=False))
        except OSError as error:
            raise DataError(f"cannot read `{self.root}/{name}`: {error.strerror or error}") from None
        except (ValueError, EOFError) as error:
            raise DataError(f"`{self.root}/{name}` is damaged: {error}") from None

    def part(self, name: str, start: int, stop: int) -> bytes:
        """Some bytes of a far file."""
        return self._fetched(name, start, stop)

    def kept(self, name: str, digest: str) -> "Place":
        """The cache, which holds the shard of this digest from now on; one process fetches it, others wait."""
        import fcntl

        assert self.cache is not None, "asked for only with a cache"
        folder = self.cache.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_file():
            with (folder / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (folder / name).is_file():
                    content = self._fetched(name, None, None)
                    if digest_of(np.load(io.BytesIO(content), allow_pickle=False)) != digest:
                        raise DataError(f"`{self.root}/{name}` is not what it was packed as: its checksum differs")
                    temporary = folder / f"{name}.part"
                    temporary.write_bytes(content)
                    os.replace(temporary, folder / name)
        return Place(str(folder), None)

    def _fetched(self, name: str, start: int | None, stop: int | None) -> bytes:
        for attempt in range(TRIES):
            try:
                system, path = self._system()
                found: bytes = system.cat_file(f"{path}/{name}", start=start, end=stop)
                return found
            except FileNotFoundError:
                raise DataError(f"there is no `{self.root}/{name}`", hint="the URL names a pack's folder") from None
            except (ImportError, ValueError) as error:
                raise DataError(f"cannot reach `{self.root}`: {error}") from None
            except Exception as error:  # each kind of storage has errors of its own
                if attempt == TRIES - 1:
                    raise DataError(f"cannot read `{self.root}/{name}`: {error or type(error).__name__}") from None
                time.sleep(PAUSE * 2**attempt)
        raise AssertionError("the last try returns or raises")

    def _system(self) -> tuple[Any, str]:
        """The file system of this process: most are not to be used in a process forked since."""
        if self._far is None or self._far[0] != os.getpid():
            from fsspec.core import url_to_fs

            self._far = (os.getpid(), *url_to_fs(self.root))
        return self._far[1], self._far[2]

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "cache": self.cache, "_far": None}


@final
class Pack(Source):
    """The images of a pack."""

    def __init__(
        self,
        place: Place,
        manifest: dict[str, Any],
        on_error: Literal["skip", "stop"] = "skip",
    ) -> None:
        self._place = place
        self._manifest = manifest
        self._index = place.array("index.npy")
        self._names = place.array("names.npy")
        self._ends = place.array("name_ends.npy")
        if self._index.dtype != INDEX or len(self._index) != manifest["images"]:
            raise DataError(f"`{place.root}/index.npy` does not belong to `{place.root}/{MANIFEST}`")
        self.classes = tuple(manifest["classes"])
        self.labels = np.array(self._index["label"]) if self.classes else None
        self.on_error = on_error
        self._open: OrderedDict[int, U8] = OrderedDict()
        self._held: U8 | None = None

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> U8:
        """The image (H, W, 3)."""
        number, start, length, height, width, _ = self._index[index].item()
        shard: dict[str, Any] = self._manifest["shards"][number]
        if self._place.is_far and self._place.cache is None:
            first = shard["offset"] + start
            content = np.frombuffer(self._place.part(shard["file"], first, first + length), dtype=np.uint8)
        else:
            content = self._shard(number)[start : start + length]
        if len(content) != length:
            raise UnreadableImage(self.name(index), "its shard is too short: an incomplete copy")
        if self._manifest["encoding"] == "raw":
            return np.array(content).reshape(height, width, 3)
        try:
            return decoded(io.BytesIO(content.tobytes()))
        except Exception as error:  # damaged files make Pillow raise almost anything
            raise UnreadableImage(self.name(index), " ".join(str(error).split()) or type(error).__name__) from None

    def name(self, index: int) -> str:
        """What the image was called when it was packed."""
        start = 0 if index == 0 else int(self._ends[index - 1])
        return bytes(self._names[start : int(self._ends[index])]).decode()

    def kind(self, index: int) -> str:
        """How the pack stores it."""
        return f"pack, {self._manifest['encoding']}"

    def resident(self) -> U8 | None:
        """Small images of one size, read by the first call; None for all others."""
        if self._held is None:
            heights, widths = self._index["height"], self._index["width"]
            height, width = int(heights[0]), int(widths[0])
            small = max(height, width) <= SMALL_SIDE and height * width * 3 * len(self) <= SMALL_BYTES
            if not small or (heights != height).any() or (widths != width).any():
                return None
            self._held = np.stack([self.read(index) for index in range(len(self))])
        return self._held

    def fingerprint(self) -> str:
        """Digest of the shards' checksums and of the labels."""
        digest = blake2b("".join(shard["digest"] for shard in self._manifest["shards"]).encode(), digest_size=8)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def verify(self) -> int:
        """Compare every shard with its checksum; raises DataError."""
        for number, shard in enumerate(self._manifest["shards"]):
            if self._place.is_far and self._place.cache is None:
                content: U8 = np.load(io.BytesIO(self._place.whole(shard["file"])), allow_pickle=False)
            else:
                content = self._shard(number)
            if digest_of(content) != shard["digest"]:
                raise DataError(
                    f"`{self._place.root}/{shard['file']}` is not what it was packed as: its checksum differs",
                    hint="copy it again, or delete it and `pack.json` and run the same `ssl data pack`",
                )
        return len(self)

    def _shard(self, number: int) -> U8:
        """The bytes of a shard, mapped."""
        found = self._open.get(number)
        if found is None:
            shard = self._manifest["shards"][number]
            place = self._place.kept(shard["file"], shard["digest"]) if self._place.is_far else self._place
            found = place.array(shard["file"])
            if len(self._open) >= OPEN:
                self._open.popitem(last=False)
            self._open[number] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def open_pack(root: str, cache: Path | None, on_error: Literal["skip", "stop"]) -> Pack:
    """The pack in a folder or behind a URL."""
    place = Place(root, cache)
    if not place.is_far and not os.path.isfile(Path(root).expanduser() / MANIFEST):
        raise DataError(
            f"`{root}` is no pack: it has no `{MANIFEST}`",
            hint="make one with `ssl data pack`; one that stopped half-way goes on",
        )
    try:
        manifest = json.loads(place.whole(MANIFEST))
        known = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"`{root}/{MANIFEST}` is damaged") from None
    if known != FORMAT:
        raise DataError(f"`{root}` has the pack format {known}; this version of ssl reads {FORMAT}")
    return Pack(place, manifest, on_error)


def digest_of(content: npt.NDArray[np.uint8]) -> str:
    """Checksum of a shard's bytes: 128 bits, hexadecimal."""
    digest = blake2b(digest_size=16)
    step = 1 << 24
    for start in range(0, len(content), step):
        digest.update(np.ascontiguousarray(content[start : start + step]).data)
    return digest.hexdigest()
