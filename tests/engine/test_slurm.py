"""What `--slurm` may say, the script it becomes, and how a job starts; a job that runs is in tests/e2e."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from sslcli.engine import slurm
from sslcli.engine.slurm import Wanted, minutes, parse
from sslcli.errors import UserError


@pytest.fixture
def submitit() -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'sslcli[slurm]'")


def test_keys_and_values():
    assert parse(["partition=gpu,nodes=2,gpus=8,time=24:00:00", "account=me,mem=200G,cpus=64,lead=300"]) == Wanted(
        minutes=1440, nodes=2, gpus=8, cpus=64, lead=300, more={"partition": "gpu", "account": "me", "mem": "200G"}
    )
    assert parse(["time=30"], gpus=4, nodes=3) == Wanted(minutes=30, nodes=3, gpus=4)
    assert parse(["time=30,gpus=a100:4"], gpus=4) == Wanted(minutes=30, gpus=4, gpu_type="a100")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("time=60,partion=gpu", "did you mean `partition`"),
        ("time=60,colour=red", "no key `colour`"),
        ("time=60,nodes", "`nodes` has no value"),
        ("time=60,nodes=", "`nodes` has no value"),
        ("time=60,nodes=two", "whole number"),
        ("time=60,gpus=a100:0", "whole number"),
        ("time=60,time=90", "given twice"),
        ("partition=gpu", "needs a time limit"),
        ("time=soon", "no time limit"),
        ("time=0:00", "no time at all"),
        ("time=2,lead=120", "leaves no time"),
    ],
)
def test_mistakes_are_named(said: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        parse([said])
    assert caught.value.hint


def test_options_and_keys_must_agree():
    with pytest.raises(UserError, match="`--gpus 4`"):
        parse(["time=60,gpus=8"], gpus=4)
    with pytest.raises(UserError, match="`--nodes 3`"):
        parse(["time=60,nodes=2"], nodes=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90:30", 91),
        ("24:00:00", 1440),
        ("0:00:10", 1),
        ("2-12", 3600),
        ("1-0:30", 1470),
        ("1-1:1:1", 1502),
    ],
)
def test_time_limits(text: str, expected: int):
    assert minutes(text) == expected


def test_the_command_on_each_machine():
    words = ["pretrain", "--slurm", "time=60", "-p", "x", "--slurm=gpus=8", "--dry-run", "-o", "seed=1"]
    assert slurm.command(words, Wanted(minutes=60, gpus=8)) == ["pretrain", "-p", "x", "-o", "seed=1", "--gpus", "8"]
    assert slurm.command(["resume", "run", "--procs", "2"], Wanted(60)) == ["resume", "run", "--procs", "2"]


@pytest.mark.usefixtures("submitit")
def test_the_script(tmp_path: Path):
    wanted = parse(["partition=gpu,nodes=2,gpus=a100:8,cpus=64,mem=200G,time=1-12,qos=long,lead=300"])
    text = slurm.script(["pretrain", "-p", "x", "-o", "optim={name: sgd}"], wanted, tmp_path / "my run")
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for flag in (
        "partition=gpu", "nodes=2", "ntasks-per-node=1", "gpus-per-node=a100:8", "cpus-per-task=64", "mem=200G",
        "time=2160", "qos=long", "signal=USR1@300", "requeue", "open-mode=append", "job-name='ssl-my run'",
    ):  # fmt: skip
        assert f"#SBATCH --{flag}" in lines, flag
    assert "# on every machine: ssl pretrain -p x -o 'optim={name: sgd}'" in lines
    assert not any("wckey" in line for line in lines)
    run = next(line for line in lines if line.startswith("srun "))
    assert "--cpu-bind=none --cpus-per-task=64" in run
    assert run.endswith(f"{sys.executable} -u -m submitit.core._submit '{tmp_path / 'my run' / 'slurm'}'")
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no `sbatch` on PATH"):
        slurm.check_here()


def test_an_environment_without_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("submitit", "submitit.slurm", "submitit.slurm.slurm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="needs submitit") as caught:
        slurm.script(["pretrain"], Wanted(minutes=60), tmp_path)
    assert caught.value.hint == "pip install 'sslcli[slurm]'"


@pytest.mark.usefixtures("submitit")
def test_a_job_that_sbatch_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpuu' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert shutil.which("sbatch") == str(sbatch)
    with pytest.raises(UserError, match="sbatch refuses the job: invalid partition specified: gpuu"):
        slurm.submit(["pretrain"], Wanted(minutes=60), tmp_path / "run")
