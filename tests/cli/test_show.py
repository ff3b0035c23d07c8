from pathlib import Path

import numpy as np
import pytest
import torch
from parts import ran
from PIL import Image
from typer.testing import CliRunner

from sslcli.cli import app
from sslcli.config.load import load
from sslcli.data import open_source
from sslcli.data.part import Part, without
from sslcli.engine.show import chosen, seen_of, views_page
from sslcli.errors import DataError, UserError
from sslcli.features.clusters import Clusters, clusters_page, of_state
from sslcli.seeds import seed_of
from sslcli.views import build

DIGITS = {"data.source": ({"name": "coloured_digits", "count": 40, "size": 32}, "a test")}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(
    ("preset", "rows"), [("simclr-cifar10-cpu", 2), ("rotation-cifar10-cpu", 4), ("relative-loc-cifar10-cpu", 9)]
)
def test_views_of_every_kind(preset, rows):
    found = load("pretrain", preset, (), DIGITS).preset
    source = open_source(found.data.source)
    one, two = (np.asarray(views_page(found, source, images=5, epochs=n)) for n in (1, 2))
    assert two.shape[0] - one.shape[0] == rows * 118  # a row is a picture of 112 px and a gap
    assert two.shape[1] == 84 + 5 * 118
    np.testing.assert_array_equal(two[: one.shape[0]], one)


def test_a_target_is_shown_in_the_colours_of_its_view():
    preset = load("pretrain", "cae-vitb16-300e", (), DIGITS).preset
    sheet = np.asarray(views_page(preset, open_source(preset.data.source), images=2, epochs=1)).astype(float)
    view, target = (sheet[22 + row * 118 :][:112, 84:196] for row in (1, 3))
    assert abs(view - target).mean() < 4


def test_what_is_shown_is_what_training_sees():
    preset = load("pretrain", "rotation-cifar10-cpu", (), DIGITS).preset
    source = open_source(preset.data.source)
    index, images = chosen(source, 4, preset.seed)
    views = build(preset.views, seed_of(preset.seed, "views"))
    for slowly in (False, True):
        seen = seen_of(views, images, index, 3, slowly=slowly)
        wanted = views.reference(source.read(int(index[2])), int(index[2]), 3)[0]
        assert (seen.views[0][2] - torch.from_numpy(wanted)).abs().mean() < 0.02


def test_the_command_writes_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ran("show", "views", "--preset", "demo-digits", "--out", "views.png", "--images", 3, "--epochs", 1)
    assert done.stdout == "views.png\n"
    assert pixels(tmp_path / "views.png").shape[1] == 84 + 3 * 118
    result = CliRunner().invoke(app, ["show", "views", "--preset", "demo-digits", "--out", "views.nothing"])
    assert isinstance(result.exception, UserError)


def test_clusters_of_a_method():
    state = {"backbone.labels": torch.zeros(3, dtype=torch.int64), "labels": torch.tensor([1, 1, 0, 1])}
    assert of_state(state, 4, "m").labels.tolist() == [1, 1, 0, 1]
    assert of_state({"labels": torch.zeros(4)}, 4, "m") is None


def test_clusters_are_drawn_with_their_own_images():
    source = open_source(load("pretrain", "demo-digits", (), DIGITS).preset.data.source)
    view = load("pretrain", "demo-digits", (), DIGITS).preset.views.eval_view
    labels = np.full(len(source), 7)
    labels[:3], labels[3] = 2, -1
    settings = {"rows": 5, "columns": 4, "pick": "largest", "seed": 0}
    page = np.asarray(clusters_page(Clusters(labels, "a test"), source, view, **settings))
    assert page.shape == (16 + 6 + 2 * 118, 84 + 4 * 118, 3)
    small = page[16 + 6 + 118 :, 84:]  # the smaller cluster comes second: three images and an empty place
    assert (small[:112, 3 * 118 :] == 255).all()
    centres = {tuple(small[1, column * 118 + 1]) for column in range(3)}
    assert centres == {tuple(source.read(index)[0, 0]) for index in range(3)}


def test_clusters_by_k_means(run, tmp_path):
    done = ran("show", "clusters", "run", "--k", 4, "--out", "clusters.png", "--images", 5)
    assert done.stdout == "clusters.png\n"
    assert pixels(tmp_path / "clusters.png").shape == (16 + 6 + 4 * 118, 84 + 5 * 118, 3)
    result = CliRunner().invoke(app, ["show", "clusters", "run", "--out", "clusters.png"])
    assert isinstance(result.exception, UserError)
    assert "keeps no clusters" in str(result.exception)


