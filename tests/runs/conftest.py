"""Run folders as the engine writes them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sslcli.config.yaml_file import dump
from sslcli.contracts import Progress, Report
from sslcli.engine.record import Note, Record, Silent
from sslcli.runs import ledger
from sslcli.runs.folder import Run

PRESET = {
    "about": {"title": "SimCLR on photos"},
    "data": {"source": {"name": "folder", "path": "photos"}, "batch_size": 64},
    "backbone": {"name": "resnet"},
    "method": {"name": "simclr", "temperature": 0.1},
}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """`make_run(name, state, steps, knn)`: a run of `steps` of 20 steps, with a report if `knn` is given."""

    def make(name: str = "a", state: str = "running", steps: int = 10, knn: float | None = None) -> Run:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "preset.yaml").write_text(dump(PRESET))
        (folder / "env.json").write_text(json.dumps({"torch": "2.14"}))
        (folder / "command.txt").write_text(
            "2026-01-01T00:00:00+00:00  ssl pretrain --preset simclr-r18 --data 'my photos'\n"
            "2026-01-02T00:00:00+00:00  ssl resume runs/a\n"
        )
        (folder / "checkpoints").mkdir()
        record = Record(folder, 64, Silent(), tensorboard=False)
        at = Progress(step=0, total=20, steps_per_epoch=5, seed=0)
        record.status("running", at)
        for step in range(1, steps + 1):
            at = at.next()
            record.note(Note(step, step / 5, 5.0 - step / 10, 0.1, 1.5, 100.0, 0.02, 0.5, {"agreement": 0.9}), at)
            if step % 5 == 0:
                (folder / "checkpoints" / f"step_{step:08d}.pt").write_bytes(b"")
        record.status(state, at, "stopped on request" if state == "stopped" else "")
        if knn is not None:
            ledger.append(folder, Report("knn-v1", {"top1_k10": knn - 1, "top1_k20": knn}, {"seed": 0}))
        return Run(folder)

    return make
