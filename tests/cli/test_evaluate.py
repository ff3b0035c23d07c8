import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parts import ran

from sslcli.cli.evaluate import newest
from sslcli.data.digits import coloured_digits
from sslcli.errors import UserError


def test_a_table_a_report_and_the_next_command(run: Path):
    done = ran("eval", "knn", run, "--floors")
    head, first, *_ = done.stdout.splitlines()
    assert head.split() == ["knn-v1", "raw", "pixels", "untrained", "learned"]
    assert first.startswith("top1_k10")
    assert first.count("%") == 3
    assert "report: run/reports/knn-v1.json" in done.stderr
    assert "next: ssl eval linear-cached run" in done.stderr
    report = json.loads((run / "reports" / "knn-v1.json").read_text())
    assert f"{report['metrics']['top1_k10']:.2f} %" in first
    assert (run / "ledger.jsonl").is_file()


def test_the_next_command_is_about_the_same_images(run: Path):
    for part, seed in (("train", 1), ("test", 2)):
        source = coloured_digits("train", 30, 32, seed)
        np.savez(f"my {part}.npz", images=source.resident(), labels=source.labels)
    done = ran("eval", "knn", run, "--train", "my train.npz", "--test", "my test.npz")
    assert "next: ssl eval linear-cached run --train 'my train.npz' --test 'my test.npz'\n" in done.stderr
    assert ran(*shlex.split(done.stderr.split("next: ssl ")[1])).stdout.startswith("linear-cached-v1")


def test_json_is_all_there_is_on_stdout(run: Path):
    done = ran("knn", run, "--json", "-o", "evaluator.k=[5]", "--seed", "3")
    report = json.loads(done.stdout)
    assert report["protocol"].startswith("knn-v1@settings-")
    assert report["details"]["seed"] == 3
    assert list(report["metrics"]) == ["top1_k5", "top5_k5"]


def test_every_evaluator_is_a_command_and_says_what_it_is(run: Path):
    listed = ran("eval", "--help").stdout
    assert "knn" in listed
    assert "Weighted nearest neighbours" in listed
    done = ran("eval", "linear-cached", run)
    assert done.stdout.startswith("linear-cached-v1")
    assert "next: ssl runs show run" in done.stderr


def test_machines_are_counted_while_they_are_fitted(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sslcli.cli.terminal.EVERY", 0.0)
    done = ran("eval", "svm", run, "-o", "evaluator.costs=[1]", "-o", "evaluator.taps=[pooled]")
    lines = [line for line in done.stderr.splitlines() if line.startswith("learned: machines: ")]
    assert [line.split()[2] for line in lines] == [f"{4 * classes}/40," for classes in range(1, 10)]
    assert all("machines/s" in line and line.endswith("s to go") for line in lines)


def test_weights_without_a_run_keep_their_report_beside_them(run: Path, tmp_path: Path):
    ran("extract", run, "--out", "away/mine.safetensors")
    assert "report: away/reports/knn-v1@mine.json" in ran("eval", "knn", "away/mine.safetensors").stderr


def test_stored_features_are_judged_too(run: Path, tmp_path: Path):
    import numpy as np

    from sslcli.data.digits import coloured_digits

    for split, count in (("train", 64), ("test", 16)):
        source = coloured_digits(split, count, 32, 0)
        images = source.resident()
        np.savez(f"{split}.npz", images=images, labels=source.labels, classes=np.array(source.classes))
        ran("features", run, "--data", f"{split}.npz", "--out", f"f_{split}.npz")
    words = ("eval", "knn", run, "--json")
    stored = json.loads(ran(*words, "--train", "f_train.npz", "--test", "f_test.npz").stdout)
    direct = json.loads(ran(*words, "--train", "train.npz", "--test", "test.npz").stdout)
    assert stored["metrics"] == direct["metrics"]
    with pytest.raises(UserError, match="holds features, the other side does not"):
        ran(*words, "--train", "f_train.npz", "--test", "test.npz")
    with pytest.raises(UserError, match="needs images"):
        ran(*words, "--train", "f_train.npz", "--test", "f_test.npz", "--floors")


def test_what_cannot_work_is_refused_with_the_fix(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="exclude each other"):
        ran("eval", "knn", run, "--data", ".", "--train", ".")
    with pytest.raises(UserError, match="not for this evaluator") as caught:
        ran("eval", "knn", run, "--preset", "linear-cached-v1")
    assert caught.value.hint == "use `ssl eval linear-cached run --preset linear-cached-v1`"
    with pytest.raises(UserError, match="no run folder or weights file `gone`"):
        ran("eval", "knn", "gone")
    with pytest.raises(UserError, match="no preset `knn-v9`; did you mean `knn-v1`"):
        ran("eval", "knn", run, "--preset", "knn-v9")
    with pytest.raises(UserError, match="comes with ssl"):
        newest("astrology")
    with pytest.raises(UserError, match="several protocols for `linear`") as caught:
        ran("eval", "linear", run)
    assert "linear-moco-v1" in (caught.value.hint or "")
    assert "linear-cached-v1" not in (caught.value.hint or "")
    with pytest.raises(UserError, match="`--floors` is for evaluations of stored features"):
        ran("eval", "semi", run, "--preset", "semi-1pct-v1", "--floors")


def test_an_evaluation_that_trains_leaves_a_report_and_its_training(run: Path):
    words = (
        "eval",
        "linear",
        run,
        "--preset",
        "linear-swav-v1",
        "-o",
        "evaluator.epochs=1",
        "-o",
        "evaluator.batch_size=32",
    )
    done = ran(*words, "--seeds", "2")
    assert " ± " in done.stdout
    assert "images of 10 classes" in done.stderr.replace("64 of", "images of")
    report = json.loads(next((run / "reports").glob("linear-swav-v1@settings-*.json")).read_text())
    assert report["details"]["seeds"] == 2
    folder = Path(report["details"]["training"]["folder"])
    assert (folder / "metrics.jsonl").is_file()
    assert (folder.parent / folder.name.replace("seed0", "seed1")).is_dir()
    import numpy as np

    np.savez("t.npz", index=np.arange(3), meta=np.array("{}"))
    with pytest.raises(UserError, match="trains on images, not on tables"):
        ran(*words, "--train", "t.npz", "--test", "t.npz")


@pytest.mark.dist
@pytest.mark.e2e
def test_two_processes_write_the_report_of_one(run: Path):
    alone = json.loads(ran("eval", "knn", run, "--json").stdout)
    done = subprocess.run(
        [sys.executable, "-m", "sslcli", "eval", "knn", "run", "--json", "--procs", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"] == alone["metrics"]


def test_help_needs_no_torch():
    code = "import sys; from sslcli.cli import evaluate, extract, features, doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
