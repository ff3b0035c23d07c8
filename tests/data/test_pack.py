import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sslcli.cli import app
from sslcli.config.data import Folder, Packed
from sslcli.data import guess_source, open_source, other_split
from sslcli.data import pack as packing
from sslcli.data.pack import How, pack
from sslcli.data.packed import open_pack
from sslcli.data.source import Source, UnreadableImage
from sslcli.errors import DataError


@pytest.fixture
def photos(tmp_path: Path) -> Source:
    """Ten images of several sizes in two classes, one of which cannot be read."""
    rng = np.random.default_rng(0)
    for number in range(10):
        (tmp_path / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        side = 20 + 7 * number
        smooth = np.add.outer(np.arange(side), np.arange(2 * side))[..., None] + rng.integers(0, 100, 3)
        Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "photos" / "ab"[number % 2] / f"é {number}.png")
    (tmp_path / "photos" / "b" / "broken.png").write_bytes(b"no image")
    return open_source(Folder(path=tmp_path / "photos"))


def packed(source: Source, out: Path, **settings) -> Source:
    pack(source, out, How(**{"per_shard": 4, **settings}), workers=0)
    return open_source(guess_source(out))


def test_raw_pixels_come_back_as_they_were(photos, tmp_path):
    found = packed(photos, tmp_path / "pack")
    readable = [index for index in range(11) if "broken" not in photos.name(index)]
    assert len(found) == 10
    assert found.classes == photos.classes == ("a", "b")
    assert found.labels.tolist() == photos.labels[readable].tolist()
    for place, index in enumerate(readable):
        assert found.name(place) == photos.name(index)
        image = found.read(place)
        np.testing.assert_array_equal(image, photos.read(index))
        image[:] = 0  # the caller's own
        np.testing.assert_array_equal(found.read(place), photos.read(index))
    assert (tmp_path / "pack" / "skipped.txt").read_text().startswith("b/broken.png\tnot an image")
    assert found.verify() == 10
    assert found.resident() is None
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).read(3), found.read(3))
    assert not list((tmp_path / "pack").glob("*.part"))


def test_numpy_alone_reads_a_pack(photos, tmp_path):
    packed(photos, tmp_path / "pack")
    index = np.load(tmp_path / "pack" / "index.npy")
    row = index[4]
    shard = np.load(tmp_path / "pack" / f"shard-{row['shard']:05}.npy", mmap_mode="r")
    pixels = shard[row["start"] : row["start"] + row["length"]].reshape(row["height"], row["width"], 3)
    np.testing.assert_array_equal(pixels, photos.read(4))


def test_png_loses_nothing_and_jpeg_little(photos, tmp_path):
    png, jpeg = packed(photos, tmp_path / "png", encoding="png"), packed(photos, tmp_path / "jpeg", encoding="jpeg")
    np.testing.assert_array_equal(png.read(4), photos.read(4))
    assert np.abs(jpeg.read(4).astype(int) - photos.read(4)).mean() < 6
    assert (png.kind(0), jpeg.kind(0)) == ("pack, png", "pack, jpeg")
    assert len({png.fingerprint(), jpeg.fingerprint()}) == 2


def test_larger_images_are_reduced(photos, tmp_path):
    found = packed(photos, tmp_path / "pack", size=30)
    shapes = [found.read(index).shape[:2] for index in range(len(found))]
    assert {min(shape) for shape in shapes} == {20, 27, 30}  # smaller ones stay as they are
    assert all(abs(width - 2 * height) <= 1 for height, width in shapes)


def test_small_images_of_one_size_are_kept_in_memory(tmp_path):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (9, 16, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", images=images, labels=np.arange(9) % 3)
    found = packed(open_source(guess_source(tmp_path / "some.npz")), tmp_path / "pack")
    np.testing.assert_array_equal(found.resident(), images)
    assert found.labels.tolist() == [0, 1, 2] * 3


def test_what_was_interrupted_goes_on(photos, tmp_path, monkeypatch):
    out, real = tmp_path / "pack", packing._encoded
    calls = []

    def failing(image, how):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(image, how)

    monkeypatch.setattr(packing, "_encoded", failing)
    with pytest.raises(KeyboardInterrupt):
        pack(photos, out, How(per_shard=4), workers=0)
    with pytest.raises(DataError, match="is no pack"):
        open_pack(str(out), None, "skip")
    with pytest.raises(DataError, match="another pack: encoding differ"):
        pack(photos, out, How(per_shard=4, encoding="png"), workers=0)
    monkeypatch.setattr(packing, "_encoded", lambda image, how: calls.append(1) or real(image, how))
    done = pack(photos, out, How(per_shard=4), workers=0)
    assert (done.kept, done.images, len(calls)) == (1, 10, 7 + 6)
    straight = packed(photos, tmp_path / "straight")
    assert open_source(guess_source(out)).fingerprint() == straight.fingerprint()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "straight").iterdir())
    with pytest.raises(DataError, match="is a finished pack"):
        pack(photos, out, How(per_shard=4), workers=0)


