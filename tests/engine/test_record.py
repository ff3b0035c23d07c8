"""Signs of life, pictures and services: none of them may hold up a run or end it."""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from parts import Listener
from PIL import Image

from sslcli.config.load import load
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Progress
from sslcli.engine import loggers, record
from sslcli.engine.health import Verdict
from sslcli.engine.record import Note, Record
from sslcli.errors import UserError
from sslcli.runs.curves import draw

AT = Progress(step=2, total=10, steps_per_epoch=5, seed=0)
NOTE = Note(2, 0.4, 3.0, 0.1, 1.5, 100.0, 0.02, 0.5, {"top1": 50.0})


@pytest.fixture
def preset() -> PretrainPreset:
    return load("pretrain", "demo-digits", (), {}).preset


@contextmanager
def opened(
    folder: Path,
    preset: PretrainPreset,
    listener: Listener | None = None,
    draw: Callable[[Path], None] | None = None,
    *names: str,
) -> Iterator[Record]:
    with Record(folder, 64, listener or Listener(), draw=draw, tensorboard=False, loggers=names) as made:
        made.open(preset, AT)
        yield made
        made.status("finished", AT)


def eventually(true: Callable[[], bool]) -> bool:
    for _ in range(500):
        if true():
            return True
        time.sleep(0.02)
    return False


def status_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "status.json").read_text())
    return found


def test_a_long_step_gives_signs_of_life(tmp_path: Path, preset: PretrainPreset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "BEAT", 0.02)
    with opened(tmp_path, preset) as made:
        for step in (3, 4):
            made.reached(Progress(step, 10, 5, 0))
            assert eventually(lambda step=step: status_of(tmp_path)["step"] == step)
        before = (tmp_path / "status.json").stat().st_mtime_ns
        assert eventually(lambda: (tmp_path / "status.json").stat().st_mtime_ns > before)
    assert status_of(tmp_path)["state"] == "finished"
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[Path], None]]:
    """`drawing(body)`: a function of a module that processes started here can import."""

    def make(body: str) -> Callable[[Path], None]:
        (tmp_path / "some_drawing.py").write_text(f"import os, sys, time\n\ndef draw(folder):\n    {body}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "some_drawing", raising=False)
        found: Callable[[Path], None] = importlib.import_module("some_drawing").draw
        return found

    return make


def test_a_slow_picture_holds_up_nothing_and_is_never_drawn_twice_at_once(
    tmp_path: Path, preset: PretrainPreset, drawing: Callable[[str], Callable[[Path], None]]
):
    body = "(folder / str(os.getpid())).touch(); [time.sleep(0.05) for _ in range(200) if not (folder / 'go').exists()]"
    folder = tmp_path / "run"

    def drawn() -> set[str]:
        return {path.name for path in folder.iterdir() if path.name.isdecimal()}

    with opened(folder, preset, draw=drawing(body)) as made:
        for _ in range(3):
            begun = time.perf_counter()
            made.note(NOTE, AT)
            assert time.perf_counter() - begun < 3
        assert eventually(lambda: len(drawn()) == 1)
        (folder / "go").touch()
    assert len(drawn()) == 2  # once on the way, once at the end
    assert str(os.getpid()) in drawn()


@pytest.mark.parametrize(
    "body", ["raise ZeroDivisionError('no axes')", "sys.stderr.write('x' * 1000); raise ZeroDivisionError('no axes')"]
)
def test_a_run_survives_what_cannot_draw(
    tmp_path: Path, preset: PretrainPreset, drawing: Callable[[str], Callable[[Path], None]], body: str
):
    listener = Listener()
    with opened(tmp_path / "run", preset, listener, drawing(body)) as made:
        made.note(NOTE, AT)
        assert eventually(lambda: bool(made.note(NOTE, AT) or listener.lines))
    (line,) = listener.lines
    assert line.startswith("warning: no more pictures are drawn: ")
    assert line.endswith("ZeroDivisionError: no axes")


def test_a_run_survives_a_service_that_fails(tmp_path: Path, preset: PretrainPreset, monkeypatch: pytest.MonkeyPatch):
    class Failing:
        def __init__(self, folder: Path, preset: PretrainPreset, step: int) -> None: ...
        def scalars(self, values: Mapping[str, float], step: int) -> None:
            raise ConnectionError("server is away")

        def close(self, finished: bool) -> None:
            raise AssertionError("it was given up")

    monkeypatch.setitem(loggers.OPEN, "failing", Failing)
    listener = Listener()
    with opened(tmp_path, preset, listener, None, "failing") as made:
        for _ in range(3):
            made.note(NOTE, AT)
    assert listener.lines == ["warning: `failing` gets no more metrics: server is away"]


def test_health_is_told_when_it_changes(tmp_path: Path, preset: PretrainPreset):
    listener = Listener()
    ill = Verdict("warning", "do this")
    with opened(tmp_path, preset, listener) as made:
        for verdict, knn in ((Verdict("healthy"), 10.0), (ill, 20.0), (ill, 30.0), (Verdict("healthy"), 40.0)):
            made.health(verdict, {"spread": 0.5, "rankme": float("nan"), "knn": knn}, AT)
            made.note(NOTE, AT)
    assert listener.lines == ["warning: health at step 2: warning: do this", "health at step 2: healthy again"]
    assert [note.health for note in listener.notes] == [
        "healthy  knn 10.0 %", "warning  knn 20.0 %", "warning  knn 30.0 %", "healthy  knn 40.0 %"
    ]  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert [row["rankme"] for row in rows] == [None] * 4
    assert "health" not in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (status_of(tmp_path)["health"], status_of(tmp_path)["knn"]) == ("healthy", 40.0)
    assert "loss 3.0000  top1 50  warning  knn 20.0 %" in (tmp_path / "log.txt").read_text()


def test_tensorboard_gets_metrics_and_health(tmp_path: Path, preset: PretrainPreset):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Record(tmp_path, 64, Listener(), tensorboard=True) as made:
        made.open(preset, AT)
        made.note(NOTE, AT)
        made.health(Verdict("healthy"), {"spread": 0.5}, AT)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert {"loss", "top1", "health/spread"} <= set(found.Tags()["scalars"])
    assert found.Scalars("health/spread")[0].value == 0.5


def test_the_picture_shows_health(tmp_path: Path, preset: PretrainPreset):
    def size() -> tuple[int, int]:
        draw(tmp_path)
        with Image.open(tmp_path / "curves.png") as picture:
            return picture.size

    with opened(tmp_path, preset) as made:
        made.note(NOTE, AT)
        narrow = size()
        made.health(Verdict("healthy"), {"spread": 0.5, "rank_share": 0.4, "view_ratio": 0.5, "knn": 30.0}, AT)
        wide = size()
    assert wide[0] > narrow[0]
    assert wide[1] == narrow[1]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_absent_package_is_named(tmp_path: Path, preset: PretrainPreset, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"names `{name}`, but its package") as caught:
        loggers.open_logger(name, tmp_path, preset, 0)
    assert caught.value.hint == f"pip install 'sslcli[{name}]'"


def test_services_are_not_imported_unasked():
    code = "import sys, sslcli.engine.loggers; print({'wandb', 'mlflow', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_mlflow_keeps_one_run_over_a_resumption(
    tmp_path: Path, preset: PretrainPreset, monkeypatch: pytest.MonkeyPatch
):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    listener = Listener()
    for value in (3.0, 2.0):
        with opened(tmp_path / "run", preset, listener, None, "mlflow") as made:
            made.note(Note(2, 0.4, value, 0.1, 1.5, 100.0, 0.02, 0.5), AT)
            made.health(Verdict("healthy"), {"spread": 0.5}, AT)
    assert listener.lines == []
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("ssl")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "run"
    assert found.data.params["method.temperature"] == "0.2"
    assert found.data.metrics["health/spread"] == 0.5
    assert [point.value for point in client.get_metric_history(found.info.run_id, "loss")] == [3.0, 2.0]


