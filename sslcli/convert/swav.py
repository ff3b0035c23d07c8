"""SwAV and DeepCluster v2 as written by facebookresearch/swav; the queue is in files of its own."""

from sslcli.convert._layout import Layout, Part
from sslcli.convert.torchvision import RESNET

LAYOUTS = (
    Layout(
        "swav", "SwAV (facebookresearch/swav)", (Part("student", ("",), "network"),), (RESNET,),
        signs=(r"(projection_head|prototypes)\.",), beside=(r"projection_head\.", r"prototypes\."), method="swav",
    ),
)  # fmt: skip
