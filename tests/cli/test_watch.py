"""Following a run of another process."""

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sslcli.cli.runs import app
from sslcli.cli.watch import Tail, condition, line, screen, sparkline
from sslcli.contracts import Progress
from sslcli.engine.health import Verdict
from sslcli.engine.record import Note, Record, Silent
from sslcli.errors import SslError, StoppedOnRequest
from sslcli.runs.folder import Run

PRESET = "method: {name: simclr}\nbackbone: {name: resnet}\n"


def note(record: Record, step: int) -> None:
    at = Progress(step, 20, 5, 0)
    record.note(Note(step, step / 5, 5.0 - step / 10, 0.1, 1.5, 100.0, 0.02, 0.5), at)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "preset.yaml").write_text(PRESET)
    made = Record(folder, 64, Silent(), tensorboard=False)
    note(made, 5)
    return made


def change(folder: Path, **values: object) -> Run:
    path = folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return Run(folder)


def watch(folder: Path) -> list[str]:
    done = CliRunner().invoke(app, ["watch", str(folder), "--every", "0.1"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stderr.startswith("next: ssl eval knn")
    return done.stdout.splitlines()


def during(record: Record, work: Callable[[], None]) -> list[str]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        return watch(record.folder)
    finally:
        thread.join()


def test_a_line_for_every_change_until_the_run_has_finished(record: Record):
    def work() -> None:
        time.sleep(0.5)
        note(record, 10)
        record.health(Verdict("warning", "lower it"), {"knn": 31.0}, Progress(10, 20, 5, 0))
        time.sleep(0.5)
        record.status("finished", Progress(20, 20, 5, 0))

    assert during(record, work) == [
        "epoch 1.00/4  step 5/20  loss 4.5000  100 img/s  eta 0:10",
        "epoch 2.00/4  step 10/20  loss 4.0000  warning  knn 31.0 %  100 img/s  eta 0:06",
        "epoch 4.00/4  step 20/20  loss 4.0000  warning  knn 31.0 %  finished",
    ]


@pytest.mark.parametrize(
    ("state", "kind", "words"),
    [
        ("failed", SslError, "failed"),
        ("interrupted", SslError, "was interrupted"),
        ("stopped", StoppedOnRequest, "stopped"),
    ],
)
def test_a_run_that_did_not_finish_ends_the_command_with_an_error(
    record: Record, state: str, kind: type[SslError], words: str
):
    record.health(Verdict("collapsed", "do this"), {}, Progress(7, 20, 5, 0))
    record.status(state, Progress(7, 20, 5, 0), "it broke")
    with pytest.raises(kind) as caught:
        CliRunner().invoke(app, ["watch", str(record.folder)], catch_exceptions=False)
    assert caught.value.exit_code == (75 if state == "stopped" else 1)
    assert caught.value.message == f"the run {words} at step 7: it broke"
    assert caught.value.hint == f"`ssl resume {record.folder}` continues it; but first: do this"


def test_a_process_that_is_gone_is_noticed(record: Record):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    change(record.folder, pid=process.pid)
    with pytest.raises(SslError, match=f"the run died at step 5: its process {process.pid} is gone"):
        CliRunner().invoke(app, ["watch", str(record.folder)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("host", "age", "state", "remark"),
    [
        (None, 10, "running", ""),
        (None, 200, "running", "no sign of life"),
        (None, 1000, "running", "no sign of life"),
        ("far-away", 10, "running", ""),
        ("far-away", 200, "running", "no sign of life"),
        ("far-away", 1000, "lost", "no sign of life"),
    ],
)
def test_silence_is_told_and_on_another_machine_taken_for_death(
    record: Record, host: str | None, age: float, state: str, remark: str
):
    then = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    status = change(record.folder, updated=then, **({} if host is None else {"host": host})).status
    assert status is not None
    assert condition(status)[0] == state
    assert condition(status)[1].startswith(remark)
    assert bool(condition(status)[1]) == bool(remark)
    assert (remark in line(status)) or not remark


def test_no_status_is_an_error(record: Record):
    (record.folder / "status.json").unlink()
    with pytest.raises(SslError, match="no readable"):
        CliRunner().invoke(app, ["watch", str(record.folder)], catch_exceptions=False)


def test_the_screen_shows_what_matters(record: Record):
    record.health(Verdict("warning", "lower [it]"), {"knn": 31.0}, Progress(5, 20, 5, 0))
    tail = Tail(record.folder / "metrics.jsonl")
    tail.refresh()
    console = Console(file=io.StringIO(), width=200)
    console.print(screen(Run(record.folder), tail.rows))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("simclr on resnet", "running", "1.00 of 4", "5 of 20", "4.5000", "warning  lower [it]", "31.0 %"):
        assert words in shown
    assert "grad_norm" in shown


def test_the_tail_reads_what_is_new_and_starts_again_with_a_new_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    tail.refresh()
    assert tail.rows == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    tail.refresh()
    assert [row["step"] for row in tail.rows] == [1, 2]
    with path.open("a") as file:
        file.write('ep": 3}\nnonsense\n')
    tail.refresh()
    assert [row["step"] for row in tail.rows] == [1, 2, 3]
    new = tmp_path / "new"
    new.write_text('{"step": 1}\n')
    new.replace(path)
    tail.refresh()
    assert [row["step"] for row in tail.rows] == [1]


def test_a_sparkline_goes_from_lowest_to_highest():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([4.0, 4.0], 8) == "▁▁"
    assert len(sparkline([float(value) for value in range(1000)], 40)) == 40
