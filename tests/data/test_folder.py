"""Folders of images: what is found, in which order, under which labels."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslcli.config.data import Folder
from sslcli.data.files import Files, Names
from sslcli.data.folder import open_folder
from sslcli.data.open import open_source
from sslcli.data.source import UnreadableImage
from sslcli.errors import DataError


def put(path: Path, size: tuple[int, int] = (8, 6), colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path, "PNG")


def names(source: Files) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def test_class_folders_are_classes(tmp_path: Path) -> None:
    for name in ("dog/2.png", "dog/deep/er/1.png", "cat/9.png", "Bird/x.png"):
        put(tmp_path / name)
    source = open_folder(tmp_path, None, "skip")
    assert names(source) == ["Bird/x.png", "cat/9.png", "dog/2.png", "dog/deep/er/1.png"]
    assert source.classes == ("Bird", "cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2, 2]
    assert source.labels.dtype == np.int64
    assert source.ignored == 0
    assert source.remark == ""


def test_flat_and_mixed_folders_have_no_labels(tmp_path: Path) -> None:
    put(tmp_path / "b.png")
    put(tmp_path / "a.png")
    assert open_folder(tmp_path, None, "skip").labels is None
    put(tmp_path / "more" / "c.png")
    mixed = open_folder(tmp_path, None, "skip")
    assert names(mixed) == ["a.png", "b.png", "more/c.png"]
    assert mixed.labels is None
    assert mixed.classes == ()


def test_one_sub_folder_is_no_classes_unless_asked(tmp_path: Path) -> None:
    put(tmp_path / "holiday" / "a.png")
    assert open_folder(tmp_path, None, "skip").labels is None
    assert open_folder(tmp_path, True, "skip").classes == ("holiday",)


def test_labels_can_be_refused_or_demanded(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png")
    put(tmp_path / "b" / "1.png")
    assert open_folder(tmp_path, False, "skip").labels is None
    put(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"outside of any class folder, e\.g\. `loose\.png`"):
        open_folder(tmp_path, True, "skip")


def test_suffixes_in_any_case_hidden_files_and_others(tmp_path: Path) -> None:
    for name in ("A.JPG", "b.Jpeg", "c.TIFF", "d.webp", "._A.JPG", ".hidden.png", ".git/e.png"):
        put(tmp_path / name)
    for name in ("notes.txt", "more.txt", "Makefile", "x.mat"):
        (tmp_path / name).write_text("no image")
    source = open_folder(tmp_path, None, "skip")
    assert names(source) == ["A.JPG", "b.Jpeg", "c.TIFF", "d.webp"]
    assert source.ignored == 6
    assert "6 files that are no images" in source.remark
    assert "2 .txt" in source.remark
    assert "2 hidden" in source.remark


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "real.png", colour=77)
    data = tmp_path / "data"
    data.mkdir()
    (data / "file.png").symlink_to(tmp_path / "elsewhere" / "real.png")
    (data / "folder").symlink_to(tmp_path / "elsewhere")
    (data / "circle").symlink_to(data)
    (data / "broken.png").symlink_to(tmp_path / "gone.png")
    source = open_folder(data, None, "skip")
    assert names(source) == ["broken.png", "file.png", "folder/real.png"]
    assert source.read(1)[0, 0, 0] == 77
    with pytest.raises(UnreadableImage, match=r"`broken\.png`: No such file"):
        source.read(0)


def test_names_of_any_script_and_none(tmp_path: Path) -> None:
    put(tmp_path / "tênch фото.png", colour=5)
    strange = os.fsencode(tmp_path) + b"/a\xe9.png"
    os.rename(tmp_path / "tênch фото.png", strange)
    put(tmp_path / "tênch фото.png", colour=6)
    source = open_folder(tmp_path, None, "skip")
    assert names(source) == ["a\\xe9.png", "tênch фото.png"]
    assert [int(source.read(index)[0, 0, 0]) for index in (0, 1)] == [5, 6]


def test_empty_and_imageless_folders_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no files in it") as caught:
        open_folder(tmp_path, None, "skip")
    assert str(tmp_path) in caught.value.message
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("text")
    with pytest.raises(DataError, match=r"only 12 files that are no images \(12 \.txt\)") as caught:
        open_folder(tmp_path, None, "skip")
    assert ".jpg" in (caught.value.hint or "")


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_folder(tmp_path / "gone", None, "skip")
    put(tmp_path / "a.png")
    with pytest.raises(DataError, match="is not a folder"):
        open_folder(tmp_path / "a.png", None, "skip")


def test_one_image_is_a_source(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    assert len(open_source(Folder(path=tmp_path))) == 1


def test_fingerprint_follows_names_sizes_and_labels_not_the_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        put(tmp_path / place / "a" / "1.png")
        put(tmp_path / place / "b" / "1.png")

    def taken(place: str, labels: bool | None = None) -> str:
        return open_folder(tmp_path / place, labels, "skip").fingerprint()

    assert taken("here") == taken("there")
    assert len(taken("here")) == 16
    assert taken("here") != taken("here", labels=False)
    put(tmp_path / "there" / "b" / "1.png", size=(40, 40))
    assert taken("here") != taken("there")
    put(tmp_path / "here" / "b" / "2.png")
    assert len({taken("here"), taken("there")}) == 2


def test_small_images_of_one_size_are_held_in_memory(tmp_path: Path) -> None:
    for number in range(5):
        put(tmp_path / f"{number}.png", colour=number)
    source = open_folder(tmp_path, None, "skip")
    held = source.resident()
    assert held is not None
    assert held.shape == (5, 6, 8, 3)
    assert held[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    taken = source.read(3)
    taken[:] = 99
    assert source.read(3)[0, 0, 0] == 3, "what was read is the caller's own"


@pytest.mark.parametrize("spoiler", ["size", "large", "bad"])
def test_other_images_are_not(tmp_path: Path, spoiler: str) -> None:
    put(tmp_path / "0.png", size=(200, 6) if spoiler == "large" else (8, 6))
    if spoiler == "size":
        put(tmp_path / "1.png", size=(9, 6))
    if spoiler == "bad":
        (tmp_path / "1.png").write_bytes(b"")
    assert open_folder(tmp_path, None, "skip").resident() is None


def test_names_take_little_memory() -> None:
    kept = Names(b"n%08d/%d.JPEG" % (number // 1300, number) for number in range(5000))
    assert len(kept) == 5000
    assert kept[4999] == b"n00000003/4999.JPEG"
    assert len(kept.blob) + kept.ends.nbytes < 30 * 5000
