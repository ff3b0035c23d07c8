"""Linear classifiers trained on a frozen network: what a linear classifier reads of it when images vary as in training.

The protocols of papers: random crops and mirror images, a network in evaluation mode, accuracy after the last epoch on
central crops of the test images.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from sslcli.config.supervised import TrainedConfig
from sslcli.config.types import Count, Positive
from sslcli.contracts import Backbone
from sslcli.engine.classifier import Read, TrainedEvaluator, average
from sslcli.errors import PresetError
from sslcli.nn.pooling import to_9k
from sslcli.nn.taps import check_taps


class Config(TrainedConfig):
    """Linear classifiers on a frozen network, each on one place of it."""

    name: Literal["linear"] = "linear"
    taps: tuple[str, ...] = Field(default=("pooled",), min_length=1)
    """Places in the network; each gets a classifier of its own, all trained in one pass."""
    pooling: Literal["mean", "9k"] = "mean"
    """Maps are averaged over space, or over windows, so that each gives about 9,000 values (Goyal et al. 2019)."""
    last_blocks: Count | None = None
    """Instead of `taps`, join the class tokens of so many last blocks of a vision transformer (DINO)."""
    patch_mean: bool = False
    """With `last_blocks`, join the mean of the last patch tokens too."""
    norm: Literal["none", "batch"] = "none"
    """Before each classifier: nothing, or batch norm without gain and bias."""
    norm_eps: Positive = 1e-5
    """Added to the variance in `norm`."""

    @model_validator(mode="after")
    def _joins(self) -> "Config":
        if self.patch_mean and self.last_blocks is None:
            raise ValueError("`patch_mean` needs `last_blocks`")
        return self


def build(cfg: Config) -> TrainedEvaluator:
    """The evaluator for these settings."""
    headline = "top1" if len(cfg.taps) == 1 or cfg.last_blocks is not None else f"top1_{cfg.taps[-1]}"
    return TrainedEvaluator(reads=partial(reads, cfg), headline=headline, frozen=True)


def reads(cfg: Config, backbone: Backbone) -> Mapping[str, Read]:
    """What each classifier reads of a network.

    Raises:
        UserError: the network lacks a place.
    """
    if cfg.last_blocks is not None:
        return {"joined": Read(joined(cfg.last_blocks, backbone, cfg.patch_mean), average, cfg.norm, cfg.norm_eps)}
    check_taps(cfg.taps, backbone.tap_names())
    pool = average if cfg.pooling == "mean" else nine_thousand
    return {tap.replace(".", "_"): Read((tap,), pool, cfg.norm, cfg.norm_eps) for tap in cfg.taps}


def nine_thousand(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) pooled to about 9,000 values: (B, C, cells)."""
    return to_9k(maps).view(len(maps), maps.shape[1], -1)


def joined(count: int, backbone: Backbone, patch_mean: bool) -> tuple[str, ...]:
    """The class tokens of the last `count` blocks of a vision transformer, and perhaps its last patch tokens.

    Raises:
        PresetError: the network is none, or has fewer blocks.
    """
    tokens = [name for name in backbone.tap_names() if name.startswith("cls.")]
    if len(tokens) < count:
        what = f"a vision transformer of {count} blocks or more"
        raise PresetError(
            f"`evaluator.last_blocks`: {count} needs {what}, this `{type(backbone.trunk).__name__}` has {len(tokens)}",
            hint="for a ResNet use `-o evaluator.last_blocks=null`, which reads the pooled feature",
        )
    return (*tokens[-count:], *(("norm",) if patch_mean else ()))
