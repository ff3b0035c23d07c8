"""Vision transformer of BEiT (Bao et al. 2022, https://arxiv.org/abs/2106.08254).

Keys without bias, branches that start small (layer scale), positions as biases of the attention. Built by timm under
timm's names. SimMIM and CAE train it too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, final

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslcli.config.base import BackboneConfig
from sslcli.config.types import Count, Fraction, Positive
from sslcli.contracts import Backbone
from sslcli.errors import UserError
from sslcli.nn.patches import check_sizes, replaced
from sslcli.nn.positions import sincos_positions
from sslcli.nn.taps import check_taps

if TYPE_CHECKING:
    from timm.models.beit import Beit as Trunk

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, blocks and attention heads."""


class Config(BackboneConfig):
    """BEiT's vision transformer with a class token, for images of one size."""

    name: Literal["beit"] = "beit"
    size: Literal["tiny", "small", "base", "large"] = "base"
    """Width, blocks and heads: 192, 12, 3; 384, 12, 6; 768, 12, 12; 1024, 24, 16."""
    width: Count | None = None
    """Length of a token, where it differs from the size's; blocks and heads are the size's unless given."""
    depth: Count | None = None
    """Blocks, where they differ from the size's."""
    heads: Count | None = None
    """Attention heads, where they differ from the size's."""
    patch: Count = 16
    """Side of a patch in pixels."""
    image_size: Count = 224
    """Side in pixels of the images."""
    positions: Literal["none", "learned", "sincos"] = "none"
    """Position embeddings: none, learned, or fixed sines and cosines with the row first (CAE)."""
    bias: Literal["none", "shared", "blocks"] = "shared"
    """Biases of the attention by relative position: none, one table for all blocks, or one for each."""
    layer_scale: Positive | None = 0.1
    """What every branch is multiplied with at first, channel by channel; null: 1, and not learned."""
    init: Literal["beit", "cae"] = "beit"
    """Initial weights. `beit`: normal of 0.02, the last layer of every branch smaller the deeper it lies. `cae`: Xavier
    uniform, patch projection and class token normal of 0.02 cut at 0.02."""
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
        return self


