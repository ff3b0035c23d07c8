"""MAE and MaskFeat as written by facebookresearch/mae and SlowFast: the encoder at the root, a decoder or head beside.

Released encoders (`mae_pretrain_vit_base.pth`) hold nothing beside: they are bare transformers under timm's names.
"""

from dataclasses import replace

from sslcli.convert._layout import BICUBIC, Layout, Part
from sslcli.convert._rules import rename
from sslcli.convert.timm import VIT

NORM_IN_HEAD = replace(
    VIT, name="SlowFast ViT", rules=(*VIT.rules, rename("pred_head.transforms.0.0.{leaf}", "norm.{leaf}")), source=None
)
"""SlowFast's MaskFeat has its last norm in the head, before the projection."""

LAYOUTS = (
    Layout(
        "mae", "MAE (facebookresearch/mae)", (Part("student", ("",), "encoder"),), (VIT,),
        signs=(r"decoder_embed\.", r"decoder_blocks\."), beside=(r"decoder_",), method="mae", view=BICUBIC,
    ),
    Layout(
        "maskfeat", "MaskFeat (facebookresearch/SlowFast)", (Part("student", ("",), "encoder"),),
        (NORM_IN_HEAD,), signs=(r"pred_head\.projections\.",), beside=(r"pred_head\.projections", r"hogs\."),
        method="maskfeat", view=BICUBIC,
    ),
)  # fmt: skip
