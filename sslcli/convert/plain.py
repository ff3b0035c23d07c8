"""A network behind a common prefix and nothing that tells whose it is."""

from sslcli.convert._layout import Layout, Part
from sslcli.convert.timm import BEIT, OFFICIAL_SWIN, SWIN, VIT
from sslcli.convert.torchvision import RESNET
from sslcli.convert.torchvision import SWIN as SWIN_TORCHVISION
from sslcli.convert.torchvision import VIT as VIT_TORCHVISION

LAYOUTS = (
    Layout(
        "plain", "a network behind a prefix",
        (Part("student", ("backbone.", "encoder.", "trunk.", "visual.", "student.", "teacher.", "model."), "network"),),
        (RESNET, VIT, BEIT, SWIN, OFFICIAL_SWIN, VIT_TORCHVISION, SWIN_TORCHVISION),
        never=(
            r"encoder_[qk]\.", r"projector", r"predictor", r"(neck|head)\.", r"momentum", r"classifier", r"decoder",
            r"(projection|prediction)_head", r"backbone\.fc\.0", r"regresser", r"pretext_neck",
            r"(student|teacher)\.backbone",
        ),
    ),
)  # fmt: skip
