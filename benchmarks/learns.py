"""Does each method learn? Every method's `<method>-cifar10-cpu` preset, trained whole and judged on frozen features.

kNN (k = 20) on the training images' features, tested on the test images, beside the same for the untrained network and
for raw pixels, and the health verdict of the run's last look at its own features. `--linear` adds logistic regression,
which takes as long as a short training: masked-image methods are better judged by it.

    python benchmarks/learns.py [METHOD ...] --train DIR --test DIR [--linear] [--out DIR] [-o KEY=VALUE ...]

DIR holds one folder per class. A run that `--out` already holds is not trained again. Prints a Markdown table, and the
rows as JSON lines into `--out`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).parent.parent / "presets" / "pretrain"
ENDING = "-cifar10-cpu"
COLUMNS = ("learned", "untrained", "raw pixels")


def ssl(*arguments: object) -> str:
    """Run a command of ssl, its messages on this terminal; gives what it printed.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "sslcli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def processor_minutes() -> float:
    """Processor time of all finished children so far."""
    used = os.times()
    return (used.children_user + used.children_system) / 60


def trained(method: str, run: Path, train: Path, overrides: list[str]) -> float | None:
    """Train a method to the end; the processor minutes it took, None where it was done before."""
    given = [word for override in overrides for word in ("-o", override)]
    before, finished = processor_minutes(), (run / "status.json").exists() and status(run)["state"] == "finished"
    if not finished:
        ssl("pretrain", "--preset", method + ENDING, "--data", train, "--out", run, *given)
    return None if finished else processor_minutes() - before


def status(run: Path) -> dict[str, Any]:
    """What the run last said of itself."""
    said: dict[str, Any] = json.loads((run / "status.json").read_text(encoding="utf-8"))
    return said


def judged(evaluator: str, metric: str, run: Path, train: Path, test: Path) -> dict[str, float]:
    """A metric of the learned features, of the untrained network's, and of raw pixels."""
    report = json.loads(ssl("eval", evaluator, run, "--train", train, "--test", test, "--floors", "--json"))
    floors = report["details"]["floors"]
    return {"learned": report["metrics"][metric], **{name: floors[name][metric] for name in floors}}


def row_of(method: str, train: Path, test: Path, out: Path, overrides: list[str], *, linear: bool) -> dict[str, Any]:
    """One method, from nothing to its numbers."""
    run = out / method
    minutes = trained(method, run, train, overrides)
    knn = judged("knn", "top1_k20", run, train, test)
    known = {row["method"]: row for row in rows_in(out)}.get(method, {})
    return {
        "method": method,
        "minutes": known.get("minutes") if minutes is None else round(minutes, 1),
        "knn": knn,
        "linear": judged("linear-cached", "top1", run, train, test) if linear else known.get("linear"),
        "health": status(run).get("health"),
    }


def rows_in(out: Path) -> list[dict[str, Any]]:
    """The rows written so far."""
    file = out / "rows.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown; in a cell what was learned, the untrained network, raw pixels."""
    lines = [
        "| method | processor minutes | kNN, % | logistic regression, % | health |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            " / ".join(f"{row[name][column]:.1f}" for column in COLUMNS) if row[name] else "-"
            for name in ("knn", "linear")
        ]
        lines.append(f"| {row['method']} | {row['minutes']} | {cells[0]} | {cells[1]} | {row['health']} |")
    return "\n".join(lines)


def main() -> None:
    """Train and judge the methods named, or all that have a preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/learns"))
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    every = sorted(file.stem.removesuffix(ENDING) for file in PRESETS.glob(f"*{ENDING}.yaml"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for method in arguments.methods or every:
        images = arguments.train, arguments.test
        row = row_of(method, *images, arguments.out, arguments.overrides, linear=arguments.linear)
        rows = [*(old for old in rows_in(arguments.out) if old["method"] != method), row]
        text = "".join(json.dumps(each) + "\n" for each in sorted(rows, key=lambda each: each["method"]))
        (arguments.out / "rows.jsonl").write_text(text, encoding="utf-8")
    print(table(rows_in(arguments.out)))


if __name__ == "__main__":
    main()
