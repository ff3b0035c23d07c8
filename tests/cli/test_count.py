import json
from pathlib import Path

import pytest
from parts import ran

from sslcli.errors import UserError


def test_a_preset_is_counted_without_its_images():
    done = ran("count", "mocov2-r50-200e", "-o", "data.source.path=nowhere")
    assert "backbone        8.174 GFLOP (4.09 GMAC) at 224 x 224, 2 views per image" in done.stdout
    assert "slow_backbone  23 508 032           0" in done.stdout
    assert "queue                   0           0  33.55 MB" in done.stdout
    assert "1 000 800 steps of 256, 200 epochs" in done.stdout
    assert "1 281 167 images of ImageNet; `--images N` says otherwise" in done.stderr
    assert "--dry-run" in done.stderr


def test_a_run_and_its_weights_are_counted_alike(tiny_run: Path, tmp_path: Path):
    told = json.loads(ran("count", tiny_run, "--json").stdout)
    assert told["images"] == 64
    assert told["steps"] == 4
    assert [part["name"] for part in told["parts"]] == ["backbone", "head", "(loss)"]
    ran("extract", tiny_run, "--out", tmp_path / "b.safetensors")
    assert json.loads(ran("count", tmp_path / "b.safetensors", "--json").stdout) == told
    assert "next:" not in ran("count", tmp_path / "b.safetensors").stderr  # weights are no preset
    more = json.loads(ran("count", tiny_run, "--images", "640", "--json").stdout)
    assert more["steps"] == 40


def test_what_is_stored_cannot_be_overridden(tiny_run: Path):
    with pytest.raises(UserError, match="changes presets only"):
        ran("count", tiny_run, "-o", "data.batch_size=2")


def test_a_misspelt_preset_is_one_clear_error():
    with pytest.raises(UserError, match="did you mean"):
        ran("count", "mocov2-r50-200")