def test_several_processes_write_the_same(photos, tmp_path):
    pack(photos, tmp_path / "two", How(per_shard=3), workers=1)
    pack(photos, tmp_path / "none", How(per_shard=3), workers=0)
    for path in (tmp_path / "none").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_damage_is_found(photos, tmp_path):
    found = packed(photos, tmp_path / "pack", encoding="jpeg")
    path = tmp_path / "pack" / "shard-00001.npy"
    content = bytearray(path.read_bytes())
    content[150:170] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00001\.npy` is not what it was packed as"):
        open_source(guess_source(tmp_path / "pack")).verify()
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "pack")])
    assert isinstance(result.exception, DataError)
    path.write_bytes(content[:400])
    broken = open_source(guess_source(tmp_path / "pack"))
    with pytest.raises((UnreadableImage, DataError)):
        broken.read(4)
    assert len(found.read(0))


def test_a_pack_far_away(photos, tmp_path):
    near = packed(photos, tmp_path / "pack")
    url = f"file://{tmp_path / 'pack'}"
    for cache in (None, tmp_path / "cache"):
        far = open_source(Packed(path=url, cache=cache))
        assert far.fingerprint() == near.fingerprint()
        for index in (9, 0, 5):
            np.testing.assert_array_equal(far.read(index), near.read(index))
            assert far.name(index) == near.name(index)
        assert far.verify() == 10
    shards = {path.name for path in (tmp_path / "cache").glob("*.npy")}
    assert shards == {"shard-00000.npy", "shard-00001.npy", "shard-00002.npy"}
    (tmp_path / "pack" / "shard-00000.npy").unlink()
    np.testing.assert_array_equal(far.read(0), photos.read(0))  # the cache has it


def test_what_arrives_damaged_is_not_cached(photos, tmp_path):
    packed(photos, tmp_path / "pack")
    path = tmp_path / "pack" / "shard-00000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    far = open_source(Packed(path=f"file://{tmp_path / 'pack'}", cache=tmp_path / "cache"))
    with pytest.raises(DataError, match="its checksum differs"):
        far.read(0)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_a_far_storage_that_fails_is_asked_again_and_then_named(photos, tmp_path, monkeypatch):
    packed(photos, tmp_path / "pack")
    monkeypatch.setattr("sslcli.data.packed.PAUSE", 0.0)
    far = open_pack(f"file://{tmp_path / 'pack'}", None, "skip")
    system, _ = far._place._system()
    real, failures = system.cat_file, iter([TimeoutError("slow"), TimeoutError("slow")])

    def unsteady(*words, **settings):
        for failure in failures:
            raise failure
        return real(*words, **settings)

    monkeypatch.setattr(system, "cat_file", unsteady)
    np.testing.assert_array_equal(far.read(0), photos.read(0))
    monkeypatch.setattr(system, "cat_file", lambda *words, **settings: (_ for _ in ()).throw(TimeoutError("slow")))
    with pytest.raises(DataError, match="slow") as failure:
        far.read(0)
    assert not isinstance(failure.value, UnreadableImage)  # or the run would train on other images


@pytest.mark.parametrize("url", ["nosuchthing://bucket/pack", "file:///nowhere/pack"])
def test_a_wrong_url_is_one_clear_error(url):
    with pytest.raises(DataError, match=r"cannot reach|there is no"):
        open_source(Packed(path=url))


def test_train_and_test_packs_belong_together(photos, tmp_path):
    for name in ("train", "val"):
        packed(photos, tmp_path / "packs" / name)
    train = guess_source(tmp_path / "packs")
    assert train == Packed(path=str(tmp_path / "packs" / "train"))
    assert other_split(train) == Packed(path=str(tmp_path / "packs" / "val"))
    assert other_split(other_split(train)) is None


def test_the_command(photos, tmp_path):
    (tmp_path / "skip.txt").write_text("a/é 0.png\n", encoding="utf-8")
    out = tmp_path / "pack"
    words = ["data", "pack", str(tmp_path / "photos"), str(out), "--skip", str(tmp_path / "skip.txt"), "--json"]
    result = CliRunner().invoke(app, [*words, "--encoding", "png", "--size", "24"], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert (told["images"], list(told["skipped"])) == (9, ["b/broken.png"])
    manifest = json.loads((out / "pack.json").read_text())
    assert (manifest["format"], manifest["encoding"], manifest["size"], manifest["images"]) == (1, "png", 24, 9)
    checked = CliRunner().invoke(app, ["data", "check", str(out), "--json"], catch_exceptions=False)
    assert json.loads(checked.stdout)["kinds"] == {"pack, png": 9}


def test_a_run_on_a_pack_equals_one_on_the_images(tmp_path):
    from sslcli.config.load import load
    from sslcli.engine.checkpoint import newest, read
    from sslcli.engine.pretrain import pretrain

    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(16):
        pixels = rng.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02}.png")
    source = open_source(Folder(path=tmp_path / "photos"))
    packed(source, tmp_path / "pack")
    settings = (
        "data.batch_size=8", "run.epochs=1", "run.views=fast", "run.tensorboard=false", "backbone.width=8",
        "data.workers=1", "run.monitor=null",
    )  # fmt: skip
    states = []
    for name in ("photos", "pack"):
        flags = {"data.source": (guess_source(tmp_path / name).model_dump(mode="json"), "a test")}
        pretrain(load("pretrain", "demo-digits", settings, flags).preset, tmp_path / f"run-{name}")
        states.append(read(newest(tmp_path / f"run-{name}"))["method"])
    assert states[0].keys() == states[1].keys()
    assert all((states[0][key] == states[1][key]).all() for key in states[0])
