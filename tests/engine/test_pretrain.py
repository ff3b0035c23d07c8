"""The pretraining job in this process: what it writes, how it resumes, what it refuses."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import Listener
from PIL import Image

from sslcli.config.load import load
from sslcli.config.presets import PretrainPreset
from sslcli.engine import checkpoint
from sslcli.engine.plan import dry_run
from sslcli.engine.pretrain import pretrain
from sslcli.errors import DataError, DivergedError, StoppedOnRequest, UserError

TINY = (
    "data.source.count=80",
    "data.batch_size=16",
    "run.epochs=2",
    "run.log_every=1",
    "run.views=fast",
    "run.tensorboard=false",
    "backbone.width=8",
)


def tiny(*overrides: str) -> PretrainPreset:
    return load("pretrain", "demo-digits", (*TINY, *overrides), {}).preset


def final_state(folder: Path) -> checkpoint.State:
    return checkpoint.read(checkpoint.newest(folder))


def leaves(value: object, name: str = "") -> Iterable[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            yield from leaves(item, f"{name}.{key}")
    else:
        yield name, value


def assert_equal(a: checkpoint.State, b: checkpoint.State) -> None:
    ours, theirs = dict(leaves(a)), dict(leaves(b))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_a_run_leaves_everything_in_its_folder(tmp_path: Path):
    folder, listener = tmp_path / "run", Listener()
    outcome = pretrain(tiny("run.tensorboard=true"), folder, watcher=listener)
    assert outcome.at.done
    assert outcome.fresh
    names = {path.name for path in folder.iterdir()}
    assert names >= {"preset.yaml", "command.txt", "env.json", "log.txt", "metrics.jsonl", "tensorboard", "views.png"}
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["total"]) == ("finished", 10, 10)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert np.isfinite([row["loss"] for row in rows]).all()
    assert {"lr", "grad_norm", "images_per_second", "data_wait", "memory_gb", "top1"} <= rows[0].keys()
    assert [checkpoint.step_of(path) for path in checkpoint.all_in(folder)] == [5, 10]
    assert any((folder / "tensorboard").iterdir())
    with Image.open(folder / "views.png") as picture:
        assert picture.size[0] > 64
    again = load("pretrain", str(folder / "preset.yaml"), (), {}).preset
    assert again.run.precision == "fp32"
    assert again.data.workers == 0


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim={name: sgd, lr: 0.1}", "run.accumulate=2"),
        ("optim={name: lars, lr: 0.5, rules: [{one_dim: true, adapt: false}]}", "schedule.warmup={epochs: 1}"),
        ("method={name: moco, queue: 64}", "run.batch_norm=4"),
        ("run.views=reference",),
    ],
    ids=["adamw", "sgd-accumulate", "lars-warmup", "moco-split-bn", "reference"],
)
def test_a_stopped_run_continues_to_the_bit(tmp_path: Path, overrides: tuple[str, ...]):
    preset = tiny(*overrides)
    pretrain(preset, tmp_path / "straight")
    for stop_at in (3, 7):  # both in the middle of an epoch
        with pytest.raises(StoppedOnRequest, match=f"at step {stop_at}"):
            pretrain(preset, tmp_path / "stopped", watcher=Listener(stop_at))
        assert json.loads((tmp_path / "stopped" / "status.json").read_text())["state"] == "stopped"
    listener = Listener()
    pretrain(preset, tmp_path / "stopped", watcher=listener)
    assert [note.step for note in listener.notes] == [8, 9, 10]
    assert_equal(final_state(tmp_path / "straight"), final_state(tmp_path / "stopped"))
    rows = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))


def test_the_seed_decides_everything(tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain(tiny(f"seed={seed}", "run.epochs=null", "run.steps=2"), tmp_path / name)
    a, b, c = (final_state(tmp_path / name)["method"] for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_a_finished_run_is_left_alone(tmp_path: Path):
    pretrain(tiny(), tmp_path)
    before = checkpoint.newest(tmp_path).stat().st_mtime_ns
    assert not pretrain(tiny(), tmp_path).fresh
    assert checkpoint.newest(tmp_path).stat().st_mtime_ns == before


def test_another_preset_or_other_images_are_refused(tmp_path: Path):
    pretrain(tiny("run.epochs=1"), tmp_path)
    with pytest.raises(UserError, match="another preset") as caught:
        pretrain(tiny("run.epochs=1", "optim.lr=0.5", "method.temperature=0.3"), tmp_path)
    assert "optim.lr: 0.002 -> 0.5" in caught.value.message
    assert "method.temperature: 0.2 -> 0.3" in caught.value.message
    assert "--out" in (caught.value.hint or "")
    with pytest.raises(UserError, match="other images"):
        pretrain(tiny("run.epochs=1", "data.source.seed=5"), tmp_path)
    pretrain(tiny("run.epochs=1", "run.log_every=3", "run.checkpoints.keep.last=1"), tmp_path)  # free to change


def test_a_key_that_is_younger_than_the_checkpoint_stands_at_its_default(tmp_path: Path):
    with pytest.raises(StoppedOnRequest):
        pretrain(tiny(), tmp_path, watcher=Listener(7))
    path = checkpoint.newest(tmp_path)
    state = checkpoint.read(path)
    del state["preset"]["run"]["deterministic"]
    checkpoint.write(path, {key: value for key, value in state.items() if key not in ("format", "version")})
    assert pretrain(tiny(), tmp_path).at.done
    with pytest.raises(UserError, match=r"run\.deterministic: False -> True"):
        pretrain(tiny("run.deterministic=true"), tmp_path)


def test_never_refuses_a_folder_in_use(tmp_path: Path):
    pretrain(tiny("run.epochs=1"), tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(tiny("run.epochs=1"), tmp_path, resume="never")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path):
    with pytest.raises(StoppedOnRequest):
        pretrain(tiny(), tmp_path, watcher=Listener(7))
    broken = checkpoint.newest(tmp_path)
    broken.write_bytes(broken.read_bytes()[:1000])
    listener = Listener()
    pretrain(tiny(), tmp_path, watcher=listener)
    assert any(str(broken) in line for line in listener.lines)
    assert listener.notes[0].step == 6


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(tmp_path: Path):
    preset = tiny("optim={name: sgd, lr: 1e30}", "run.checkpoints.every_steps=1")
    with pytest.raises(DivergedError, match="not finite at step"):
        pretrain(preset, tmp_path)
    for path in checkpoint.all_in(tmp_path):
        assert checkpoint.step_of(path) < 10
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_a_step_with_a_broken_gradient_can_be_left_out(tmp_path: Path):
    method = tmp_path / "sometimes.py"
    method.write_text(
        "from typing import Literal, final\n"
        "from sslcli.config.base import MethodConfig\n"
        "from sslcli.contracts import Method, StepResult\n"
        "class Config(MethodConfig):\n    name: str = 'sometimes'\n"
        "@final\nclass Sometimes(Method):\n"
        "    def forward(self, batch, at):\n"
        "        bad = float('nan') if at.step in (2, 3) else 1.0\n"
        "        return StepResult(self.backbone(batch.views[0]).square().mean() * bad)\n"
        "build = Sometimes\n"
    )
    chosen = f"method={{name: {method}}}"
    with pytest.raises(DivergedError, match="at step 3"):
        pretrain(tiny(chosen), tmp_path / "stop")
    listener = Listener()
    pretrain(tiny(chosen, "run.on_nonfinite=skip"), tmp_path / "skip", watcher=listener)
    assert [note.step for note in listener.notes if "left_out" in note.scalars] == [3, 4]
    assert all(torch.isfinite(p).all() for p in final_state(tmp_path / "skip")["method"].values())
    with pytest.raises(DivergedError, match="at step 4"):
        pretrain(tiny(chosen, "run.on_nonfinite=skip", "run.skip_limit=1"), tmp_path / "limit")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(tmp_path: Path, precision: str):
    listener = Listener()
    pretrain(tiny(f"run.precision={precision}", "run.epochs=1", "run.clip=1.0"), tmp_path, watcher=listener)
    assert np.isfinite([note.loss for note in listener.notes]).all()


def test_unreadable_images_are_skipped_and_named(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(images / f"{number:02d}.png")
    (images / "07.png").write_bytes((images / "08.png").read_bytes()[:200])
    listener = Listener()
    source = f"data.source={{name: folder, path: {images}}}"
    preset = load("pretrain", "demo-digits", (source, "data.batch_size=10", *TINY[2:], "data.workers=2"), {}).preset
    pretrain(preset, tmp_path / "run", watcher=listener)
    skipped = (tmp_path / "run" / "skipped.txt").read_text()
    assert skipped.startswith("07.png\t")
    assert len(skipped.splitlines()) == 1
    assert any("1 unreadable" in line for line in listener.lines)


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="larger than the data set of 80") as caught:
        pretrain(tiny("data.batch_size=81"), tmp_path)
    assert "data.batch_size=80" in (caught.value.hint or "")


def test_a_dry_run_takes_real_steps_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rows = dict(dry_run(tiny()))
    assert {"parameters", "memory", "speed", "time", "disk", "learning rate", "loss"} <= rows.keys()
    assert len(rows["loss"].split()) == 2
    assert list(tmp_path.iterdir()) == []
