"""The preset of each job: the sections it has and what they may say."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from sslcli.config.base import BackboneConfig, EvaluatorConfig, MethodConfig, Settings
from sslcli.config.choice import chosen_from
from sslcli.config.data import AnySource, Data
from sslcli.config.optim import AnyOptim
from sslcli.config.schedule import AnySchedule, Cosine
from sslcli.config.types import Count, Index, Operational, Positive
from sslcli.config.views import AnyViews, Masked, MultiBlockMask, ViewChange

AnyMethod = Annotated[SerializeAsAny[MethodConfig], chosen_from("sslcli.methods")]
AnyBackbone = Annotated[SerializeAsAny[BackboneConfig], chosen_from("sslcli.backbones")]
AnyEvaluator = Annotated[SerializeAsAny[EvaluatorConfig], chosen_from("sslcli.evaluate")]


class Expects(Settings):
    """A published result of this recipe: copied, not measured by us."""

    metric: str
    """What was measured, e.g. `linear top-1`."""
    value: float
    """The published number."""
    source: str
    """Where it is published."""


class About(Settings):
    """What a preset is and where its numbers come from; changes nothing."""

    title: str = ""
    """One line for listings."""
    paper: str = ""
    """Link to the paper."""
    follows: str = ""
    """Which recipe this is: repository, configuration file, table row; and every deliberate difference."""
    expects: tuple[Expects, ...] = ()
    """Published results to compare with."""


class Keep(Settings):
    """Which checkpoints stay on disk."""

    last: Count = 3
    """How many of the newest."""
    every_epochs: Count | None = None
    """And for good, one every so many epochs."""


class Checkpoints(Settings):
    """When the state of a run is written."""

    every_epochs: Positive = 1.0
    """Epochs between checkpoints; one is always written at the end."""
    every_steps: Count | None = None
    """Steps between checkpoints; replaces `every_epochs`."""
    keep: Keep = Keep()
    """Which ones stay."""


class Monitor(Settings):
    """Looks at a few training images now and then, without disturbing training: are they still told apart?"""

    every_epochs: Positive | None = 1.0
    """Epochs between looks, not necessarily whole; there is one more at the end. Null: none at all."""
    images: Annotated[int, Field(ge=16)] = 512
    """How many images, always the same ones."""
    knn: bool = True
    """Where images have labels, also let nearest neighbours vote."""
    knn_images: Annotated[int, Field(ge=16)] = 1000
    """How many images vote; of a data set with many classes, as many classes as give 20 images each."""


class Run(Settings):
    """How long, in what arithmetic, on how many images at once."""

    epochs: Positive | None = None
    """Passes over the images; give this or `steps`."""
    steps: Count | None = None
    """Optimiser steps; give this or `epochs`."""
    accumulate: Count = 1
    """Slices a rank's batch is cut into; gradients are averaged over them before the step."""
    batch_norm: Literal["global"] | Count = "global"
    """How many images share batch-norm statistics: the whole batch of a forward pass (SyncBN on several ranks), or the
    paper's images per GPU (split on one device, grouped over ranks, so that the number of GPUs changes nothing)."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Arithmetic of the forward pass; when absent, bf16 on a GPU that has it and fp32 elsewhere."""
    tf32: bool = True
    """Under fp32 on a GPU, multiply with 10 bits of mantissa (TF32): several times faster. Losses keep all 23."""
    compile: bool = False
    """Let torch.compile make kernels for the backbone: minutes at the start, then faster on a GPU; last bits differ."""
    checkpoint_activations: Annotated[bool, Operational()] = False
    """Keep only the inputs of the backbone's blocks and compute the rest again in the backward pass: a third slower,
    much less memory, the same gradients."""
    shard: Annotated[bool, Operational()] = False
    """On several ranks, share parameters, gradients and optimiser state out among them (FSDP2) instead of giving every
    rank all of them (DDP): for networks that do not fit. Not with LAMB, nor with `precision: fp16`."""
    clip: Positive | None = None
    """Largest norm of the gradient."""
    clip_each: bool = False
    """`clip` limits the gradient of every parameter by itself (DINO) instead of the whole gradient."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose gradient is not finite stops the run, or is left out: the optimiser does not move."""
    skip_limit: Count = 10
    """Under `skip`, stop all the same after so many such steps in a row."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run on a GPU."""
    views: Literal["fast", "reference"] | None = None
    """Which reading of the views runs: batched on the device, or image by image with PIL; when absent, the faster one
    by a short measurement."""
    channels_last: Annotated[bool, Operational()] = True
    """Memory layout of images and convolutions."""
    log_every: Annotated[Count, Operational()] = 50
    """Steps between log lines; the device is not synchronised in between."""
    checkpoints: Annotated[Checkpoints, Operational()] = Checkpoints()
    """When the state is written and which files stay."""
    monitor: Annotated[Monitor | None, Operational()] = Monitor()
    """Looks at the features on the way; null: none."""
    on_collapse: Annotated[Literal["warn", "stop"], Operational()] = "warn"
    """What happens when two looks in a row find the features collapsed."""
    tensorboard: Annotated[bool, Operational()] = True
    """Write TensorBoard event files."""
    loggers: Annotated[tuple[Literal["wandb", "mlflow"], ...], Operational()] = ()
    """Services that get the metrics too; each needs its package, e.g. `pip install 'sslcli[wandb]'`."""

    @model_validator(mode="after")
    def _one_length(self) -> "Run":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length of the run either in `epochs` or in `steps`")
        return self

    @model_validator(mode="after")
    def _clips_what(self) -> "Run":
        if self.clip_each and self.clip is None:
            raise ValueError("`clip_each` needs a limit in `clip`")
        return self

    @model_validator(mode="after")
    def _shares_what_it_scales(self) -> "Run":
        if self.shard and self.precision == "fp16":
            raise ValueError("`shard` does not go with `precision: fp16`; use bf16 or fp32")
        return self


