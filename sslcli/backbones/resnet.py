"""ResNet (He et al. 2016, https://arxiv.org/abs/1512.03385), with stride in the 3 x 3 convolution.

Built by timm; names and initialisation are torchvision's, so weights go into either without translation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field
from torch import Tensor, nn

from sslcli.config.base import BackboneConfig
from sslcli.config.types import Count
from sslcli.contracts import Backbone
from sslcli.nn.sobel import Sobel
from sslcli.nn.taps import check_taps

if TYPE_CHECKING:
    from timm.models.resnet import ResNet as Trunk

Stem = Literal["imagenet", "cifar", "small", "padded"]
Depth = Literal[10, 14, 18, 26, 34, 50, 101, 152]

BASIC: dict[int, tuple[int, int, int, int]] = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK: dict[int, tuple[int, int, int, int]] = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


class Config(BackboneConfig):
    """Residual network."""

    name: Literal["resnet"] = "resnet"
    depth: Depth = 50
    """Number of weighted layers; up to 34, except 14 and 26, two per block, otherwise three."""
    width: Annotated[Count, Field(ge=8)] = 64
    """Channels of the stem and of the first stage's blocks; 64 is the standard network. At least 8: on one thread of a
    CPU the gradient of a strided 1 x 1 convolution of fewer channels corrupts memory in oneDNN."""
    stem: Stem = "imagenet"
    """`imagenet`: 7 x 7 with stride 2, then max-pooling. `cifar`: 3 x 3 with stride 1 and no pooling, for 32 px.
    `small`: 3 x 3 with stride 2 and no pooling, for small images on slow machines. `padded`: as `cifar` with two pixels
    of padding, as in solo-learn."""
    zero_init_residual: bool = False
    """Start every block as the identity: the gain of its last batch norm is 0 (Goyal et al. 2017)."""
    sobel: bool = False
    """Look at two maps of slopes, from fixed Sobel filters on the mean of the colours, instead of three colours
    (DeepCluster)."""


@final
class ResNet(Backbone):
    """Stem, four stages, average over the map."""

    trunk: "Trunk"

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.front = Sobel() if cfg.sobel else nn.Identity()
        channels = 2 if cfg.sobel else 3
        self.trunk = resnet_trunk(cfg.depth, cfg.width, cfg.stem, cfg.zero_init_residual, channels)
        self.dim = self.trunk.num_features

    def maps(self, images: Tensor) -> Tensor:
        """Output (B, C, h, w) of the last stage."""
        return self.trunk.forward_features(self.front(images))

    def forward(self, images: Tensor) -> Tensor:
        """Average of the last stage's output (B, dim)."""
        return self.trunk.forward_head(self.maps(images), pre_logits=True)

    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Output of the stem before pooling, of stages, or `pooled`.

        Raises:
            UserError: there is no place of that name.
        """
        check_taps(names, self.tap_names())
        last, stages = self.trunk.forward_intermediates(self.front(images))
        found = dict(zip(STAGES, stages, strict=True))
        if "pooled" in names:
            found["pooled"] = self.trunk.forward_head(last, pre_logits=True)
        return {name: found[name] for name in names}

    def tap_names(self) -> tuple[str, ...]:
        """The stem, the stages, the pooled feature."""
        return (*STAGES, "pooled")


def resnet_trunk(depth: Depth, width: int, stem: Stem, zero_init: bool, inputs: int = 3) -> "Trunk":
    """A timm ResNet without classifier, initialised as torchvision does: normal with variance 2 / fan-out."""
    from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
    from timm.models.resnet import ResNet as Trunk

    block: Any = BasicBlock if depth in BASIC else Bottleneck
    repeats = BASIC[depth] if depth in BASIC else BOTTLENECK[depth]
    channels = (width, 2 * width, 4 * width, 8 * width)
    trunk: Any = Trunk(block, repeats, num_classes=0, in_chans=inputs, channels=channels, zero_init_last=False)
    if stem != "imagenet":
        stride, padding = 2 if stem == "small" else 1, 2 if stem == "padded" else 1
        trunk.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=padding, bias=False)
        trunk.maxpool = nn.Identity()
    elif width != 64:
        trunk.conv1 = nn.Conv2d(inputs, width, 7, stride=2, padding=3, bias=False)
    if width != 64:  # timm's stem always has 64 channels
        trunk.bn1 = nn.BatchNorm2d(width)
        stages, _ = make_blocks((block,) * 4, channels, repeats, width, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d)
        for name, stage in stages:
            trunk.add_module(name, stage)
    trunk.init_weights(zero_init_last=zero_init)
    made: Trunk = trunk
    return made


build = ResNet