def test_mlflow_that_cannot_start_is_the_users_affair(
    tmp_path: Path, preset: PretrainPreset, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://nowhere")
    with pytest.raises(UserError, match="mlflow cannot start") as caught:
        loggers.open_logger("mlflow", tmp_path, preset, 0)
    assert "MLFLOW_TRACKING_URI" in (caught.value.hint or "")


def test_wandb_offline_keeps_the_numbers_in_the_run_folder(tmp_path: Path):
    """In a process of its own: wandb leaves helpers behind that pytest would complain of."""
    pytest.importorskip("wandb")
    code = (
        "from pathlib import Path\n"
        "from sslcli.config.load import load\n"
        "from sslcli.contracts import Progress\n"
        "from sslcli.engine.record import Note, Record, Silent\n"
        f"folder = Path({str(tmp_path / 'run')!r})\n"
        "at = Progress(step=2, total=10, steps_per_epoch=5, seed=0)\n"
        "with Record(folder, 64, Silent(), tensorboard=False, loggers=('wandb',)) as record:\n"
        "    record.open(load('pretrain', 'demo-digits', (), {}).preset, at)\n"
        "    record.note(Note(2, 0.4, 3.125, 0.1, 1.5, 100.0, 0.02, 0.5), at)\n"
        "    record.status('finished', at)\n"
        "print((folder / 'log.txt').read_text())\n"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(tmp_path)}
    ids = set()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stdout
        ids.add(json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"])
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(ids) == 1
    assert {path.stem for path in files} == {f"run-{ids.pop()}"}
    assert all(b"images_per_second" in path.read_bytes() for path in files)
