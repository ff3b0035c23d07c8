"""Vision transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929).

Built by timm under timm's names, with the fixed positions, frozen patch projection and initialisations that
self-supervised methods give it.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, final

import torch
from pydantic import model_validator
from torch import Tensor, nn

from sslcli.config.base import BackboneConfig
from sslcli.config.types import Count, Fraction
from sslcli.contracts import Backbone
from sslcli.errors import UserError
from sslcli.nn.patches import check_sizes, replaced
from sslcli.nn.positions import sincos_positions
from sslcli.nn.taps import check_taps

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer as Trunk

SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Width, blocks and attention heads (Touvron et al. 2021, table 1; Dosovitskiy et al. 2021, table 1)."""


class Config(BackboneConfig):
    """Vision transformer with a class token, or without."""

    name: Literal["vit"] = "vit"
    size: Literal["tiny", "small", "base", "large", "huge"] = "small"
    """Width, blocks and heads: 192, 12, 3; 384, 12, 6; 768, 12, 12; 1024, 24, 16; 1280, 32, 16."""
    width: Count | None = None
    """Length of a token, where it differs from the size's; blocks and heads are the size's unless given."""
    depth: Count | None = None
    """Blocks, where they differ from the size's."""
    heads: Count | None = None
    """Attention heads, where they differ from the size's (MoCo v3 gives `small` 12)."""
    patch: Count = 16
    """Side of a patch in pixels."""
    image_size: Count = 224
    """Side in pixels of the images that the positions are made for; for others they are interpolated."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embeddings: learned, or fixed sines and cosines."""
    sincos_first: Literal["row", "column"] = "row"
    """Coordinate in the first half of fixed positions: `row` in MoCo v3 and MMSelfSup, `column` in MAE."""
    class_token: bool = True
    """Whether a class token goes through the network beside the patches (not in I-JEPA)."""
    init: Literal["normal", "mae", "mocov3", "ijepa"] = "normal"
    """Initial weights. `normal`: normal of 0.02 (DeiT, DINO). `ijepa`: the same, and so is the patch projection.
    `mae`: Xavier uniform, class token normal of 0.02. `mocov3`: Xavier uniform with queries, keys and values as three
    matrices, class token almost 0."""
    freeze_patch_embed: bool = False
    """Leave the patch projection as it starts (MoCo v3, section 4.3): steadier training."""
    pool: Literal["cls", "mean"] = "cls"
    """The pooled feature: the class token, or the mean of the patch tokens, after the last norm."""
    drop_path: Fraction = 0.0
    """Probability of skipping the last block's branches while training; earlier blocks linearly less."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, blocks and heads."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    @model_validator(mode="after")
    def _divides(self) -> "Config":
        width, _, heads = self.shape
        check_sizes(width, heads, self.image_size, self.patch, sincos=self.positions == "sincos")
        if not self.class_token and self.pool == "cls":
            raise ValueError("`class_token: false` leaves nothing but the patches to pool: set `pool: mean`")
        return self


@final
class ViT(Backbone):
    """Patches and any class token through transformer blocks, then a layer norm."""

    trunk: "Trunk"

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        width, depth, heads = cfg.shape
        self.trunk = vit_trunk(
            width, depth, heads, cfg.patch, cfg.image_size, cfg.drop_path, class_token=cfg.class_token
        )
        init_(self.trunk, cfg.init)
        if cfg.positions == "sincos":
            fix_positions_(self.trunk, cfg.sincos_first)
        if cfg.freeze_patch_embed:
            self.trunk.patch_embed.requires_grad_(False)
        self.dim = width
        self.pool = cfg.pool
        self.patch = cfg.patch
        self.prefix = int(cfg.class_token)
        self.grid = cfg.image_size // cfg.patch
        self.stride = cfg.patch
        self.patch_dim = width

    def tokens(self, images: Tensor) -> Tensor:
        """Any class token, then patch tokens in row-major order, after the last norm: (B, prefix + N, dim)."""
        self._fits(images)
        return self.trunk.forward_features(images)

    def maps(self, images: Tensor) -> Tensor:
        """Patch tokens (B, dim, h, w) after the last norm."""
        return self._as_maps(self.tokens(images), images)

    def visible_tokens(self, images: Tensor, patches: Tensor) -> Tensor:
        """Any class token, then the tokens of the given patches, after the last norm: (B, prefix + K, dim)."""
        self._fits(images)
        tokens = self.trunk._pos_embed(self.trunk.patch_embed(images))  # (B, prefix + N, D)
        shown = tokens[:, self.prefix :].gather(1, patches.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        return self._through(torch.cat([tokens[:, : self.prefix], shown], dim=1))

    def masked_maps(self, images: Tensor, masks: Tensor, token: Tensor) -> Tensor:
        """Patch tokens (B, dim, h, w) after the last norm, with `token` for the embeddings of masked patches."""
        self._fits(images)
        patches = self.trunk.patch_embed(images)  # (B, h, w, D)
        patches = replaced(patches, masks, token)
        return self._as_maps(self._through(self.trunk._pos_embed(patches)), images)

    def forward(self, images: Tensor) -> Tensor:
        """Class token or mean patch token (B, dim) after the last norm."""
        return self._pooled(self.tokens(images))

    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Patch tokens (B, dim, h, w) after a block or after the last norm, class tokens (B, dim), or `pooled`.

        `blocks.3` is before any final norm; `norm`, and the class token `cls.3` after block 3, are normalised by it.

        Raises:
            UserError: there is no place of that name.
        """
        check_taps(names, self.tap_names())
        self._fits(images)
        last, blocks = self.trunk.forward_intermediates(images, return_prefix_tokens=True)
        assert isinstance(last, Tensor)
        found = {"norm": self._as_maps(last, images), "pooled": self._pooled(last)}
        for number, block in enumerate(blocks):
            maps, *prefix = block if self.prefix else (block,)
            found[f"blocks.{number}"] = maps
            if f"cls.{number}" in names:
                found[f"cls.{number}"] = self.trunk.norm(prefix[0])[:, 0]
        return {name: found[name] for name in names}

    def tap_names(self) -> tuple[str, ...]:
        """Blocks and last norm under timm's names, any class tokens after each block, and the pooled feature."""
        numbers = range(len(self.trunk.blocks))
        class_tokens = [f"cls.{number}" for number in numbers] if self.prefix else []
        return (*(f"blocks.{number}" for number in numbers), "norm", *class_tokens, "pooled")

    def _through(self, tokens: Tensor) -> Tensor:
        """Blocks and last norm, for tokens (B, L, D) with positions."""
        from timm.models import checkpoint_seq

        trunk = self.trunk
        last: Tensor = checkpoint_seq(trunk.blocks, tokens) if trunk.grad_checkpointing else trunk.blocks(tokens)
        normed: Tensor = trunk.norm(last)
        return normed

    def _pooled(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.pool == "cls" else tokens[:, self.prefix :].mean(dim=1)

    def _as_maps(self, tokens: Tensor, images: Tensor) -> Tensor:
        height, width = images.shape[2] // self.patch, images.shape[3] // self.patch
        return tokens[:, self.prefix :].mT.reshape(len(tokens), -1, height, width)  # (B, D, h, w)

    def _fits(self, images: Tensor) -> None:
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            raise UserError(
                f"images of {height} x {width} pixels cannot be cut into patches of {self.patch}",
                hint=f"set the size of every crop to a multiple of `backbone.patch`, {self.patch}",
            )


def vit_trunk(
    width: int, depth: int, heads: int, patch: int, image_size: int, drop_path: float, *, class_token: bool = True
) -> "Trunk":
    """A timm vision transformer without classifier, for images of any size that the patch divides."""
    from timm.models.vision_transformer import VisionTransformer as Trunk

    return Trunk(
        img_size=image_size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_path_rate=drop_path,
        num_classes=0,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
        dynamic_img_size=True,
    )


@torch.no_grad()
def fix_positions_(trunk: "Trunk", first: Literal["row", "column"]) -> None:
    """Replace learned positions by sines and cosines that no gradient moves."""
    height, width = trunk.patch_embed.grid_size
    assert trunk.pos_embed is not None
    trunk.pos_embed.copy_(sincos_positions(trunk.embed_dim, height, width, first=first, prefix=trunk.num_prefix_tokens))
    trunk.pos_embed.requires_grad_(False)


@torch.no_grad()
def init_(trunk: "Trunk", kind: Literal["normal", "mae", "mocov3", "ijepa"]) -> None:
    """Draw the initial weights of `Config.init`; timm has drawn those of `normal` but for the class token."""
    projection = trunk.patch_embed.proj
    if kind == "ijepa":
        nn.init.trunc_normal_(projection.weight, std=0.02)
        nn.init.zeros_(projection.bias)
    elif kind != "normal":
        for name, layer in trunk.named_modules():
            if isinstance(layer, nn.Linear):
                wide_out, wide_in = layer.weight.shape
                blocks = 3 if kind == "mocov3" and name.endswith("qkv") else 1
                uniform_(layer, wide_in + wide_out // blocks)
        bias = projection.bias.clone()
        uniform_(projection, projection.weight[0].numel() + projection.weight.shape[0])
        if kind == "mae":  # the authors leave this bias as torch draws it
            projection.bias.copy_(bias)
    if trunk.cls_token is not None:
        nn.init.normal_(trunk.cls_token, std=1e-6 if kind == "mocov3" else 0.02)


def uniform_(layer: nn.Linear | nn.Conv2d, fan: int) -> None:
    """Weights uniform in +-sqrt(6 / fan) for `fan` inputs and outputs, bias 0 (Glorot & Bengio 2010, eq. 16)."""
    bound = math.sqrt(6 / fan)
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


build = ViT
