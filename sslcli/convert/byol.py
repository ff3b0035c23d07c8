"""BYOL's ports to PyTorch: lucidrains/byol-pytorch and sthalles/PyTorch-BYOL."""

from sslcli.convert._layout import Layout, Part
from sslcli.convert.simclr import WHOLE
from sslcli.convert.torchvision import RESNET

LAYOUTS = (
    Layout(
        "byol", "BYOL (lucidrains/byol-pytorch)",
        (
            Part("student", ("online_encoder.net.",), "online network", aliases=("net.",)),
            Part("teacher", ("target_encoder.net.",), "target network"),
        ),
        (RESNET,), signs=(r"online_encoder\.net\.conv1",),
        beside=(r"online_encoder\.projector\.", r"target_encoder\.projector\.", r"online_predictor\."), method="byol",
    ),
    Layout(
        "byol", "BYOL (sthalles/PyTorch-BYOL)",
        (
            Part("student", ("online_network_state_dict.encoder.",), "online network"),
            Part("teacher", ("target_network_state_dict.encoder.",), "target network"),
        ),
        (WHOLE,), signs=(r"online_network_state_dict\.encoder\.0\.",),
        beside=(r"(online|target)_network_state_dict\.proj\w+\.", r"predictor"), method="byol",
    ),
)  # fmt: skip
