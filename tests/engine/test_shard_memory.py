"""Memories in shares on two ranks: the numbers of whole ones, and checkpoints that any number of ranks continues."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sslcli.config.load import load
from sslcli.engine import checkpoint
from sslcli.engine.pretrain import pretrain
from sslcli.features import weights

pytestmark = pytest.mark.dist
Ranks = Callable[..., list[Any]]

SMALL = (
    "data.source.count=49",  # shares of 25 and 24 images
    "data.batch_size=16",
    "run.epochs=null",
    "run.steps=5",
    "run.checkpoints.every_steps=2",
    "run.views=fast",
    "run.tensorboard=false",
    "run.monitor={every_epochs: 1, images: 16, knn: false}",
    "backbone.width=8",
    "optim={name: sgd, lr: 0.01}",
)
NPID = "{name: npid, dim: 8, negatives: 20, shard_memory: %s}"
ODC = "{name: odc, hidden: 16, dim: 8, dropout: 0, clusters: 5, min_cluster: 3, shard_memory: %s}"
ONE = "views.groups=[{size: 32}]"


def run(folder: Path, method: str, shard: bool, *overrides: str) -> None:
    chosen = f"method={method % str(shard).lower()}"
    pretrain(load("pretrain", "demo-digits", (*SMALL, ONE, chosen, *overrides), {}).preset, folder)


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}")


def difference(a: Path, b: Path) -> float:
    """Largest of all tensors of the methods in the newest checkpoints of two runs, which must hold the same ones."""
    ours, theirs = (dict(tensors(checkpoint.read(checkpoint.newest(folder))["method"])) for folder in (a, b))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.mark.parametrize("method", [NPID, ODC], ids=["npid", "odc"])
def test_shares_change_nothing(two_ranks: Ranks, tmp_path: Path, method: str):
    two_ranks(run, tmp_path / "whole", method, False)
    two_ranks(run, tmp_path / "shares", method, True)
    assert checkpoint.newest(tmp_path / "whole").is_file()
    assert checkpoint.newest(tmp_path / "shares").is_dir()
    assert difference(tmp_path / "whole", tmp_path / "shares") < 1e-5
    kept = checkpoint.read(checkpoint.newest(tmp_path / "shares"))["method"]
    rows = next(value for name, value in kept.items() if name.endswith("bank.rows"))
    assert rows.shape == (49, 8)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(49))


def test_a_run_in_shares_goes_on_with_any_number_of_ranks(two_ranks: Ranks, tmp_path: Path):
    two_ranks(run, tmp_path / "straight", NPID, True)
    early = tmp_path / "straight" / "checkpoints" / "step_00000002.dcp"
    assert early.is_dir()
    two_ranks(resumed, tmp_path / "two", early)
    resumed(tmp_path / "one", early)
    assert difference(tmp_path / "straight", tmp_path / "two") == 0
    assert difference(tmp_path / "straight", tmp_path / "one") < 1e-5
    assert checkpoint.newest(tmp_path / "one").is_file()


def resumed(folder: Path, start: Path) -> None:
    chosen = f"method={NPID % 'true'}"
    preset = load("pretrain", "demo-digits", (*SMALL, ONE, chosen), {}).preset
    pretrain(preset, folder, resume=start)


def test_the_backbone_comes_out_of_a_checkpoint_in_shares(two_ranks: Ranks, tmp_path: Path):
    two_ranks(run, tmp_path, ODC, True)
    assert weights.extract(checkpoint.newest(tmp_path), tmp_path / "out.safetensors")