def test_a_part_of_a_source():
    whole = open_source(load("pretrain", "demo-digits", (), DIGITS).preset.data.source)
    part = Part(whole, np.array([5, 2, 30]))
    assert len(part) == 3
    assert part.name(1) == whole.name(2)
    np.testing.assert_array_equal(part.read(2), whole.read(30))
    np.testing.assert_array_equal(part.resident(), whole.resident()[[5, 2, 30]])
    np.testing.assert_array_equal(part.labels, whole.labels[[5, 2, 30]])
    assert len({part.fingerprint(), whole.fingerprint(), Part(whole, np.array([5, 2, 31])).fingerprint()}) == 3


def test_a_skip_list(tmp_path):
    whole = open_source(load("pretrain", "demo-digits", (), DIGITS).preset.data.source)
    path = tmp_path / "skip.txt"
    path.write_text("# why\nimages[3]\tunreadable\nimages[0]\n\n", encoding="utf-8")
    part = without(whole, path)
    assert len(part) == len(whole) - 2
    assert [part.name(index) for index in range(3)] == ["images[1]", "images[2]", "images[4]"]
    assert "leaves out 2 images" in part.remark
    path.write_text("photos/cat.jpg\n", encoding="utf-8")
    with pytest.raises(DataError, match="names none of the 40 images"):
        without(whole, path)
    path.write_text("".join(f"images[{index}]\n" for index in range(40)), encoding="utf-8")
    with pytest.raises(DataError, match="leaves none"):
        without(whole, path)
    with pytest.raises(DataError, match="cannot read skip list"):
        without(whole, tmp_path / "none.txt")


@pytest.fixture(scope="module")
def painters(tmp_path_factory):
    """Run folders of a MAE, a SimMIM, and a SimCLR that has not been asked to paint, and two image files."""
    from sslcli.engine.pretrain import pretrain

    folder = tmp_path_factory.mktemp("painters")
    small = ("run.steps=2", "run.epochs=null", "run.tensorboard=false", "run.views=fast", "data.batch_size=20",
             "run.monitor=null")  # fmt: skip
    nets = {
        "mae-cifar10-cpu": ("backbone.width=16", "backbone.heads=2", "backbone.depth=1", "method.width=16",
                            "method.heads=2"),
        "simmim-cifar10-cpu": ("backbone.width=16", "backbone.heads=2", "backbone.depth=1"),
        "simclr-cifar10-cpu": ("backbone.width=8",),
    }  # fmt: skip
    for name, net in nets.items():
        pretrain(load("pretrain", name, small + net, DIGITS).preset, folder / name)
    noise = np.random.default_rng(0).integers(0, 256, (2, 50, 40, 3), dtype=np.uint8)
    for number, image in enumerate(noise):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", ["mae-cifar10-cpu", "simmim-cifar10-cpu"])
def test_reconstruction(painters, name):
    out = painters / f"{name}.png"
    words = ("show", "reconstruction", painters / name, painters / "0.png", painters / "1.png", "--out", out)
    assert ran(*words).stdout == f"{out}\n"
    sheet = pixels(out)
    assert sheet.shape == (16 + 6 + 3 * 118, 84 + 2 * 118, 3)
    masked, painted, original = (sheet[22 + row * 118 :][:112, 84:196].astype(int) for row in range(3))
    hidden = (masked != original).any(axis=2)
    assert 0.4 < hidden.mean() < 0.8
    assert (painted == original).all(axis=2)[~hidden].all()  # what was seen stays
    assert (painted != masked).any(axis=2)[hidden].mean() > 0.5
    ran(*words)
    np.testing.assert_array_equal(pixels(out), sheet)
    ran(*words, "--seed", 1)
    assert (pixels(out) != sheet).any()


def test_only_painters_paint(painters):
    words = ["show", "reconstruction", str(painters / "simclr-cifar10-cpu"), str(painters / "0.png"), "--out", "x.png"]
    with pytest.raises(UserError, match="the method `simclr` paints no images"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    words[2:4] = [str(painters / "mae-cifar10-cpu"), str(painters / "none.png")]
    with pytest.raises(DataError, match="cannot read the image"):
        CliRunner().invoke(app, words, catch_exceptions=False)
