import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from parts import ran
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image
from typer.testing import CliRunner

from sslcli.cli import app
from sslcli.config.data import Folder
from sslcli.data import open_source, other_split
from sslcli.data.check import judge, measure, near_pairs, perceptual_hash
from sslcli.errors import DataError, UserError


def photos(count: int) -> list[Image.Image]:
    """Pieces of two photographs that do not overlap."""
    whole = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    places = [(left, top) for top in (0, 140, 280) for left in (0, 150, 300, 450)]
    return [whole[n % 2].crop((x, y, x + 140, y + 130)) for n, (x, y) in enumerate(places)][:count]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six training images in two classes, doubles of several sorts, two test images of which one leaks."""
    pictures = photos(8)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
    for number, picture in enumerate(pictures[:6]):
        picture.save(tmp_path / "train" / "ab"[number % 2] / f"{number}.png")
    pictures[0].save(tmp_path / "train/b/same.bmp")  # equal pixels, another format, another label
    pictures[1].resize((280, 260)).save(tmp_path / "train/b/larger.jpg", quality=80)
    (tmp_path / "train/a/broken.jpg").write_bytes(b"not an image")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "train/a/red.png")
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "train/a/blue.png")
    pictures[6].save(tmp_path / "val/a/6.png")
    ImageEnhance.Brightness(pictures[3]).enhance(1.1).save(tmp_path / "val/b/brighter.jpg", quality=90)
    return tmp_path


def test_everything_is_found(tree):
    facts = json.loads(ran("data", "check", tree, "--json").stdout)
    assert facts["images"] == 11
    assert facts["unreadable"] == {"a/broken.jpg": "not an image, or of a kind that is not supported"}
    assert facts["kinds"] == {"PNG, RGB": 8, "BMP, RGB": 1, "JPEG, RGB": 1}
    assert facts["height"] == {"least": 40, "median": 130, "most": 260}
    assert facts["one_colour"] == 2
    assert facts["classes"] == {"a": 6, "b": 5}
    assert facts["equal"] == [{"image": "b/same.bmp", "other": "a/0.png", "distance": None}]
    assert facts["equal_with_other_label"] == 1
    (alike,) = facts["near"]
    assert {alike["image"], alike["other"]} == {"b/larger.jpg", "b/1.png"}
    (leak,) = facts["overlap"]
    assert (leak["image"], leak["other"]) == ("b/3.png", "b/brighter.jpg")


def test_mean_and_std_count_every_image_alike(tmp_path):
    Image.new("RGB", (10, 10), (255, 0, 51)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 40), (0, 0, 51)).save(tmp_path / "b.png")
    found = judge(measure(open_source(Folder(path=tmp_path)), workers=0), 3)
    assert found.mean == pytest.approx([0.5, 0.0, 0.2])
    assert found.std == pytest.approx([0.5, 0.0, 0.0], abs=1e-4)
    assert not len(found.equal)
    assert not len(found.near)  # of one colour: nothing to compare


def test_training_leaves_out_what_the_list_names(tree, monkeypatch):
    monkeypatch.chdir(tree)
    done = ran("data", "check", ".", "--out", "skip.txt")
    assert "unreadable     1" in done.stdout
    assert "data.source.skip=skip.txt" in done.stderr
    listed = [line.split("\t") for line in (tree / "skip.txt").read_text().splitlines()]
    assert [name for name, _ in listed] == ["a/broken.jpg", "b/3.png", "b/same.bmp"]
    assert "looks like (distance" in listed[1][1]
    config = Folder(path=tree / "train", skip=tree / "skip.txt")
    source = open_source(config)
    assert len(source) == 8
    assert not {source.name(index) for index in range(8)} & {name for name, _ in listed}
    assert source.labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert len(open_source(other_split(config))) == 2  # the list is about the training images
    ran("data", "check", ".", "--out", "skip.txt", "--drop", "unreadable,near")
    assert len((tree / "skip.txt").read_text().splitlines()) == 2


def test_a_run_leaves_them_out(tree, tmp_path):
    from sslcli.config.load import load
    from sslcli.engine.plan import dry_run

    (tree / "skip.txt").write_text("b/same.bmp\n")
    settings = ("run.epochs=1", "data.batch_size=4", "views.groups.0.size=16", "run.views=fast", "data.workers=0")
    source = {"name": "folder", "path": str(tree / "train"), "skip": str(tree / "skip.txt")}
    preset = load("pretrain", "demo-digits", settings, {"data.source": (source, "a test")}).preset
    assert dict(dry_run(preset))["images"] == "10 (folder)"


def test_several_processes_find_the_same(tree, monkeypatch):
    monkeypatch.setattr("sslcli.data.check.FEW", 0)
    source = open_source(Folder(path=tree / "train"))
    alone, together = measure(source, workers=0), measure(source, workers=1)
    assert alone.reasons == together.reasons
    assert alone.kinds == together.kinds
    assert (alone.rows == together.rows).all()


def test_no_torch_is_needed(tree):
    code = (
        "import sys\nfrom sslcli.cli.data import app\n"
        f"app(['check', {str(tree)!r}], standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_mistakes_are_named(tree, tmp_path):
    for words, kind, message in (
        (["--drop", "ugly"], UserError, "there is unreadable, equal, near, overlap"),
        (["--against", str(tree / "nowhere")], DataError, "does not exist"),
        (["--out", str(tree / "no" / "skip.txt")], UserError, "cannot write"),
    ):
        result = CliRunner().invoke(app, ["data", "check", str(tree), *words])
        assert isinstance(result.exception, kind)
        assert message in str(result.exception)


def test_hashes_that_differ_in_few_bits_are_all_found():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64)
    for number in range(100):  # a neighbour at distance 0 to 4
        flips = rng.choice(64, number % 5, replace=False)
        hashes[200 + number] = hashes[number] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    for near in (0, 2, 3):
        found = set(zip(*(side.tolist() for side in near_pairs(hashes, near)), strict=True))
        distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
        wanted = {(i, j) for i, j in zip(*np.nonzero(distances <= near), strict=True) if i < j}
        assert found == wanted
        assert len(wanted) >= 20 * (near + 1)


def test_hashes_change_little_with_size_and_quality_and_much_with_the_picture(tmp_path):
    pictures = photos(12)
    hashes = [perceptual_hash(np.asarray(picture)) for picture in pictures]
    for picture, own in zip(pictures, hashes, strict=True):
        picture.resize((90, 84)).save(tmp_path / "small.jpg", quality=70)
        with Image.open(tmp_path / "small.jpg") as small:
            assert (perceptual_hash(np.asarray(small)) ^ own).bit_count() <= 8
    others = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(others) > 8


@pytest.mark.data
def test_awkward_files(small_data, tmp_path):
    with tarfile.open(small_data / "awkward.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "awkward" / "files"
    facts = json.loads(ran("data", "check", folder, "--json").stdout)
    assert facts["images"] + facts["ignored"] == sum(path.is_file() for path in folder.rglob("*"))
    assert facts["unreadable"]
    assert all(reason and "\n" not in reason for reason in facts["unreadable"].values())
    assert {"JPEG, CMYK", "JPEG, L", "PNG, RGBA", "PNG, P"} <= set(facts["kinds"])
    ran("data", "check", folder, "--out", tmp_path / "skip.txt")
    source = open_source(Folder(path=folder, skip=tmp_path / "skip.txt"))
    for index in range(len(source)):
        source.read(index)  # every image that is left can be read
