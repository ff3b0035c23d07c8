"""Packing images into shards: each is written by one process, checked, and kept if the work stops half-way."""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from sslcli.data.open import MANIFEST
from sslcli.data.packed import FORMAT, INDEX, digest_of
from sslcli.data.source import U8, Source, UnreadableImage
from sslcli.data.workers import each
from sslcli.errors import DataError

PLAN = "plan.json"
HEADER = 128
"""Bytes that NumPy's format takes before the data of such an array."""


@dataclass(frozen=True, slots=True)
class How:
    """How images are stored."""

    encoding: Literal["raw", "jpeg", "png"] = "raw"
    """`raw` pixels are read fastest, `jpeg` takes least room, `png` loses nothing in little room."""
    size: int | None = None
    """Shorter side in pixels that larger images are reduced to; None leaves them as they are."""
    quality: int = 90
    """Of JPEG, up to 95."""
    per_shard: int = 4096
    """Images in each shard."""


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a pack."""

    images: int
    skipped: dict[str, str]
    """Images that could not be read, and why."""
    bytes: int
    kept: int
    """Shards that an earlier, interrupted call had finished."""


def pack(source: Source, out: Path, how: How, *, workers: int, told: Callable[[int, int], None] | None = None) -> Done:
    """Store all readable images of a source in a folder; continues what an interrupted call began.

    Raises:
        DataError: the folder holds something else, cannot be written, or no image can be read.
    """
    shards = -(-len(source) // how.per_shard)
    _begin(out, {"source": source.fingerprint(), "images": len(source), **asdict(how)})
    kept = sum(_finished(out, number) is not None for number in range(shards))
    facts: list[dict[str, Any]] = []
    try:
        for fact in each(partial(_shard, source, out, how), range(shards), workers if shards > 1 else 0):
            facts.append(fact)
            if told is not None:
                told(min(len(facts) * how.per_shard, len(source)), len(source))
    except OSError as error:
        raise DataError(
            f"cannot write into `{out}`: {error.strerror or error}",
            hint="the same command goes on where it stopped, once that is mended",
        ) from None
    skipped = {name: reason for fact in facts for name, reason in fact["skipped"].items()}
    images = sum(fact["images"] for fact in facts)
    if not images:
        raise DataError(f"none of {len(source)} images can be read", hint=next(iter(skipped.values()), None))
    _finish(source, out, how, facts)
    return Done(images, skipped, sum(fact["bytes"] for fact in facts), kept)


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or make sure that what it holds is the beginning of the same pack."""
    if (out / MANIFEST).exists():
        raise DataError(f"`{out}` is a finished pack", hint="give another folder, or delete it")
    if out.exists() and not out.is_dir():
        raise DataError(f"`{out}` is a file", hint="give a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / PLAN).exists():
            begun = json.loads((out / PLAN).read_text(encoding="utf-8"))
            if changed := [key for key in plan if begun.get(key) != plan[key]]:
                raise DataError(
                    f"`{out}` holds the beginning of another pack: {', '.join(changed)} differ",
                    hint="give another folder, or delete it",
                )
        elif any(out.iterdir()):
            raise DataError(f"`{out}` is not empty", hint="give a new folder")
        else:
            _write(out / PLAN, json.dumps(plan, indent=2).encode())
    except OSError as error:
        raise DataError(
            f"cannot write into `{out}`: {error.strerror}", hint="give a new folder, where you may write"
        ) from None


def _shard(source: Source, out: Path, how: How, number: int) -> dict[str, Any]:
    """Write a shard, read it again, and say what is in it; at once if an earlier call has."""
    done = _finished(out, number)
    if done is not None:
        return done
    first, last = number * how.per_shard, min((number + 1) * how.per_shard, len(source))
    rows, names, skipped = np.zeros(last - first, dtype=INDEX), [], {}
    count = start = 0
    path, temporary = out / _name(number), out / f"{_name(number)}.part"
    with temporary.open("wb") as file:
        file.seek(HEADER)
        for index in range(first, last):
            try:
                image = _reduced(source.read(index), how.size)
            except UnreadableImage as error:
                skipped[source.name(index)] = error.reason
                continue
            content = _encoded(image, how)
            label = -1 if source.labels is None else int(source.labels[index])
            rows[count] = (number, start, len(content), *image.shape[:2], label)
            names.append(source.name(index))
            file.write(content)
            count, start = count + 1, start + len(content)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (start,)})
        if file.tell() != HEADER:
            raise AssertionError("NumPy pads the header of a flat array to 128 bytes")
        file.flush()
        os.fsync(file.fileno())
    digest = digest_of(np.load(temporary, mmap_mode="r", allow_pickle=False))
    os.replace(temporary, path)
    fact = {"file": path.name, "images": count, "bytes": start, "offset": HEADER, "digest": digest, "skipped": skipped}
    with (out / f"{_name(number)}.index").open("wb") as file:
        np.save(file, rows[:count], allow_pickle=False)
    _write(out / f"{_name(number)}.json", json.dumps({**fact, "names": names}).encode())
    return fact


