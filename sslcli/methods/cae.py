"""CAE: from the visible patches, foresee what the encoder would say of the hidden ones; then name them.

Chen et al. 2022 ("context autoencoder"), https://arxiv.org/abs/2202.03026.
"""

from pathlib import Path
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Fraction, NonNegative, Positive
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.errors import UserError, WeightsError
from sslcli.nn import dalle, slow
from sslcli.nn.needs import need_patches
from sslcli.nn.patches import fits, patches_of, visible_and_masked
from sslcli.nn.positions import sincos_positions
from sslcli.nn.precision import widen
from sslcli.nn.regressor import Regressor

EPS = 1e-6
"""Added to the variance of a patch."""


class Config(MethodConfig):
    """Context autoencoder; the backbone sees the visible patches only, regressor and decoder are thrown away."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="masked", at_least=1, at_most=1, even=True)
    name: Literal["cae"] = "cae"
    target: Literal["tokens", "pixels"] = "tokens"
    """What is decoded. `tokens`: the word that DALL-E's encoder has for a hidden patch (the paper). `pixels`: the
    patch's colours less their mean and over their deviation, as in MAE; not the paper's, but it needs no file."""
    tokenizer: Path | None = None
    """File with the encoder of DALL-E: OpenAI's `encoder.pkl` or MMSelfSup's `dalle_encoder.pth`; for `tokens`. It is
    read when training begins, and no code in it is run."""
    words: Count = 8192
    """Words of the tokenizer."""
    align: NonNegative = 2.0
    """Weight of the squared distance between foreseen and true features of the hidden patches."""
    aligned_with: Literal["current", "previous"] = "current"
    """Whose features are the true ones: those of the encoder as it is (the paper, the authors' later code), or as it
    was one step before (MMSelfSup, the authors' first code)."""
    width: Count | None = None
    """Length of a token in regressor and decoder, a multiple of 4 and of the heads; when absent, the backbone's."""
    heads: Count = 12
    """Attention heads of regressor and decoder."""
    regressor_depth: Count = 4
    """Blocks of the regressor."""
    decoder_depth: Count = 4
    """Blocks of the decoder."""
    layer_scale: Positive | None = 0.1
    """What every branch of regressor and decoder is multiplied with at first, channel by channel; null: 1, and not
    learned."""
    drop_path: Fraction = 0.0
    """Probability of skipping the last block's branches while training, in regressor and decoder; earlier ones less."""


@final
class CAE(Method[Config]):
    """Backbone, latent regressor, decoder, and the token that stands for hidden patches."""

    positions: Tensor
    tokenizer_digest: Tensor

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        from timm.layers.norm import LayerNorm
        from timm.models.vision_transformer import Block

        need_patches(backbone, "cae")
        if cfg.target == "tokens" and cfg.tokenizer is None:
            raise WeightsError("`cae` with `method.target: tokens` needs a `method.tokenizer`", hint=dalle.HINT)
        width = cfg.width or backbone.dim
        self.adapter = nn.Sequential(
            *([nn.Linear(backbone.dim, width), LayerNorm(width)] if width != backbone.dim else [])
        )
        rates = [torch.linspace(0, cfg.drop_path, depth).tolist() for depth in (cfg.regressor_depth, cfg.decoder_depth)]
        self.regressor = Regressor(width, cfg.heads, rates[0], cfg.layer_scale)
        self.decoder = nn.Sequential(
            *(Block(width, cfg.heads, qkv_bias=True, init_values=cfg.layer_scale, drop_path=rate, norm_layer=LayerNorm)
              for rate in rates[1]),
            LayerNorm(width),
        )  # fmt: skip
        self.head = nn.Linear(width, cfg.words if cfg.target == "tokens" else 3 * backbone.patch**2)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02, a=-0.02, b=0.02))
        for part in (self.adapter, self.regressor, self.decoder, self.head):
            part.apply(xavier_)
        self.slow_backbone = slow.frozen_copy(backbone) if cfg.aligned_with == "previous" else None
        positions = sincos_positions(width, backbone.grid, backbone.grid, first="row")  # (N, D)
        self.register_buffer("positions", positions, persistent=False)
        if cfg.target == "tokens":
            self.register_buffer("tokenizer_digest", torch.zeros(32, dtype=torch.uint8))
        self._tokenizer: list[dalle.Encoder] = []  # in a list: not the run's to keep, so no part of its state

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """Loss of decoding plus weighted loss of alignment (equation 2)."""
        (images,), masks, cfg = batch.views, batch.masks, self.cfg
        assert masks is not None, "masked views have masks"
        visible, hidden = visible_and_masked(masks, batch.masked)  # (B, N - M), (B, M)
        decoded, foreseen, true = self.decoded(images, masks, visible, hidden)
        words = cfg.target == "tokens"
        targets = self.words_of(batch) if words else standardised(patches_of(images, self.backbone.patch))  # (B, N, ..)
        targets = picked(targets, hidden)  # (B, M) or (B, M, P)
        decoding, alignment = losses(widen(decoded), targets, widen(foreseen), widen(true), cfg.align)
        scalars = {"decoding": decoding.detach(), "alignment": alignment.detach()}
        if words:
            scalars["words_right"] = (decoded.detach().argmax(dim=2) == targets).float().mean()
        return StepResult(decoding + alignment, scalars)

    def decoded(self, images: Tensor, masks: Tensor, visible: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder's output (B, M, K), foreseen and true features (B, M, D) of the hidden patches.

        Args:
            images: (B, 3, H, W).
            masks: (B, N) bool, True where a patch is hidden.
            visible: (B, N - M) int64, numbers of the visible patches.
            hidden: (B, M) int64, numbers of the hidden ones.
        """
        fits(masks, self.backbone.grid**2)
        seen = self.adapter(self.backbone.visible_tokens(images, visible)[:, self.backbone.prefix :])
        with torch.no_grad():
            encoder = self.slow_backbone or self.backbone
            true = self.adapter(encoder.visible_tokens(images, hidden)[:, encoder.prefix :])
        places = self.positions.to(seen.dtype)
        asked = self.mask_token.to(seen.dtype).expand(*hidden.shape, -1)
        foreseen = self.regressor(asked, seen, places[hidden], places[visible])
        return self.head(self.decoder(foreseen + places[hidden])), foreseen, true

    @torch.no_grad()
    def words_of(self, batch: Batch) -> Tensor:
        """The tokenizer's words (B, N) for all patches."""
        if len(batch.targets) != 1 or batch.targets[0].shape[-1] != dalle.STRIDE * self.backbone.grid:
            side = dalle.STRIDE * self.backbone.grid
            raise UserError(
                f"the tokenizer needs images of {side} pixels to have a word for each patch, and there are none",
                hint=f"set `views.target` to `{{size: {side}, interpolation: lanczos}}`",
            )
        return self.tokenizer(batch.targets[0].device).words_of(batch.targets[0])

    def tokenizer(self, device: torch.device) -> dalle.Encoder:
        """The tokenizer, read once in each process.

        Raises:
            WeightsError: its file is missing, holds something else, or is not the one that the run began with.
        """
        if not self._tokenizer:
            path = self.cfg.tokenizer
            assert path is not None
            found = dalle.read_encoder(path)
            if found.words != self.cfg.words:
                raise WeightsError(
                    f"tokenizer `{path}` has {found.words} words, and the run is made for {self.cfg.words}",
                    hint=f"set `method.words` to {found.words}",
                )
            digest = torch.frombuffer(bytearray(dalle.digest_of(found)), dtype=torch.uint8)
            before = self.tokenizer_digest.cpu()
            if before.any() and not torch.equal(before, digest):
                raise WeightsError(
                    f"`{path}` is not the tokenizer that this run began with", hint="put that file back, or begin anew"
                )
            self.tokenizer_digest.copy_(digest)
            self._tokenizer.append(found.to(device))
        return self._tokenizer[0]

    def before_update(self, at: Progress) -> None:
        """Keep the encoder as it is before the step: the next step's alignment looks at it."""
        if self.slow_backbone is not None:
            slow.copy_(self.slow_backbone, self.backbone)

    def copy_student(self) -> None:
        """Start the second encoder where the first starts."""
        if self.slow_backbone is not None:
            slow.copy_(self.slow_backbone, self.backbone)


def xavier_(layer: nn.Module) -> None:
    """Draw the weights of a linear layer uniformly (Glorot & Bengio 2010), bias 0; leave other layers alone."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def losses(decoded: Tensor, targets: Tensor, foreseen: Tensor, true: Tensor, align: float) -> tuple[Tensor, Tensor]:
    """The two terms of the loss (equation 2): L_y(Y, sg[Y*]) and lambda L_z(Z, sg[Z*]), means over hidden patches.

    L_y is the cross-entropy with the words or, where targets are pixels, the mean squared difference; L_z the mean
    squared difference. The targets are constants.

    Args:
        decoded: (B, M, K), scores of words or pixels Y.
        targets: (B, M) int64, words Y*; or (B, M, K), pixels.
        foreseen: (B, M, D), the regressor's features Z.
        true: (B, M, D), the encoder's features Z*.
        align: lambda.
    """
    if targets.dtype == torch.int64:
        decoding = F.cross_entropy(decoded.flatten(0, 1), targets.flatten())
    else:
        decoding = F.mse_loss(decoded, targets)
    return decoding, align * F.mse_loss(foreseen, true.detach())


def picked(rows: Tensor, numbers: Tensor) -> Tensor:
    """The entries (B, M, ...) of rows (B, N, ...) at the numbers (B, M)."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], numbers]


def standardised(patches: Tensor) -> Tensor:
    """Patches (B, N, P) less their mean and over the root of their unbiased variance + 1e-6 (He et al. 2022)."""
    return (patches - patches.mean(dim=2, keepdim=True)) / (patches.var(dim=2, keepdim=True) + EPS).sqrt()


build = CAE
