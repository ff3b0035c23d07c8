"""What a command that was started again continues from, and what becomes of checkpoints it leaves behind."""

from pathlib import Path

import pytest

from sslcli.config.load import load
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Progress
from sslcli.engine import checkpoint
from sslcli.engine.pretrain import pretrain
from sslcli.engine.record import Note
from sslcli.engine.resume import after_restart


@pytest.fixture
def preset() -> PretrainPreset:
    settings = (
        "data.source.count=64", "data.batch_size=16", "run.epochs=2", "run.log_every=1", "run.views=fast",
        "run.tensorboard=false", "run.checkpoints.every_steps=2", "run.checkpoints.keep.last=2", "backbone.width=8",
        "run.monitor.every_epochs=null",
    )  # fmt: skip
    return load("pretrain", "demo-digits", settings, {}).preset


class Hearer:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, note: Note, at: Progress, eta: float) -> None:
        self.steps.append(note.step)


def steps_in(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.all_in(folder)]


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path, preset: PretrainPreset):
    pretrain(preset, tmp_path)
    assert steps_in(tmp_path) == [6, 8]
    straight = checkpoint.read(checkpoint.newest(tmp_path))
    hearer = Hearer()
    pretrain(preset, tmp_path, resume=checkpoint.all_in(tmp_path)[0], watcher=hearer)
    assert hearer.steps == [7, 8]
    assert any("renamed 1 checkpoint(s) beyond step 6" in line for line in hearer.lines)
    assert (tmp_path / "checkpoints" / "step_00000008.pt.aside").is_file()
    again = checkpoint.read(checkpoint.newest(tmp_path))
    assert steps_in(tmp_path) == [6, 8]
    assert all((straight["method"][name] == value).all() for name, value in again["method"].items())


def test_a_damaged_newest_checkpoint_does_not_push_the_good_ones_out(tmp_path: Path, preset: PretrainPreset):
    pretrain(preset, tmp_path)
    broken = checkpoint.newest(tmp_path)
    broken.write_bytes(broken.read_bytes()[:100])
    checkpoint.set_aside(tmp_path, 6)
    checkpoint.set_aside(tmp_path, 6)  # again, with nothing left to do
    assert steps_in(tmp_path) == [6]
    assert broken.with_name(f"{broken.name}.aside").stat().st_size == 100


def test_after_a_restart_the_newest_checkpoint_counts_whatever_was_asked_at_first(
    tmp_path: Path, preset: PretrainPreset
):
    other, mine = tmp_path / "other", tmp_path / "mine"
    pretrain(preset, other)
    first = checkpoint.all_in(other)[0]  # of step 6
    assert after_restart(mine, "never") == "auto"
    assert after_restart(mine, "auto") == "auto"
    assert after_restart(mine, first) == first  # died before its own first checkpoint
    assert after_restart(mine, other / "checkpoints" / "last") == other / "checkpoints" / "last"
    pretrain(preset, mine, resume=first)
    assert after_restart(mine, first) == "auto"
    assert after_restart(mine, other) == other  # its newest is as far as ours


def test_a_restart_is_said_on_the_terminal_and_in_the_log(
    tmp_path: Path, preset: PretrainPreset, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SSL_RESTARTED", "(1 of 3) after a process died (rank 1: SIGKILL)")
    hearer = Hearer()
    pretrain(preset, tmp_path, watcher=hearer)
    start = "restarted (1 of 3) after a process died (rank 1: SIGKILL); no checkpoint yet: begun anew"
    assert start in hearer.lines
    checkpoint.newest(tmp_path).unlink()
    pretrain(preset, tmp_path, watcher=hearer)
    again = "restarted (1 of 3) after a process died (rank 1: SIGKILL); resumed at step 6"
    assert again in hearer.lines
    log = (tmp_path / "log.txt").read_text()
    assert start in log
    assert again in log
