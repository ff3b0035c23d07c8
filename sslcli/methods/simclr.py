"""SimCLR: find the other view of the same image among all views of the batch.

Chen et al. 2020, https://arxiv.org/abs/2002.05709.
"""

from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.config.base import MethodConfig, ViewNeeds
from sslcli.config.types import Count, Positive
from sslcli.contracts import Backbone, Batch, Method, Progress, RunFacts, StepResult
from sslcli.nn.contrast import Contrast, percent_right
from sslcli.nn.heads import mlp
from sslcli.nn.precision import no_autocast, widen
from sslcli.nn.views import interleave


class Config(MethodConfig):
    """Contrast of two views within the batch of all ranks."""

    views: ClassVar[ViewNeeds] = ViewNeeds(kind="crops", at_least=2, at_most=2)
    name: Literal["simclr"] = "simclr"
    temperature: Positive = 0.1
    """Divisor of similarities; a smaller one weighs the hardest negatives more."""
    dim: Count = 128
    """Length of the projection."""
    hidden: Count | None = None
    """Width of the layers between; when absent, the length of the backbone's feature."""
    layers: Count = 2
    """Linear layers of the projection head."""
    batch_norm: bool = True
    """Batch norm after every linear layer of the head, which then has no bias."""
    joint: bool = True
    """Pass both views through the network together, so that they share batch-norm statistics (as Google's and
    MMSelfSup's code do), or one after the other (as small PyTorch versions do)."""


@final
class SimCLR(Method[Config]):
    """A backbone and a projection head that is thrown away."""

    def __init__(self, cfg: Config, backbone: Backbone, facts: RunFacts) -> None:
        super().__init__(cfg, backbone, facts)
        hidden = [cfg.hidden or backbone.dim] * (cfg.layers - 1)
        self.head = mlp(
            [backbone.dim, *hidden, cfg.dim],
            norm=cfg.batch_norm,
            bias=not cfg.batch_norm,
            last_norm=cfg.batch_norm,
            last_bias=not cfg.batch_norm,
        )

    def forward(self, batch: Batch, at: Progress) -> StepResult:
        """NT-Xent of this rank's rows against the rows of all ranks."""
        if self.cfg.joint:
            z = self._project(interleave(batch.views))  # (2B, D), rows 2i and 2i + 1 show image i
        else:
            z = interleave([self._project(view) for view in batch.views])
        found = nt_xent(z, dist.gather_with_grad(z), dist.rank() * len(z), self.cfg.temperature)
        return StepResult(found.loss, {"top1": found.top1})

    def _project(self, images: Tensor) -> Tensor:
        return F.normalize(widen(self.head(self.backbone(images))), dim=1)


def nt_xent(rows: Tensor, everyone: Tensor, first: int, temperature: float) -> Contrast:
    """Normalised temperature-scaled cross entropy (equation 1), mean over `rows`.

    -log( exp(r.p/T) / sum_e exp(r.e/T) ) with p the other view of the same image and e any row but r itself.

    Args:
        rows: (2B, D) unit vectors, the two views of an image in neighbouring rows.
        everyone: (2N, D), which holds `rows` from row `first` on.
        first: an even number.
        temperature: T.
    """
    with no_autocast(rows):
        logits = widen(rows) @ widen(everyone).T / temperature  # (2B, 2N)
    here = torch.arange(len(rows), device=rows.device)
    itself = first + here
    logits = logits.index_put((here, itself), logits.new_tensor(-torch.inf))
    other = itself ^ 1  # 0 <-> 1, 2 <-> 3, ...
    return Contrast(F.cross_entropy(logits, other), percent_right(logits, other))


build = SimCLR
