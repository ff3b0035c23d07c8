"""Images as sequences of square patches, some of them masked."""

import torch
from torch import Tensor

from sslcli.errors import UserError


def patches_of(images: Tensor, side: int) -> Tensor:
    """Cut images (B, 3, H, W) into patches (B, N, side * side * 3) in row-major order.

    Inside a patch, pixels are in row-major order and the three colours of a pixel stand together.
    """
    batch, colours, height, width = images.shape
    grid = images.reshape(batch, colours, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * colours)


def images_of(patches: Tensor, side: int, height: int, width: int) -> Tensor:
    """Undo `patches_of`: patches (B, N, side * side * 3) to images (B, 3, height, width)."""
    grid = patches.reshape(len(patches), height // side, width // side, side, side, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)


def as_pixels(masks: Tensor, side: int, height: int, width: int) -> Tensor:
    """Masks of patches (B, N) as masks of pixels (B, 1, height, width)."""
    grid = masks.reshape(len(masks), 1, height // side, width // side)
    return grid.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


def replaced(patches: Tensor, masks: Tensor, token: Tensor) -> Tensor:
    """Embeddings of patches, (B, N, D) or (B, h, w, D), with `token` (D,) where masks (B, N) are True.

    Raises:
        UserError: there are other numbers of patches than of places in a mask.
    """
    fits(masks, patches[..., 0].numel() // len(patches))
    return torch.where(masks.reshape(patches.shape[:-1]).unsqueeze(-1), token.to(patches.dtype), patches)


def visible_and_masked(masks: Tensor, masked: int | None) -> tuple[Tensor, Tensor]:
    """Numbers of the visible patches (B, N - M) and of the masked ones (B, M) of every image, in row-major order.

    Args:
        masks: (B, N) bool, True where a patch is masked, equally many in every row.
        masked: M, where it is known; counting it waits for the device.

    Raises:
        UserError: M is not known and differs from image to image.
    """
    if masked is None:
        counts = masks.sum(dim=1)
        masked = int(counts[0])
        if bool((counts != masked).any()):
            raise UserError(
                "the masks of a batch hide different numbers of patches",
                hint="use `views.mask.name=random`, or `views.mask.exact=true` with blocks",
            )
    order = masks.byte().argsort(dim=1, stable=True)  # (B, N)
    return order[:, : masks.shape[1] - masked], order[:, masks.shape[1] - masked :]


def fits(masks: Tensor, patches: int) -> None:
    """Make sure that masks (B, N) are made for so many patches.

    Raises:
        UserError: they are not.
    """
    if masks.shape[1] != patches:
        raise UserError(
            f"masks are drawn for {masks.shape[1]} patches, but the network cuts an image into {patches}",
            hint="set `views.patch` to the backbone's patch size",
        )


def check_sizes(width: int, heads: int, image_size: int, patch: int, *, sincos: bool) -> None:
    """Refuse sizes of a vision transformer that do not go together.

    Raises:
        ValueError: says which two.
    """
    if width % heads:
        raise ValueError(f"the number of heads must divide the width (got {heads} and {width})")
    if sincos and width % 4:
        raise ValueError(f"`positions: sincos` needs a width that 4 divides (got {width})")
    if image_size % patch:
        raise ValueError(f"`patch` must divide `image_size` (got {patch} and {image_size})")
