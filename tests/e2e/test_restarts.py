"""Ranks that die, jobs that are interrupted, jobs side by side: real processes, real signals, two ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sslcli.engine import checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.dist]

QUICK = [
    "-o", "data.source.count=64", "-o", "data.batch_size=16", "-o", "run.log_every=1", "-o", "run.views=fast",
    "-o", "run.tensorboard=false", "-o", "run.checkpoints.every_steps=2", "-o", "backbone.width=8",
    "-o", "run.monitor.every_epochs=null",
]  # fmt: skip


STARTED: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def nobody_stays_behind() -> Iterator[None]:
    """What a failed test leaves running would disturb the next."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.returncode is None:
            process.kill()
            process.communicate()


def start(*words: str | Path, cwd: Path, more: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "sslcli", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SSL_TRACE": str(cwd / "trace"), **(more or {})}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    STARTED.append(process)
    return process


def pretrain(*words: str | Path, cwd: Path) -> "subprocess.Popen[str]":
    return start("pretrain", "--preset", "demo-digits", "--out", "run", "--procs", "2", *words, *QUICK, cwd=cwd)


def reached(process: "subprocess.Popen[str]", trace: Path, step: int, not_by: int = 0) -> int:
    """The process id of the rank with this trace, once it has come to this step."""
    while process.poll() is None:
        for line in trace.read_text().splitlines()[:-1] if trace.is_file() else []:
            note = json.loads(line)
            if note["step"] >= step and note["pid"] != not_by:
                return int(note["pid"])
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_command_restarts_its_ranks_and_loses_nothing(tmp_path: Path, ranks: int):
    done = start(
        "verify", "resume", "--preset", "demo-digits", "--procs", str(ranks), "--elastic", "--steps", "8",
        "-o", "backbone.width=8", cwd=tmp_path,
    )  # fmt: skip
    told, errors = done.communicate()
    assert done.returncode == 0, errors
    assert "verdict: resume is exact" in told
    assert "bit-equal" in told
    assert errors.count("SIGKILL of rank") == 2
    assert "restarted (1 of 2) after a process died (rank" in errors
    assert "restarted (2 of 2) after a process died (rank" in errors


def test_a_restart_goes_on_and_is_logged_and_ctrl_c_ends_it(tmp_path: Path):
    process = pretrain("--max-restarts", "3", "--resume", "never", "-o", "run.epochs=1000", cwd=tmp_path)
    victim = reached(process, tmp_path / "trace.1", 5)
    os.kill(victim, signal.SIGKILL)
    reached(process, tmp_path / "trace.1", 5, not_by=victim)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    said = "restarted (1 of 3) after a process died (rank 1: SIGKILL); resumed at step "
    log = (tmp_path / "run" / "log.txt").read_text()
    assert said in errors
    assert said in log
    assert int(log.partition(said)[2].split()[0]) >= 2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"


def test_a_killed_rank_ends_the_command_with_a_word_about_it(tmp_path: Path):
    process = pretrain("-o", "run.epochs=1000", cwd=tmp_path)
    os.kill(reached(process, tmp_path / "trace.1", 2), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "error: a process died (rank 1: SIGKILL)" in errors
    assert "--max-restarts" in errors
    assert "Traceback" not in errors


def test_a_diverged_run_is_not_started_again(tmp_path: Path):
    process = pretrain("--max-restarts", "3", "-o", "optim={name: sgd, lr: 1e30}", "-o", "run.epochs=2", cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.count("error: the loss or its gradient is not finite") == 1, errors
    assert "restarted" not in errors


def test_two_jobs_on_one_machine_do_not_meet(tmp_path: Path):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    both = [pretrain("-o", "run.epochs=1", cwd=place) for place in places]
    for process, place in zip(both, places, strict=True):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert json.loads((place / "run" / "status.json").read_text())["state"] == "finished"


def test_two_machines_restart_together(tmp_path: Path):
    """Both launchers are on this machine; each knows only its own rank, as on two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = (
        "pretrain", "--preset", "demo-digits", "--out", "run", "--nodes", "2", "--rdzv", f"localhost:{port}",
        "--max-restarts", "1", "--resume", "never", "-o", "run.epochs=1000", *QUICK,
    )  # fmt: skip
    both = [start(*words, cwd=tmp_path) for _ in range(2)]
    victim = reached(both[0], tmp_path / "trace.1", 5)
    os.kill(victim, signal.SIGKILL)
    reached(both[0], tmp_path / "trace.1", 5, not_by=victim)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 75, errors
        assert "Traceback" not in errors
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "restarted" in log
    assert "resumed at step" in log
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"


def test_tasks_of_srun_are_the_ranks(tmp_path: Path):
    job = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS": "2", "SLURM_NODEID": "0",
    }  # fmt: skip
    words = ("pretrain", "--preset", "demo-digits", "--out", "run", "-o", "run.epochs=1", *QUICK)
    tasks = [
        start(*words, cwd=tmp_path, more={**job, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)})
        for number in range(2)
    ]
    for task in tasks:
        _, errors = task.communicate()
        assert task.returncode == 0, errors
    assert checkpoint.read(checkpoint.newest(tmp_path / "run"))["progress"]["step"] == 4
    assert json.loads((tmp_path / "run" / "env.json").read_text())["ranks"] == 2
    refused = start(*words, "--procs", "2", cwd=tmp_path, more={**job, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    _, errors = refused.communicate()
    assert refused.returncode == 2
    assert "srun has started 2 processes" in errors
