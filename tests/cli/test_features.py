from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sslcli.cli import app
from sslcli.errors import DataError, UserError
from sslcli.features.table import FeatureTable


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for split, each in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(each):
                picture = Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8))
                picture.save(tmp_path / "images" / split / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return Path("images")


def ran(*words: str | Path):
    result = CliRunner().invoke(app, ["features", *(str(word) for word in words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_writes_a_table_that_numpy_reads(tiny_run: Path, images: Path):
    (images / "train" / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = ran(tiny_run, "--data", images, "--out", "f.npz", "--taps", "pooled, layer3", "--workers", "0")
    assert done.stdout == "f.npz\n"
    assert "features_pooled (7, 64), features_layer3 (7, 32), labels; 1 unreadable images left out" in done.stderr
    with np.load("f.npz", allow_pickle=False) as table:
        assert table["features_layer3"].shape == (7, 32)
        assert table["labels"].tolist() == [0, 0, 0, 1, 1, 1, 1]
        assert table["index"].tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert table["names"][0].decode() == "cat/1.png"


def test_the_test_split_and_loader_processes(tiny_run: Path, images: Path):
    words = (tiny_run, "--data", images, "--split", "test")
    ran(*words, "--out", "a.npz", "--workers", "2", "--batch-size", "2")
    ran(*words, "--out", "b.npz", "--workers", "0", "--batch-size", "2")
    found = [FeatureTable.load(Path(name)) for name in ("a.npz", "b.npz")]
    assert len(found[0]) == 4
    assert found[0].digest() == found[1].digest()


def test_what_cannot_work_is_refused_with_the_fix(tiny_run: Path, images: Path):
    flat = images / "train" / "cat"
    for words, kind, told in (
        (("--data", images, "--out", "f.csv"), UserError, "does not end in `.npz`"),
        (("--data", images, "--out", "f.npz", "--taps", "layer9"), UserError, "no tap `layer9`"),
        (("--data", images, "--out", "f.npz", "--taps", ","), UserError, "names no place"),
        (("--data", images, "--out", "f.npz", "--split", "dev"), UserError, "there is `train` and `test`"),
        (("--data", flat, "--out", "f.npz", "--split", "test"), DataError, "no test images"),
        (("--data", "nowhere", "--out", "f.npz"), DataError, "does not exist"),
        (("--data", images, "--out", "f.npz", "--gpus", "1", "--procs", "2"), UserError, "exclude each other"),
    ):
        with pytest.raises(kind, match=told):
            ran(tiny_run, *words)
    with pytest.raises(UserError) as caught:
        ran(tiny_run, "--data", images, "--out", "f.npy")
    assert caught.value.hint == "use `--out f.npz`"
    assert not list(Path().glob("f.*"))
