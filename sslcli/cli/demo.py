"""ssl demo: everything once, from images to a number, offline."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslcli.cli.options import DataDir, Override
from sslcli.cli.terminal import Terminal

if TYPE_CHECKING:
    from sslcli.evaluate._job import Outcome
    from sslcli.features.weights import Weights

EVALUATORS = {"kNN": "knn", "linear": "linear_cached"}
COLUMNS = ("raw pixels", "untrained", "learned")


def demo(
    data: DataDir = None,
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
    override: Override = None,
) -> None:
    """Pretrain on real handwriting in random colours (or your own images), extract the backbone, say what it learned.

    Takes about five minutes on two CPU cores and needs no network.
    """
    from sslcli.cli.pretrain import image_flags
    from sslcli.config.load import load
    from sslcli.engine.pretrain import pretrain
    from sslcli.features import weights
    from sslcli.runs import ledger
    from sslcli.runs.curves import draw

    preset = load("pretrain", "demo-digits", override or (), image_flags(data)).preset
    with Terminal() as terminal:
        pretrain(preset, out, watcher=terminal, draw=draw)
        target = out / weights.FILE
        weights.extract(out, target)
        learned = weights.load(target)
        found: dict[str, Outcome] = {}
        for name, evaluator in EVALUATORS.items():
            outcome = _judge(learned, evaluator, terminal)
            if outcome is None:
                continue
            found[name] = outcome
            ledger.append(out, outcome.report)
            for warning in outcome.warnings:
                terminal.say(f"warning: {warning}")
        if found:
            print(table(found))
        terminal.say(f"backbone  {target}")
        terminal.say(f"curves    {out / 'curves.png'}")
        terminal.say(f"views     {out / 'views.png'}")
        terminal.say(f"next: ssl runs show {out}")


def _judge(learned: "Weights", evaluator: str, terminal: Terminal) -> "Outcome | None":
    """The newest protocol's verdict, or None (said so) where the images have no labels or no test images."""
    from sslcli.cli.evaluate import newest, protocol_of
    from sslcli.errors import DataError
    from sslcli.evaluate._job import evaluate

    protocol = protocol_of(evaluator, newest(evaluator), (), None, {}, learned.file)
    try:
        return evaluate(learned, protocol, floors=True, passes=lambda title: None)
    except DataError as error:
        terminal.say(f"no {protocol.name} number: {error.message}")
        return None


def table(found: Mapping[str, "Outcome"]) -> str:
    """Raw pixels, the untrained network and what was learned, side by side, in percent."""
    rows = [f"{'top-1 accuracy, %':<20}" + "".join(f"{column:>12}" for column in COLUMNS)]
    for name, outcome in found.items():
        headline = outcome.report.details["headline"]
        values = [outcome.columns[column].metrics[headline] for column in COLUMNS]
        rows.append(f"{f'{name} ({headline})':<20}" + "".join(f"{value:>12.1f}" for value in values))
    return "\n".join(rows)
