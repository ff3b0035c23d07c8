"""Looking at the features of a run in progress: nothing is disturbed, and what breaks is seen."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sslcli import dist
from sslcli.config.load import load
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Progress
from sslcli.data import open_source
from sslcli.engine import checkpoint
from sslcli.engine.build import facts_of, images_per_rank, method_of, training_of
from sslcli.engine.monitor import Monitor, undisturbed, voters
from sslcli.engine.pretrain import pretrain
from sslcli.engine.record import Record, Silent
from sslcli.errors import CollapsedError
from sslcli.views import build

SMALL = (
    "data.source.count=160",
    "data.batch_size=32",
    "run.epochs=2",
    "run.log_every=1",
    "run.views=fast",
    "run.tensorboard=false",
    "run.precision=fp32",
    "backbone.width=8",
    "run.monitor={every_epochs: 0.4, images: 64}",
)

DRAWING = """
from typing import Literal
import torch
from sslcli.config.base import BackboneConfig
from sslcli.contracts import Backbone

class Config(BackboneConfig):
    name: str = "drawing"

class Drawing(Backbone):
    def __init__(self, cfg):
        super().__init__()
        self.trunk = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.5)
        )
        self.trunk[1].eval()  # a frozen layer
        self.dim = 8
    def maps(self, images):
        return self.trunk(images) + CONSTANT * torch.rand((), device=images.device)
    def forward(self, images):
        return self.maps(images).mean((2, 3))
    def taps(self, images, names):
        return {"pooled": self(images)}
    def tap_names(self):
        return ("pooled",)

build = Drawing
"""

CONSTANT = """
import torch
from sslcli.config.base import BackboneConfig
from sslcli.contracts import Backbone

class Config(BackboneConfig):
    name: str = "constant"

class Constant(Backbone):
    def __init__(self, cfg):
        super().__init__()
        self.trunk = torch.nn.Linear(1, 16)
        self.dim = 16
    def maps(self, images):
        return self(images)[:, :, None, None]
    def forward(self, images):
        return self.trunk(torch.ones(len(images), 1, device=images.device))
    def taps(self, images, names):
        return {"pooled": self(images)}
    def tap_names(self):
        return ("pooled",)

build = Constant
"""

NO_PREDICTOR = """
from torch.nn import functional as F
from sslcli.config.base import MethodConfig
from sslcli.contracts import Method, StepResult
from sslcli.nn.heads import mlp
from sslcli.nn.spread import spread

class Config(MethodConfig):
    name: str = "no_predictor"

class NoPredictor(Method):
    def __init__(self, cfg, backbone, facts):
        super().__init__(cfg, backbone, facts)
        self.projector = mlp([backbone.dim, 128, 64], norm=True)
    def forward(self, batch, at):
        z1, z2 = (self.projector(self.backbone(view)) for view in batch.views)
        return StepResult(2 - 2 * F.cosine_similarity(z1, z2).mean(), {"spread": spread(z1)})

