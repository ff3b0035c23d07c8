import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sslcli.cli import app, doctor
from sslcli.cli.doctor import Check


def test_this_machine_is_ready():
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 0, result.stdout
    assert {"python", "torch", "import sklearn", "gpu", "ranks", "cpu", "memory", "disk", "folder"} <= checks.keys()
    assert {"wandb", "detectron2", "presets", "precision", "compute"} <= checks.keys()
    assert checks["presets"]["state"] == "ok"
    assert all(check["fix"] for check in checks.values() if check["state"] != "ok")
    assert "gloo" in checks["ranks"]["found"]


def test_something_essential_that_is_broken_ends_in_1(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "CORE", ("torch", "ssl-needs-this"))
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "fail  ssl-needs-this" in result.stdout
    assert "fix: `pip install ssl-needs-this`" in result.stdout
    assert "broken: ssl-needs-this" in result.stderr


def test_a_package_that_does_not_load_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "half_installed.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.loadable("half_installed")
    assert (found.state, found.found) == ("fail", "operator torchvision::nms does not exist")
    assert found.fix


def test_too_little_of_anything_is_a_warning_with_a_fix(tmp_path: Path):
    tight = [
        doctor.memory(1e9),
        doctor.disk(tmp_path, 1e9),
        doctor.shared_memory(64e6),
        doctor.writable(tmp_path / "absent"),
    ]
    assert [check.state for check in tight] == ["warn"] * 4
    assert all(check.fix for check in tight)
    plenty = [doctor.memory(16e9), doctor.disk(tmp_path, 1e11), doctor.shared_memory(8e9), doctor.writable(tmp_path)]
    assert [check.state for check in plenty] == ["ok"] * 4
    assert not list(tmp_path.iterdir())


def test_an_old_python_cannot_be_used():
    assert doctor.python((3, 10, 4)).state == "fail"
    assert doctor.python((3, 11, 0)).state == "ok"


def test_the_listing_is_one_line_per_check_and_one_per_fix():
    checks = [Check("a", "ok", "fine"), Check("long name", "warn", "little", "get more")]
    assert doctor.listing(checks).splitlines() == [
        "ok    a          fine",
        "warn  long name  little",
        "                 fix: get more",
    ]
