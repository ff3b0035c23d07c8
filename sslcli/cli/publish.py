"""ssl publish: from a run to files that can be handed on."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslcli.cli.options import Json
from sslcli.cli.terminal import Passes
from sslcli.config.spelling import none_such
from sslcli.errors import UserError

if TYPE_CHECKING:
    from sslcli.evaluate._job import Protocol
    from sslcli.features.weights import Weights
    from sslcli.publish import Result


def publish(
    what: Annotated[Path, typer.Argument(metavar="RUN|WEIGHTS", help="Run folder, checkpoint or file of weights.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for weights, description and card.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Of the model; the preset's, or method and backbone, when absent.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="SPDX identifier, e.g. Apache-2.0.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Heads and slow twins too, in a second file, for `--init-from`.")
    ] = False,
    verify: Annotated[
        str | None,
        typer.Option("--verify", metavar="PROTOCOL", help="Repeat this evaluation with the published file."),
    ] = None,
    allow_unfinished: Annotated[
        bool, typer.Option("--allow-unfinished", help="Publish a run that is not at its end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write weights under a name with their digest, a description and a model card."""
    from sslcli import publish as job
    from sslcli.features.weights import load
    from sslcli.runs.folder import Run, is_run

    weights = load(what)
    results = _results(weights)
    protocol = None if verify is None else _protocol(weights, results, verify)
    preset_name = Run(weights.run).preset_name if weights.run is not None and is_run(weights.run) else None
    chosen = name or Path(preset_name or f"{weights.manifest.method}-{weights.manifest.backbone['name']}").stem
    done = job.publish(
        weights, out, results, name=chosen, licence=licence, full=full, allow_unfinished=allow_unfinished
    )
    known = {result.protocol: result.metrics for result in results}
    checked = None if protocol is None or verify is None else _verified(done.weights, protocol, known[verify])
    if as_json:
        facts: dict[str, Any] = {
            "weights": str(done.weights),
            "full": done.full and str(done.full),
            "card": str(done.card),
        }
        print(
            json.dumps({**facts, "description": done.published.model_dump(mode="json"), "verified": checked}, indent=2)
        )
        return
    manifest = done.published.manifest
    print(f"{manifest.tensors} tensors written and read back: the same to the last bit", file=sys.stderr)
    if done.left_out:
        print(f"left out, being of other weights: {', '.join(done.left_out)}", file=sys.stderr)
    if not done.published.results:
        print(f"note: no evaluation goes with it; `ssl eval knn {what}` makes one", file=sys.stderr)
    if licence is None:
        print("note: without `--licence`, nobody may use it", file=sys.stderr)
    if checked is not None:
        print(f"{verify} repeated with the published file: largest difference {checked:.2f} points", file=sys.stderr)
    for path in (done.weights, done.full, done.description, done.card):
        if path is not None:
            print(path)
    print(f"next: ssl eval knn {done.weights} --data DIR", file=sys.stderr)


def _results(weights: "Weights") -> "list[Result]":
    """Reports that lie beside the weights."""
    from sslcli.publish import Result
    from sslcli.runs import ledger

    return [
        Result(protocol=entry.protocol, metrics=entry.metrics, details=entry.details)
        for entry in ledger.reports(weights.run or weights.file.parent)
    ]


def _protocol(weights: "Weights", results: "Sequence[Result]", name: str) -> "Protocol":
    """The protocol of a report on these weights, with its settings, seed and images.

    Raises:
        UserError: there is no such report, it does not say which images it is of, or it comes from training.
    """
    from sslcli.config.load import load
    from sslcli.config.supervised import TrainedConfig
    from sslcli.evaluate._job import Protocol

    known = {result.protocol: result for result in results}
    if name not in known or known[name].details["weights"]["digest"] != weights.digest:
        wrong = f"the report `{name}` is of other weights" if name in known else none_such(name, known)
        raise UserError(f"`--verify`: {wrong}", hint="make the report first, e.g. `ssl eval knn RUN`")
    details = known[name].details
    sources = {part: details[part].get("source") for part in ("train", "test")}
    if None in sources.values():
        raise UserError(
            f"`--verify {name}`: the report was made from stored features and does not say where the images are",
            hint="make it from images: `ssl eval … --data DIR`",
        )
    base = name.partition("@")[0]
    frozen = load("eval", base).preset
    if isinstance(frozen.evaluator, TrainedConfig):
        raise UserError(
            f"`--verify {name}`: this evaluation trains a classifier, and only those of stored features are repeated",
            hint="verify with one of those, e.g. `--verify knn-v1`; what is published holds the same numbers anyhow",
        )
    said: dict[str, Any] = {**sources, "evaluator": details["settings"], "seed": details["seed"]}
    flags = {key: (value, "the report") for key, value in said.items()}
    return Protocol(base, frozen, load("eval", base, (), flags).preset)


def _verified(file: Path, protocol: "Protocol", known: Mapping[str, float]) -> float:
    """Largest difference between a report and the same evaluation of the published file."""
    from sslcli.evaluate import _job
    from sslcli.features.weights import load
    from sslcli.publish import agreement

    with Passes() as passes:
        outcome = _job.evaluate(load(file), protocol, floors=False, passes=passes)
    assert outcome is not None
    return agreement(known, outcome.report.metrics)
