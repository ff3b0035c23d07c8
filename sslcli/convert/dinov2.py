"""DINOv2 as written by facebookresearch/dinov2: bare backbones, teachers alone, and training states in chunks."""

from sslcli.convert._layout import BICUBIC, Layout, Part
from sslcli.convert.timm import VIT, VIT_IN_CHUNKS

_DIALECTS = (VIT, VIT_IN_CHUNKS)
LAYOUTS = (
    Layout(
        "dinov2", "a backbone of DINOv2 (facebookresearch/dinov2)", (Part("student", ("",), "backbone"),), _DIALECTS,
        signs=(r"mask_token", r"blocks\.0\.(0\.)?ls1\.gamma"), never=(r"decoder_", r"backbone\."), method="dinov2",
        view=BICUBIC,
    ),
    Layout(
        "dinov2", "DINOv2 (facebookresearch/dinov2)",
        (
            Part("teacher", ("teacher.backbone.",), "teacher"),
            Part("student", ("student.backbone.",), "student"),
        ),
        _DIALECTS, signs=(r"(student|teacher)\.(dino|ibot)_head\.",),
        beside=(r"(student|teacher)\.(dino|ibot)_head\.", r"\w*_loss\."), method="dinov2", view=BICUBIC,
    ),
    Layout(
        "dinov2", "one of DINOv2's networks (facebookresearch/dinov2)", (Part("student", ("backbone.",), "network"),),
        _DIALECTS, signs=(r"backbone\.", r"(dino|ibot)_head\."), beside=(r"(dino|ibot)_head\.",), method="dinov2",
        view=BICUBIC,
    ),
)  # fmt: skip
