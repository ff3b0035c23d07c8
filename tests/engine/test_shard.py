"""Sharded runs on two ranks (FSDP2): the numbers of whole copies, and checkpoints that any number of ranks reads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sslcli.config.load import load
from sslcli.engine import checkpoint
from sslcli.engine.pretrain import pretrain
from sslcli.errors import PresetError, WeightsError
from sslcli.features import weights

pytestmark = pytest.mark.dist
Ranks = Callable[..., list[Any]]

SMALL = (
    "data.source.count=64",
    "data.batch_size=16",
    "run.epochs=null",
    "run.steps=4",
    "run.checkpoints.every_steps=2",
    "run.views=fast",
    "run.tensorboard=false",
    "run.log_every=1",
    "run.monitor={every_epochs: 0.5, images: 16, knn: false}",
    "method={name: byol, hidden: 32, dim: 16}",
    "backbone={name: vit, size: tiny, width: 32, depth: 2, heads: 2, patch: 8, image_size: 32}",
)


def run(folder: Path, *overrides: str) -> None:
    pretrain(load("pretrain", "demo-digits", (*SMALL, *overrides), {}).preset, folder)


def refused(folder: Path, *overrides: str) -> str:
    with pytest.raises(PresetError) as caught:
        run(folder, "run.shard=true", *overrides)
    return caught.value.message


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}")
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield from tensors(item, f"{name}.{key}")


def difference(a: checkpoint.State, b: checkpoint.State) -> float:
    """Largest of all tensors of two checkpoints, which must hold the same ones."""
    ours, theirs = dict(tensors(a)), dict(tensors(b))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def end(folder: Path) -> checkpoint.State:
    return checkpoint.read(checkpoint.newest(folder))


@pytest.mark.parametrize(
    ("optim", "tolerance", "more"),
    [
        ("sgd", 2e-6, ("run.clip=0.5", "run.clip_each=true")),
        ("lars", 5e-5, ("run.accumulate=2",)),
        ("adamw", 1e-6, ("run.checkpoint_activations=true",)),
    ],
)
def test_a_sharded_run_computes_what_whole_copies_do(
    two_ranks: Ranks, tmp_path: Path, optim: str, tolerance: float, more: tuple[str, ...]
):
    """Adam is not clipped: where a gradient is 0 but for rounding (a bias before batch norm), it would blow that up."""
    rules = ", rules: [{one_dim: true, adapt: false}]" if optim == "lars" else ""
    chosen = f"optim={{name: {optim}, lr: 0.01{rules}}}"
    two_ranks(run, tmp_path / "whole", chosen, *more)
    two_ranks(run, tmp_path / "shared", "run.shard=true", chosen, *more)
    assert checkpoint.newest(tmp_path / "shared").is_dir()
    assert difference(end(tmp_path / "whole"), end(tmp_path / "shared")) < tolerance


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_broken_step_of_a_sharded_run_is_left_out(two_ranks: Ranks, tmp_path: Path, optim: str):
    method = tmp_path / "sometimes.py"
    method.write_text(
        "from typing import final\n"
        "from sslcli import dist\n"
        "from sslcli.config.base import MethodConfig\n"
        "from sslcli.contracts import Method, StepResult\n"
        "class Config(MethodConfig):\n    name: str = 'sometimes'\n"
        "@final\nclass Sometimes(Method):\n"
        "    def forward(self, batch, at):\n"
        "        bad = float('nan') if at.step == 3 and dist.rank() == 1 else 1.0\n"
        "        return StepResult(self.backbone(batch.views[0]).square().mean() * bad)\n"
        "build = Sometimes\n"
    )
    chosen = (
        f"method={{name: {method}}}",
        f"optim={{name: {optim}, lr: 0.1}}",
        "run.on_nonfinite=skip",
        "schedule={name: constant}",
        "run.shard=true",
    )
    two_ranks(run, tmp_path / "four", *chosen)
    two_ranks(run, tmp_path / "three", *chosen, "run.steps=3")
    ours, theirs = (dict(tensors(end(tmp_path / name)["method"])) for name in ("four", "three"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_sharded_run_continues_to_the_bit(two_ranks: Ranks, tmp_path: Path):
    two_ranks(run, tmp_path / "straight", "run.shard=true")
    two_ranks(run, tmp_path / "again", "run.shard=true")
    checkpoint.remove(checkpoint.newest(tmp_path / "again"))
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "again")) == 2
    two_ranks(run, tmp_path / "again", "run.shard=true")
    assert difference(end(tmp_path / "straight"), end(tmp_path / "again")) == 0


def test_one_rank_continues_what_two_have_shared(two_ranks: Ranks, tmp_path: Path):
    two_ranks(run, tmp_path / "run", "run.shard=true")
    checkpoint.remove(checkpoint.newest(tmp_path / "run"))
    run(tmp_path / "run")
    assert end(tmp_path / "run")["progress"]["step"] == 4


def test_the_backbone_of_a_sharded_run_is_extracted(two_ranks: Ranks, tmp_path: Path):
    two_ranks(run, tmp_path / "run", "run.shard=true")
    done = weights.extract(tmp_path / "run")
    assert done.difference == 0
    assert weights.load(done.path).manifest.step == 4


def test_a_folder_with_a_missing_part_is_refused(two_ranks: Ranks, tmp_path: Path):
    two_ranks(run, tmp_path / "run", "run.shard=true")
    newest = checkpoint.newest(tmp_path / "run")
    next(newest.glob("*.safetensors")).unlink()
    with pytest.raises(WeightsError, match="checkpoint"):
        checkpoint.read(newest)
    found = checkpoint.newest_whole(tmp_path / "run")
    assert found is not None
    assert checkpoint.step_of(found[0]) == 2


def test_what_does_not_work_on_shares_is_refused(two_ranks: Ranks, tmp_path: Path):
    for message in two_ranks(refused, tmp_path / "run", "optim={name: lamb, lr: 0.01}"):
        assert "`run.shard`" in message
        assert "does not go with" in message
