"""MAE: from a quarter of an image's patches, paint the other three.

He et al. 2022, https://arxiv.org/abs/2111.06377.
"""

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn.needs import need_patches
from sslcli.nn.patches import fits, images_of, patches_of, visible_and_masked
from sslcli.nn.positions import sincos_positions
from sslcli.nn.precision import widen

EPS = 1e-6
"""Added to the variance of a patch."""


class Config(MethodConfig):
    """Masked autoencoder; the backbone sees the visible patches only, a light decoder is thrown away after training."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="masked", at_least=1, at_most=1, even=True)
    name: Literal["mae"] = "mae"
    width: Count = 512
    """Length of the decoder's tokens, a multiple of 4 and of the heads."""
    depth: Count = 8
    """Blocks of the decoder."""
    heads: Count = 16
    """Attention heads of the decoder."""
    normalized: bool = True
    """Paint every patch less its mean and over its standard deviation, instead of its colours (section 4.1)."""
    positions_first: Literal["row", "column"] = "column"
    """Coordinate in the first half of the decoder's positions: `column` in the authors' code, `row` in MMSelfSup."""


@final
class MAE(Method[Config]):
    """Backbone, decoder, and the token that stands for masked patches. Names are those of the authors' code."""

    decoder_pos_embed: Tensor

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        from timm.layers.norm import LayerNorm
        from timm.models.vision_transformer import Block

        need_patches(backbone, "mae")
        self.decoder_embed = nn.Linear(backbone.dim, cfg.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, cfg.width))
        self.decoder_blocks = nn.Sequential(
            *(Block(cfg.width, cfg.heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(cfg.depth))
        )
        self.decoder_norm = LayerNorm(cfg.width)
        self.decoder_pred = nn.Linear(cfg.width, backbone.patch**2 * 3)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(xavier_)
        nn.init.normal_(self.mask_token, std=0.02)
        positions = sincos_positions(
            cfg.width, backbone.grid, backbone.grid, first=cfg.positions_first, prefix=backbone.prefix
        )
        self.register_buffer("decoder_pos_embed", positions.unsqueeze(0))  # (1, prefix + N, D)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Mean squared error of the masked patches."""
        (images,), masks = batch.views, batch.masks
        assert masks is not None, "masked views have masks"
        painted = self.painted(images, masks, batch.masked)
        return StepResult(painting_loss(widen(painted), images, masks, normalized=self.cfg.normalized))

    def painted(self, images: Tensor, masks: Tensor, masked: int | None = None) -> Tensor:
        """What the decoder paints for all patches, (B, N, P), in the units of the loss.

        Args:
            images: (B, 3, H, W).
            masks: (B, N) bool, True where a patch is masked, equally many in every row.
            masked: how many, where it is known.
        """
        fits(masks, self.backbone.grid**2)
        seen, unseen = visible_and_masked(masks, masked)  # (B, N - M), (B, M)
        prefix = self.backbone.prefix
        embedded = self.decoder_embed(self.backbone.visible_tokens(images, seen))
        cls, tokens = embedded.split([prefix, seen.shape[1]], dim=1)
        hidden = self.mask_token.to(tokens.dtype).expand(*unseen.shape, -1)
        places = torch.cat([seen, unseen], dim=1).argsort(dim=1)  # (B, N), where each patch stands below
        full = torch.cat([tokens, hidden], dim=1).gather(1, places.unsqueeze(2).expand(-1, -1, self.cfg.width))
        x = torch.cat([cls, full], dim=1) + self.decoder_pos_embed  # (B, prefix + N, D)
        painted: Tensor = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, prefix:]
        return painted

    def reconstruction(self, images: Tensor, masks: Tensor) -> Tensor:
        """What the decoder paints; the mean and deviation of a standardised patch are taken from the image itself."""
        side, painted = self.backbone.patch, widen(self.painted(images, masks))
        if self.cfg.normalized:
            mean, deviation = moments(patches_of(images, side))
            painted = painted * deviation + mean
        return images_of(painted, side, *images.shape[2:])


def xavier_(layer: nn.Module) -> None:
    """Draw the weights of a linear layer uniformly (Glorot & Bengio 2010), bias 0; leave other layers alone."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


def moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, N, 1) of the pixels of patches (B, N, P), as the loss divides by it."""
    return patches.mean(dim=2, keepdim=True), (patches.var(dim=2, keepdim=True) + EPS).sqrt()


def painting_loss(painted: Tensor, images: Tensor, masks: Tensor, *, normalized: bool) -> Tensor:
    """Mean over the masked patches of |painted - patch|^2 / P (section 3).

    `normalized`: a patch is taken less the mean of its P values and over the root of their unbiased variance + 1e-6.
    NaN where nothing is masked.

    Args:
        painted: (B, N, P), P = side * side * 3.
        images: (B, 3, H, W).
        masks: (B, N), true or 1 where a patch is masked.
        normalized: whether patches are standardised.
    """
    target = patches_of(images, round((painted.shape[2] // 3) ** 0.5))
    if normalized:
        mean, deviation = moments(target)
        target = (target - mean) / deviation
    errors = (painted - target).square().mean(dim=2)  # (B, N)
    weights = masks.to(errors.dtype)
    return (errors * weights).sum() / weights.sum()


build = MAE
