"""The whole network trained with a classifier on top, on all labels: how good a start the weights are."""

from functools import partial
from typing import Literal

from sslcli.config.supervised import TunedConfig
from sslcli.engine.classifier import TrainedEvaluator, tuned_reads


class Config(TunedConfig):
    """Fine-tuning of the whole network."""

    name: Literal["finetune"] = "finetune"


def build(cfg: Config) -> TrainedEvaluator:
    """The evaluator for these settings."""
    return TrainedEvaluator(reads=partial(tuned_reads, cfg.feature), headline="top1", frozen=False)
