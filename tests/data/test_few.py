from pathlib import Path

import numpy as np
import pytest

from sslcli.data.arrays import Arrays
from sslcli.data.few import named_in, share_of_each_class
from sslcli.data.folder import open_folder
from sslcli.data.part import Part
from sslcli.errors import DataError


def source(per_class: int = 20, classes: int = 3) -> Arrays:
    count = per_class * classes
    images = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3)
    return Arrays(images, np.arange(count) % classes, tuple("abcdef"[:classes]))


def test_a_share_of_every_class_is_a_function_of_the_seed():
    whole = source()
    part = share_of_each_class(whole, 0.1, 4)
    assert part.labels is not None
    assert np.bincount(part.labels).tolist() == [2, 2, 2]
    assert part.classes == whole.classes
    same, other = share_of_each_class(whole, 0.1, 4), share_of_each_class(whole, 0.1, 5)
    assert part.fingerprint() == same.fingerprint()
    assert part.fingerprint() != other.fingerprint() != whole.fingerprint()
    assert np.bincount(share_of_each_class(whole, 0.001, 4).labels).tolist() == [1, 1, 1]  # type: ignore[arg-type]
    held = part.resident()
    assert held is not None
    for row in range(len(part)):
        assert part.name(row) == whole.name(int(held[row, 0, 0, 0]))
        assert np.array_equal(part.read(row), held[row])
    with pytest.raises(DataError, match="no labels"):
        share_of_each_class(Arrays(held), 0.5, 0)


def test_a_list_names_images_with_or_without_their_folder(tmp_path: Path):
    from PIL import Image

    for name in ("cat/1.png", "cat/only.png", "dog/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    whole = open_folder(tmp_path / "images", None, "skip")
    text = tmp_path / "list.txt"
    text.write_text("only.png\ndog/1.png 1\n\n")
    part = named_in(whole, text)
    assert isinstance(part, Part)
    assert [part.name(i) for i in range(len(part))] == ["cat/only.png", "dog/1.png"]
    for lines, why in {
        "1.png": "stands for several",
        "gone.png": r"list.txt:1: `gone.png` is not among",
        "only.png\ncat/only.png": "names an image twice",
        "": "names no image",
    }.items():
        text.write_text(lines)
        with pytest.raises(DataError, match=why):
            named_in(whole, text)
    with pytest.raises(DataError, match="cannot read the list"):
        named_in(whole, tmp_path / "none.txt")
