import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslcli.runs.curves import draw, smoothed, thinned


def write(folder: Path, losses: list[float]) -> None:
    rows = [
        {"step": i, "epoch": i / 5, "loss": loss, "lr": 0.1, "grad_norm": 10.0**i, "images_per_second": 9.0}
        for i, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ink(path: Path) -> np.ndarray:
    """Share of coloured pixels in each quarter of the picture: the drawn lines."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    coloured = np.ptp(pixels, axis=2) > 20
    return np.array([half.mean() for band in np.array_split(coloured, 2) for half in np.array_split(band, 2, axis=1)])


@pytest.mark.parametrize("count", [1, 2, 200])
def test_each_panel_shows_its_curve(tmp_path: Path, count: int) -> None:
    write(tmp_path, [3.0 / i for i in range(1, count + 1)])
    draw(tmp_path)
    assert (ink(tmp_path / "curves.png") > 0).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_numbers_that_are_none_leave_gaps(tmp_path: Path) -> None:
    write(tmp_path, [math.nan] * 3)
    draw(tmp_path)
    loss, *others = ink(tmp_path / "curves.png")
    assert loss == 0
    assert min(others) > 0


def test_no_metrics_give_no_picture(tmp_path: Path) -> None:
    draw(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_renews_its_picture(tmp_path: Path) -> None:
    write(tmp_path, [3.0, 2.0])
    draw(tmp_path)
    first = (tmp_path / "curves.png").read_bytes()
    write(tmp_path, [3.0, 2.0, 9.0])
    draw(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() != first


def test_where_nothing_can_be_written_the_run_goes_on(tmp_path: Path) -> None:
    write(tmp_path, [3.0, 2.0])
    (tmp_path / "curves.png").mkdir()
    draw(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_thinning_keeps_the_last_row() -> None:
    rows = [{"step": step} for step in range(1, 1002)]
    kept = [row["step"] for row in thinned(rows, 500)]
    assert kept == list(range(2, 1002, 3))
    assert thinned(rows[:10], 500) == rows[:10]


def test_smoothing_is_a_centred_mean_that_skips_gaps() -> None:
    assert smoothed([1.0, 2.0, 6.0, math.nan, 8.0], 1) == [1.5, 3.0, 4.0, 7.0, 8.0]
    assert math.isnan(smoothed([math.nan], 3)[0])
