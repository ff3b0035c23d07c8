"""SimSiam as written by facebookresearch/simsiam."""

from sslcli.convert._layout import Layout, Part
from sslcli.convert.torchvision import RESNET

LAYOUTS = (
    Layout(
        "simsiam", "SimSiam (facebookresearch/simsiam)", (Part("student", ("encoder.",), "encoder"),), (RESNET,),
        signs=(r"encoder\.conv1", r"predictor\.[03]\."), beside=(r"predictor\.",), method="simsiam",
    ),
)  # fmt: skip
