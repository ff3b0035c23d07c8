import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sslcli.config.presets import Keep
from sslcli.engine import checkpoint
from sslcli.errors import SslError, WeightsError


def state(step: int = 3) -> checkpoint.State:
    return {"progress": {"step": step}, "method": {"w": torch.arange(5.0)}, "preset": {"seed": 1}}


def test_round_trip(tmp_path: Path):
    path = tmp_path / checkpoint.file_name(3)
    checkpoint.write(path, state())
    back = checkpoint.read(path)
    assert back["format"] == checkpoint.FORMAT
    assert torch.equal(back["method"]["w"], torch.arange(5.0))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_cut_in_half_is_refused_by_name_and_the_previous_one_is_used(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoint.write(folder / checkpoint.file_name(step), state(step))
    broken = folder / checkpoint.file_name(2)
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(WeightsError, match="not a whole checkpoint") as caught:
        checkpoint.read(broken)
    assert str(broken) in caught.value.message
    path, found, damaged = checkpoint.newest_whole(tmp_path)
    assert path.name == checkpoint.file_name(1)
    assert found["progress"]["step"] == 1
    assert len(damaged) == 1
    assert str(broken) in damaged[0]


def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path):
    path = tmp_path / "checkpoints" / checkpoint.file_name(2)
    checkpoint.write(path, state(2))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WeightsError, match="none of the checkpoints"):
        checkpoint.newest_whole(tmp_path)


def test_foreign_and_newer_files_are_refused(tmp_path: Path):
    foreign, newer, text = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt"
    torch.save({"state_dict": {}}, foreign)
    torch.save({"format": checkpoint.FORMAT + 1, "version": "9.9"}, newer)
    text.write_text("hello")
    with pytest.raises(WeightsError, match="not a checkpoint of ssl"):
        checkpoint.read(foreign)
    with pytest.raises(WeightsError, match=r"written by ssl 9\.9"):
        checkpoint.read(newer)
    with pytest.raises(WeightsError, match="not a whole checkpoint"):
        checkpoint.read(text)
    with pytest.raises(WeightsError, match="no checkpoint"):
        checkpoint.read(tmp_path / "absent.pt")


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def test_no_code_from_a_file_is_run(tmp_path: Path):
    path, target = tmp_path / "evil.pt", tmp_path / "pwned"
    torch.save({"format": checkpoint.FORMAT, "x": Payload(target)}, path)
    with pytest.raises(WeightsError, match="cannot read checkpoint"):
        checkpoint.read(path)
    assert not target.exists()


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path):
    """A file-size limit makes the kernel refuse the write half-way, as a full disk does."""
    path = tmp_path / checkpoint.file_name(1)
    checkpoint.write(path, state(1))
    script = """
import resource, signal, sys, torch
from pathlib import Path
from sslcli.engine import checkpoint
from sslcli.errors import SslError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.write(Path(sys.argv[1]), {"progress": {"step": 1}, "method": {"w": torch.zeros(1_000_000)}})
except SslError as error:
    print(error.message, "|", error.hint, "|", error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write checkpoint `{path}`: ")
    assert done.stdout.rstrip().endswith("| 1")
    assert checkpoint.read(path)["progress"]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_killed_while_writing_leaves_whole_files_only(tmp_path: Path):
    script = """
import sys, torch
from pathlib import Path
from sslcli.engine import checkpoint
for step in range(1, 10_000):
    path = Path(sys.argv[1]) / "checkpoints" / checkpoint.file_name(step)
    checkpoint.write(path, {"progress": {"step": step}, "method": {"w": torch.zeros(3_000_000)}})
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(checkpoint.all_in(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    found = checkpoint.all_in(tmp_path)
    assert len(found) >= 3
    for path in found[-3:]:
        assert checkpoint.read(path)["progress"]["step"] == checkpoint.step_of(path)


def test_the_store_keeps_the_newest_and_one_every_so_many_epochs(tmp_path: Path):
    store = checkpoint.Store(tmp_path, Keep(last=2, every_epochs=2), steps_per_epoch=5)
    for step in range(5, 50, 5):
        store.save(step, state(step))
    store.close()
    assert [checkpoint.step_of(path) for path in checkpoint.all_in(tmp_path)] == [10, 20, 30, 40, 45]
    assert (tmp_path / "checkpoints" / "last").resolve().name == checkpoint.file_name(45)


def test_a_failed_background_write_is_reported(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("in the way")
    store = checkpoint.Store(tmp_path, Keep(), steps_per_epoch=1)
    store.save(1, state(1))
    with pytest.raises(SslError, match="cannot write checkpoint"):
        store.close()


def test_the_state_is_copied_before_training_goes_on(tmp_path: Path):
    store = checkpoint.Store(tmp_path, Keep(), steps_per_epoch=1)
    weights = torch.zeros(1000)
    store.save(1, {"progress": {"step": 1}, "method": {"w": weights}})
    weights += 1
    store.close()
    assert checkpoint.read(checkpoint.newest(tmp_path))["method"]["w"].sum() == 0
