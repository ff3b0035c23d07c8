import json
import subprocess
import sys

import pytest

from sslcli.errors import UserError
from sslcli.runs.folder import find_runs, is_run, open_run, read_metrics


def test_a_run_reads_as_the_engine_wrote_it(make_run) -> None:
    run = open_run(make_run("a", "stopped", steps=10, knn=61.5).path)
    assert run.status is not None
    assert (run.status.state, run.status.now) == ("stopped", "stopped")
    assert (run.status.step, run.status.total, run.status.epoch, run.status.epochs) == (10, 20, 2.0, 4.0)
    assert run.status.loss == 4.0
    assert run.status.images_per_second == 100.0
    assert run.status.message == "stopped on request"
    assert 0 <= run.status.age < 60
    assert (run.named("method"), run.named("backbone"), run.named("optim")) == ("simclr", "resnet", "?")
    assert run.preset_name == "simclr-r18"
    assert run.commands == ["ssl pretrain --preset simclr-r18 --data 'my photos'", "ssl resume runs/a"]
    assert [row["step"] for row in run.metrics] == list(range(1, 11))
    assert run.metrics[-1]["agreement"] == 0.9
    assert [path.name for path in run.checkpoints] == ["step_00000005.pt", "step_00000010.pt"]
    assert [entry.protocol for entry in run.reports] == ["knn-v1"]
    assert run.environment == {"torch": "2.14"}
    assert run.files == {}


def test_the_last_line_of_the_metrics_may_be_cut_short(make_run) -> None:
    path = make_run().path / "metrics.jsonl"
    whole = read_metrics(path)
    text = path.read_bytes()
    for missing in (2, 30, 100):
        path.write_bytes(text[:-missing])
        assert read_metrics(path) == whole[:-1]
    path.write_bytes(text[:-1])
    assert read_metrics(path) == whole


def test_metrics_may_hold_numbers_that_are_none(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n7\n')
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["step"] == 1
    assert row["loss"] != row["loss"]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_a_running_run_whose_process_is_gone_has_died(make_run) -> None:
    run = make_run("a", "running")
    assert run.status is not None
    assert run.status.now == "running"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert run.status.model_copy(update={"pid": gone.pid}).now == "died"
    assert run.status.model_copy(update={"pid": gone.pid, "host": "another.machine"}).now == "running"
    assert run.status.model_copy(update={"pid": gone.pid, "state": "finished"}).now == "finished"


@pytest.mark.parametrize("name", ["status.json", "preset.yaml", "env.json", "command.txt", "reports/knn-v1.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe"])
def test_what_is_missing_or_damaged_reads_as_empty(make_run, name: str, content: bytes | None) -> None:
    run = make_run(knn=50.0)
    if content is None:
        (run.path / name).unlink()
    else:
        (run.path / name).write_bytes(content)
    empty = {
        "status.json": lambda: run.status is None,
        "preset.yaml": lambda: run.preset == {} and run.named("method") == "?",
        "env.json": lambda: run.environment == {},
        "command.txt": lambda: run.preset_name is None,
        "reports/knn-v1.json": lambda: run.reports == [],
    }
    assert empty[name]()


def test_a_loss_that_is_no_number_does_not_hide_the_status(make_run) -> None:
    path = make_run().path / "status.json"
    words = json.loads(path.read_text())
    path.write_text(json.dumps({**words, "state": "failed", "loss": float("nan")}))
    status = open_run(path.parent).status
    assert status is not None
    assert status.now == "failed"


def test_runs_are_found_at_any_depth(make_run) -> None:
    root = make_run("a").path.parent
    make_run("exp/b")
    make_run(".trash/c")
    (root / "not a run").mkdir()
    assert [str(run.path.relative_to(root)) for run in find_runs(root)] == ["a", "exp/b"]
    assert [run.path for run in find_runs(root / "a")] == [root / "a"]
    assert not is_run(root)


def test_a_folder_without_a_run_is_refused_with_the_nearest_one(make_run) -> None:
    run = make_run("simclr-r18").path
    with pytest.raises(UserError, match="no run folder") as wrong:
        open_run(run.with_name("simclr-r81"))
    assert wrong.value.hint == f"did you mean `{run}`?"
    with pytest.raises(UserError, match="is not a run folder") as above:
        open_run(run.parent)
    assert above.value.hint is not None
    assert str(run) in above.value.hint
    with pytest.raises(UserError) as lost:
        open_run(run / "checkpoints" / "no" / "where")
    assert "ssl runs list" in str(lost.value.hint)
