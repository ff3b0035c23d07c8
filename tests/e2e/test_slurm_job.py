"""A job in SLURM's hands: submitted, warned of its time limit, put back into the queue, continued, cancelled.

The cluster is three shell scripts that do what the real commands do to one machine: set variables, run, record.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'sslcli[slurm]'")
pytestmark = [pytest.mark.e2e, pytest.mark.dist]

SBATCH = """#!/bin/bash
cp "$1" "$CLUSTER/script.sh"
(
  export SLURM_JOB_ID=4242 SLURM_JOB_NODELIST=$(hostname) SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1
  for start in 0 1 2; do
    rm -f "$CLUSTER/requeue"
    [ $start -gt 0 ] && export SLURM_RESTART_COUNT=$start
    bash "$CLUSTER/script.sh"
    echo $? >"$CLUSTER/code.$start"
    [ -e "$CLUSTER/requeue" ] || break
  done
) </dev/null >"$CLUSTER/batch.log" 2>&1 &
echo "Submitted batch job 4242"
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do
  if [ "$1" == --output ]; then out=$2; shift; fi
  shift
done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1
export SLURM_STEP_TASKS_PER_NODE=1 SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST
out=${out//%j/$SLURM_JOB_ID}
echo $$ >"$CLUSTER/task.${SLURM_RESTART_COUNT:-0}"
exec "$@" >>"${out//%t/0}" 2>&1
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$CLUSTER/scontrol.log"
touch "$CLUSTER/requeue"
"""


def wait_for(ready: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def test_a_job_outlives_its_time_limit(tmp_path: Path):
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "sslcli", "pretrain", "--preset", "demo-digits", "--out", "run", "--procs", "2",
        "--slurm", "partition=gpu,time=60,lead=60", "-o", "data.source.count=64", "-o", "data.batch_size=16",
        "-o", "run.epochs=1000", "-o", "run.log_every=1", "-o", "run.views=fast", "-o", "run.tensorboard=false",
        "-o", "backbone.width=8", "-o", "run.monitor.every_epochs=null",
    ]  # fmt: skip
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CLUSTER": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "submitted: job 4242" in done.stderr
    output = run / "slurm" / "4242_0_log.out"
    assert str(output) in done.stderr
    assert (run / "slurm" / "4242_submission.sh").read_text() == (tmp_path / "script.sh").read_text()

    wait_for(lambda: len(steps(run)) > 2)
    os.kill(int((tmp_path / "task.0").read_text()), signal.SIGUSR1)  # as SLURM does, `lead` seconds ahead
    wait_for((tmp_path / "task.1").is_file)
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4242\n"
    assert "stopped on request" in output.read_text()
    stopped = steps(run)[-1]

    wait_for(lambda: steps(run)[-1] > stopped + 2)
    assert f"SLURM started this job again (restart 1); resumed at step {stopped}" in (run / "log.txt").read_text()
    os.kill(int((tmp_path / "task.1").read_text()), signal.SIGTERM)  # as scancel does
    wait_for((tmp_path / "code.1").is_file)
    assert (tmp_path / "code.1").read_text() == "75\n"
    assert not (tmp_path / "task.2").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert steps(run) == list(range(1, steps(run)[-1] + 1))
    assert "Traceback" not in output.read_text()
