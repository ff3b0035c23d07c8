"""Pictures of what a preset does to images, before anything is trained."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslcli.config.presets import PretrainPreset
from sslcli.config.views import EvalView
from sslcli.data.source import U8, Source, UnreadableImage
from sslcli.errors import DataError
from sslcli.seeds import permuted, seed_of
from sslcli.views import Row, Seen, Views, build, build_eval, page, rows_of

CANDIDATES = 1000
"""Images that are tried at most in search of readable ones."""
CAPTION = 18
"""Letters of a name that fit over a picture."""


def views_page(preset: PretrainPreset, source: Source, *, images: int, epochs: int) -> Image.Image:
    """What the network of a preset sees of a few images in its first epochs: one column per image.

    The first row shows the image as evaluation looks at it. Which images is a function of the preset's seed.

    Raises:
        DataError: none of a thousand images can be read.
    """
    index, pictures = chosen(source, images, preset.seed)
    views = build(preset.views, seed_of(preset.seed, "views"))
    eval_view = preset.views.eval_view
    rows = [Row(f"evaluation\n{eval_view.size} px", plain(pictures, eval_view), eval_view.normalize)]
    for epoch in range(epochs):
        seen = seen_of(views, pictures, index, epoch, slowly=preset.run.views == "reference")
        rows += [row._replace(name=f"epoch {epoch + 1}\n{row.name}") for row in rows_of(seen, preset.views)]
    captions = [source.name(int(one))[-CAPTION:] for one in index]
    return page(rows, captions)


def chosen(source: Source, count: int, seed: int) -> tuple[np.ndarray, list[U8]]:
    """Up to `count` readable images of a source, spread over it by the seed: their numbers and pixels."""
    found: dict[int, U8] = {}
    for position in range(min(len(source), CANDIDATES + count)):
        index = permuted(position, len(source), seed_of(seed, "show"))
        with suppress(UnreadableImage):
            found[index] = source.read(index)
        if len(found) == count:
            break
    if not found:
        raise DataError(
            f"none of {min(len(source), CANDIDATES)} images can be read, e.g. `{source.name(0)}`",
            hint="point `--data` at readable images",
        )
    return np.array(list(found)), list(found.values())


def seen_of(views: Views, images: Sequence[U8], index: np.ndarray, epoch: int, *, slowly: bool) -> Seen:
    """What training sees of these images in an epoch; `slowly` in the reference reading."""
    look = views.reference if slowly else views.crop
    each = [look(image, int(one), epoch) for image, one in zip(images, index, strict=True)]
    parts = [torch.from_numpy(np.stack(part)) for part in zip(*each, strict=True)]
    return views.arrange(parts if slowly else views.finish(parts, index, epoch), index, epoch)


def plain(images: Sequence[U8], view: EvalView) -> Tensor:
    """Images as evaluation looks at them: (B, 3, s, s) float32, standardised."""
    look = build_eval(view)
    return look.finish(torch.from_numpy(np.stack([look.crop(image) for image in images])))
