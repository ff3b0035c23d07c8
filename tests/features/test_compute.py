"""From images to tables: taps, floors, and networks that stay as they are."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslcli.config.views import EvalView
from sslcli.data.arrays import Arrays
from sslcli.data.digits import coloured_digits
from sslcli.errors import UserError
from sslcli.evaluate import knn
from sslcli.features.baselines import centred, raw_pixels, small, untrained
from sslcli.features.compute import of_network
from sslcli.features.table import FeatureTable
from sslcli.features.weights import digest_of, load, network

NET = {"name": "resnet", "depth": 10, "width": 8, "stem": "small"}
VIEW = EvalView(resize=32, size=32)


def table_of(source: Arrays, taps: tuple[str, ...], **changes: object) -> FeatureTable:
    backbone = network(NET).eval()
    found = of_network(
        backbone, source, VIEW, taps, what="untrained", digest=None, batch_size=16, workers=0, **changes
    )  # fmt: skip
    assert found is not None
    return found


def test_maps_are_averaged_over_space():
    source = coloured_digits("train", 20, 32, 0)
    found = table_of(source, ("layer3", "layer4", "pooled"))
    assert {name: rows.shape for name, rows in found.features.items()} == {
        "layer3": (20, 32), "layer4": (20, 64), "pooled": (20, 64),
    }  # fmt: skip
    np.testing.assert_allclose(found.tap("layer4"), found.tap("pooled"), atol=1e-5)
    assert found.known_labels().tolist() == source.labels.tolist()
    assert found.meta.source == source.fingerprint()
    assert found.meta.classes == source.classes


def test_names_are_kept_where_wanted():
    source = coloured_digits("train", 3, 32, 0)
    assert table_of(source, ("pooled",)).names == ()
    assert table_of(source, ("pooled",), named=True).names == tuple(source.name(i) for i in range(3))


def test_an_unknown_tap_is_refused_before_the_pass():
    with pytest.raises(UserError, match="no tap `layer9`") as caught:
        table_of(coloured_digits("train", 3, 32, 0), ("pooled", "layer9"))
    assert "layer4" in str(caught.value.hint)


def test_a_pass_changes_nothing_in_the_network():
    backbone = network(NET).eval()
    before = digest_of(backbone.state_dict())
    source = coloured_digits("train", 40, 32, 0)
    of_network(backbone, source, VIEW, ("pooled",), what="untrained", digest=None, batch_size=7, workers=0)
    assert digest_of(backbone.state_dict()) == before


def test_a_network_in_training_mode_cannot_be_used():
    with pytest.raises(AssertionError, match="training mode"):
        of_network(
            network(NET), coloured_digits("train", 4, 32, 0), VIEW, ("pooled",), what="untrained", digest=None,
            batch_size=4, workers=0,
        )  # fmt: skip


def test_the_untrained_floor_is_the_run_before_its_first_step(tiny_run: Path):
    weights = load(tiny_run)
    source = coloured_digits("train", 8, 32, 0)
    settings = {"seed": 0, "batch_size": 8, "workers": 0}
    first = untrained(weights.manifest.backbone, source, VIEW, ("pooled",), **settings)
    again = untrained(weights.manifest.backbone, source, VIEW, ("pooled",), **settings)
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first.tap("pooled"), again.tap("pooled"))
    with torch.no_grad():
        learned = weights.backbone(torch.zeros(1, 3, 32, 32))
        fresh = network(weights.manifest.backbone).eval()(torch.zeros(1, 3, 32, 32))
    assert not torch.allclose(learned, fresh)


def test_raw_pixels_are_small_and_in_0_to_1():
    source = Arrays(np.random.default_rng(0).integers(0, 256, (5, 60, 80, 3), dtype=np.uint8))
    found = raw_pixels(source, EvalView(), ("pooled",), batch_size=2, workers=0)
    assert found is not None
    assert found.tap("pooled").shape == (5, 3 * 32 * 32)
    assert 0 <= found.tap("pooled").min() <= found.tap("pooled").max() <= 1
    assert (small(EvalView()).resize, small(EvalView()).size) == (37, 32)  # 256 : 224
    assert small(EvalView(resize=28, size=28)).size == 28


def pictures_in(archive: Path) -> Arrays:
    """The images of an archive of class folders."""
    with tarfile.open(archive) as tar:
        files = sorted((m for m in tar if m.name.endswith(".png")), key=lambda m: m.name)
        images = np.stack([np.asarray(Image.open(tar.extractfile(m)).convert("RGB")) for m in files])
    names = [m.name.split("/")[-2] for m in files]
    classes = tuple(sorted(set(names)))
    return Arrays(images, np.array([classes.index(name) for name in names]), classes)


@pytest.mark.data
def test_the_raw_floor_of_small_cifar_is_the_known_one(small_data: Path):
    tables = []
    for split in ("train", "test"):
        source = pictures_in(small_data / f"cifar10_small_{split}.tar")
        made = raw_pixels(source, VIEW, ("pooled",), batch_size=500, workers=0)
        assert made is not None
        tables.append(made)
    found = knn.score(*centred(*tables), knn.Config(k=(20,)), seed=0)
    assert found.metrics["top1_k20"] == pytest.approx(39.2, abs=0.05)
