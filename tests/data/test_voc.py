"""Pascal VOC: lists per class, marks, line ends, and what is wrong with them."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslcli.config.data import Voc
from sslcli.data import guess_source, open_source, other_split
from sslcli.data.voc import read_lists
from sslcli.errors import DataError

CLASSES = ("bird", "cat", "train")
MARKS = {"trainval": {"000007": "1 -1 -1", "000005": "0 1 -1", "000012": "-1 -1 1"}, "test": {"000001": "1 1 -1"}}


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A folder in the layout; lines end as in the published lists."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    for split, images in MARKS.items():
        for image in images:
            Image.new("RGB", (4, 4), (int(image), 0, 0)).save(root / "JPEGImages" / f"{image}.jpg", quality=100)
        text = "".join(f"{image}\r\n" for image in images)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(text)
        for number, name in enumerate(CLASSES):
            lines = [f"{image} {marks.split()[number]:>2}\r\n" for image, marks in images.items()]
            (root / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("".join(lines))
    return root


def test_marks_become_targets_in_order_of_images_and_classes(voc: Path):
    source = open_source(Voc(path=voc))
    assert source.classes == CLASSES
    assert [source.name(i) for i in range(3)] == [f"JPEGImages/{n}.jpg" for n in ("000005", "000007", "000012")]
    assert source.targets is not None
    assert source.targets.tolist() == [[-1, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert source.labels is None
    assert source.read(2)[0, 0, 0] == 12


def test_the_layout_is_found_and_its_test_images_too(voc: Path):
    for path in (voc, voc.parent, voc.parent.parent):
        config = guess_source(path)
        assert config == Voc(path=path.absolute())
        test = other_split(config)
        assert test is not None
        assert len(open_source(test)) == 1
    assert other_split(Voc(path=voc, split="train")) == Voc(path=voc, split="val")
    assert other_split(Voc(path=voc, split="test")) is None


def test_marks_are_part_of_the_fingerprint(voc: Path):
    before = open_source(Voc(path=voc)).fingerprint()
    path = voc / "ImageSets" / "Main" / "cat_trainval.txt"
    path.write_text(path.read_text().replace("000007 -1", "000007  0"))
    assert open_source(Voc(path=voc)).fingerprint() != before


def test_lists_without_classes_give_images_alone(voc: Path):
    for path in (voc / "ImageSets" / "Main").glob("*_trainval.txt"):
        path.unlink()
    source = open_source(Voc(path=voc))
    assert len(source) == 3
    assert source.targets is None
    assert source.classes == ()


def test_what_is_wrong_is_said_with_its_place(voc: Path, tmp_path: Path):
    with pytest.raises(DataError, match="has not the layout of Pascal VOC"):
        open_source(Voc(path=tmp_path / "nothing"))
    with pytest.raises(DataError, match="no lists of split `val`"):
        open_source(Voc(path=voc, split="val"))
    lists = voc / "ImageSets" / "Main"
    whole = (lists / "cat_trainval.txt").read_text()
    (lists / "cat_trainval.txt").write_text(whole.replace("000007 -1", "000007 2"))
    with pytest.raises(DataError, match=r"cat_trainval\.txt:1: expected an image and 1, -1 or 0, found `000007 2`"):
        open_source(Voc(path=voc))
    (lists / "cat_trainval.txt").write_text(whole.replace("000007", "000008"))
    with pytest.raises(DataError, match=r"does not name the images that `bird_trainval\.txt` names"):
        open_source(Voc(path=voc))
    (lists / "cat_trainval.txt").write_text(whole)
    for path in (voc / "JPEGImages").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="none of the first 3 images of split `trainval` exists"):
        open_source(Voc(path=voc))


@pytest.mark.data
def test_the_published_lists(small_data: Path, tmp_path: Path):
    with tarfile.open(small_data / "voc2007_imagesets.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    lists = tmp_path / "VOC2007" / "ImageSets" / "Main"
    for split, images, persons in (("trainval", 5011, 2008), ("test", 4952, 2007)):
        names, classes, targets = read_lists(lists, split)
        assert targets is not None
        assert targets.shape == (images, 20)
        assert len(names) == images
        assert names == sorted(names)
        assert classes == tuple(sorted(classes))
        assert "train" in classes
        assert (targets[:, classes.index("person")] == 1).sum() == persons
    assert set(np.unique(targets)) == {-1, 0, 1}


@pytest.mark.data
def test_real_images_in_the_layout(small_data: Path, tmp_path: Path):
    with tarfile.open(small_data / "voc07_multilabel.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    source = open_source(guess_source(tmp_path))
    assert source.targets is not None
    assert source.targets.shape == (120, 20)
    assert (source.targets == 1).any(axis=0).all()
    assert source.read(0).ndim == 3
