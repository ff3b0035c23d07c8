"""NPID as written by zhirongw/lemniscate.pytorch: a bare ResNet, and the memory as a pickled module, left alone."""

from sslcli.convert._layout import Layout, Part
from sslcli.convert.torchvision import RESNET

LAYOUTS = (
    Layout(
        "lemniscate", "NPID (zhirongw/lemniscate.pytorch)", (Part("student", ("",), "network"),), (RESNET,),
        signs=("top:lemniscate",), beside=(r"lemniscate\.",), method="npid",
    ),
)  # fmt: skip
