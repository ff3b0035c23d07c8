"""Barlow Twins and VICReg as written by facebookresearch; their `resnet50.pth` are bare networks of torchvision."""

from sslcli.convert._layout import Layout, Part
from sslcli.convert.torchvision import RESNET

LAYOUTS = (
    Layout(
        "barlowtwins", "Barlow Twins (facebookresearch/barlowtwins)", (Part("student", ("backbone.",), "backbone"),),
        (RESNET,), signs=(r"backbone\.conv1", r"projector\.\d", r"bn\.running_mean"), never=(r"(momentum_|class)",),
        beside=(r"projector\.", r"bn\."), method="barlowtwins",
    ),
    Layout(
        "vicreg", "VICReg (facebookresearch/vicreg)", (Part("student", ("backbone.",), "backbone"),), (RESNET,),
        signs=(r"backbone\.conv1", r"projector\.\d"), never=(r"bn\.", r"momentum_", r"classifier", r"predictor"),
        beside=(r"projector\.",), method="vicreg",
    ),
)  # fmt: skip
