"""What is handed on: a name with its digest, a description, a card; refused what nobody should get."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from parts import ran

from sslcli import publish
from sslcli.config.load import load as load_preset
from sslcli.engine import checkpoint
from sslcli.engine.build import facts_of, method_of
from sslcli.errors import SslError, UserError, WeightsError
from sslcli.features.weights import begin_with, load


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_name_holds_the_digest_and_the_file_the_weights(run: Path):
    done = ran("publish", run, "--out", "out", "--name", "tiny-r10", "--licence", "Apache-2.0")
    weights, description, card = (Path(line) for line in done.stdout.split())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert weights.name == f"tiny-r10-{digest[:8]}.safetensors"
    assert {path.name for path in Path("out").iterdir()} == {weights.name, description.name, card.name}
    told = publish.Published.model_validate_json(description.read_bytes())
    assert (told.file, told.sha256, told.size) == (weights.name, digest, weights.stat().st_size)
    assert (told.licence, told.finished) == ("Apache-2.0", True)
    assert load(weights).digest == load(run).digest == told.manifest.digest
    text = card.read_text()
    front = front_matter(text)
    assert front["license"] == "apache-2.0"
    assert {"simclr", "resnet", "self-supervised-learning"} <= set(front["tags"])
    assert "model-index" not in front
    assert f'backbone = load("{weights.name}").backbone' in text
    assert told.manifest.source.fingerprint in text
    assert "no evaluation goes with it" in done.stderr


def test_reports_go_along_and_are_repeated(run: Path):
    ran("eval", "knn", run)
    report = json.loads((run / "reports" / "knn-v1.json").read_text())
    done = json.loads(ran("publish", run, "--out", "out", "--verify", "knn-v1", "--json").stdout)
    assert done["verified"] <= publish.CLOSE
    (result,) = done["description"]["results"]
    assert result["metrics"] == report["metrics"]
    assert "command" not in result["details"]
    text = Path(done["card"]).read_text()
    (entry,) = front_matter(text)["model-index"][0]["results"]
    assert {metric["value"] for metric in entry["metrics"]} == {round(v, 4) for v in report["metrics"].values()}
    for metric, value in report["metrics"].items():
        assert f"| knn-v1 | {metric} | {value:.2f} % |" in text


def test_an_evaluation_that_trains_is_not_repeated_and_nothing_is_written(run: Path):
    words = ("-o", "evaluator.epochs=1", "-o", "evaluator.batch_size=32")
    ran("eval", "linear", run, "--preset", "linear-moco-v1", *words)
    (report,) = (run / "reports").glob("linear-moco-v1*.json")
    with pytest.raises(UserError, match="trains a classifier") as caught:
        ran("publish", run, "--out", "out", "--verify", report.stem)
    assert "--verify knn-v1" in str(caught.value.hint)
    assert not Path("out").exists()


def test_reports_on_other_weights_stay_behind(run: Path):
    ran("eval", "knn", run)
    older = checkpoint.all_in(run)[0]
    done = ran("publish", older, "--out", "out", "--allow-unfinished")
    assert "left out, being of other weights: knn-v1" in done.stderr
    assert "The run was not at its end." in Path(done.stdout.split()[-1]).read_text()
    with pytest.raises(UserError, match="is of other weights"):
        ran("publish", older, "--out", "out", "--verify", "knn-v1", "--allow-unfinished")
    with pytest.raises(UserError, match="did you mean `knn-v1`"):
        ran("publish", run, "--out", "out", "--verify", "knn-v2")


def test_a_run_that_is_not_at_its_end_is_refused(run: Path):
    with pytest.raises(UserError, match="not at its end") as caught:
        ran("publish", checkpoint.all_in(run)[0], "--out", "out")
    assert "--allow-unfinished" in str(caught.value.hint)
    assert not Path("out").exists()


def test_the_whole_method_begins_another_run(run: Path):
    done = ran("publish", run, "--out", "out", "--full", "--name", "tiny")
    full = Path(done.stdout.split()[1])
    state = checkpoint.read(full)
    assert "optimizer" not in state
    preset = load_preset(
        "pretrain",
        "demo-digits",
        ("data.source.count=64", "data.batch_size=32", "run.epochs=2", "backbone.width=8", "seed=5"),
    ).preset
    method = method_of(preset, facts_of(preset, images=64, steps_per_epoch=2))
    assert "all of `simclr` at step 4" in begin_with(method, full)
    assert all(torch.equal(x, state["method"][name]) for name, x in method.state_dict().items())
    with pytest.raises(WeightsError, match="holds a backbone only"):
        ran("publish", Path(done.stdout.split()[0]), "--out", "again", "--full")


def test_numbers_that_are_none_are_refused(run: Path):
    newest = checkpoint.newest(run)
    state = checkpoint.read(newest)
    state["method"]["head.0.weight"][0, 0] = torch.nan
    checkpoint.write(newest, {key: value for key, value in state.items() if key not in ("format", "version")})
    ran("publish", run, "--out", "out")  # the backbone is sound
    with pytest.raises(WeightsError, match=r"head.0.weight.* not finite"):
        ran("publish", run, "--out", "other", "--full")
    state["method"]["backbone.trunk.conv1.weight"][0, 0] = torch.inf
    checkpoint.write(newest, {key: value for key, value in state.items() if key not in ("format", "version")})
    with pytest.raises(WeightsError, match="not finite"):
        ran("publish", run, "--out", "other")


def test_paths_of_the_machine_stay_at_home():
    told = publish.without_paths({"data": {"path": "/home/me/images/train", "n": 3}, "l": ["/a/b", 1], "command": "x"})
    assert told == {"data": {"path": "train", "n": 3}, "l": ["b", 1]}


def test_results_that_differ_are_an_error():
    assert publish.agreement({"top1": 50.0}, {"top1": 50.05}) == pytest.approx(0.05)
    with pytest.raises(SslError, match=r"`top1` is 51.00 % with the published file and 50.00 %"):
        publish.agreement({"top1": 50.0}, {"top1": 51.0})
    with pytest.raises(SslError, match="something else"):
        publish.agreement({"top1": 50.0}, {"top5": 50.0})


def test_words_that_are_no_names_are_refused(run: Path):
    with pytest.raises(UserError, match="cannot name a file"):
        ran("publish", run, "--out", "out", "--name", "a/b")
    with pytest.raises(UserError, match="no licence identifier"):
        ran("publish", run, "--out", "out", "--licence", "do what you want")


def test_weights_of_another_tool_say_where_they_are_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=64, depth=1, num_heads=1, img_size=32)
    torch.save(network.state_dict(), "theirs.pth")
    done = ran("publish", "theirs.pth", "--out", "out", "--name", "theirs")
    _, description, card = (Path(line) for line in done.stdout.split())
    told = publish.Published.model_validate_json(description.read_bytes())
    assert told.manifest.preset is None
    assert told.finished
    text = card.read_text()
    assert "from `theirs.pth` (layout `timm`" in text
    lines = text.split("With timm:\n\n```python\n")[1].split("```")[0]
    monkeypatch.chdir("out")
    place: dict[str, Any] = {}
    exec(lines, place)
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in place["network"].state_dict().items())
