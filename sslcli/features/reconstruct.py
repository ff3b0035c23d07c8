"""Pictures of what a masked-image method paints in place of what it has not seen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sslcli.config.views import Masked
from sslcli.data.decode import read_image
from sslcli.data.source import UnreadableImage
from sslcli.engine import checkpoint
from sslcli.engine.show import CAPTION, plain
from sslcli.errors import DataError, UserError
from sslcli.features.weights import method_at
from sslcli.seeds import seed_of
from sslcli.views import Row, draw_masks, hidden, page


def reconstruction_page(run: Path, images: Sequence[Path], *, seed: int) -> Image.Image:
    """Each image with patches hidden, with the method's painting in their place, and whole; one image a column.

    Which patches are hidden is a function of the seed and of the image's place in the list.

    Args:
        run: run folder, or one of its checkpoints.
        images: image files.
        seed: which patches are hidden.

    Raises:
        UserError: the run's method does not paint.
        DataError: an image cannot be read.
    """
    method, preset, _ = method_at(checkpoint.meant(run))
    views, name = preset.views, preset.method.name
    if not isinstance(views, Masked):
        raise _does_not_paint(name)
    pictures = []
    for path in images:
        try:
            pictures.append(read_image(bytes(path), str(path)))
        except UnreadableImage as error:
            raise DataError(f"cannot read the image `{path}`: {error.reason}", hint="give image files") from None
    originals = plain(pictures, views.eval_view)  # (B, 3, s, s)
    places = np.arange(len(pictures))
    drawn = torch.from_numpy(
        draw_masks(views.mask, seed_of(seed, "reconstruction"), 0, places, views.crop.size, views.patch)
    )
    with torch.no_grad():
        painted = method.eval().reconstruction(originals, drawn)
    if painted is None:
        raise _does_not_paint(name)
    masked = hidden(originals, drawn)
    seen = hidden(torch.ones_like(originals), drawn)
    shown = {"masked": masked, "painted": masked + painted * (1 - seen), "original": originals}
    rows = [Row(what, some, views.normalize) for what, some in shown.items()]
    return page(rows, [path.name[-CAPTION:] for path in images])


def _does_not_paint(name: str) -> UserError:
    return UserError(
        f"the method `{name}` paints no images", hint="give a run of a method that does, such as `mae` or `simmim`"
    )