@final
class BEiT(Backbone):
    """Patches and a class token through transformer blocks, then a layer norm."""

    trunk: "Trunk"

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.trunk = beit_trunk(cfg)
        self.dim = self.patch_dim = cfg.shape[0]
        self.pool = cfg.pool
        self.patch = cfg.patch
        self.grid = cfg.image_size // cfg.patch
        self.stride = cfg.patch
        self.image_size = cfg.image_size

    def tokens(self, images: Tensor) -> Tensor:
        """Class token, then patch tokens in row-major order, after the last norm: (B, 1 + N, dim)."""
        return self._through(self._placed(self._patches(images)))

    def maps(self, images: Tensor) -> Tensor:
        """Patch tokens (B, dim, h, w) after the last norm."""
        return self._as_maps(self.tokens(images))

    def masked_maps(self, images: Tensor, masks: Tensor, token: Tensor) -> Tensor:
        """Patch tokens (B, dim, h, w) after the last norm, with `token` for the embeddings of masked patches."""
        return self._as_maps(self._through(self._placed(replaced(self._patches(images), masks, token))))

    def visible_tokens(self, images: Tensor, patches: Tensor) -> Tensor:
        """Class token, then the tokens of the given patches, after the last norm: (B, 1 + K, dim).

        Raises:
            UserError: attention is biased by relative position, which is made for all patches.
        """
        if self.trunk.rel_pos_bias is not None or self.trunk.blocks[0].attn.relative_position_bias_table is not None:
            raise UserError(
                "a network whose attention is biased by relative position cannot leave patches out",
                hint="set `backbone.bias` to `none` and `backbone.positions` to `sincos` or `learned`",
            )
        tokens = self._placed(self._patches(images))
        shown = tokens[:, 1:].gather(1, patches.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        return self._through(torch.cat([tokens[:, :1], shown], dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """Class token or mean patch token (B, dim) after the last norm."""
        return self._pooled(self.tokens(images))

    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Patch tokens (B, dim, h, w) after a block, before any final norm, or `pooled`.

        Raises:
            UserError: there is no place of that name.
        """
        check_taps(names, self.tap_names())
        tokens = self._placed(self._patches(images))
        bias = None if self.trunk.rel_pos_bias is None else self.trunk.rel_pos_bias()
        found: dict[str, Tensor] = {}
        for number, block in enumerate(self.trunk.blocks):
            tokens = block(tokens, shared_rel_pos_bias=bias)
            found[f"blocks.{number}"] = self._as_maps(tokens)
        found["pooled"] = self._pooled(self.trunk.norm(tokens))
        return {name: found[name] for name in names}

    def tap_names(self) -> tuple[str, ...]:
        """The blocks under timm's names, and the pooled feature."""
        return (*(f"blocks.{number}" for number in range(len(self.trunk.blocks))), "pooled")

    def _patches(self, images: Tensor) -> Tensor:
        """Embeddings of the patches (B, N, D)."""
        height, width = images.shape[2:]
        if height != self.image_size or width != self.image_size:
            raise UserError(
                f"images of {height} x {width} pixels do not fit positions made for "
                f"{self.image_size} x {self.image_size}",
                hint="set `backbone.image_size` to the size of the crops",
            )
        patches: Tensor = self.trunk.patch_embed(images)
        return patches

    def _placed(self, patches: Tensor) -> Tensor:
        """Class token and patches (B, 1 + N, D) with positions."""
        tokens = torch.cat([self.trunk.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return tokens if self.trunk.pos_embed is None else tokens + self.trunk.pos_embed

    def _through(self, tokens: Tensor) -> Tensor:
        """Blocks and last norm, for tokens (B, L, D) with positions."""
        bias = None if self.trunk.rel_pos_bias is None else self.trunk.rel_pos_bias()
        for block in self.trunk.blocks:
            if self.trunk.grad_checkpointing:
                tokens = checkpoint(block, tokens, shared_rel_pos_bias=bias, use_reentrant=False)
            else:
                tokens = block(tokens, shared_rel_pos_bias=bias)
        normed: Tensor = self.trunk.norm(tokens)
        return normed

    def _pooled(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1)

    def _as_maps(self, tokens: Tensor) -> Tensor:
        return tokens[:, 1:].mT.reshape(len(tokens), -1, self.grid, self.grid)  # (B, D, h, w)


def beit_trunk(cfg: Config) -> "Trunk":
    """A timm BEiT without classifier."""
    from timm.models.beit import Beit as Trunk

    width, depth, heads = cfg.shape
    trunk = Trunk(
        img_size=cfg.image_size,
        patch_size=cfg.patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        drop_path_rate=cfg.drop_path,
        init_values=cfg.layer_scale,
        use_abs_pos_emb=cfg.positions != "none",
        use_rel_pos_bias=cfg.bias == "blocks",
        use_shared_rel_pos_bias=cfg.bias == "shared",
        num_classes=0,
        global_pool="token",
    )
    if cfg.init == "cae":
        init_as_cae_(trunk)
    if cfg.positions == "sincos":
        assert trunk.pos_embed is not None
        side = cfg.image_size // cfg.patch
        with torch.no_grad():
            trunk.pos_embed.copy_(sincos_positions(width, side, side, first="row", prefix=1))
        trunk.pos_embed.requires_grad_(False)
    return trunk


def init_as_cae_(trunk: "Trunk") -> None:
    """Draw the initial weights of CAE's encoder."""
    for layer in trunk.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    for tensor in (trunk.patch_embed.proj.weight, trunk.cls_token):
        nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)
    assert trunk.patch_embed.proj.bias is not None
    nn.init.zeros_(trunk.patch_embed.proj.bias)


build = BEiT
