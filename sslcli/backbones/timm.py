"""Any network of timm, by its name there (https://huggingface.co/docs/timm)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from pydantic import Field
from torch import Tensor, nn

from sslcli.config.base import BackboneConfig
from sslcli.config.spelling import nearest
from sslcli.config.types import Count
from sslcli.contracts import Backbone
from sslcli.errors import PresetError
from sslcli.nn.taps import check_taps

Argument = bool | int | float | str | tuple[int, ...] | None


class Config(BackboneConfig):
    """A network from timm's catalogue, with fresh weights."""

    name: Literal["timm"] = "timm"
    model: str
    """Its name, e.g. `vit_small_patch16_224`."""
    image_size: Count | None = None
    """Side of the images in pixels, for networks whose shape depends on it; when absent, the network's own."""
    args: dict[str, Argument] = Field(default={})
    """What else the network is built with, under timm's names, e.g. `{reg_tokens: 4}`."""


@final
class Timm(Backbone):
    """A timm network without classifier."""

    trunk: Any

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.trunk = timm_trunk(cfg.model, cfg.image_size, cfg.args)
        self.dim = int(self.trunk.head_hidden_size)
        self.stages = tuple(str(stage["module"]) for stage in self.trunk.feature_info)

    def maps(self, images: Tensor) -> Tensor:
        """Output (B, C, h, w) of the last stage, normalised if the network does so; of a ViT, the patch tokens."""
        last: Tensor = self.trunk.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]
        return last

    def forward(self, images: Tensor) -> Tensor:
        """What the classifier would see (B, dim)."""
        pooled: Tensor = self.trunk.forward_head(self.trunk.forward_features(images), pre_logits=True)
        return pooled

    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Output of stages (or blocks, of a ViT) under timm's names, as (B, C, h, w), or `pooled`.

        Raises:
            UserError: there is no place of that name.
        """
        check_taps(names, self.tap_names())
        wanted = [name for name in names if name != "pooled"]
        indices = sorted(self.stages.index(name) for name in wanted)
        found: dict[str, Tensor] = {}
        if wanted:
            maps = self.trunk.forward_intermediates(images, indices=indices, intermediates_only=True)
            found = {self.stages[index]: value for index, value in zip(indices, maps, strict=True)}
        if "pooled" in names:
            found["pooled"] = self(images)
        return {name: found[name] for name in names}

    def tap_names(self) -> tuple[str, ...]:
        """The stages that timm names, and the pooled feature."""
        return (*self.stages, "pooled")


def timm_trunk(model: str, image_size: int | None, args: Mapping[str, Argument]) -> nn.Module:
    """The network `model` of timm without classifier.

    Raises:
        PresetError: there is none of that name, its shape does not depend on the image size, or it does not take an
            argument.
    """
    import timm

    if not timm.is_model(model):
        close = nearest(model, timm.list_models())
        raise PresetError(
            f"`backbone.model`: timm {timm.__version__} has no network `{model}`",
            hint=f"did you mean `{close}`?" if close else "`timm.list_models()` names them all",
        )
    settings: dict[str, Any] = dict(args) if image_size is None else {"img_size": image_size, **args}
    try:
        return timm.create_model(model, num_classes=0, **settings)
    except TypeError as error:
        if image_size is not None and "img_size" in str(error):
            raise PresetError(
                f"`backbone.image_size`: the shape of `{model}` does not depend on the size of images",
                hint="leave `backbone.image_size` out",
            ) from None
        raise PresetError(f"`backbone.args`: timm cannot build `{model}` with them: {error}") from None


build = Timm
