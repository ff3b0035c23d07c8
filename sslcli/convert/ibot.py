"""iBOT as written by bytedance/ibot: DINO's layout with a second last layer and a token for hidden patches."""

from sslcli.convert._layout import BICUBIC, Layout, Part
from sslcli.convert.timm import SWIN, VIT

_NEW = r"((student|teacher)\.)?(backbone\.masked_embed|head\.last_layer2|head\.mlp2)|ibot_loss\."
LAYOUTS = (
    Layout(
        "ibot", "iBOT (bytedance/ibot)",
        (
            Part("teacher", ("teacher.backbone.",), "teacher"),
            Part("student", ("student.backbone.",), "student"),
        ),
        (VIT, SWIN), signs=(r"(student|teacher)\.backbone\.", _NEW), never=(r"(student|teacher)\.(dino|ibot)_head\.",),
        beside=(r"(student|teacher)\.head\.", r"(ibot_)?loss\."), method="ibot", view=BICUBIC,
    ),
    Layout(
        "ibot", "one of iBOT's networks (bytedance/ibot)", (Part("student", ("backbone.",), "network"),), (VIT, SWIN),
        signs=(r"backbone\.", r"head\.", _NEW), never=(r"neck\.",), beside=(r"head\.",), method="ibot", view=BICUBIC,
    ),
)  # fmt: skip