class PretrainPreset(Settings):
    """A complete pretraining experiment."""

    about: Annotated[About, Operational()] = About()
    """What this is and where its numbers come from."""
    seed: Index = 0
    """Seed of initialisation, order, views and every draw inside a step."""
    data: Data
    """Which images, how many at a time."""
    views: AnyViews
    """How they are looked at."""
    backbone: AnyBackbone
    """The network that learns."""
    method: AnyMethod
    """How it learns."""
    optim: AnyOptim
    """The optimiser."""
    schedule: AnySchedule = Cosine()
    """Learning rate over time."""
    run: Run
    """Length, arithmetic, checkpoints."""

    @model_validator(mode="after")
    def _fits_together(self) -> "PretrainPreset":
        needs = self.method.views
        if self.views.name != needs.kind:
            raise ValueError(f"method `{self.method.name}` needs views of kind `{needs.kind}`, not `{self.views.name}`")
        count = self.views.count
        if count < needs.at_least or (needs.at_most is not None and count > needs.at_most):
            wanted = (
                f"{needs.at_least}"
                if needs.at_most == needs.at_least
                else f"at least {needs.at_least}"
                if needs.at_most is None
                else f"{needs.at_least} to {needs.at_most}"
            )
            raise ValueError(f"method `{self.method.name}` needs {wanted} views of each image, `views` gives {count}")
        if needs.even and isinstance(self.views, Masked) and not self.views.even:
            raise ValueError(
                f"method `{self.method.name}` needs as many masked patches in every image: set `views.mask.exact: true`"
            )
        if needs.blocks and isinstance(self.views, Masked) and not isinstance(self.views.mask, MultiBlockMask):
            raise ValueError(
                f"method `{self.method.name}` needs masks with target blocks: set `views.mask.name: multiblock`"
            )
        if self.data.batch_size % self.run.accumulate:
            raise ValueError(
                f"`data.batch_size` {self.data.batch_size} cannot be cut into {self.run.accumulate} equal slices "
                "(`run.accumulate`)"
            )
        return self


class EvalPreset(Settings):
    """A frozen, versioned evaluation protocol."""

    about: Annotated[About, Operational()] = About()
    """What this reproduces."""
    seed: Index = 0
    """Seed of every draw."""
    evaluator: AnyEvaluator
    """What is computed from the features."""
    train: AnySource | None = None
    """Images the evaluator learns from; when absent, the training images the weights came from."""
    test: AnySource | None = None
    """Images it is judged on; when absent, the test images that belong to `train`."""
    view: ViewChange | None = None
    """What is changed about the view that goes with the weights."""
    batch_size: Annotated[Count, Operational()] = 256
    """Images per forward pass."""
    workers: Annotated[Index | None, Operational()] = None
    """Loader processes per rank; when absent, chosen for the machine."""


def operational_keys(model: type[Settings], prefix: str = "") -> set[str]:
    """Dotted keys whose value may change between a run and its resumption."""
    found: set[str] = set()
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        if any(isinstance(note, Operational) for note in info.metadata):
            found.add(key)
        elif isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            found |= operational_keys(info.annotation, f"{key}.")
    return found


JOBS: dict[str, type[Settings]] = {"pretrain": PretrainPreset, "eval": EvalPreset}
"""The folder under `presets/` and the model its files must satisfy."""


def as_data(preset: Settings) -> dict[str, Any]:
    """The preset as plain data: lists, mappings, numbers and strings only."""
    return preset.model_dump(mode="json")
