"""SimMIM: hide large cells of an image from the network, and have one linear layer paint their pixels.

Xie et al. 2022, https://arxiv.org/abs/2111.09886.
"""

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn.needs import need_patches
from sslcli.nn.patches import as_pixels
from sslcli.nn.precision import widen

EPS = 1e-5
"""Added to the number of masked pixels."""


class Config(MethodConfig):
    """Masked image modelling with next to no decoder; the backbone sees a token in place of masked patches."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="masked", at_least=1, at_most=1)
    name: Literal["simmim"] = "simmim"


@final
class SimMIM(Method[Config]):
    """Backbone, the token, and a 1 x 1 convolution that gives all pixels of each place of the last map at once."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_patches(backbone, "simmim")
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.patch_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        stride = backbone.stride
        self.decoder = nn.Sequential(nn.Conv2d(backbone.dim, stride**2 * 3, 1), nn.PixelShuffle(stride))

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Mean absolute error of the masked pixels."""
        (images,), masks = batch.views, batch.masks
        assert masks is not None, "masked views have masks"
        return StepResult(painting_loss(widen(self.painted(images, masks)), images, masks))

    def painted(self, images: Tensor, masks: Tensor) -> Tensor:
        """What is painted for all pixels, (B, 3, H, W), in the units of the images.

        Args:
            images: (B, 3, H, W).
            masks: (B, N) bool, True where a patch is masked.
        """
        painted: Tensor = self.decoder(self.backbone.masked_maps(images, masks, self.mask_token[0, 0]))
        return painted

    def reconstruction(self, images: Tensor, masks: Tensor) -> Tensor:
        """What is painted."""
        return widen(self.painted(images, masks))


def painting_loss(painted: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Sum of |painted - image| over the masked pixels and colours, over 3 (masked pixels + 1e-5) (section 3.4).

    0 where nothing is masked.

    Args:
        painted: (B, 3, H, W).
        images: (B, 3, H, W).
        masks: (B, N), true or 1 where a square patch is masked.
    """
    side = round((images[0, 0].numel() / masks.shape[1]) ** 0.5)
    weights = as_pixels(masks.to(painted.dtype), side, *images.shape[2:])  # (B, 1, H, W)
    errors = (painted - images).abs() * weights
    count = masks.sum() * side**2  # whole: what is added below comes in single precision, as the authors have it
    loss: Tensor = errors.sum() / (count + EPS) / images.shape[1]
    return loss


build = SimMIM
