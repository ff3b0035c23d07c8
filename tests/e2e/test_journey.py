"""The journey of a user, by the real commands: pretrain, extract, features, evaluate, list; on one rank and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sslcli.engine import checkpoint

pytestmark = pytest.mark.e2e

QUICK = [
    "-o", "data.source.count=128", "-o", "data.batch_size=32", "-o", "run.epochs=2", "-o", "run.log_every=1",
    "-o", "run.views=fast", "-o", "backbone.width=8",
]  # fmt: skip


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "sslcli", *map(str, words)]


def ssl(*words: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_from_images_to_a_number(tmp_path: Path):
    done = ssl("pretrain", "--preset", "demo-digits", "--out", "run", *QUICK, cwd=tmp_path)
    assert "next: ssl eval knn run" in done.stderr
    for name in ("backbone.safetensors", "curves.png", "views.png", "metrics.jsonl", "preset.yaml"):
        assert (tmp_path / "run" / name).is_file(), name
    ssl("extract-backbone", "run", "--out", "b.safetensors", cwd=tmp_path)
    report = json.loads(ssl("eval", "knn", "run", "--json", cwd=tmp_path).stdout)
    assert report["protocol"] == "knn-v1"
    assert 0 <= report["metrics"]["top1_k20"] <= 100
    assert (tmp_path / "run" / "reports" / "knn-v1.json").is_file()
    listed = json.loads(ssl("runs", "list", ".", "--json", cwd=tmp_path).stdout)
    assert len(listed) == 1
    assert "finished" in ssl("runs", "show", "run", cwd=tmp_path).stdout


def test_a_finished_run_says_so(tmp_path: Path):
    words = ("pretrain", "--preset", "demo-digits", "--out", "run", *QUICK)
    ssl(*words, cwd=tmp_path)
    assert "already finished" in ssl(*words, cwd=tmp_path).stderr


def test_a_dry_run_writes_nothing(tmp_path: Path):
    done = ssl("pretrain", "--preset", "demo-digits", "--dry-run", *QUICK, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert any(line.startswith("parameters  ") for line in lines)
    assert [line for line in lines if len(line.split()) < 2] == []
    assert sum(line.startswith("group") for line in lines) == 1  # the head of the table, and no empty line before it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dist
def test_two_ranks_agree_with_each_other_on_the_state(tmp_path: Path):
    ssl("pretrain", "--preset", "demo-digits", "--out", "run", "--procs", "2", *QUICK, cwd=tmp_path)
    state = checkpoint.read(checkpoint.newest(tmp_path / "run"))
    assert state["progress"]["step"] == 8
    assert all(torch.isfinite(value).all() for value in state["method"].values())


@pytest.mark.dist
@pytest.mark.parametrize("preset", ["demo-digits", "mocov2-cifar10-cpu"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_proven_exact(tmp_path: Path, preset: str, ranks: int):
    words = ["verify", "resume", "--preset", preset, "--procs", str(ranks), "--steps", "8", "-o", "backbone.width=8"]
    extra = ["-o", "method.queue=1024"] if preset.startswith("moco") else []
    done = ssl(*words, *extra, cwd=tmp_path)
    assert "verdict: resume is exact" in done.stdout
    assert "SIGKILL of rank" in done.stderr
    assert "SIGTERM to the job" in done.stderr


@pytest.mark.dist
def test_another_number_of_ranks_goes_on_with_the_same_batches(tmp_path: Path):
    done = ssl(
        "verify", "resume", "--preset", "demo-digits", "--procs", "2", "--procs-after", "1", "--steps", "8",
        "-o", "backbone.width=8", cwd=tmp_path,
    )  # fmt: skip
    assert "verdict: resume is exact" in done.stdout
    assert "the number of ranks changed" in done.stdout
