"""The whole network trained with a classifier on top, on few labels: 1 % or 10 % of the training images."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sslcli.config.supervised import TunedConfig
from sslcli.data.few import named_in, share_of_each_class
from sslcli.data.source import Source
from sslcli.engine.classifier import TrainedEvaluator, tuned_reads
from sslcli.seeds import seed_of


class Config(TunedConfig):
    """Fine-tuning on a part of the labels."""

    name: Literal["semi"] = "semi"
    fraction: Annotated[float, Field(gt=0, le=1)] | None = 0.01
    """Share of every class's images that is trained on, at least one; which ones is a function of `part_seed`."""
    part_seed: int = Field(default=0, ge=0)
    """Seed of the choice; another one than the evaluation's seed, so that several seeds train on the same images."""
    list: Path | None = None
    """Instead of `fraction`, a text file that names the images to train on, one a line, as SimCLR's lists do."""

    @model_validator(mode="after")
    def _one_choice(self) -> "Config":
        if (self.fraction is None) == (self.list is None):
            raise ValueError("say which images are trained on either with `fraction` or with `list`")
        return self


def build(cfg: Config) -> TrainedEvaluator:
    """The evaluator for these settings."""
    return TrainedEvaluator(
        reads=partial(tuned_reads, cfg.feature), headline="top1", frozen=False, part=partial(part, cfg)
    )


def part(cfg: Config, source: Source) -> Source:
    """The images that are trained on.

    Raises:
        DataError: the list does not fit the images.
    """
    if cfg.list is not None:
        return named_in(source, cfg.list.expanduser())
    return share_of_each_class(source, cfg.fraction or 1.0, seed_of("semi", cfg.part_seed))
