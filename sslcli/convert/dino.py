"""DINO as written by facebookresearch/dino; its bare backbones carry timm's or torchvision's names."""

from sslcli.convert._layout import BICUBIC, Layout, Part
from sslcli.convert.timm import VIT
from sslcli.convert.torchvision import RESNET

LAYOUTS = (
    Layout(
        "dino", "DINO (facebookresearch/dino)",
        (
            Part("teacher", ("teacher.backbone.",), "teacher"),
            Part("student", ("student.backbone.",), "student"),
        ),
        (VIT, RESNET), signs=(r"(student|teacher)\.head\.(mlp|last_layer)",),
        never=(r"ibot_loss\.", r"student\.backbone\.masked_embed", r"(student|teacher)\.head\.last_layer2"),
        beside=(r"(student|teacher)\.head\.", r"dino_loss\."), method="dino", view=BICUBIC,
    ),
    Layout(
        "dino", "one of DINO's networks (facebookresearch/dino)", (Part("student", ("backbone.",), "network"),),
        (VIT, RESNET), signs=(r"backbone\.", r"head\.(mlp|last_layer)\."), never=(r"head\.last_layer2", r"neck\."),
        beside=(r"head\.",), method="dino", view=BICUBIC,
    ),
)  # fmt: skip
