"""ssl inspect, ssl convert ssl, and other tools' files where weights are asked for."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import ran
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from sslcli.engine import checkpoint
from sslcli.errors import UserError, WeightsError


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


@pytest.fixture
def dino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training file of DINO with a small transformer, settings as an object, and a payload."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    student, teacher = (
        {f"backbone.{name}": x for name, x in VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=1,
                                                                 num_classes=0).state_dict().items()}
        for _ in range(2)
    )  # fmt: skip
    head = {"head.mlp.0.weight": torch.zeros(2, 64)}
    torch.save(
        {
            "student": {f"module.{name}": x for name, x in {**student, **head}.items()},
            "teacher": {**teacher, **head},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
            "epoch": 12,
            "args": argparse.Namespace(arch="vit_small", patch_size=8),
            "dino_loss": {"center": torch.zeros(1, 4)},
            "payload": Payload(),
        },
        "checkpoint.pth",
    )
    return Path("checkpoint.pth")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, bright in (("dark", 0), ("light", 128)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(rng.integers(bright, bright + 128, (32, 32, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    return Path("images")


def test_says_what_a_file_is(dino: Path):
    done = ran("inspect", dino, "--keys")
    for told in (
        "dino: DINO (facebookresearch/dino)",
        "teacher (`--part teacher`, timm ViT, behind `teacher.backbone.`)",
        "epoch 12",
        "optimizer",
        "argparse.Namespace",
        "(left alone)",
        "width 64, depth 2, heads 1, patch 8, image_size 32",
        "teacher.backbone.blocks.1.mlp.fc2.weight  (64, 256)",
    ):
        assert told in done.stdout
    facts = json.loads(ran("inspect", dino, "--json").stdout)
    assert (facts["layout"], facts["method"], facts["training"]) == ("dino", "dino", ["optimizer"])
    assert facts["tensors"] == 2 * 31 + 1
    assert "keys" not in facts
    assert not Path("pwned").exists()


def test_our_own_files_and_unknown_ones(tiny_run: Path, tmp_path: Path):
    run = json.loads(ran("inspect", tiny_run, "--json").stdout)
    assert (run["layout"], run["method"], run["progress"], run["training"]) == (
        "ssl",
        "simclr",
        {"step": 4},
        ["optimizer"],
    )
    assert run["backbone"]["width"] == 8
    out = tmp_path / "b.safetensors"
    ran("extract", tiny_run, "--out", out)
    file = json.loads(ran("inspect", out, "--json").stdout)
    assert (file["layout"], file["method"], file["tensors"]) == ("ssl", "simclr", 72)
    torch.save({"layers": [torch.zeros(2), torch.ones(3)]}, tmp_path / "own.pth")
    own = json.loads(ran("inspect", tmp_path / "own.pth", "--json", "--keys").stdout)
    assert (own["layout"], own["keys"]) == ("unknown", {"layers.0": [2], "layers.1": [3]})
    state = {**checkpoint.read(checkpoint.newest(tiny_run)), "format": 9, "version": "7.0"}
    torch.save(state, tmp_path / "step_00000001.pt")
    assert "install ssl 7.0" in ran("inspect", tmp_path / "step_00000001.pt").stdout
    with pytest.raises(WeightsError, match=r"written by ssl 7\.0"):
        ran("extract", tmp_path / "step_00000001.pt")


def test_takes_a_network_in(dino: Path):
    done = ran("convert", "ssl", dino, "teacher.safetensors")
    assert done.stdout == "teacher.safetensors\n"
    assert "the teacher of DINO (facebookresearch/dino)" in done.stderr
    assert "`--part student` takes the student" in done.stderr
    assert "30 tensors matched, 0 missing, 0 unexpected, 0 of another shape" in done.stderr
    assert "in double precision: largest difference" in done.stderr
    told = json.loads(ran("convert", "ssl", dino, "student.safetensors", "--part", "student", "--json").stdout)
    assert told["manifest"]["origin"]["part"] == "student"
    assert told["manifest"]["digest"] != json.loads(Path("teacher.manifest.json").read_text())["digest"]
    assert told["difference"] < 1e-10
    with pytest.raises(UserError, match=r"does not end in `\.safetensors`"):
        ran("convert", "ssl", dino, "teacher.pth")
    with pytest.raises(UserError, match="is not KEY=VALUE"):
        ran("convert", "ssl", dino, "t.safetensors", "-o", "heads")
    assert not Path("pwned").exists()


def test_features_and_knn_of_another_tools_file(dino: Path, images: Path):
    done = ran("features", dino, "--data", images, "--out", "f.npz", "--workers", "0", "--part", "student")
    assert "the student of DINO (facebookresearch/dino), 30 tensors matched" in done.stderr
    with np.load("f.npz") as table:
        assert table["features_pooled"].shape == (6, 64)
    done = ran("eval", "knn", dino, "--data", images, "-o", "evaluator.k=[2]")
    assert "the teacher of DINO" in done.stderr
    assert "note: colours are shown with mean 0.485" in done.stderr
    assert "top1_k2" in done.stdout
    with pytest.raises(WeightsError, match="does not say which images it was trained on"):
        ran("eval", "knn", dino)
