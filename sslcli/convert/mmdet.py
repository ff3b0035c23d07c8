"""MMDetection (https://github.com/open-mmlab/mmdetection): a ResNet for detection."""

from pathlib import Path

from sslcli.convert._layout import Network, Written
from sslcli.convert._openmmlab import resnet_for


def write(network: Network, out: Path) -> Written:
    """What `init_cfg=dict(type="Pretrained", checkpoint=…)` of a detector's backbone takes; see `resnet_for`."""
    return resnet_for(
        "MMDetection",
        network,
        out,
        (
            "MMDetection's own recipes for self-supervised weights freeze nothing (`frozen_stages=0` or -1) and train "
            "SyncBN in backbone and heads.",
            "a C4 model reads the file twice: in the backbone and in `roi_head.shared_head.init_cfg`.",
        ),
    )
