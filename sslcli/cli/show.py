"""ssl show: pictures of what a network sees, of what it finds alike, and of what it paints."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sslcli.cli.options import DataDir, Override, Preset

if TYPE_CHECKING:
    from PIL import Image

app = typer.Typer(
    name="show",
    help="Pictures of views, clusters and reconstructions.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option("--out", help="Picture to write, e.g. `views.png`.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Which images are shown.")]


@app.command()
def views(
    preset: Preset,
    out: Out,
    data: DataDir = None,
    images: Annotated[int, typer.Option("--images", min=1, max=64, help="How many images.")] = 8,
    epochs: Annotated[int, typer.Option("--epochs", min=1, max=16, help="How many epochs.")] = 2,
    override: Override = None,
) -> None:
    """Draw what the network sees of a few images, epoch by epoch, with nothing trained."""
    from sslcli.cli.pretrain import image_flags
    from sslcli.config.load import load
    from sslcli.data import open_source
    from sslcli.engine.show import views_page

    found = load("pretrain", preset, override or (), image_flags(data)).preset
    _written(views_page(found, open_source(found.data.source), images=images, epochs=epochs), out)
    print(f"next: ssl pretrain --preset {preset}", file=sys.stderr)


@app.command()
def clusters(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or one of its checkpoints.")],
    out: Out,
    data: DataDir = None,
    rows: Annotated[int, typer.Option("--rows", min=1, max=100, help="How many clusters.")] = 12,
    images: Annotated[int, typer.Option("--images", min=1, max=64, help="How many images of each.")] = 10,
    pick: Annotated[
        Literal["largest", "random"], typer.Option("--pick", metavar="largest|random", help="Which clusters.")
    ] = "largest",
    k: Annotated[
        int | None, typer.Option("--k", min=2, help="Cluster the features into so many, whatever the method says.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=2, help="With `--k`: images that are clustered at most.")] = 5000,
    seed: Seed = 0,
) -> None:
    """Draw some images of some clusters: those of the run's method, or of k-means over its features."""
    from sslcli import dist
    from sslcli.cli.terminal import Passes
    from sslcli.data import guess_source, open_source
    from sslcli.errors import UserError
    from sslcli.features import clusters as made
    from sslcli.features import weights as stored

    with dist.joined(), Passes() as passes:
        found = made.of_run(run) if k is None else None
        if found is None and k is None:
            raise UserError(
                f"the method of `{run}` keeps no clusters", hint="say into how many its features are put, e.g. `--k 50`"
            )
        weights = stored.load(run)
        preset = weights.preset()
        if found is not None and data is not None:
            raise UserError(
                "the method's clusters are of the run's own images", hint="leave out `--data`, or add `--k`"
            )
        source = open_source(preset.data.source if data is None else guess_source(data))
        if found is None:
            found = made.of_features(weights, source, k or 0, limit=limit, seed=seed, progress=passes("images"))
        elif len(found.labels) != len(source):
            raise UserError(
                f"the run clustered {len(found.labels)} images, and its source now has {len(source)}",
                hint="restore the images, or add `--k`",
            )
        view = weights.manifest.view
        sheet = made.clusters_page(found, source, view, rows=rows, columns=images, pick=pick, seed=seed)
    _written(sheet, out)


@app.command()
def reconstruction(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or one of its checkpoints.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    out: Out,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which patches are hidden.")] = 0,
) -> None:
    """Draw images with patches hidden as in training, what a masked-image method paints there, and the originals."""
    from sslcli.features.reconstruct import reconstruction_page

    _written(reconstruction_page(run, images, seed=seed), out)


def _written(sheet: "Image.Image", out: Path) -> None:
    from sslcli.errors import UserError

    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write `{out}`: {error}", hint="give a file that ends in `.png`") from None
    print(out)
