"""CIFAR in its original formats, and what happens to files that only pretend."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sslcli.config.data import Cifar
from sslcli.data.open import guess_source, open_source, other_split
from sslcli.errors import DataError

NAMES = [f"class {number}" for number in range(10)]
ROWS = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
LABELS = [3, 0, 9, 1, 1, 7, 2, 5, 4, 8, 6, 0]
IMAGES = ROWS.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]


def as_python_2(rows: np.ndarray, labels: list[int], key: bytes) -> bytes:
    """A batch as the authors' own script wrote it: protocol 2, byte strings, arrays by `_reconstruct`."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    raw = rows.tobytes()
    kind = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    kind += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + number(1) + number(rows.shape[0]) + number(rows.shape[1]) + b"\x86" + kind
    array += b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + listed + b"u."


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate(TRAIN):
        (folder / name).write_bytes(as_python_2(ROWS[2 * number : 2 * number + 2], LABELS[2 * number :][:2], b"labels"))
    (folder / "test_batch").write_bytes(as_python_2(ROWS[10:], LABELS[10:], b"labels"))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES, "num_vis": 3072}, 2))
    return tmp_path


def test_python_files_of_cifar10(cifar10: Path) -> None:
    for root in (cifar10, cifar10 / "cifar-10-batches-py"):
        cfg = Cifar(root=root)
        source = open_source(cfg)
        held = source.resident()
        assert held is not None
        assert np.array_equal(held, IMAGES[:10])
        assert source.labels is not None
        assert source.labels.tolist() == LABELS[:10]
        assert source.classes == tuple(NAMES)
        test = other_split(cfg)
        assert test is not None
        assert np.array_equal(open_source(test).read(1), IMAGES[11])
        assert guess_source(root) == cfg
    assert source.fingerprint() != open_source(test).fingerprint()


@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_python_3_pickles_of_cifar100(tmp_path: Path, protocol: int) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    columns = np.asfortranarray(ROWS)  # an order in memory that a pickle keeps
    for name, rows in (("train", columns), ("test", ROWS)):
        batch = {"data": rows, "fine_labels": LABELS, "coarse_labels": [0] * 12, "filenames": ["x.png"] * 12}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"f{i}" for i in range(100)]}, protocol))
    assert guess_source(tmp_path) == Cifar(root=tmp_path, classes=100)
    for split in ("train", "test"):
        source = open_source(Cifar(root=tmp_path, classes=100, split=split))
        assert np.array_equal(source.resident(), IMAGES)
        assert source.labels is not None
        assert source.labels.tolist() == LABELS
        assert source.classes[99] == "f99"


@pytest.mark.parametrize("classes", [10, 100])
def test_binary_files(tmp_path: Path, classes: Any) -> None:
    folder = tmp_path / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    folder.mkdir()
    heads = np.array(LABELS, dtype=np.uint8)[:, None]
    if classes == 100:
        heads = np.concatenate([heads * 0 + 19, heads], axis=1)
    records = np.concatenate([heads, ROWS], axis=1)
    for name in [f"{stem}.bin" for stem in TRAIN] if classes == 10 else ["train.bin"]:
        records.tofile(folder / name)
    source = open_source(Cifar(root=tmp_path, classes=classes))
    assert len(source) == (60 if classes == 10 else 12)
    assert np.array_equal(source.read(11), IMAGES[11])
    assert source.labels is not None
    assert source.labels[:12].tolist() == LABELS
    assert source.classes[9] == "9"
    (folder / "batches.meta.txt").write_text("\n".join(name.replace(" ", "") for name in NAMES) + "\n\n")
    (folder / "fine_label_names.txt").write_text("\n".join(f"f{i}" for i in range(100)))
    assert open_source(Cifar(root=tmp_path, classes=classes)).classes[9] == ("class9" if classes == 10 else "f9")
    assert guess_source(tmp_path) == Cifar(root=tmp_path, classes=classes)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_would_run_something_is_refused(cifar10: Path) -> None:
    target = cifar10 / "was-run"
    bad = cifar10 / "cifar-10-batches-py" / "data_batch_3"
    payload = pickle.dumps({b"data": Payload(target), b"labels": []}, 2)
    bad.write_bytes(payload)
    with pytest.raises(DataError, match=r"asks to run `posix\.system`") as caught:
        open_source(Cifar(root=cifar10))
    assert str(bad) in caught.value.message
    assert "\n" not in caught.value.message
    assert not target.exists()
    pickle.loads(payload)
    assert target.exists(), "the payload is a real one"


@pytest.mark.parametrize(
    "wanted", [b"cbuiltins\neval\n", b"cnumpy\nload\n", b"cnumpy.core.multiarray\nscalar\n", b"c_codecs\ndecode\n"]
)
def test_only_what_the_originals_use_is_known(cifar10: Path, wanted: bytes) -> None:
    (cifar10 / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x02" + wanted + b".")
    with pytest.raises(DataError, match="is refused"):
        open_source(Cifar(root=cifar10))


def test_codecs_other_than_latin1_are_not_run(cifar10: Path) -> None:
    pickled = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    (cifar10 / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickled)
    with pytest.raises(DataError, match="is damaged: text encoded as rot13"):
        open_source(Cifar(root=cifar10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"no pickle at all", "is damaged"),
        (as_python_2(ROWS, LABELS, b"labels")[:9000], "is damaged"),
        (as_python_2(ROWS[:5], LABELS, b"labels"), "is damaged: 12 labels for images of shape"),
        (as_python_2(ROWS, [10] * 12, b"labels"), "labels outside of 0 to 9"),
        (as_python_2(ROWS, LABELS, b"fine_labels"), "lacks its images or labels"),
        (pickle.dumps([1, 2], 2), "holds no dictionary"),
    ],
)
def test_damaged_files_are_named(cifar10: Path, content: bytes, message: str) -> None:
    (cifar10 / "cifar-10-batches-py" / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_source(Cifar(root=cifar10))
    assert "data_batch_2" in caught.value.message


def test_missing_files(cifar10: Path, tmp_path: Path) -> None:
    (cifar10 / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(DataError, match=r"lacks `data_batch_4`"):
        open_source(Cifar(root=cifar10))
    with pytest.raises(DataError, match="no CIFAR-100 files") as caught:
        open_source(Cifar(root=tmp_path, classes=100))
    assert "download" in (caught.value.hint or "")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "data_batch_1.bin").write_bytes(bytes(3072))
    for name in TRAIN[1:]:
        (tmp_path / "cut" / f"{name}.bin").write_bytes(bytes(3073))
    with pytest.raises(DataError, match=r"3072 bytes are no whole number of 3073-byte records"):
        open_source(Cifar(root=tmp_path / "cut"))


def test_download_touches_nothing_that_is_there(cifar10: Path) -> None:
    assert len(open_source(Cifar(root=cifar10, download=True))) == 10


def test_download_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot download CIFAR-10"):
        open_source(Cifar(root=tmp_path / "file", download=True))
