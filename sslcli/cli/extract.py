"""ssl extract-backbone: from a run to a weights file that other tools read."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sslcli.cli.options import Json


def extract_backbone(
    what: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Run folder, or one of its checkpoints.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; `backbone.safetensors` in the run folder when absent.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--format", metavar="torchvision|timm", help="Whose parameter names are wanted.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the backbone of a run as a safetensors file, and prove that it is the same network."""
    from sslcli.features.weights import extract

    done = extract(what, out, layout=layout)
    if as_json:
        facts = {"file": str(done.path), "matched": done.matched, "difference": done.difference}
        print(
            json.dumps({**facts, "already": done.already, "manifest": done.manifest.model_dump(mode="json")}, indent=2)
        )
        return
    if done.already:
        print(f"`{what}` is an extracted backbone already: nothing to do", file=sys.stderr)
    else:
        print(
            f"{done.matched} of {done.manifest.tensors} tensors written and read back, names as in "
            f"{done.manifest.layout}; largest difference of features {done.difference:g}",
            file=sys.stderr,
        )
    print(done.path)
    trained_on = done.manifest.source
    images = "" if trained_on is not None and trained_on.classes else " --train DIR --test DIR"  # no labels are known
    print(f"next: ssl eval knn {done.path}{images}", file=sys.stderr)
