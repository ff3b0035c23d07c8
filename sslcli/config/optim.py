"""Optimisers as data: which one, its numbers, and which parameters are treated differently."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sslcli.config.base import Settings
from sslcli.config.types import Count, Fraction, NonNegative, Positive


class ParamRule(Settings):
    """Different treatment for the parameters it selects; later rules win, a rule that selects nothing is an error."""

    match: str | None = None
    """Regular expression searched in the parameter's name, e.g. `bias$`."""
    one_dim: bool = False
    """Select every parameter with at most one dimension: biases, and the gains of normalisation layers."""
    lr_scale: Positive | None = None
    """Multiply the learning rate."""
    fixed_lr: bool | None = None
    """Keep the base learning rate throughout: no schedule."""
    weight_decay: NonNegative | None = None
    """Replace the weight decay."""
    momentum: Fraction | None = None
    """Replace the momentum (SGD and LARS)."""
    adapt: bool | None = None
    """Whether LARS scales the step by the norm ratio."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _selects(self) -> "ParamRule":
        if (self.match is None) == (not self.one_dim):
            raise ValueError("select parameters either with `match` or with `one_dim: true`")
        return self

    def selects(self, name: str, dimensions: int) -> bool:
        """Whether the rule is about a parameter of this name and number of dimensions."""
        return dimensions <= 1 if self.match is None else re.search(self.match, name) is not None


class _Optim(Settings):
    lr: Positive
    """Base learning rate, for a batch of `per` images (or as it stands when `per` is absent)."""
    per: Count | None = None
    """Batch size the rate is quoted for: the rate used is lr x batch_size / per (Goyal et al. 2017)."""
    weight_decay_end: NonNegative | None = None
    """Where the weight decay ends: it moves there along half a cosine, step by step; what a rule sets stays."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Multiply the rate by this once for every layer of the backbone that lies above (BEiT, MAE fine-tuning)."""
    rules: tuple[ParamRule, ...] = ()
    """Parameters that are treated differently."""

    def effective_lr(self, batch_size: int) -> float:
        """The rate actually used at this global batch size."""
        return self.lr if self.per is None else self.lr * batch_size / self.per


class Sgd(_Optim):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.9
    """Momentum of the gradient average."""
    nesterov: bool = False
    """Nesterov's look-ahead."""
    weight_decay: NonNegative = 0.0
    """L2 penalty added to the gradient."""

    @model_validator(mode="after")
    def _looks_ahead_with_momentum(self) -> "Sgd":
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` needs a `momentum` above 0")
        return self


class Lars(_Optim):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888)."""

    name: Literal["lars"] = "lars"
    momentum: Fraction = 0.9
    """Momentum of the update."""
    nesterov: bool = False
    """Nesterov's look-ahead."""
    weight_decay: NonNegative = 0.0
    """L2 penalty added to the gradient before scaling."""
    eta: Positive = 0.001
    """Trust coefficient."""
    variant: Literal["lr_inside", "google", "lr_outside", "larc"] = "lr_outside"
    """`lr_inside`: ratio by |g| + wd|w|, the rate sits inside the momentum buffer (MMSelfSup). `google`: ratio by
    |g + wd w|, rate inside the buffer (SimCLR). `lr_outside`: ratio by |g + wd w|, rate applied outside the buffer
    (Barlow Twins, MoCo v3, BYOL). `larc`: gradient scaled, then plain SGD (apex LARC without clipping; SwAV)."""


class AdamW(_Optim):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the two moment averages."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""


class Lamb(_Optim):
    """Adam with steps scaled layer by layer (You et al. 2020, arXiv:1904.00962), as timm has it."""

    name: Literal["lamb"] = "lamb"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the two moment averages."""
    eps: Positive = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Weight decay added to the update before scaling; parameters without any are not scaled."""


AnyOptim = Annotated[Sgd | Lars | AdamW | Lamb, Field(discriminator="name")]
