"""MaskFeat: see some of an image, and say which edges the hidden patches hold.

Wei et al. 2022, https://arxiv.org/abs/2112.09133.
"""

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.errors import UserError
from sslcli.nn.hog import cells_of_patches, hog


class Config(MethodConfig):
    """Masked prediction of histograms of oriented gradients."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="masked", at_least=1, at_most=1)
    name: Literal["maskfeat"] = "maskfeat"
    bins: Count = 9
    """Orientations of a histogram."""
    cell: Count = 8
    """Side in pixels of the square whose gradients one histogram counts; it divides the backbone's patch."""
    window: Count | None = None
    """Side in pixels of a Gaussian, laid over the image like tiles, that weighs gradients before they are counted: 16
    in MMSelfSup; absent, all weigh alike, as in the authors' code. It divides the side of the image."""


@final
class MaskFeat(Method[Config]):
    """Mask token and a linear layer from the backbone's last tokens to histograms."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        if backbone.patch == 0 or backbone.patch % cfg.cell:
            raise UserError(
                f"`method.cell` {cfg.cell} must divide the backbone's patch (got {backbone.patch or 'none'})",
                hint="use `backbone: {name: vit}`, and a cell whose multiple is `backbone.patch`",
            )
        self.across = backbone.patch // cfg.cell
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, backbone.patch_dim), std=0.02))
        self.head = nn.Linear(backbone.dim, 3 * cfg.bins * self.across**2)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Histograms of the hidden patches, predicted from the others."""
        (images,), masks = batch.views, batch.masks
        assert masks is not None
        maps = self.backbone.masked_maps(images, masks, self.mask_token[0, 0])
        predictions = self.head(maps.flatten(2).mT)  # (B, N, D)
        targets = self.targets(images)
        if predictions.shape != targets.shape:
            raise UserError(
                f"the backbone gives {predictions.shape[1]} features for the {targets.shape[1]} patches of an image",
                hint="use a backbone that keeps one feature per patch: `backbone: {name: vit}`",
            )
        return StepResult(masked_error(predictions, targets, masks))

    def targets(self, images: Tensor) -> Tensor:
        """Histograms (B, N, D) of all patches of normalised images (B, 3, H, W)."""
        side, window = images.shape[-1], self.cfg.window
        if window is not None and side % window:
            raise UserError(
                f"`method.window` {window} must divide the side of the images, {side} pixels",
                hint="leave it out, or choose one that does",
            )
        return cells_of_patches(hog(images, bins=self.cfg.bins, cell=self.cfg.cell, window=window), self.across)


def masked_error(predictions: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
    """Squared error, mean over entries and over the masked patches of all ranks (section 3.1).

    Where images have different numbers of masked patches, every patch weighs alike: the sum of a rank is divided by
    the mean number of masked patches on a rank.

    Args:
        predictions: (B, N, D).
        targets: (B, N, D).
        masks: (B, N) bool, True where a patch is masked.
    """
    errors = (predictions - targets).square().mean(dim=2)  # (B, N)
    count = dist.mean(masks.sum().to(errors.dtype))
    return torch.where(masks, errors, 0.0).sum() / count


build = MaskFeat
