"""A training evaluation on two processes: stopped by a signal, continued by the same command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 100


@pytest.mark.e2e
@pytest.mark.dist
def test_stopped_on_two_processes_it_continues_with_the_same_command(run: Path, tmp_path: Path):
    words = [
        sys.executable, "-m", "sslcli", "eval", "linear", "run", "--preset", "linear-mae-v1", "--procs", "2", "--json",
        "-o", "evaluator.epochs=25", "-o", "evaluator.batch_size=16", "-o", "evaluator.batch_norm=8",
    ]  # fmt: skip
    place = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **place) as process:
        until = time.monotonic() + SECONDS
        while not list(run.glob("eval/*/*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, err
    assert "continue with `ssl eval linear run" in err
    assert out == ""
    (folder,) = run.glob("eval/*/*")
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    done = subprocess.run(words, capture_output=True, check=False, timeout=SECONDS, **place)
    assert done.returncode == 0, done.stderr
    assert "resumed at" in done.stderr
    report = json.loads(done.stdout)
    assert report["details"]["training"] == report["details"]["training"] | {"steps": 100, "ranks": 2}
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 100
