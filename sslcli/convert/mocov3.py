"""MoCo v3 as written by facebookresearch/moco-v3; its small transformer has 12 heads, which shapes do not tell."""

from dataclasses import replace

from sslcli.convert._layout import Inferred, Layout, Part
from sslcli.convert.timm import VIT
from sslcli.convert.torchvision import RESNET


def twelve_heads(found: Inferred, method: str) -> Inferred:
    """Heads of MoCo v3's transformers: 12 at width 384 and 768 (Chen et al. 2021, table 2)."""
    small = (found.backbone.get("name"), found.backbone.get("size")) == ("vit", "small")
    small = small and "width" not in found.backbone
    if method != "mocov3" or not small:
        return found
    notes = tuple(note for note in found.notes if "heads" not in note)
    return replace(found, backbone={**found.backbone, "heads": 12}, notes=notes)


LAYOUTS = (
    Layout(
        "mocov3", "MoCo v3 (facebookresearch/moco-v3)",
        (Part("student", ("base_encoder.",), "encoder"), Part("teacher", ("momentum_encoder.",), "momentum encoder")),
        (RESNET, VIT), signs=(r"base_encoder\.(conv1|cls_token)",), beside=(r"predictor\.",), method="mocov3",
        settings=twelve_heads,
    ),
)  # fmt: skip