def _finished(out: Path, number: int) -> dict[str, Any] | None:
    """What an earlier call wrote down of a shard, if the shard is still there in its full length."""
    path = out / _name(number)
    try:
        fact: dict[str, Any] = json.loads((out / f"{path.name}.json").read_text(encoding="utf-8"))
        whole = path.stat().st_size == HEADER + fact["bytes"] and (out / f"{path.name}.index").is_file()
    except (OSError, ValueError, KeyError):
        return None
    del fact["names"]
    return fact if whole else None


def _finish(source: Source, out: Path, how: How, facts: list[dict[str, Any]]) -> None:
    """Join what was written down of the shards; the manifest comes last and makes the folder a pack."""
    numbers = range(len(facts))
    index = np.concatenate([np.load(out / f"{_name(n)}.index", allow_pickle=False) for n in numbers])
    blob, ends = bytearray(), []
    for name in _names(out, numbers):
        blob += name.encode()
        ends.append(len(blob))
    np.save(out / "index.npy", index, allow_pickle=False)
    np.save(out / "names.npy", np.frombuffer(bytes(blob), dtype=np.uint8), allow_pickle=False)
    np.save(out / "name_ends.npy", np.array(ends, dtype=np.int64), allow_pickle=False)
    skipped = {name: reason for fact in facts for name, reason in fact["skipped"].items()}
    if skipped:
        lines = "".join(f"{name}\t{reason}\n" for name, reason in skipped.items())
        (out / "skipped.txt").write_text(lines, encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "images": len(index),
        "classes": list(source.classes),
        **asdict(how),
        "source": source.fingerprint(),
        "shards": [{key: fact[key] for key in ("file", "images", "bytes", "offset", "digest")} for fact in facts],
    }
    _write(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    for number in numbers:
        for suffix in (".index", ".json"):
            (out / f"{_name(number)}{suffix}").unlink()
    (out / PLAN).unlink()


def _names(out: Path, numbers: range) -> Iterator[str]:
    for number in numbers:
        yield from json.loads((out / f"{_name(number)}.json").read_text(encoding="utf-8"))["names"]


def _reduced(image: U8, size: int | None) -> U8:
    """An image whose shorter side is longer than `size`, reduced to that."""
    height, width = image.shape[:2]
    if size is None or min(height, width) <= size:
        return image
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    return np.array(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))


def _encoded(image: U8, how: How) -> bytes:
    if how.encoding == "raw":
        return np.ascontiguousarray(image).tobytes()
    content = io.BytesIO()
    if how.encoding == "jpeg":
        Image.fromarray(image).save(content, "JPEG", quality=how.quality)
    else:
        Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def _name(number: int) -> str:
    return f"shard-{number:05}.npy"


def _write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name first, so that it is whole when it is there."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
