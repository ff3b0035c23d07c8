"""I-JEPA: from one block of an image, foresee what a slow copy of the encoder says of four others.

Assran et al. 2023, https://arxiv.org/abs/2301.08243.
"""

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn import slow
from sslcli.nn.needs import need_patches
from sslcli.nn.patches import fits, visible_and_masked
from sslcli.nn.positions import sincos_positions
from sslcli.nn.precision import widen
from sslcli.nn.spread import spread


class Config(MethodConfig):
    """Joint-embedding prediction within an image; the predictor is thrown away after training.

    The authors' backbone has no class token (`class_token: false`, `pool: mean`), and positions as MAE has them.
    """

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="masked", at_least=1, at_most=1, even=True, blocks=True)
    name: Literal["ijepa"] = "ijepa"
    width: Count = 384
    """Length of the predictor's tokens, a multiple of 4 and of the heads."""
    depth: Count = 6
    """Blocks of the predictor: 6 for a ViT-B, 12 for ViT-L and ViT-H."""
    heads: Count = 12
    """Attention heads of the predictor; in the authors' code as many as the backbone's."""
    momentum: Fraction = 0.996
    """The share of itself that the target encoder keeps at every step, at first; it grows to 1 along a line."""


@final
class IJEPA(Method[Config]):
    """Context encoder, predictor, and the slow target encoder, which is what is exported."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        need_patches(backbone, "ijepa")
        self.predictor = Predictor(backbone.dim, backbone.grid, cfg)
        self.slow_backbone = slow.frozen_copy(backbone)

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Distance between foreseen and true features of the target blocks."""
        (images,), masks, blocks = batch.views, batch.masks, batch.blocks
        assert masks is not None, "masked views have masks"
        assert blocks is not None, "these masks come with target blocks"
        fits(masks, self.backbone.grid**2)
        context, _ = visible_and_masked(masks, batch.masked)  # (B, K)
        true = self.true(images)  # (B, N, D)
        rows = torch.arange(len(true), device=true.device)[:, None, None]
        loss = foresight(self.foreseen(images, context, blocks), true[rows, blocks])
        return StepResult(loss, {"spread": spread(true.flatten(1))})

    def foreseen(self, images: Tensor, context: Tensor, blocks: Tensor) -> Tensor:
        """Features (B, T, M, D) that the predictor expects of the target blocks.

        Args:
            images: (B, 3, H, W).
            context: (B, K) int64, numbers of the patches that are shown.
            blocks: (B, T, M) int64, numbers of the patches of every target block.
        """
        seen = self.backbone.visible_tokens(images, context)[:, self.backbone.prefix :]
        foreseen: Tensor = self.predictor(seen, context, blocks)
        return foreseen

    @torch.no_grad()
    def true(self, images: Tensor) -> Tensor:
        """Features (B, N, D) of all patches by the target encoder, which sees the whole image; each is layer-normed."""
        tokens = widen(self.slow_backbone.maps(images).flatten(2).mT)
        return F.layer_norm(tokens, tokens.shape[2:])

    def after_step(self, at: Progress) -> None:
        """Move the target encoder towards the context encoder."""
        momentum = self.cfg.momentum + (1 - self.cfg.momentum) * at.fraction
        slow.ema_(self.slow_backbone, self.backbone, momentum)

    def copy_student(self) -> None:
        """Start the target encoder where the context encoder starts."""
        slow.copy_(self.slow_backbone, self.backbone)

    def exported(self) -> Backbone:
        """The target encoder, which the authors evaluate (appendix A.2)."""
        return self.slow_backbone


@final
class Predictor(nn.Module):
    """Narrow transformer over a context and the places of one target block. Names are those of the authors' code."""

    predictor_pos_embed: Tensor

    def __init__(self, dim: int, grid: int, cfg: Config) -> None:
        super().__init__()
        from timm.layers.norm import LayerNorm
        from timm.models.vision_transformer import Block

        self.predictor_embed = nn.Linear(dim, cfg.width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, cfg.width), std=0.02))
        self.predictor_blocks = nn.Sequential(
            *(Block(cfg.width, cfg.heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(cfg.depth))
        )
        self.predictor_norm = LayerNorm(cfg.width)
        self.predictor_proj = nn.Linear(cfg.width, dim)
        self.apply(normal_)
        positions = sincos_positions(cfg.width, grid, grid, first="column")
        self.register_buffer("predictor_pos_embed", positions.unsqueeze(0))  # (1, N, W)

    def forward(self, seen: Tensor, context: Tensor, blocks: Tensor) -> Tensor:
        """Features (B, T, M, D); every target block is foreseen by itself.

        Args:
            seen: (B, K, D), features of the context's patches.
            context: (B, K) int64, their numbers.
            blocks: (B, T, M) int64, numbers of the patches of the target blocks.
        """
        x = self.predictor_embed(seen)
        places = self.predictor_pos_embed[0].to(x.dtype)  # (N, W)
        x = (x + places[context]).unsqueeze(1).expand(-1, blocks.shape[1], -1, -1)  # (B, T, K, W)
        asked = self.mask_token.to(x.dtype) + places[blocks]  # (B, T, M, W)
        tokens = self.predictor_blocks(torch.cat([x, asked], dim=2).flatten(0, 1))  # (B T, K + M, W)
        foreseen: Tensor = self.predictor_proj(self.predictor_norm(tokens)[:, context.shape[1] :])
        blocked: Tensor = foreseen.unflatten(0, blocks.shape[:2])
        return blocked


def normal_(layer: nn.Module) -> None:
    """Draw the weights of a linear layer normally with deviation 0.02, bias 0; leave other layers alone.

    The authors' later initialisation of the whole model undoes the scaling by depth in their modules.
    """
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)


def foresight(foreseen: Tensor, true: Tensor) -> Tensor:
    """Mean over all features of smooth L1: d^2 / 2 where the difference |d| < 1, else |d| - 1/2.

    The paper (equation 1) has the squared distance summed over a block's patches; the authors' code has this.

    Args:
        foreseen: (B, T, M, D).
        true: (B, T, M, D), layer-normed; constant.
    """
    return F.smooth_l1_loss(widen(foreseen), true.detach())


build = IJEPA
