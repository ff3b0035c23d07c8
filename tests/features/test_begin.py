"""`--init-from`: what a new run takes from an old one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sslcli.config.load import load
from sslcli.contracts import Method
from sslcli.engine import checkpoint
from sslcli.engine.build import facts_of, method_of
from sslcli.engine.pretrain import pretrain
from sslcli.errors import WeightsError
from sslcli.features import weights

SETTINGS = ("data.source.count=64", "data.batch_size=32", "run.epochs=1", "run.views=fast", "run.tensorboard=false",
            "run.monitor=null", "backbone.width=8", "seed=3")  # fmt: skip
MOCO = "method={name: moco, queue: 64}"


def fresh(*overrides: str) -> Method[Any]:
    preset = load("pretrain", "demo-digits", (*SETTINGS, *overrides)).preset
    return method_of(preset, facts_of(preset, images=64, steps_per_epoch=2))


@pytest.fixture(scope="module")
def moco_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moco")
    pretrain(load("pretrain", "demo-digits", (*SETTINGS, MOCO, "seed=1")).preset, folder)
    return folder


def test_a_run_of_the_same_method_gives_everything(moco_run: Path) -> None:
    stored = checkpoint.read(checkpoint.newest(moco_run))["method"]
    method = fresh(MOCO)
    assert not torch.equal(method.state_dict()["queue.rows"], stored["queue.rows"])
    said = weights.begin_with(method, moco_run)
    assert "all of `moco` at step 2" in said
    assert f"{len(stored)} tensors match" in said
    ours = method.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in ours.items())
    assert not torch.equal(ours["slow_backbone.trunk.conv1.weight"], ours["backbone.trunk.conv1.weight"])


def test_a_run_of_another_method_gives_its_backbone(moco_run: Path, tiny_run: Path) -> None:
    stored = checkpoint.read(checkpoint.newest(tiny_run))["method"]
    method = fresh(MOCO)
    head = method.state_dict()["head.0.weight"].clone()
    said = weights.begin_with(method, checkpoint.newest(tiny_run))
    assert "the backbone:" in said
    ours = method.state_dict()
    for place in ("backbone", "slow_backbone"):
        assert torch.equal(ours[f"{place}.trunk.conv1.weight"], stored["backbone.trunk.conv1.weight"])
    assert torch.equal(ours["head.0.weight"], head)


def test_a_backbone_file_gives_the_backbone(tiny_run: Path, tmp_path: Path) -> None:
    file = weights.extract(tiny_run, tmp_path / "backbone.safetensors").path
    method = fresh("method.dim=16")
    assert "the backbone:" in weights.begin_with(method, file)
    stored = checkpoint.read(checkpoint.newest(tiny_run))["method"]
    assert torch.equal(
        method.state_dict()["backbone.trunk.layer1.0.conv1.weight"], stored["backbone.trunk.layer1.0.conv1.weight"]
    )


def test_what_does_not_fit_is_named_and_can_be_left(tiny_run: Path) -> None:
    method = fresh("method.dim=16")
    with pytest.raises(WeightsError, match=r"does not fit: \d+ tensors match, 5 of another shape \(`head") as caught:
        weights.begin_with(method, tiny_run)
    assert "--allow-partial" in (caught.value.hint or "")
    said = weights.begin_with(fresh("method.dim=16"), tiny_run, allow_partial=True)
    assert "of another shape" in said


def test_weights_of_another_network_are_refused_even_in_part(tmp_path: Path, tiny_run: Path) -> None:
    vit = "backbone={name: vit, width: 8, depth: 1, heads: 1, patch: 16, image_size: 32}"
    file = weights.extract(tiny_run, tmp_path / "backbone.safetensors").path
    with pytest.raises(WeightsError, match="0 tensors match") as caught:
        weights.begin_with(fresh(vit, MOCO), file, allow_partial=True)
    assert caught.value.hint is None


def test_a_resumed_run_goes_on_with_its_own(moco_run: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    def start(method: Method[Any]) -> str:
        calls.append(weights.begin_with(method, moco_run))
        return calls[-1]

    preset = load("pretrain", "demo-digits", (*SETTINGS, MOCO, "run.checkpoints.every_steps=1")).preset
    pretrain(preset, tmp_path, start=start)
    checkpoint.remove(checkpoint.newest(tmp_path))
    pretrain(preset, tmp_path, start=start)
    assert len(calls) == 1
    assert (tmp_path / "log.txt").read_text().count("begins with") == 1
