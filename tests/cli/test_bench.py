import json
from dataclasses import replace
from itertools import count

import pytest
from typer.testing import CliRunner

from sslcli.cli import app
from sslcli.config.load import load
from sslcli.engine import bench
from sslcli.engine.bench import Found, Stage

SMALL = (
    "-p", "demo-digits", "-o", "data.source.count=64", "-o", "data.batch_size=16", "-o", "backbone.width=8",
    "--seconds", "0",
)  # fmt: skip


def test_every_stage_is_timed_alone_and_together():
    result = CliRunner().invoke(app, ["bench", "run", *SMALL, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found["images_per_second"]) == ["loader", "views", "step", "run"]
    assert all(rate > 0 for rate in found["images_per_second"].values())
    assert found["bound"] in ("loader", "views", "step")
    assert found["batch_size"] == 16
    assert found["advice"]
    assert found["run_over_step"] > 0


def test_one_stage_is_timed_by_itself_and_nothing_is_judged():
    result = CliRunner().invoke(app, ["bench", "loader", *SMALL], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("loader")
    assert len(result.stdout.splitlines()) == 1
    assert "bounds" not in result.stderr


def test_what_cannot_be_timed_is_the_users_mistake():
    result = CliRunner().invoke(app, ["bench", "gradient", *SMALL])
    assert result.exit_code == 2
    assert "step" in result.stderr


def test_a_rate_counts_images_after_the_warmup(monkeypatch: pytest.MonkeyPatch):
    ticks = count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    work = iter([1000, 1000, 10, 10, 10])  # two for the warm-up
    assert bench.rate(work, warmup=2, seconds=0) == 30 / 2  # one look at the clock in between


class TestAdvice:
    """What to change, by what bounds the run."""

    FOUND = Found(
        load("pretrain", "demo-digits", []).preset, "cpu", dict.fromkeys((*Stage,), 100.0)
    )  # fmt: skip

    def slow(self, stage: Stage, device: str = "cpu") -> str:
        found = replace(self.FOUND, device=device, rates={**self.FOUND.rates, stage: 10.0})
        assert found.bound is stage
        return bench.advice(found)

    def test_names_the_stage_that_bounds_the_run(self):
        assert "ssl data pack" in self.slow(Stage.LOADER)
        assert "views bound" in self.slow(Stage.VIEWS)
        assert "network bounds" in self.slow(Stage.STEP)
        assert "data.workers=" in self.slow(Stage.LOADER, "NVIDIA H100")

    def test_says_nothing_of_a_single_stage(self):
        assert bench.advice(replace(self.FOUND, rates={Stage.STEP: 1.0})) == ""
