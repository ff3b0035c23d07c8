"""MoCo v1 and v2 as written by facebookresearch/moco: two whole encoders and a queue."""

from sslcli.convert._layout import Layout, Part
from sslcli.convert.torchvision import RESNET

LAYOUTS = (
    Layout(
        "moco", "MoCo v1 and v2 (facebookresearch/moco)",
        (Part("student", ("encoder_q.",), "query encoder"), Part("teacher", ("encoder_k.",), "key encoder")),
        (RESNET,), signs=(r"encoder_q\.conv1\.",), never=(r"queue2",), beside=(r"queue",), method="moco",
    ),
)  # fmt: skip
