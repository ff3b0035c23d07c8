"""What a user's mistake gets: one clear line with the fix, the right exit code, nothing lost."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslcli.engine import checkpoint

pytestmark = pytest.mark.e2e

QUICK = (
    "data.source.count=64", "data.batch_size=16", "run.epochs=1", "run.log_every=1", "run.views=fast",
    "run.tensorboard=false", "backbone.width=8",
)  # fmt: skip


def ssl(*words: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sslcli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def overrides(*words: str) -> list[str]:
    return [part for word in words for part in ("-o", word)]


def pretrain(*words: str | Path, cwd: Path, preset: str = "demo-digits") -> "subprocess.CompletedProcess[str]":
    return ssl("pretrain", "--preset", preset, *words, cwd=cwd)


def assert_refused(done: "subprocess.CompletedProcess[str]", *parts: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def image(path: Path, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_an_empty_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert_refused(pretrain("--data", "empty", cwd=tmp_path), "empty")
    assert not (tmp_path / "runs").exists()


def test_no_folder(tmp_path: Path):
    assert_refused(pretrain("--data", "absent", cwd=tmp_path), "absent")


def test_a_folder_of_text_files(tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("hello")
    assert_refused(pretrain("--data", "texts", cwd=tmp_path), "texts", ".txt")


def test_text_files_that_are_called_images(tmp_path: Path):
    folder = tmp_path / "liars"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.jpg").write_text("hello")
    done = pretrain("--data", "liars", *overrides("data.batch_size=4"), cwd=tmp_path)
    assert_refused(done, "can be read")


def test_one_image(tmp_path: Path):
    (tmp_path / "one").mkdir()
    image(tmp_path / "one" / "a.png")
    assert_refused(pretrain("--data", "one", cwd=tmp_path), "larger than the data set of 1", "hint:")


def test_a_batch_larger_than_the_data_set(tmp_path: Path):
    done = pretrain(*overrides(*QUICK, "data.batch_size=100"), cwd=tmp_path)
    assert_refused(done, "data.batch_size", "larger than the data set of 64", "hint:")


def test_an_out_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    done = pretrain("--out", "file/run", *overrides(*QUICK), cwd=tmp_path)
    assert_refused(done, "cannot write to `file/run`", "--out")
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_existing_run_with_another_preset(tmp_path: Path):
    assert pretrain("--out", "run", *overrides(*QUICK), cwd=tmp_path).returncode == 0
    before = checkpoint.newest(tmp_path / "run").read_bytes()
    done = pretrain("--out", "run", *overrides(*QUICK, "optim.lr=0.1"), cwd=tmp_path)
    assert_refused(done, "another preset", "optim.lr: 0.002 -> 0.1", "--out")
    assert checkpoint.newest(tmp_path / "run").read_bytes() == before


def test_a_checkpoint_cut_in_half(tmp_path: Path):
    assert pretrain("--out", "run", *overrides(*QUICK, "run.checkpoints.every_steps=2"), cwd=tmp_path).returncode == 0
    last = checkpoint.newest(tmp_path / "run")
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    assert_refused(ssl("extract-backbone", last.relative_to(tmp_path), cwd=tmp_path), str(last.name), "cut short")
    done = ssl("resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert last.name in done.stderr
    assert "resumed at 2" in done.stderr
    assert checkpoint.read(last)["progress"]["step"] == 4


def test_a_preset_with_five_mistakes(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text(
        "extends: pretrain/demo-digits\n"
        "run: {epochs: 0}\n"
        "method:\n"
        "  temprature: 0.1\n"
        "  dim: -4\n"
        "optim:\n"
        "  lrr: 1.0\n"
        "seed: many\n"
    )
    done = pretrain(preset="bad.yaml", cwd=tmp_path)
    assert_refused(done, "5 problem(s)", "bad.yaml:2", "bad.yaml:4", "did you mean `temperature`", "bad.yaml:8")


def test_an_unknown_preset(tmp_path: Path):
    assert_refused(pretrain(preset="demo-digit", cwd=tmp_path), "demo-digits")


def test_more_gpus_than_there_are(tmp_path: Path):
    assert_refused(pretrain("--gpus", "8", *overrides(*QUICK), cwd=tmp_path), "--gpus 8", "hint:")


def test_a_batch_that_ranks_cannot_share(tmp_path: Path):
    done = pretrain("--procs", "2", *overrides(*QUICK, "data.batch_size=15"), cwd=tmp_path)
    assert_refused(done, "15 cannot be shared by 2", "data.batch_size=14")


def test_a_full_disk_during_a_checkpoint(tmp_path: Path):
    """A limit on file sizes makes the kernel refuse the write half-way, as a full disk does."""
    words = ["--out", "run", *overrides(*QUICK, "run.epochs=2", "run.checkpoints.every_steps=4")]
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path\n"
        "from sslcli.engine import loop\n"
        "from sslcli.cli import main\n"
        "step = loop.step\n"
        "def limited(training, batch, at, preset):\n"
        "    if at.step == 5:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "    return step(training, batch, at, preset)\n"
        "loop.step = limited\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "pretrain", "--preset", "demo-digits", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert_refused(done, "cannot write checkpoint", "hint:", code=1)
    assert checkpoint.read(checkpoint.newest(tmp_path / "run"))["progress"]["step"] == 4
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob(".*")] == []
    again = pretrain(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert checkpoint.read(checkpoint.newest(tmp_path / "run"))["progress"]["step"] == 8


def test_debug_shows_the_traceback(tmp_path: Path):
    done = pretrain("--debug", preset="demo-digit", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
