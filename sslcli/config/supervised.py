"""Evaluations that train a classifier, as data: how images are cropped, for how long, by which optimiser."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sslcli.config.base import EvaluatorConfig, Settings
from sslcli.config.data import Data
from sslcli.config.optim import AnyOptim, Sgd
from sslcli.config.presets import Run
from sslcli.config.schedule import AnySchedule, Cosine
from sslcli.config.types import Count, Fraction, Index, NonNegative, Positive
from sslcli.config.views import CropGroup, Crops, EvalView, Interpolation, Jitter, Normalize, Range, resize_for


class TrainCrop(Settings):
    """The one view of each training image."""

    size: Count | None = None
    """Side of the crop in pixels; when absent, the side that the weights were trained with."""
    scale: Range = (0.08, 1.0)
    """Area of the crop as a share of the image."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the crop, drawn log-uniformly."""
    interpolation: Interpolation = "bilinear"
    """Resampling filter, antialiased."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    jitter: Jitter | None = None
    """Colour jitter."""
    rand_augment: str | None = None
    """RandAugment after the flip, in timm's words, e.g. `rand-m9-mstd0.5-inc1`."""
    lighting: NonNegative = 0.0
    """Deviation of the noise along the principal components of ImageNet's colours (Krizhevsky et al. 2012: 0.1)."""
    erase: Fraction = 0.0
    """Probability of filling a rectangle with noise after normalisation (random erasing, Zhong et al. 2017)."""

    def views(self, size: int, normalize: Normalize) -> Crops:
        """The crops as the view builder takes them."""
        group = CropGroup(
            size=size,
            scale=self.scale,
            ratio=self.ratio,
            interpolation=self.interpolation,
            flip=self.flip,
            jitter=self.jitter,
        )
        return Crops(groups=(group,), normalize=normalize)


class Mix(Settings):
    """Mixing of each batch with its mirror image in the order of rows, one draw for the whole batch of a rank."""

    mixup: NonNegative = 0.8
    """Alpha of mixup (Zhang et al. 2018); 0: never."""
    cutmix: NonNegative = 1.0
    """Alpha of CutMix (Yun et al. 2019); 0: never."""
    p: Fraction = 1.0
    """Probability that a batch is mixed at all."""
    switch: Fraction = 0.5
    """Probability of CutMix where both are possible."""

    @model_validator(mode="after")
    def _mixes(self) -> "Mix":
        if self.mixup == 0 and self.cutmix == 0:
            raise ValueError("at least one of `mixup` and `cutmix` must be above 0; leave `mix` out to mix nothing")
        return self


class TrainedConfig(EvaluatorConfig):
    """What every evaluation that trains a classifier fixes."""

    epochs: Positive = 100
    """Passes over the training images."""
    batch_size: Count = 256
    """Images per optimiser step over all ranks together."""
    drop_last: bool = False
    """Leave out the last, incomplete batch of an epoch."""
    batch_norm: Literal["global"] | Count = "global"
    """How many images share the statistics of batch norms that learn; a number above the batch means the batch."""
    precision: Literal["fp32", "bf16", "fp16"] | None = "fp32"
    """Arithmetic of the network; null: bf16 on a GPU that has it and fp32 elsewhere."""
    optim: AnyOptim = Sgd(lr=30.0)
    """The optimiser."""
    schedule: AnySchedule = Cosine()
    """Learning rate over time."""
    crop: TrainCrop = TrainCrop()
    """How training images are looked at."""
    test_interpolation: Interpolation = "bilinear"
    """Resampling filter of test images."""
    head_std: NonNegative = 0.01
    """Deviation of the normal distribution that the classifier's weights start from; its biases start from 0."""
    classes: Count | None = None
    """How many classes the images must have; null: any number."""

    def test_view(self, own: EvalView) -> EvalView:
        """How test images are looked at: as the weights were trained, with this protocol's size and filter."""
        size = self.crop.size or own.size
        resize = own.resize if size == own.size else resize_for(size)
        return own.model_copy(update={"size": size, "resize": resize, "interpolation": self.test_interpolation})

    def recipe(self, data: Data, seed: int) -> "Recipe":
        """The experiment, as the training loop takes it."""
        group = self.batch_norm if self.batch_norm == "global" or self.batch_norm < self.batch_size else "global"
        run = Run(epochs=self.epochs, precision=self.precision, batch_norm=group, monitor=None, views="fast")
        return Recipe(seed=seed, data=data, optim=self.optim, schedule=self.schedule, run=run)


class TunedConfig(TrainedConfig):
    """What evaluations fix that train the whole network."""

    accumulate: Count = 1
    """Slices a rank's batch is cut into; gradients are averaged over them before the step."""
    clip: Positive | None = None
    """Largest norm of the gradient."""
    feature: Literal["pooled", "mean"] = "pooled"
    """What the classifier reads: the network's pooled feature, or the mean of a vision transformer's patch tokens after
    the last block, through a layer norm of its own instead of the network's last one (MAE)."""
    drop_path: Fraction = 0.0
    """Probability of skipping the last block's branches while training; earlier blocks linearly less."""
    smoothing: Fraction = 0.0
    """Label smoothing: the share of the target that is spread over all classes."""
    mix: Mix | None = None
    """Mixup and CutMix."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Judge a copy of the network that follows it with this momentum per step."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TunedConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(f"`batch_size` {self.batch_size} cannot be cut into {self.accumulate} equal slices")
        if not self.drop_last and (self.accumulate > 1 or self.mix is not None):
            raise ValueError("`accumulate` and `mix` need whole batches: set `drop_last: true`")
        return self

    def recipe(self, data: Data, seed: int) -> "Recipe":
        """The experiment, as the training loop takes it."""
        made = super().recipe(data, seed)
        run = made.run.model_copy(update={"accumulate": self.accumulate, "clip": self.clip})
        return made.model_copy(update={"run": run})


class Recipe(Settings):
    """The part of an evaluation that the training loop carries out."""

    seed: Index
    """Seed of initialisation, order, views and every draw inside a step."""
    data: Data
    """Which images, how many at a time."""
    optim: AnyOptim
    """The optimiser."""
    schedule: AnySchedule
    """Learning rate over time."""
    run: Run
    """Length, arithmetic, checkpoints."""
