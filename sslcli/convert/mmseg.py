"""MMSegmentation (https://github.com/open-mmlab/mmsegmentation): a ResNet for semantic segmentation."""

from pathlib import Path

from sslcli.convert._layout import Network, Written
from sslcli.convert._openmmlab import resnet_for


def write(network: Network, out: Path) -> Written:
    """What `init_cfg=dict(type="Pretrained", checkpoint=…)` of a segmentor's backbone takes; see `resnet_for`."""
    return resnet_for(
        "MMSegmentation",
        network,
        out,
        (
            "MMSegmentation's recipes use `ResNetV1c`, whose stem is three 3 x 3 convolutions: say `ResNet`, whose "
            "stem is the 7 x 7 one, with `contract_dilation=True`.",
        ),
    )
