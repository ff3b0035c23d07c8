import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sslcli.cli.runs import ago, app
from sslcli.config import yaml_file
from sslcli.contracts import Report
from sslcli.errors import UserError
from sslcli.runs import ledger


def ask(*words: str | Path) -> tuple[str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def refused(*words: str | Path) -> UserError:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return caught.value


def test_list_shows_one_line_per_run(make_run) -> None:
    root = make_run("a", "finished", steps=20, knn=61.5).path.parent
    make_run("exp/b", "stopped", steps=5)
    (root / "exp" / "b" / "status.json").write_text("")
    head, first, second = ask("list", root)[0].splitlines()
    assert head.split() == ["run", "method", "step", "state", "loss", "knn", "updated"]
    assert first.split()[:7] == ["a", "simclr", "resnet", "20/20", "finished", "3", "61.50"]
    assert first.endswith(" s ago")
    assert second.split() == ["exp/b", "simclr", "resnet", "-", "unknown", "-", "-", "-"]


def test_list_as_json_is_data(make_run) -> None:
    run = make_run("a", "finished", steps=20, knn=61.5)
    (only,) = json.loads(ask("list", run.path.parent, "--json")[0])
    assert {key: only[key] for key in ("path", "preset", "method", "state", "step", "total", "loss", "knn")} == {
        "path": str(run.path),
        "preset": "simclr-r18",
        "method": "simclr",
        "state": "finished",
        "step": 20,
        "total": 20,
        "loss": 3.0,
        "knn": 61.5,
    }


def test_an_empty_folder_has_no_runs_and_an_absent_one_is_refused(tmp_path: Path) -> None:
    out, err = ask("list", tmp_path)
    assert out == ""
    assert "no runs in" in err
    assert json.loads(ask("list", tmp_path, "--json")[0]) == []
    assert "no folder" in refused("list", tmp_path / "absent").message


@pytest.mark.parametrize(
    ("state", "knn", "following"),
    [
        ("running", None, "ssl runs watch {run}"),
        ("stopped", None, "ssl resume {run}"),
        ("failed", None, "ssl resume {run}"),
        ("finished", None, "ssl eval knn {run} --train DIR --test DIR"),
        ("finished", 61.5, "ssl features {run} --data DIR --out FILE.npz"),
    ],
)
def test_show_says_where_a_run_stands_and_what_to_type_next(make_run, state, knn, following) -> None:
    run = make_run("a", state, knn=knn)
    (run.path / "curves.png").write_bytes(b"")
    out, err = ask("show", run.path)
    for words in (
        "simclr-r18 - SimCLR on photos",
        "simclr on resnet",
        "folder photos",
        "step 10/20, epoch 2.00/4",
        "loss 4 ",
        "agreement 0.9",
        f"2, newest {run.checkpoints[-1]}",
        str(run.path / "curves.png"),
        "ssl resume runs/a",
    ):
        assert words in out
    assert ("top1_k20 61.50" in out) == (knn is not None)
    assert err == f"next: {following.format(run=run.path)}\n"


def test_show_as_json_is_strict_and_complete(make_run) -> None:
    run = make_run("a", "failed", knn=61.5)
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps({**status, "loss": float("nan")}))

    def no_constants(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(ask("show", run.path, "--json")[0], parse_constant=no_constants)
    assert found["status"]["loss"] is None
    assert found["last"]["step"] == 10
    assert found["settings"]["method"]["temperature"] == 0.1
    assert found["reports"][0]["metrics"]["top1_k20"] == 61.5
    assert len(found["checkpoints"]) == 2


def test_show_survives_a_run_that_wrote_next_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    out, err = ask("show", tmp_path)
    assert out.splitlines() == [f"run     {tmp_path}", "method  ? on ?"]
    assert err == f"next: ssl resume {tmp_path}\n"


def test_show_refuses_what_is_no_run(tmp_path: Path) -> None:
    assert "is not a run folder" in refused("show", tmp_path).message


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (172800, "2 d"), (1e7, "115 d")],
)
def test_durations_read_in_their_largest_whole_unit(seconds: float, words: str) -> None:
    assert ago(seconds) == words


def reported(run, protocol: str, value: float, **details) -> None:
    facts = {"headline": "top1", "protocol_hash": "a", "train": {"fingerprint": "t"}, "test": {"fingerprint": "u"}}
    ledger.append(run.path, Report(protocol, {"top1": value, "top5": 99.0}, {**facts, **details}))


def test_compare_sets_like_beside_like_and_says_what_is_not(make_run) -> None:
    one, two = make_run("a", "finished"), make_run("b", "finished")
    reported(one, "knn-v1", 60.0)
    reported(two, "knn-v1@data-12345678", 61.0)  # another run's own images, the same images all the same
    reported(one, "knn-v1@settings-1", 70.0, protocol_hash="b", test={"fingerprint": "w"})
    reported(two, "linear-v1", 80.0, spread={"top1": 0.25}, seeds=3)
    reported(one, "knn-v1@step_00000005", 10.0, weights={"step": -1})
    head, knn, other, linear, note = ask("compare", one.path, two.path)[0].splitlines()
    assert head.split() == ["protocol", "metric", str(one.path), str(two.path)]
    assert knn.split() == ["knn-v1", "top1", "60.00", "61.00"]
    assert other.split() == ["knn-v1", "(1)", "top1", "70.00", "-"]
    assert linear.split() == ["linear-v1", "top1", "-", "80.00", "±", "0.25"]
    assert note == "(1) not comparable with knn-v1 above: other settings, other test images"
    assert len(ask("compare", one.path, two.path, "--all")[0].splitlines()) == 8
    first, second, third = json.loads(ask("compare", one.path, two.path, "--json")[0])
    assert first["not_comparable_with_first"] == third["not_comparable_with_first"] == []
    assert second["not_comparable_with_first"] == ["settings", "test images"]
    assert first["runs"][str(two.path)]["label"] == "knn-v1@data-12345678"
    assert third["runs"][str(two.path)]["seeds"] == 3


def test_compare_refuses_what_is_no_run_and_needs_reports(make_run, tmp_path: Path) -> None:
    run = make_run("a", "finished")
    assert "no report on any" in refused("compare", run.path).message
    assert "named twice" in refused("compare", run.path, run.path).message
    assert "no run folder" in refused("compare", run.path, tmp_path / "gone").message


@pytest.mark.parametrize(
    ("source", "classes", "command"),
    [
        ({"name": "digits"}, ["0", "1"], "ssl eval knn {run}"),
        ({"name": "digits"}, [], "ssl eval knn {run} --train DIR --test DIR"),
        ({"name": "folder", "path": "photos"}, ["cat"], "ssl eval knn {run} --test DIR"),
        ({"name": "voc", "path": "VOCdevkit"}, ["cat"], "ssl eval svm {run}"),
    ],
)
def test_a_finished_run_names_an_evaluation_that_works(make_run, source, classes, command) -> None:
    run = make_run("a", "finished")
    preset = yaml_file.read(run.path / "preset.yaml").data
    (run.path / "preset.yaml").write_text(yaml_file.dump({**preset, "data": {"source": source}}))
    (run.path / "backbone.manifest.json").write_text(json.dumps({"source": {"classes": classes}}))
    assert ask("show", run.path)[1] == f"next: {command.format(run=run.path)}\n"
