"""Guessing what a path holds, and which images go with which."""

from pathlib import Path

import pytest
from PIL import Image

from sslcli.config.data import AnySource, Cifar, ColouredDigits, Digits, FileList, Folder, Npz
from sslcli.data import guess_source, open_source, other_split
from sslcli.errors import DataError


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def test_a_folder_is_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    assert guess_source(tmp_path) == Folder(path=tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        ["train/a.png"],
        ["train/a.png", "val/b.png"],
        ["train/cat/a.png", "train/dog/b.png", "annotations/x.txt"],
        ["train/a.png", "test/b.png", "docs/c.png"],
    ],
)
def test_a_folder_with_a_training_split_is_its_training_split(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        put(tmp_path / name) if name.endswith("png") else (tmp_path / name).parent.mkdir()
    assert guess_source(tmp_path) == Folder(path=tmp_path / "train")


def test_trains_may_be_a_class(tmp_path: Path) -> None:
    for name in ("bus", "train", "tram"):
        put(tmp_path / name / "1.png")
    cfg = guess_source(tmp_path)
    assert cfg == Folder(path=tmp_path)
    assert open_source(cfg).classes == ("bus", "train", "tram")


def test_lists_and_arrays(tmp_path: Path) -> None:
    for name, kind in (("x.txt", FileList), ("x.CSV", FileList), ("x.npz", Npz)):
        (tmp_path / name).touch()
        assert guess_source(tmp_path / name) == kind(path=tmp_path / name)


def test_relative_paths_are_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "here" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert guess_source(Path("here")) == Folder(path=tmp_path / "here")


def test_other_things_say_what_to_do(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "a.tar").touch()
    for name, message in (("gone", "does not exist"), ("a.tar", "is an archive"), ("a.png", "is no folder")):
        with pytest.raises(DataError, match=message) as caught:
            guess_source(tmp_path / name)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("cfg", "other"),
    [
        (Cifar(classes=100), Cifar(classes=100, split="test")),
        (Cifar(split="test"), None),
        (Digits(), Digits(split="test")),
        (Digits(split="all"), None),
        (ColouredDigits(seed=4, size=48), ColouredDigits(seed=4, size=48, split="test", count=1500)),
        (ColouredDigits(count=400), ColouredDigits(count=100, split="test")),
        (ColouredDigits(count=2), ColouredDigits(count=1, split="test")),
        (ColouredDigits(split="test"), None),
        (Npz(path=Path("x.npz")), None),
        (FileList(path=Path("x.txt")), None),
    ],
)
def test_the_images_that_belong_to_training_images(cfg: AnySource, other: AnySource | None) -> None:
    assert other_split(cfg) == other


def test_the_folder_beside_a_training_folder(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a.png")
    cfg = Folder(path=tmp_path / "train", labels=False, on_error="stop")
    assert other_split(cfg) is None
    put(tmp_path / "test" / "a.png")
    assert other_split(cfg) == Folder(path=tmp_path / "test", labels=False, on_error="stop")
    put(tmp_path / "val" / "a.png")
    assert other_split(cfg) == Folder(path=tmp_path / "val", labels=False, on_error="stop")
    assert other_split(Folder(path=tmp_path / "val")) is None
