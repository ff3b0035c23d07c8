"""Learning-rate schedules: data, and one pure function from time to a factor of the base rate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sslcli.config.base import Settings
from sslcli.config.types import Count, Fraction, NonNegative, Positive


class Warmup(Settings):
    """How the rate climbs to its base value."""

    epochs: NonNegative = 0
    """Length of the warm-up in epochs."""
    steps: int = Field(default=0, ge=0)
    """Length of the warm-up in optimiser steps; give this or `epochs`."""
    start: Fraction = 0.0
    """Factor of the base rate at the first step."""
    shape: Literal["linear", "exp", "constant"] = "linear"
    """How the factor gets from `start` to 1."""
    by: Literal["step", "epoch"] = "step"
    """Whether the factor changes at every step or once per epoch."""
    subtract: bool = False
    """Start the decay only after the warm-up (MAE, MoCo v3, SwAV); otherwise the warm-up multiplies a decay that
    already runs (MMCV 1.x)."""
    reach: bool = False
    """Reach the base value at the last warm-up step already (SwAV's linspace), instead of one step later."""

    @model_validator(mode="after")
    def _one_length(self) -> "Warmup":
        if bool(self.epochs) == bool(self.steps):
            raise ValueError("give the length of the warm-up either in `epochs` or in `steps`")
        return self


class _Schedule(Settings):
    by: Literal["step", "epoch"] = "step"
    """Whether the factor changes at every step or once per epoch."""
    warmup: Warmup | None = None
    """Warm-up before or during the decay."""


class Constant(_Schedule):
    """The base rate throughout."""

    name: Literal["constant"] = "constant"


class Cosine(_Schedule):
    """Half a cosine from 1 to `end` (Loshchilov & Hutter 2017, without restarts)."""

    name: Literal["cosine"] = "cosine"
    end: Fraction = 0.0
    """Factor of the base rate at the end."""


class Linear(_Schedule):
    """A straight line from 1 to `end`."""

    name: Literal["linear"] = "linear"
    end: Fraction = 0.0
    """Factor of the base rate at the end."""


class Poly(_Schedule):
    """(1 - t)^power down to `end`."""

    name: Literal["poly"] = "poly"
    power: Positive = 0.9
    """Exponent of the remaining time."""
    end: Fraction = 0.0
    """Lowest factor of the base rate."""


class Step(_Schedule):
    """Multiply by `gamma` at given epochs."""

    name: Literal["step"] = "step"
    by: Literal["step", "epoch"] = "epoch"
    """Whether the factor changes at every step or once per epoch."""
    at: tuple[Positive, ...] = ()
    """Epochs at which the rate drops."""
    every: Count | None = None
    """Drop every so many epochs; give this or `at`."""
    gamma: Fraction = 0.1
    """Factor of each drop."""
    end: Fraction = 0.0
    """Lowest factor of the base rate."""

    @model_validator(mode="after")
    def _one_rule(self) -> "Step":
        if bool(self.at) == (self.every is not None):
            raise ValueError("say when the rate drops either with `at` or with `every`")
        return self


class Cyclic(_Schedule):
    """A saw of cosines: `cycles` times from 1 down to `end`."""

    name: Literal["cyclic"] = "cyclic"
    cycles: Count = 2
    """Number of equal cycles."""
    end: Fraction = 0.0
    """Factor of the base rate at the end of each cycle."""


AnySchedule = Annotated[Constant | Cosine | Linear | Poly | Step | Cyclic, Field(discriminator="name")]
