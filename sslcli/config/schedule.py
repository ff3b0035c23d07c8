"""Learning-rate schedules: data, and one pure function from time to a factor of the base rate."""

from math import cos, pi
from typing import Annotated, Literal, assert_never

from pydantic import Field, model_validator

from sslcli.config.base import Settings
from sslcli.config.types import Count, Fraction, Index, NonNegative, Positive


class Warmup(Settings):
    """How the rate climbs to its base value."""

    epochs: NonNegative = 0
    """Length of the warm-up in epochs."""
    steps: Index = 0
    """Length of the warm-up in optimiser steps; give this or `epochs`."""
    start: Fraction = 0.0
    """Factor of the base rate at the first step."""
    shape: Literal["linear", "exp", "constant"] = "linear"
    """How the factor gets from `start` to 1: along a line, exponentially, or in one jump at the end."""
    by: Literal["step", "epoch"] = "step"
    """Whether the factor changes at every step or once per epoch."""
    subtract: bool = False
    """Start the decay only after the warm-up (MAE, MoCo v3, SwAV); otherwise the warm-up multiplies a decay that
    already runs (MMCV 1.x)."""
    mirror: bool = False
    """With `subtract`: during the warm-up, multiply the decay's mirror image before its start instead of the base
    rate (MMSelfSup's StepFixCosineAnnealing), a ramp that lags a little behind the straight line."""
    reach: bool = False
    """Reach the base value at the last warm-up step already (SwAV's linspace), instead of one step later."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Warmup":
        if bool(self.epochs) == bool(self.steps):
            raise ValueError("give the length of the warm-up either in `epochs` or in `steps`")
        if self.shape == "exp" and self.start == 0:
            raise ValueError("an exponential warm-up cannot start from 0: give `start` a small value, e.g. 0.001")
        if self.mirror and not self.subtract:
            raise ValueError("`mirror` needs `subtract: true`")
        return self

    def length(self, steps_per_epoch: int) -> float:
        """Length of the warm-up in steps."""
        return self.steps or self.epochs * steps_per_epoch


class _Schedule(Settings):
    by: Literal["step", "epoch"] = "step"
    """Whether the factor changes at every step or once per epoch."""
    warmup: Warmup | None = None
    """Warm-up before or during the decay."""
    ahead: Index = 0
    """Steps by which the rate, and the weight decay if it moves, runs ahead: 1 where the authors' schedule takes a step
    before the first update (I-JEPA)."""


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
    """From 1 to `end` with (1 - t)^power, t the share of the run that is done."""

    name: Literal["poly"] = "poly"
    power: Positive = 0.9
    """Exponent of the remaining time."""
    end: Fraction = 0.0
    """Factor of the base rate at the end."""


class Step(_Schedule):
    """Multiply by `gamma` at given epochs of the run, the warm-up included."""

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
        if self.warmup is not None and self.warmup.subtract:
            raise ValueError("`warmup.subtract` has no meaning here: `at` and `every` count from the start of the run")
        return self


class Cyclic(_Schedule):
    """Cosine with warm restarts (Loshchilov & Hutter 2017): `cycles` times from 1 down to `end`, equally long."""

    name: Literal["cyclic"] = "cyclic"
    cycles: Count = 2
    """Number of equal cycles."""
    end: Fraction = 0.0
    """Factor of the base rate at the end of each cycle."""


AnySchedule = Annotated[Constant | Cosine | Linear | Poly | Step | Cyclic, Field(discriminator="name")]


def factor(schedule: AnySchedule, step: int, total: int, steps_per_epoch: int) -> float:
    """What the base rate is multiplied with at `step` (from 0) of a run of `total` steps.

    The warm-up's factor times the decay's: `decay(step)`, or `decay(step - warm-up)` with `subtract`. A run too short
    for its warm-up just ends inside it.
    """
    step += schedule.ahead
    clock = _clock(schedule.by, step, steps_per_epoch)
    warmup = schedule.warmup
    if warmup is None:
        return _decay(schedule, clock, total, steps_per_epoch)
    length = warmup.length(steps_per_epoch)
    elapsed, span = (clock - length, total - length) if warmup.subtract else (clock, total)
    if warmup.mirror:
        elapsed = abs(elapsed)
    rise = _rise(warmup, _clock(warmup.by, step, steps_per_epoch), length, steps_per_epoch) if step < length else 1.0
    return rise * _decay(schedule, max(elapsed, 0), span, steps_per_epoch)


def _clock(by: Literal["step", "epoch"], step: int, steps_per_epoch: int) -> int:
    """The step at which the factor last changed."""
    return step if by == "step" else step - step % steps_per_epoch


def _rise(warmup: Warmup, clock: int, length: float, steps_per_epoch: int) -> float:
    """The warm-up's factor at step `clock` < `length`."""
    tick = steps_per_epoch if warmup.by == "epoch" else 1
    until = length - tick if warmup.reach else length
    done = min(clock / until, 1.0) if until > 0 else 0.0
    match warmup.shape:
        case "linear":
            return warmup.start + (1 - warmup.start) * done
        case "exp":
            return float(warmup.start ** (1 - done))
        case "constant":
            return warmup.start
        case _:
            assert_never(warmup.shape)


def _decay(schedule: AnySchedule, elapsed: float, span: float, steps_per_epoch: int) -> float:
    """The decay's factor when `elapsed` of its `span` steps are done."""
    done = min(elapsed / span, 1.0) if span > 0 else 0.0
    match schedule:
        case Constant():
            return 1.0
        case Cosine(end=end):
            return _half_cosine(done, end)
        case Linear(end=end):
            return end + (1 - end) * (1 - done)
        case Poly(power=power, end=end):
            return float(end + (1 - end) * (1 - done) ** power)
        case Step(at=at, every=every, gamma=gamma, end=end):
            epochs = elapsed / steps_per_epoch
            drops = int(epochs // every) if every is not None else sum(epochs >= epoch for epoch in at)
            return max(float(gamma**drops), end)
        case Cyclic(cycles=cycles, end=end):
            return _half_cosine(done * cycles % 1 if done < 1 else 1.0, end)
        case _:
            assert_never(schedule)


def _half_cosine(done: float, end: float) -> float:
    """From 1 to `end` along half a cosine."""
    return end + (1 - end) * (1 + cos(pi * done)) / 2
