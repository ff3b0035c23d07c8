"""curves.png: how a run went, in one small picture."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sslcli.runs.folder import HEALTH, METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm", "images_per_second": "images / s"}
SHARES = {"rank_share": "rank / most possible", "spread": "spread", "method_spread": "spread in the loss"}
VERDICTS = {"healthy": "#3a9a4b", "warning": "#e0a020", "collapsed": "#c62f2f"}
POINTS = 500
SMOOTH_FROM = 60
BLUE, GREY = "#2a6fb0", "#b8cbe0"


def draw(run: Path) -> None:
    """Draw `curves.png` from the metrics of a run folder: loss, learning rate, gradient norm, images/s over epochs.

    Where the features were looked at, their health and, where labels were there, nearest neighbours stand beside.
    A run without metrics gets no picture; where the disk is full the old picture stays.
    """
    rows, looks = read_metrics(run / METRICS), read_metrics(run / HEALTH)
    if not rows:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 3 if looks else 2
    figure = Figure(figsize=(4.5 * columns, 5.2), dpi=100)
    figure.subplots_adjust(0.14 / columns, 0.09, 1 - 0.03 / columns, 0.89, wspace=0.16, hspace=0.2)
    FigureCanvasAgg(figure)
    figure.suptitle(f"{run.resolve().name}, step {rows[-1]['step']}", fontsize=11)
    panels = figure.subplots(2, columns, sharex=True)
    rows = thinned(rows, POINTS)
    for axes, (key, title) in zip(panels[:, :2].flat, PANELS.items(), strict=True):
        _panel(axes, _epochs(rows), [_number(row.get(key)) for row in rows], title)
    if looks:
        looks = thinned(looks, POINTS)
        _health_panel(panels[0, 2], looks)
        key, title = ("knn", "kNN, % right") if "knn" in looks[-1] else ("view_ratio", "distance of views / of images")
        _panel(panels[1, 2], _epochs(looks), [_number(row.get(key)) for row in looks], title)
    for axes in panels[1]:
        axes.set_xlabel("epoch")
    temporary = run / f".curves.{os.getpid()}.tmp"
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(run / "curves.png")
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _frame(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _panel(axes: "Axes", epochs: Sequence[float], values: Sequence[float], title: str) -> None:
    finite = [value for value in values if math.isfinite(value)]
    _frame(axes, title)
    if not finite:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color="grey")
        return
    noisy = title != PANELS["lr"] and len(values) >= SMOOTH_FROM
    axes.plot(epochs, values, color=GREY if noisy else BLUE, linewidth=1, marker="o" if len(values) == 1 else None)
    if noisy:
        axes.plot(epochs, smoothed(values, len(values) // 60), color=BLUE, linewidth=1.5)
    if min(finite) > 0 and max(finite) > 100 * median(finite) and title != PANELS["lr"]:
        axes.set_yscale("log")
    elif title != PANELS["loss"]:
        axes.set_ylim(bottom=min(0.0, min(finite)))


def _health_panel(axes: "Axes", looks: Sequence[dict[str, Any]]) -> None:
    """Shares of what features could be, from 0 to 1, and above them each verdict as a dot of its colour."""
    epochs = _epochs(looks)
    _frame(axes, f"health: {looks[-1].get('health', '?')}")
    for (key, name), colour in zip(SHARES.items(), (BLUE, "#7fb3e0", "#555555"), strict=True):
        values = [_number(row.get(key)) for row in looks]
        if any(map(math.isfinite, values)):
            axes.plot(epochs, values, color=colour, linewidth=1.5, label=name, marker="." if len(values) == 1 else None)
    axes.scatter(epochs, [1.05] * len(looks), s=9, c=[VERDICTS.get(str(row.get("health")), "grey") for row in looks])
    axes.set_ylim(0, 1.1)
    axes.legend(fontsize=8, frameon=False)


def thinned(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of the rows, evenly spread, the last one always among them."""
    stride = -(-len(rows) // most)
    return list(rows[::-1][::stride][::-1])


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean over each value and `width` neighbours on either side, the finite ones; NaN where there are none."""
    result = []
    for middle in range(len(values)):
        near = [value for value in values[max(0, middle - width) : middle + width + 1] if math.isfinite(value)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def _epochs(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [float(row.get("epoch", row["step"])) for row in rows]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
