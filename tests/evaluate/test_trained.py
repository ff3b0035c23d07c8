"""Evaluations that train: what they find, that they continue exactly, what they refuse."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import Listener
from PIL import Image

from sslcli import dist
from sslcli.config.load import load as load_preset
from sslcli.engine import checkpoint
from sslcli.errors import DataError, PresetError, SslError, StoppedOnRequest, UserError, WeightsError
from sslcli.evaluate import _trained
from sslcli.evaluate._job import Outcome, Protocol
from sslcli.evaluate._trained import evaluate
from sslcli.features.weights import load, save

SHORT = ("evaluator.epochs=2", "evaluator.batch_size=16")
ALL_OF_IT = (
    "evaluator.mix={}", "evaluator.smoothing=0.1", "evaluator.ema=0.5", "evaluator.clip=1.0",
    "evaluator.drop_last=true", "evaluator.crop.erase=0.5", "evaluator.crop.rand_augment=rand-m9-mstd0.5-inc1",
    "evaluator.crop.lighting=0.1", "evaluator.accumulate=2",
)  # fmt: skip


def protocol(name: str, *overrides: str, **sources: dict[str, Any]) -> Protocol:
    extra = {part: (source, f"--{part}") for part, source in sources.items()}
    changed = load_preset("eval", name, (*SHORT, *overrides), extra).preset
    return Protocol(name, load_preset("eval", name).preset, changed)


def judged(what: Path, *args: Any, seeds: int = 1, listener: Listener | None = None, **sources: Any) -> Outcome:
    outcome = evaluate(
        load(what), protocol(*args, **sources), seeds=seeds, passes=lambda title: None, watcher=listener or Listener()
    )
    assert outcome is not None
    return outcome


def newest(outcome: Outcome) -> dict[str, torch.Tensor]:
    state = checkpoint.read(checkpoint.newest(Path(outcome.report.details["training"]["folder"])))
    found: dict[str, torch.Tensor] = state["method"]
    return found


def pictures(folder: Path, classes: tuple[str, ...], each: int = 16, seed: int = 0) -> dict[str, Any]:
    """Images whose class is their brightness: even a network that has learned nothing tells them apart."""
    rng = np.random.default_rng(seed)
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 60, (32, 32, 3)) + 190 * place // max(1, len(classes) - 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return {"name": "folder", "path": str(folder)}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("linear-moco-v1", ("evaluator.optim.lr=0.1",)),
        ("linear-mae-v1", ("evaluator.optim.lr=10", "evaluator.optim.eta=0.1", "evaluator.schedule.warmup=null")),
        ("linear-multilayer-v1", ()),
        ("finetune-r50-v1", ("evaluator.optim.lr=1.0",)),
        ("semi-10pct-v1", ("evaluator.fraction=0.5",)),
    ],
)
def test_brightness_is_learned_by_every_kind(run: Path, tmp_path: Path, name: str, overrides: tuple[str, ...]):
    train = pictures(tmp_path / "train", ("dark", "light"))
    test = pictures(tmp_path / "test", ("dark", "light"), each=8, seed=1)
    listener = Listener()
    outcome = judged(run, name, "evaluator.epochs=6", "evaluator.batch_size=8", *overrides, train=train, test=test,
                     listener=listener)  # fmt: skip
    found = outcome.report
    assert found.protocol.startswith(f"{name}@settings-")
    assert "@data-" in found.protocol
    assert found.metrics[found.details["headline"]] > 80
    assert found.details["test"]["images"] == 16
    assert found.details["settings"]["epochs"] == 6
    assert found.details["training"]["steps"] == 6 * (2 if name.startswith("semi") else 4)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)
    assert any("normalisation" in line and "the weights' own" in line for line in listener.lines)
    folder = Path(found.details["training"]["folder"])
    assert folder.parent == run / "eval" / found.protocol
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_a_test_folder_without_a_class_still_means_the_same_classes(run: Path, tmp_path: Path):
    train = pictures(tmp_path / "train", ("dark", "light"))
    pictures(tmp_path / "both", ("dark", "light"), each=8, seed=1)
    (tmp_path / "test").mkdir()
    shutil.move(tmp_path / "both" / "light", tmp_path / "test" / "light")
    test = {"name": "folder", "path": str(tmp_path / "test"), "labels": True}
    words = ("evaluator.epochs=6", "evaluator.batch_size=8", "evaluator.optim.lr=0.1")
    assert judged(run, "linear-moco-v1", *words, train=train, test=test).report.metrics["top1"] > 80


def test_weights_of_another_tool_are_judged_on_named_images(run: Path, tmp_path: Path):
    train = pictures(tmp_path / "train", ("dark", "light"), each=8)
    test = pictures(tmp_path / "test", ("dark", "light"), each=4, seed=1)
    ours = load(run)
    theirs = replace(ours, manifest=ours.manifest.model_copy(update={"preset": None, "source": None}))
    words = protocol("linear-moco-v1", "evaluator.epochs=1", train=train, test=test)
    outcome = evaluate(theirs, words, passes=lambda title: None, watcher=Listener())
    assert outcome is not None
    assert "@data-" in outcome.report.protocol
    with pytest.raises(WeightsError, match="does not say which images") as caught:
        evaluate(theirs, protocol("linear-moco-v1"), passes=lambda title: None, watcher=Listener())
    assert "--data DIR" in str(caught.value.hint)


def test_the_protocol_as_it_stands_keeps_its_name(run: Path):
    frozen = load_preset("eval", "linear-swav-v1").preset
    assert Protocol("linear-swav-v1", frozen, frozen).label() == "linear-swav-v1"
    assert protocol("linear-swav-v1").label().startswith("linear-swav-v1@settings-")
    free = load_preset("eval", "linear-swav-v1", ("batch_size=8", "workers=0", "seed=3")).preset
    assert Protocol("linear-swav-v1", frozen, free).label() == "linear-swav-v1"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("linear-multilayer-v1", ()),
        ("finetune-r50-v1", ALL_OF_IT),
    ],
)
def test_a_stopped_evaluation_continues_to_the_bit(run: Path, name: str, overrides: tuple[str, ...]):
    straight = judged(run, name, *overrides)
    expected, found = newest(straight), straight.report.metrics
    shutil.rmtree(run / "eval")
    for stop_at in (3, 6):
        with pytest.raises(StoppedOnRequest, match=f"at step {stop_at}") as caught:
            judged(run, name, *overrides, listener=Listener(stop_at))
        assert "ssl resume" not in (caught.value.hint or "")
    listener = Listener()
    again = judged(run, name, *overrides, listener=listener)
    assert [note.step for note in listener.notes] == [7, 8]
    assert again.report.metrics == found
    state = newest(again)
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, state[key]) for key, value in expected.items())
    silent = Listener()
    assert judged(run, name, *overrides, listener=silent).report.metrics == found  # all is done: only the test is anew
    assert not silent.notes


def test_many_seeds_give_a_mean_and_a_deviation(run: Path):
    found = judged(run, "linear-moco-v1", "evaluator.optim.lr=0.1", seeds=2)
    each = found.report.details["by_seed"]
    values = [each[seed]["top1"] for seed in ("0", "1")]
    assert found.report.metrics["top1"] == pytest.approx(np.mean(values))
    assert found.columns["learned"].spread["top1"] == pytest.approx(np.std(values))
    alone = judged(run, "linear-moco-v1", "evaluator.optim.lr=0.1", "seed=1")
    assert alone.report.metrics == each["1"]


def on_a_rank(run: str, name: str) -> dict[str, float] | None:
    torch.manual_seed(dist.rank())
    outcome = evaluate(load(Path(run)), protocol(name), passes=lambda title: None)
    return None if outcome is None else outcome.report.metrics


@pytest.mark.dist
@pytest.mark.parametrize("name", ["linear-multilayer-v1", "semi-10pct-v1"])
def test_two_ranks_train_what_one_does(two_ranks: Any, tiny_run: Path, tmp_path: Path, name: str):
    for place in ("alone", "shared"):
        shutil.copytree(tiny_run, tmp_path / place, symlinks=True)
    alone = judged(tmp_path / "alone", name)
    main, other = two_ranks(on_a_rank, str(tmp_path / "shared"), name)
    assert other is None
    folder = next((tmp_path / "shared" / "eval").glob("*/*"))
    shared = checkpoint.read(checkpoint.newest(folder))["method"]
    for key, value in newest(alone).items():
        torch.testing.assert_close(shared[key], value, atol=2e-5, rtol=2e-4, msg=key)
    assert main == pytest.approx(alone.report.metrics, abs=7)  # of 16 images, one may lie on the border


def test_what_would_ruin_a_number_is_refused(run: Path, tmp_path: Path):
    images = pictures(tmp_path / "images", ("dark", "light"))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "images", copy)
    with pytest.raises(DataError, match="named for both training and test"):
        judged(run, "linear-moco-v1", train=images, test=images)
    with pytest.raises(DataError, match="hold the same images"):
        judged(run, "linear-moco-v1", train=images, test={"name": "folder", "path": str(copy)})
    more = pictures(tmp_path / "more", ("dark", "light", "red"), seed=1)
    with pytest.raises(DataError, match="class `red` of the test images is not among the 2 training classes"):
        judged(run, "linear-moco-v1", train=images, test=more)
    with pytest.raises(DataError, match="this protocol is for 205 classes, the training images have 3"):
        judged(run, "linear-multilayer-places205-v1", train=more, test=images)
    one = pictures(tmp_path / "one", ("dark",), seed=2) | {"labels": True}
    other = pictures(tmp_path / "other", ("dark",), seed=3) | {"labels": True}
    with pytest.raises(DataError, match="all of one class"):
        judged(run, "linear-moco-v1", train=one, test=other)
    arrays = tmp_path / "gap.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    np.savez(arrays, images=pixels, labels=np.arange(32) % 2 * 2, classes=np.array(["dark", "nobody", "light"]))
    with pytest.raises(
        DataError, match=r"1 of the 3 classes have no training image, first of them `nobody` \(number 1\)"
    ):
        judged(run, "linear-moco-v1", train={"name": "npz", "path": str(arrays)}, test=images)
    with pytest.raises(DataError, match=r"`evaluator\.batch_size` 128 is larger than the data set of 64") as caught:
        judged(run, "finetune-r50-v1", "evaluator.batch_size=128")
    assert "-o evaluator.batch_size=64" in (caught.value.hint or "")
    with pytest.raises(PresetError, match="needs a vision transformer"):
        judged(run, "finetune-mae-vitb-v1", "evaluator.drop_path=0", "evaluator.feature=mean")
    assert not (run / "reports").exists()


def test_other_settings_have_another_folder_and_other_images_too(run: Path, tmp_path: Path):
    first = judged(run, "linear-moco-v1")
    slower = judged(run, "linear-moco-v1", "evaluator.optim.lr=1")
    assert first.report.protocol != slower.report.protocol
    train = pictures(tmp_path / "train", ("dark", "light"))
    test = pictures(tmp_path / "test", ("dark", "light"), seed=1)
    others = judged(run, "linear-moco-v1", train=train, test=test)
    folders = {outcome.report.details["training"]["folder"] for outcome in (first, slower, others)}
    assert len(folders) == 3
    kept = Path(first.report.details["training"]["folder"])
    path = checkpoint.newest(kept)
    state = checkpoint.read(path)
    state["identity"]["weights"] = "others"
    checkpoint.write(path, {key: value for key, value in state.items() if key not in ("format", "version")})
    with pytest.raises(UserError, match=r"holds another evaluation; these differ:\n  weights: 'others'"):
        judged(run, "linear-moco-v1")


def test_a_frozen_network_that_moved_gives_no_number(run: Path, monkeypatch: pytest.MonkeyPatch):
    real = _trained.train

    def moved(*args: Any, **kwargs: Any) -> Any:
        trained = real(*args, **kwargs)
        trained.classifier.backbone.trunk.bn1.running_mean.add_(1)
        return trained

    monkeypatch.setattr(_trained, "train", moved)
    with pytest.raises(SslError, match="the frozen network has changed"):
        judged(run, "linear-moco-v1")


def test_another_normalisation_is_said_and_counts_as_other_settings(run: Path):
    listener = Listener()
    words = "view.normalize={mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}"
    outcome = judged(run, "linear-moco-v1", words, listener=listener)
    assert outcome.report.protocol != judged(run, "linear-moco-v1").report.protocol
    assert any("but the weights were trained with" in note for note in outcome.notes)
    assert any("not the weights' own" in line for line in listener.lines)
    assert outcome.report.details["view"]["normalize"]["mean"] == [0.5, 0.5, 0.5]


def test_weights_that_fit_in_part_are_judged_only_when_asked_and_say_so(run: Path, tmp_path: Path):
    weights = load(run)
    config = {**weights.manifest.backbone, "depth": 14}
    path = tmp_path / "away" / "part.safetensors"
    save(weights.backbone, weights.manifest.model_copy(update={"backbone": config}), path)
    with pytest.raises(SslError, match="does not fit its network"):
        judged(path, "linear-moco-v1")
    partial = load(path, allow_partial=True)
    outcome = evaluate(partial, protocol("linear-moco-v1"), passes=lambda title: None)
    assert outcome is not None
    assert any("are as initialised" in warning for warning in outcome.warnings)
    assert (tmp_path / "away" / "eval").is_dir()
