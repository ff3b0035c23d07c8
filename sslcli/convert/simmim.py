"""SimMIM as written by microsoft/SimMIM: `encoder`, and one convolution as a decoder."""

from sslcli.convert._layout import BICUBIC, Layout, Part
from sslcli.convert.timm import BEIT, OFFICIAL_SWIN, SWIN, VIT

LAYOUTS = (
    Layout(
        "simmim", "SimMIM (microsoft/SimMIM)", (Part("student", ("encoder.",), "encoder"),),
        (OFFICIAL_SWIN, SWIN, BEIT, VIT), signs=(r"encoder\.mask_token", r"decoder\.0\."), beside=(r"decoder\.",),
        method="simmim", view=BICUBIC,
    ),
)  # fmt: skip
