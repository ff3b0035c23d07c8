"""ssl tsne: which images does a network find alike?"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from sslcli.cli.features import Partial, Target, share
from sslcli.cli.options import Gpus, Procs
from sslcli.cli.terminal import Passes
from sslcli.errors import UserError


def tsne(
    target: Target,
    data: Annotated[Path, typer.Option("--data", help="Images: a folder, a list file or an .npz.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.png|.html", help="The picture or page to write.")],
    images: Annotated[int, typer.Option("--images", min=5, help="Show at most so many, drawn by the seed.")] = 2000,
    tap: Annotated[str, typer.Option("--tap", help="Which features, e.g. `layer3`.")] = "pooled",
    method: Annotated[
        str, typer.Option("--method", metavar="tsne|umap", help="How they come into the plane.")
    ] = "tsne",
    perplexity: Annotated[
        float, typer.Option("--perplexity", min=1, help="About how many neighbours count for each image.")
    ] = 30.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of every draw.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")] = 256,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Loader processes per rank.")] = None,
    gpus: Gpus = None,
    procs: Procs = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither use features that are kept nor keep any.")
    ] = False,
    allow_partial: Partial = False,
) -> None:
    """Draw images as points: those a network finds alike lie near each other.

    An .html page shows the image under the pointer, and needs no network.
    """
    from sslcli import dist
    from sslcli.data import guess_source, open_source
    from sslcli.evaluate._job import folder_of
    from sslcli.features import weights as stored
    from sslcli.features.cache import FOLDER, Cache, remembered
    from sslcli.features.compute import of_network
    from sslcli.features.embed import few, in_plane
    from sslcli.runs import scatter
    from sslcli.runs.folder import Run

    if out.suffix not in (".png", ".html"):
        raise UserError(f"`--out {out}` ends neither in `.png` nor in `.html`", hint=f"use `--out {out.stem}.html`")
    if method not in ("tsne", "umap"):
        raise UserError(f"`--method {method}`: there is `tsne` and `umap`")
    how: Literal["tsne", "umap"] = "tsne" if method == "tsne" else "umap"
    source = few(open_source(guess_source(data)), images, seed)
    share(gpus, procs)
    with dist.joined(), Passes() as passes:
        weights = stored.load(target, allow_partial=allow_partial)
        view, told = weights.manifest.view, passes("images")
        table = remembered(
            None if no_cache else Cache(folder_of(weights) / FOLDER), source, view, (tap,), {"weights": weights.digest},
            lambda taps, room: of_network(
                weights.backbone, source, view, taps, what="weights", digest=weights.digest, batch_size=batch_size,
                workers=workers, progress=told, room=room,
            ),
        )  # fmt: skip
    if table is None:
        return
    table.check_finite("the images")
    points = in_plane(table.tap(tap), how, seed=seed, perplexity=perplexity)
    title = f"{target}: {len(table)} images of {data}, {tap}, {method}"
    if out.suffix == ".png":
        scatter.draw(points, table.labels, table.meta.classes, title, out)
    else:
        index = table.index.tolist()
        names, pictures = [source.name(i) for i in index], [source.read(i) for i in index]
        scatter.page(points, table.labels, table.meta.classes, names, pictures, title, out)
    print(out)
    if out.suffix == ".html":
        step = "open it in a browser"
    elif table.labels is None:  # nothing to judge by; with a page one sees what lies together
        step = shlex.join(["ssl", "tsne", str(target), "--data", str(data), "--out", str(out.with_suffix(".html"))])
    elif weights.run is not None:
        step = Run(weights.run).evaluation
    else:
        step = f"ssl eval knn {target} --train DIR --test DIR"
    print(f"next: {step}", file=sys.stderr)