build = NoPredictor
"""


def small(*overrides: str) -> PretrainPreset:
    return load("pretrain", "demo-digits", (*SMALL, *overrides), {}).preset


def looks(folder: Path) -> list[dict[str, Any]]:
    path = folder / "health.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def words(folder: Path) -> list[str]:
    return [row["health"] for row in looks(folder)]


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def monitor_of(preset: PretrainPreset, folder: Path) -> tuple[Monitor, nn.Module]:
    source = open_source(preset.data.source)
    method = method_of(preset, facts_of(preset, images=len(source), steps_per_epoch=5))
    training_of(method, preset)
    folder.mkdir(exist_ok=True)
    record = Record(folder, preset.data.batch_size, Silent(), tensorboard=False)
    made = Monitor(
        method, source, preset, images_at_once=images_per_rank(preset), steps_per_epoch=5, record=record
    )  # fmt: skip
    return made, method


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method={name: moco, queue: 64}", "run.batch_norm=4"),
        ("method={name: byol, hidden: 32, dim: 16}", "run.accumulate=2"),
        ("run.views=reference", "run.monitor.knn=false"),
    ],
    ids=["simclr", "moco-split-bn", "byol", "reference"],
)
def test_a_run_ends_the_same_to_the_bit_whether_looked_at_or_not(tmp_path: Path, overrides: Sequence[str]):
    states, losses = [], []
    for name, more in (("seen", ()), ("unseen", ("run.monitor=null",))):
        pretrain(small(*overrides, *more), tmp_path / name)
        states.append(checkpoint.read(checkpoint.newest(tmp_path / name)))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([(row["step"], row["loss"], row["grad_norm"]) for row in rows])
    assert [row["step"] for row in looks(tmp_path / "seen")] == [2, 4, 6, 8, 10]
    assert looks(tmp_path / "unseen") == []
    assert losses[0] == losses[1]
    seen, unseen = (state["method"] for state in states)
    assert seen.keys() == unseen.keys()
    assert all(torch.equal(seen[name], unseen[name]) for name in seen)
    for slot, other in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(torch.as_tensor(slot[key]), torch.as_tensor(other[key])) for key in slot)


def test_a_network_that_draws_is_not_disturbed_either(tmp_path: Path):
    backbone = written(tmp_path, "drawing", DRAWING.replace("CONSTANT", "0.1"))
    preset = small(f"backbone={{name: {backbone}}}")
    monitor, method = monitor_of(preset, tmp_path / "run")
    method.train()
    method.backbone.trunk[1].eval()
    modes = [module.training for module in method.modules()]
    before = {name: value.clone() for name, value in method.state_dict().items()}
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    monitor.look(Progress(2, 10, 5, 0), {})
    assert torch.equal(torch.rand(3), wanted)
    assert [module.training for module in method.modules()] == modes
    assert not all(modes)
    after = method.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_everything_is_put_back_after_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(KeyError), undisturbed(net):  # type: ignore[arg-type]
        raise KeyError
    assert all(module.training for module in net.modules())
    assert torch.is_grad_enabled()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_immature_running_statistics_do_not_count(tmp_path: Path):
    """The first step of a run: evaluation mode would scale by running variances that are still near 1."""
    monitor, method = monitor_of(small(), tmp_path / "run")
    monitor.look(Progress(2, 10, 5, 0), {})
    for name, buffer in method.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1e4)
    monitor.look(Progress(4, 10, 5, 0), {})
    first, second = looks(tmp_path / "run")
    assert second["spread"] == first["spread"] > 0.3


def test_a_healthy_run_is_called_healthy(tmp_path: Path):
    pretrain(small(), tmp_path / "run")
    assert words(tmp_path / "run") == ["healthy"] * 5
    row = looks(tmp_path / "run")[-1]
    wanted = {"step", "epoch", "rankme", "rank_share", "spread", "alignment", "uniformity", "view_ratio", "knn", "time"}
    assert wanted <= row.keys()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["health"], status["knn"]) == ("healthy", row["knn"])


@pytest.mark.parametrize(
    ("name", "overrides", "word", "advice"),
    [
        ("huge-lr-lars", ("optim={name: lars, lr: 100}",), "collapsed", "optim.lr"),
        ("huge-lr-sgd", ("optim={name: sgd, lr: 100}",), "warning", "few of their dimensions"),
        ("constant", ("backbone={name: FILES/constant.py}",), "collapsed", "same features"),
        ("no-predictor", ("method={name: FILES/no_predictor.py}", "run.epochs=8"), "collapsed", "stop-gradient"),
    ],
)
def test_broken_runs_are_caught(tmp_path: Path, name: str, overrides: Sequence[str], word: str, advice: str):
    written(tmp_path, "constant", CONSTANT)
    written(tmp_path, "no_predictor", NO_PREDICTOR)
    pretrain(small(*(text.replace("FILES", str(tmp_path)) for text in overrides)), tmp_path / name)
    row = looks(tmp_path / name)[-1]
    assert row["health"] == word
    assert advice in row["advice"]
    log = (tmp_path / name / "log.txt").read_text()
    assert f": {word}: {row['advice']}" in log


def test_the_backbone_alone_would_not_have_told(tmp_path: Path):
    """Batch norm keeps the features apart while the projections fall into one point."""
    method = written(tmp_path, "no_predictor", NO_PREDICTOR)
    pretrain(small(f"method={{name: {method}}}", "run.epochs=8"), tmp_path / "run")
    row = looks(tmp_path / "run")[-1]
    assert row["method_spread"] < 0.1
    assert row["spread"] > 0.4


def test_a_collapsed_run_stops_if_wanted_and_keeps_an_earlier_checkpoint(tmp_path: Path):
    method, folder = written(tmp_path, "no_predictor", NO_PREDICTOR), tmp_path / "run"
    settings = (f"method={{name: {method}}}", "run.epochs=20", "run.checkpoints.every_steps=2")
    with pytest.raises(CollapsedError, match="seen at steps") as caught:
        pretrain(small(*settings, "run.on_collapse=stop"), folder)
    *_, before, last, now = looks(folder)
    assert (before["health"], last["health"], now["health"]) == ("warning", "collapsed", "collapsed")
    assert f"at steps {last['step']} and {now['step']}; they were not at step {before['step']}" in caught.value.message
    assert caught.value.hint == now["advice"]
    assert caught.value.exit_code == 1
    steps = [checkpoint.step_of(path) for path in checkpoint.all_in(folder)]
    assert before["step"] in steps
    assert max(steps) < now["step"]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", now["step"])


def test_looks_at_steps_that_are_taken_again_are_forgotten(tmp_path: Path):
    class StopAt:
        def say(self, text: str) -> None: ...
        def progress(self, note: Any, at: Progress, eta: float) -> None:
            if at.step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(small("run.checkpoints.every_steps=3"), tmp_path, watcher=StopAt())
    assert [row["step"] for row in looks(tmp_path)] == [2, 4]
    pretrain(small("run.checkpoints.every_steps=3", "run.monitor.images=48"), tmp_path)
    assert [row["step"] for row in looks(tmp_path)] == [2, 4, 6, 8, 10]


def test_no_look_where_none_is_wanted(tmp_path: Path):
    pretrain(small("run.monitor.every_epochs=null", "run.epochs=1"), tmp_path / "run")
    assert looks(tmp_path / "run") == []


def test_images_without_labels_or_that_cannot_be_read(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(images / f"{number:02d}.png")
    (images / "07.png").write_bytes((images / "08.png").read_bytes()[:200])
    preset = small(f"data.source={{name: folder, path: {images}}}", "data.batch_size=12")
    monitor, _ = monitor_of(preset, tmp_path / "run")
    monitor.look(Progress(2, 10, 5, 0), {})
    (row,) = looks(tmp_path / "run")
    assert "knn" not in row
    assert row["rankme"] > 1
    assert len(monitor._sample.plain) == 23


def test_two_views_are_drawn_as_among_all():
    views = load("pretrain", "dino-vits16-100e", (), {}).preset.views
    image = np.random.default_rng(0).integers(0, 255, (300, 260, 3), dtype=np.uint8)
    wanted = build(views, seed=3).crop(image, 5, 0)
    found = build(views.pair(), seed=3).crop(image, 5, 0)
    assert len(wanted) > len(found) == 2
    assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=False))


def test_few_classes_vote_where_there_are_many():
    order = np.random.default_rng(0).permutation(20_000)
    labels = np.arange(20_000) % 500
    chosen = voters(order, labels, 200)
    assert len(chosen) == len(set(chosen.tolist())) == 200
    assert len(np.unique(labels[chosen])) == 10
    assert voters(order, labels % 7, 200).tolist() == order[:200].tolist()


def test_another_seed_looks_at_other_images(tmp_path: Path):
    chosen = [set(monitor_of(small(f"seed={seed}"), tmp_path / "run")[0]._sample.index.tolist()) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def look_on_ranks(folder: Path, overrides: Sequence[str]) -> tuple[list[str], int]:
    """On every rank: the names of the files it wrote, and the step at which it stopped, if it did."""
    mine = folder / f"rank{dist.rank()}"
    monitor, method = monitor_of(small("run.on_collapse=stop", *overrides), mine)
    method.train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    spread = torch.tensor(0.05 if dist.is_main() else 0.9)  # what the main rank sees counts
    stopped = 0
    for step in (2, 4):
        try:
            monitor.look(Progress(step, 10, 5, 0), {"spread": spread})
        except CollapsedError:
            stopped = step
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    return sorted(path.name for path in mine.iterdir()), stopped


@pytest.mark.dist
@pytest.mark.parametrize(
    "overrides", [(), ("run.batch_norm=4",), ("run.batch_norm=32",)], ids=["global", "split", "pooled"]
)
def test_ranks_agree_and_the_main_one_writes(two_ranks: Any, tmp_path: Path, overrides: Sequence[str]):
    (files, stopped), (others, also) = two_ranks(look_on_ranks, tmp_path, overrides)
    assert stopped == also == 4
    assert {"health.jsonl", "status.json", "log.txt"} <= set(files)
    assert others == []


def test_a_compiled_network_is_looked_at_without_compiling_it_again(tmp_path: Path):
    """Compiling what a look needs would take minutes on a large network."""
    from torch._dynamo.utils import counters

    monitor, _ = monitor_of(small("run.compile=true"), tmp_path / "run")
    counters.clear()
    monitor.look(Progress(2, 10, 5, 0), {})
    assert counters["stats"].get("unique_graphs", 0) == 0
    assert words(tmp_path / "run") == ["healthy"]
