"""The evaluation job: which images, which name, what it refuses, what the report says."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from sslcli import __version__, dist
from sslcli.cli.evaluate import newest
from sslcli.config.choice import build, config_of, members
from sslcli.config.data import AnySource
from sslcli.config.load import load as load_preset
from sslcli.config.load import names
from sslcli.data import open_source
from sslcli.engine import checkpoint
from sslcli.engine.classifier import TrainedEvaluator
from sslcli.errors import DataError, UserError
from sslcli.evaluate._job import LEARNED, RAW, UNTRAINED, Outcome, Protocol, evaluate, evaluate_tables
from sslcli.features.compute import of_network
from sslcli.features.table import FeatureTable, TableEvaluator
from sslcli.features.weights import extract, load


def protocol(name: str = "knn-v1", *overrides: str, **sources: dict[str, Any]) -> Protocol:
    extra = {part: (source, f"--{part}") for part, source in sources.items()}
    return Protocol(name, load_preset("eval", name).preset, load_preset("eval", name, overrides, extra).preset)


def judged(what: Path, *args: Any, floors: bool = False, **sources: dict[str, Any]) -> Outcome:
    outcome = evaluate(load(what), protocol(*args, **sources), floors=floors, passes=lambda title: None)
    assert outcome is not None
    return outcome


def pictures(folder: Path, classes: tuple[str, ...], each: int = 3, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return {"name": "folder", "path": str(folder)}


def test_a_runs_own_images_are_found(tiny_run: Path):
    titles: list[str] = []

    def passes(title: str) -> None:
        titles.append(title)

    outcome = evaluate(load(tiny_run), protocol(), floors=True, passes=passes)
    assert outcome is not None
    assert outcome.report.protocol == "knn-v1"
    assert outcome.folder == tiny_run
    assert list(outcome.columns) == [LEARNED, UNTRAINED, RAW]
    assert titles[:2] == ["learned: training images", "learned: test images"]
    assert len(titles) == 6
    details = outcome.report.details
    assert (details["train"]["images"], details["test"]["images"]) == (64, 16)
    assert details["train"]["fingerprint"] == load(tiny_run).manifest.source.fingerprint
    assert details["test"]["source"]["split"] == "test"
    assert details["k_used"] == {"100": 64, "200": 64}
    assert details["weights"]["digest"] == load(tiny_run).digest
    assert details["versions"]["ssl"] == __version__
    assert details["floors"][RAW] == outcome.columns[RAW].metrics
    assert json.loads(json.dumps(asdict(outcome.report)))["metrics"] == outcome.report.metrics


def test_the_same_command_gives_the_same_report(tiny_run: Path):
    for name in ("knn-v1", "linear-cached-v1"):
        first, second = (judged(tiny_run, name).report for _ in range(2))
        assert first == second


def test_the_report_names_the_table_it_was_made_from(tiny_run: Path):
    report = judged(tiny_run).report
    weights = load(tiny_run)
    source = open_source(weights.preset().data.source)
    made = of_network(
        weights.backbone, source, weights.manifest.view, ("pooled",), what="weights", digest=weights.digest,
        batch_size=256, workers=0,
    )  # fmt: skip
    assert made is not None
    assert made.index.tolist() == list(range(64))
    assert report.details["train"]["table"] == made.digest()
    assert report.details["train"]["fingerprint"] == made.meta.source


def test_changed_settings_are_another_protocol(tiny_run: Path):
    report = judged(tiny_run, "knn-v1", "evaluator.k=[3]").report
    assert report.protocol.startswith("knn-v1@settings-")
    assert list(report.metrics) == ["top1_k3", "top5_k3"]
    same = judged(tiny_run, "knn-v1", "batch_size=7", "seed=4", "workers=0").report
    assert same.protocol == "knn-v1"
    assert same.details["protocol_hash"] == judged(tiny_run).report.details["protocol_hash"]


def test_reports_on_other_steps_and_images_get_names_of_their_own(tiny_run: Path, tmp_path: Path):
    first = checkpoint.all_in(tiny_run)[0]
    assert judged(first).report.protocol == "knn-v1@step_00000002"
    assert judged(checkpoint.newest(tiny_run)).report.protocol == "knn-v1"
    away = extract(tiny_run, tmp_path / "mine.safetensors").path
    outcome = judged(away)
    assert outcome.report.protocol == "knn-v1@mine"
    assert outcome.folder == tmp_path
    train = pictures(tmp_path / "a" / "train", ("cat", "dog"))
    test = pictures(tmp_path / "a" / "val", ("cat", "dog"), seed=1)
    assert judged(tiny_run, train=train, test=test).report.protocol.startswith("knn-v1@data-")


def test_the_other_split_of_a_folder_is_found(tiny_run: Path, tmp_path: Path):
    train = pictures(tmp_path / "train", ("cat", "dog"))
    pictures(tmp_path / "val", ("cat", "dog"), each=2, seed=1)
    details = judged(tiny_run, train=train).report.details
    assert details["test"]["source"]["path"] == str(tmp_path / "val")
    assert details["test"]["images"] == 4


def test_classes_are_matched_by_name(tiny_run: Path, tmp_path: Path):
    train = pictures(tmp_path / "train", ("ant", "bee", "cat"))
    test = pictures(tmp_path / "test", ("bee", "cat"), seed=0)  # bee here is pixel for pixel what ant is there
    for name in ("bee", "cat"):
        for i in range(3):
            (tmp_path / "test" / name / f"{i}.png").write_bytes((tmp_path / "train" / name / f"{i}.png").read_bytes())
    assert judged(tiny_run, "knn-v1", "evaluator.k=[1]", train=train, test=test).report.metrics["top1_k1"] == 100.0
    with pytest.raises(DataError, match="class `ant` of the test images is not among the 2"):
        judged(tiny_run, train=test, test=train)


def test_unreadable_images_are_left_out_of_both_sides(tiny_run: Path, tmp_path: Path):
    train = pictures(tmp_path / "train", ("cat", "dog"), each=4)
    pictures(tmp_path / "val", ("cat", "dog"), each=4, seed=1)
    for part in ("train", "val"):
        (tmp_path / part / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    details = judged(tiny_run, train=train).report.details
    assert (details["train"]["images"], details["train"]["skipped"], details["train_images"]) == (8, 1, 7)
    assert (details["test"]["images"], details["test"]["skipped"], details["test_images"]) == (8, 1, 7)


def test_missing_labels_are_refused_with_the_fix(tiny_run: Path, tmp_path: Path):
    flat = pictures(tmp_path / "flat", ("only",))
    other = pictures(tmp_path / "train", ("cat", "dog"))
    for sources in ({"train": flat, "test": other}, {"train": other, "test": flat}):
        with pytest.raises(DataError, match="flat` have no labels") as caught:
            judged(tiny_run, **sources)
        assert "one folder per class" in str(caught.value.hint)


def test_missing_test_images_are_refused_with_the_fix(tiny_run: Path, tmp_path: Path):
    train = pictures(tmp_path / "photos", ("cat", "dog"))
    with pytest.raises(DataError, match="which test images belong to") as caught:
        judged(tiny_run, train=train)
    assert "--test" in str(caught.value.hint)
    found = judged(tiny_run, "knn-v1", "evaluator.leave_one_out=true", train=train)
    assert found.report.details["k_used"] == {"10": 5, "20": 5, "100": 5, "200": 5}


def test_the_same_images_for_training_and_test_are_refused(tiny_run: Path, tmp_path: Path):
    train = pictures(tmp_path / "train", ("cat", "dog"))
    copy = pictures(tmp_path / "copy", ("cat", "dog"))
    other = pictures(tmp_path / "other", ("cat", "dog"), seed=1)
    judged(tiny_run, train=train, test=other)  # names and sizes of files are the same, images are not
    for test in (train, copy):
        with pytest.raises(DataError, match="memory, not understanding"):
            judged(tiny_run, train=train, test=test)


def test_losing_to_the_floors_is_said(tiny_run: Path, tmp_path: Path):
    """Pictures whose classes are plain colours: raw pixels know everything."""
    sources = {}
    for part, shift in (("train", 0), ("test", 5)):
        for number, name in enumerate(("dark", "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                grey = np.full((32, 32, 3), 40 + 120 * number + 4 * i + shift, dtype=np.uint8)
                Image.fromarray(grey).save(tmp_path / part / name / f"{i}.png")
        sources[part] = {"name": "folder", "path": str(tmp_path / part)}
    outcome = judged(tiny_run, "knn-v1", "evaluator.k=[1]", floors=True, **sources)
    assert outcome.columns[RAW].metrics["top1_k1"] == 100.0
    assert any("no better than raw pixels (100.0 %)" in warning for warning in outcome.warnings)
    assert list(outcome.warnings) == outcome.report.details["warnings"]


def stored(tiny_run: Path, split: str, taps: tuple[str, ...] = ("pooled",), tests: int = 16) -> FeatureTable:
    weights = load(tiny_run)
    count = 64 if split == "train" else tests
    config = weights.preset().data.source.model_copy(update={"split": split, "count": count})
    made = of_network(
        weights.backbone, open_source(config), weights.manifest.view, taps, what="weights",
        digest=weights.digest, batch_size=256, workers=0,
    )  # fmt: skip
    assert made is not None
    return made


def test_stored_features_give_the_same_number(tiny_run: Path):
    train, test = stored(tiny_run, "train"), stored(tiny_run, "test")
    found = evaluate_tables(load(tiny_run), protocol(), train, test).report
    direct = judged(tiny_run).report
    assert found.metrics == direct.metrics
    assert found.protocol == direct.protocol
    for part in ("train", "test"):
        assert found.details[part]["table"] == direct.details[part]["table"]


def test_stored_features_of_other_weights_or_one_split_are_refused(tiny_run: Path):
    train, test = stored(tiny_run, "train"), stored(tiny_run, "test")
    with pytest.raises(DataError, match="not those of"):
        evaluate_tables(load(checkpoint.all_in(tiny_run)[0]), protocol(), train, test)
    with pytest.raises(DataError, match="same images"):
        evaluate_tables(load(tiny_run), protocol(), train, train)


def judged_on_a_rank(run: str) -> dict[str, float] | None:
    torch.manual_seed(dist.rank())
    outcome = evaluate(load(Path(run)), protocol("knn-v1", "batch_size=16"), floors=True, passes=lambda title: None)
    return None if outcome is None else {name: s.metrics["top1_k20"] for name, s in outcome.columns.items()}


@pytest.mark.dist
def test_two_ranks_find_what_one_does(two_ranks: Any, tiny_run: Path):
    alone = judged(tiny_run, "knn-v1", "batch_size=16", floors=True)
    main, other = two_ranks(judged_on_a_rank, str(tiny_run))
    assert main == {name: scores.metrics["top1_k20"] for name, scores in alone.columns.items()}
    assert other is None


@pytest.mark.parametrize("name", members("sslcli.evaluate"))
def test_every_evaluator_keeps_the_contract(name: str, tiny_run: Path):
    small = {"svm_lowshot": {"k": (1, 2), "samplings": 2}}  # 64 images are all there is
    cfg = config_of("sslcli.evaluate", name)(**small.get(name, {}))
    judge = build("sslcli.evaluate", cfg)(cfg)
    assert cfg.name == name
    if isinstance(judge, TrainedEvaluator):  # what these find is for `test_trained.py`
        assert judge.reads(load(tiny_run).backbone)
        assert any(protocol.startswith(f"{name}-") for protocol in names("eval"))
        return
    assert isinstance(judge, TableEvaluator)
    tables = (stored(tiny_run, split, judge.taps, tests=64) for split in ("train", "test"))
    found = judge.score(*tables, 0)
    assert judge.headline in found.metrics
    assert all(0 <= value <= 100 for value in found.metrics.values())
    assert json.loads(json.dumps(found.details)) == found.details
    assert newest(name) in names("eval")


def test_shipped_protocols_say_everything_they_fix():
    for name in names("eval"):
        loaded = load_preset("eval", name)
        assert loaded.preset.about.title
        assert loaded.preset.about.follows
        assert set(loaded.data["evaluator"]) == set(loaded.resolved["evaluator"])


def test_many_seeds_are_a_mean_with_its_spread(tiny_run: Path):
    alone = [judged(tiny_run, "linear-cached-v1", f"seed={seed}").report for seed in (2, 3)]
    frozen = protocol("linear-cached-v1", "seed=2")
    found = evaluate(load(tiny_run), frozen, floors=False, passes=lambda title: None, seeds=2)
    assert found is not None
    values = [report.metrics["top1"] for report in alone]
    assert found.report.metrics["top1"] == pytest.approx(np.mean(values))
    assert found.report.details["spread"]["top1"] == pytest.approx(np.std(values))
    assert found.report.details["by_seed"]["3"] == alone[1].metrics
    assert found.report.details["seeds"] == 2
    assert found.report.protocol == "linear-cached-v1"
    with pytest.raises(UserError, match="draws nothing"):
        evaluate(load(tiny_run), protocol(), floors=False, passes=lambda title: None, seeds=2)


def test_another_normalisation_is_used_and_said(tiny_run: Path):
    assert not any("normalised" in note for note in judged(tiny_run).notes)
    found = judged(tiny_run, "knn-v1", "view.normalize={mean: [0, 0, 0], std: [1, 1, 1]}")
    assert found.report.protocol.startswith("knn-v1@settings-")
    assert found.report.details["view"]["normalize"]["mean"] == [0, 0, 0]
    assert found.report.details["view"]["size"] == load(tiny_run).manifest.view.size
    assert any("but the weights were trained with" in note for note in found.notes)


def test_features_that_are_no_numbers_are_refused(tiny_run: Path):
    train, test = stored(tiny_run, "train"), stored(tiny_run, "test")
    train.features["pooled"][5, 3] = np.nan
    with pytest.raises(DataError, match="features `pooled` of the training images are not finite, first of image 5"):
        evaluate_tables(load(tiny_run), protocol(), train, test)


def test_labels_that_count_no_class_are_refused(tiny_run: Path):
    train, test = stored(tiny_run, "train"), stored(tiny_run, "test")
    assert train.labels is not None
    train.labels[0] = 10
    with pytest.raises(DataError, match="labels go from 0 to 10, but there are 10 classes"):
        evaluate_tables(load(tiny_run), protocol(), train, test)


def test_images_with_several_classes_go_through_the_table_and_the_command(tiny_run: Path, tmp_path: Path):
    root = tmp_path / "VOC2007"
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    rng = np.random.default_rng(0)
    for split, first in (("trainval", 0), ("test", 50)):
        shown = rng.random((20, 2)) < 0.5
        for i, (red, _) in enumerate(shown):
            colour = (200 if red else 20, 60, 60)
            Image.new("RGB", (40, 30), colour).save(root / "JPEGImages" / f"{first + i:06d}.jpg")
        for c, name in enumerate(("red", "other")):
            lines = [f"{first + i:06d} {1 if there else -1}\n" for i, there in enumerate(shown[:, c])]
            (root / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("".join(lines))
    source = {"name": "voc", "path": str(root)}
    settings = ("evaluator.costs=[1]", "view.squeeze=[32, 24]", "view.resize=32")
    report = judged(tiny_run, "svm-voc07-short-v1", *settings, train=source).report
    assert report.details["by_tap"]["pooled"]["ap"]["red"] == pytest.approx(100)
    assert report.details["view"]["squeeze"] == [32, 24]
    assert (report.details["train"]["images"], report.details["test"]["images"]) == (20, 20)
    made = stored(tiny_run, "train")
    voc = open_source(TypeAdapter(AnySource).validate_python(source))
    weights = load(tiny_run)
    table = of_network(
        weights.backbone, voc, weights.manifest.view, ("pooled",), what="weights", digest=weights.digest,
        batch_size=8, workers=0,
    )  # fmt: skip
    assert table is not None
    table.save(tmp_path / "t.npz")
    again = FeatureTable.load(tmp_path / "t.npz")
    assert again.digest() == table.digest() != made.digest()
    assert again.known_targets().tolist() == voc.targets.tolist()
    with pytest.raises(DataError, match="several classes each") as caught:
        judged(tiny_run, train=source)
    assert "ssl eval svm" in str(caught.value.hint)


def test_a_gallery_and_queries_come_from_one_list(tiny_run: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    lines = ["path,id,camera,part"]
    for person in ("ann", "bob", "cat"):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        for camera, part in (("1", "query"), ("1", "gallery"), ("2", "gallery")):
            name = f"{person}{camera}{part}.png"
            Image.fromarray(np.clip(pixels + rng.integers(0, 9, pixels.shape), 0, 255).astype(np.uint8)).save(
                tmp_path / name
            )
            lines.append(f"{name},{person},{camera},{part}")
    Image.fromarray(pixels // 2).save(tmp_path / "none.png")
    lines += ["none.png,zoe,1,query", "none.png,nobody,3,gallery"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    gallery = {"name": "list", "path": str(tmp_path / "list.csv"), "part": "gallery"}
    report = judged(tiny_run, "retrieval-v1", train=gallery).report
    assert report.metrics["rank1"] == 100
    assert report.details["queries_without_answer"] == 1
    assert report.details["cameras"] is True
    assert (report.details["gallery_images"], report.details["queries"]) == (7, 4)
