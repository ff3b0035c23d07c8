"""What did the user ask? Command line only: load a preset, call the job, say where the result is."""

import os
import sys
import traceback
from typing import Annotated

import typer

from sslcli import __version__
from sslcli.cli import (
    bench,
    convert,
    count,
    data,
    demo,
    doctor,
    evaluate,
    extract,
    features,
    inspect,
    methods,
    presets,
    pretrain,
    publish,
    runs,
    show,
    tsne,
    verify,
)
from sslcli.errors import SslError, StoppedOnRequest

app = typer.Typer(
    name="ssl",
    help="Self-supervised visual representation learning. (Not the TLS library.)",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"ssl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere in the command.")] = False,
) -> None:
    """Self-supervised visual representation learning; not the TLS library."""


app.command("pretrain")(pretrain.pretrain)
app.command("resume")(pretrain.resume)
app.command("extract-backbone")(extract.extract_backbone)
app.command("extract", hidden=True)(extract.extract_backbone)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("features")(features.features)
app.command("tsne")(tsne.tsne)
app.add_typer(evaluate.app, name="eval")
for _name in evaluate.SHORT:
    if _name in evaluate.COMMANDS:
        app.command(_name, hidden=True)(evaluate.COMMANDS[_name])
app.command("demo")(demo.demo)
app.add_typer(presets.app, name="presets")
app.add_typer(data.app, name="data")
app.add_typer(runs.app, name="runs")
app.add_typer(show.app, name="show")
app.add_typer(verify.app, name="verify")
app.command("bench")(bench.bench)
app.command("publish")(publish.publish)
app.command("count")(count.count)
app.command("methods")(methods.methods)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """The `ssl` command: every user's error ends here, in one line."""
    if "--debug" in sys.argv[1:]:
        sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word != "--debug")]
        os.environ["SSL_DEBUG"] = "1"
    try:
        app()
    except SslError as error:
        report(error)
        sys.exit(error.exit_code)


def report(error: SslError) -> None:
    """Print an error for a person: one line and a hint; of several ranks only the first speaks."""
    if os.environ.get("SSL_DEBUG"):
        traceback.print_exception(error)
    if os.environ.get("RANK", "0") != "0":
        return
    kind = "stopped" if isinstance(error, StoppedOnRequest) else "error"
    print(f"{kind}: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"\nhint: {error.hint}", file=sys.stderr)
