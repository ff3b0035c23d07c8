"""Lists of files: paths with spaces, labels, roots, and what is wrong with a line."""

import os
from pathlib import Path

import pytest
from PIL import Image

from sslcli.config.data import FileList
from sslcli.data.files import Files
from sslcli.data.open import open_source
from sslcli.data.source import UnreadableImage
from sslcli.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for colour, name in enumerate(("a.png", "sub/b c.png", "photo 12.png", "я.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(tmp_path / name)
    return tmp_path


def opened(folder: Path, text: str, name: str = "list.txt", root: Path | None = None) -> Files:
    (folder / name).write_bytes(text.encode())
    source = open_source(FileList(path=folder / name, root=root))
    assert isinstance(source, Files)
    return source


def test_paths_alone(images: Path) -> None:
    source = opened(images, "я.png\n\nsub/b c.png\nphoto 12.png\n")
    assert [source.name(index) for index in range(3)] == ["я.png", "sub/b c.png", "photo 12.png"]
    assert [int(source.read(index)[0, 0, 0]) for index in range(3)] == [3, 1, 2]
    assert source.labels is None


def test_labels_after_the_last_space_count_in_sorted_classes(images: Path) -> None:
    source = opened(images, "\ufeffa.png 10\r\nsub/b c.png 9\r\nphoto 12.png  -1\r\nя.png\t10\r\n")
    assert source.name(2) == "photo 12.png"
    assert source.classes == ("-1", "9", "10")
    assert source.labels is not None
    assert source.labels.tolist() == [2, 1, 0, 2]
    assert source.read(1)[0, 0, 0] == 1


def test_root_and_absolute_paths(images: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    lists = tmp_path_factory.mktemp("lists")
    assert opened(lists, f"b c.png\n{images}/a.png\n", root=images / "sub").read(1)[0, 0, 0] == 0
    with pytest.raises(DataError, match=r"none of the first 1 images .* exists") as caught:
        opened(lists, "b c.png\n")
    assert "data.source.root" in (caught.value.hint or "")


def test_a_missing_file_among_others_is_met_when_read(images: Path) -> None:
    source = opened(images, "a.png\ngone.png\n")
    with pytest.raises(UnreadableImage, match=r"gone\.png.*No such file"):
        source.read(1)


def test_csv_with_and_without_heading_and_with_words(images: Path) -> None:
    plain = opened(images, 'path,label\na.png,7\n"sub/b c.png",3\n', "x.csv")
    assert plain.classes == ("3", "7")
    assert plain.labels is not None
    assert plain.labels.tolist() == [1, 0]
    words = opened(images, "a.png, dog\nphoto 12.png,cat\n", "y.csv")
    assert words.classes == ("cat", "dog")
    assert words.name(1) == "photo 12.png"
    assert opened(images, "path\nphoto 12.png\n", "z.csv").labels is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "a.png 1\nя.png\n", r"x\.txt:2: no label at the end of"),
        ("x.txt", "a.png\nя.png 2\n", r"x\.txt:2: .* ends in a number"),
        ("x.csv", "a.png,1\nя.png\n", r"x\.csv:2: expected"),
        ("x.csv", "a.png,1,2\n", r"x\.csv:1: expected"),
        ("x.csv", "a.png,\n", r"x\.csv:1: expected"),
        ("x.txt", "\n \n", "names no image"),
        ("x.csv", "path,label\n", "names no image"),
        ("x.txt", "\0\1\2", "none of the first 1 images"),
    ],
)
def test_wrong_lines_are_named(images: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(images, text, name)


def test_missing_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        open_source(FileList(path=tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="directory"):
        open_source(FileList(path=tmp_path))


def test_names_that_are_not_utf8(images: Path) -> None:
    os.rename(images / "a.png", os.fsencode(images) + b"/\xe9.png")
    (images / "list.txt").write_bytes(b"\xe9.png 4\n")
    source = open_source(FileList(path=images / "list.txt"))
    assert source.name(0) == "\\xe9.png"
    assert source.read(0).shape == (4, 4, 3)
