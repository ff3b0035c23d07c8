"""I-JEPA as written by facebookresearch/ijepa: a transformer without class token; the target encoder is evaluated."""

from sslcli.convert._layout import BICUBIC, Layout, Part
from sslcli.convert.timm import VIT

LAYOUTS = (
    Layout(
        "ijepa", "I-JEPA (facebookresearch/ijepa)",
        (
            Part("teacher", ("target_encoder.",), "target encoder"),
            Part("student", ("encoder.",), "encoder"),
        ),
        (VIT,), signs=(r"(target_)?encoder\.blocks\.", r"predictor\.predictor_blocks\."), beside=(r"predictor\.",),
        method="ijepa", view=BICUBIC,
    ),
)  # fmt: skip
