"""Swin transformer (Liu et al. 2021, https://arxiv.org/abs/2103.14030): attention in windows that shift, four stages.

Built by timm under timm's names.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, final

import torch
from pydantic import model_validator
from torch import Tensor, nn

from sslcli.config.base import BackboneConfig
from sslcli.config.types import Count, Fraction
from sslcli.contracts import Backbone
from sslcli.errors import UserError
from sslcli.nn.patches import replaced
from sslcli.nn.taps import check_taps

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer as Trunk

SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
"""Width of the first stage, blocks and attention heads of every stage (section 3.3)."""


class Config(BackboneConfig):
    """Swin transformer for images of one size."""

    name: Literal["swin"] = "swin"
    size: Literal["tiny", "small", "base", "large"] = "base"
    """Width of the first stage, blocks and heads of the stages: 96, 2-2-6-2, 3-6-12-24; 96, 2-2-18-2, 3-6-12-24;
    128, 2-2-18-2, 4-8-16-32; 192, 2-2-18-2, 6-12-24-48."""
    width: Count | None = None
    """Channels of the first stage, where they differ from the size's; every stage doubles them."""
    depths: tuple[Count, ...] | None = None
    """Blocks of every stage, where they differ from the size's."""
    heads: tuple[Count, ...] | None = None
    """Attention heads of every stage, where they differ from the size's."""
    patch: Count = 4
    """Side of a patch in pixels."""
    window: Count = 7
    """Side of a window in patches of its stage."""
    image_size: Count = 224
    """Side in pixels of the images."""
    positions: Literal["none", "learned"] = "none"
    """Embeddings of the patches' places, besides the biases inside a window."""
    drop_path: Fraction = 0.0
    """Probability of skipping the last block's branches while training; earlier blocks linearly less."""

    @property
    def shape(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Width of the first stage, blocks and heads of every stage."""
        width, depths, heads = SIZES[self.size]
        return self.width or width, self.depths or depths, self.heads or heads

    @model_validator(mode="after")
    def _divides(self) -> "Config":
        width, depths, heads = self.shape
        if len(depths) != len(heads):
            raise ValueError(f"`depths` and `heads` are of {len(depths)} and {len(heads)} stages: give both")
        for stage, count in enumerate(heads):
            if (width << stage) % count:
                raise ValueError(
                    f"the heads of a stage must divide its width (got {count} and {width << stage} in stage {stage})"
                )
        if self.image_size % self.patch:
            raise ValueError(f"`patch` must divide `image_size` (got {self.patch} and {self.image_size})")
        return self


@final
class Swin(Backbone):
    """Patches through stages that halve the map and double the channels, a layer norm, the mean over the map."""

    trunk: "Trunk"

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer as Trunk

        width, depths, heads = cfg.shape
        self.trunk = Trunk(
            img_size=cfg.image_size,
            patch_size=cfg.patch,
            embed_dim=width,
            depths=depths,
            num_heads=heads,
            window_size=cfg.window,
            drop_path_rate=cfg.drop_path,
            num_classes=0,
        )
        if cfg.positions == "learned":
            places = torch.empty(1, (cfg.image_size // cfg.patch) ** 2, width)
            self.trunk.absolute_pos_embed = nn.Parameter(nn.init.trunc_normal_(places, std=0.02))
        self.positions = cfg.positions
        self.dim = self.trunk.num_features
        self.patch = cfg.patch
        self.grid = cfg.image_size // cfg.patch
        self.stride = cfg.patch * 2 ** (len(depths) - 1)
        self.patch_dim = width
        self.image_size = cfg.image_size

    def maps(self, images: Tensor) -> Tensor:
        """Output (B, dim, h, w) of the last stage after the norm."""
        return self._through(self._patches(images))

    def masked_maps(self, images: Tensor, masks: Tensor, token: Tensor) -> Tensor:
        """Output (B, dim, h, w) of the last stage after the norm, with `token` for the embeddings of masked patches."""
        return self._through(replaced(self._patches(images), masks, token))

    def forward(self, images: Tensor) -> Tensor:
        """Mean of the last stage's output after the norm (B, dim)."""
        return self.maps(images).mean(dim=(2, 3))

    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Output of stages (B, C, h, w), before any norm, or `pooled`.

        Raises:
            UserError: there is no place of that name.
        """
        check_taps(names, self.tap_names())
        x = self._placed(self._patches(images))
        found: dict[str, Tensor] = {}
        for number, stage in enumerate(self.trunk.layers):
            x = stage(x)
            found[f"layers.{number}"] = x.permute(0, 3, 1, 2)
        found["pooled"] = self.trunk.norm(x).mean(dim=(1, 2))
        return {name: found[name] for name in names}

    def tap_names(self) -> tuple[str, ...]:
        """The stages under timm's names, and the pooled feature."""
        return (*(f"layers.{number}" for number in range(len(self.trunk.layers))), "pooled")

    def _patches(self, images: Tensor) -> Tensor:
        """Embeddings of the patches (B, h, w, D)."""
        height, width = images.shape[2:]
        if height != self.image_size or width != self.image_size:
            raise UserError(
                f"images of {height} x {width} pixels do not fit windows made for "
                f"{self.image_size} x {self.image_size}",
                hint="set `backbone.image_size` to the size of the crops",
            )
        patches: Tensor = self.trunk.patch_embed(images)
        return patches

    def _placed(self, patches: Tensor) -> Tensor:
        if self.positions == "none":
            return patches
        places: Tensor = self.trunk.absolute_pos_embed  # type: ignore[assignment]
        return patches + places.view(1, *patches.shape[1:])

    def _through(self, patches: Tensor) -> Tensor:
        """Stages and last norm, for embeddings (B, h, w, D)."""
        maps: Tensor = self.trunk.norm(self.trunk.layers(self._placed(patches)))
        return maps.permute(0, 3, 1, 2)  # (B, C, h, w)


build = Swin
