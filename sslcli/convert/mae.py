"""MAE and MaskFeat as written by facebookresearch/mae and SlowFast: the encoder at the root, a decoder or head beside.

Released encoders (`mae_pretrain_vit_base.pth`) hold nothing beside: they are bare transformers under timm's names.
"""

from sslcli.convert._layout import BICUBIC, Layout, Part
from sslcli.convert.timm import VIT

LAYOUTS = (
    Layout(
        "mae", "MAE (facebookresearch/mae)", (Part("student", ("",), "encoder"),), (VIT,),
        signs=(r"decoder_embed\.", r"decoder_blocks\."), beside=(r"decoder_",), method="mae", view=BICUBIC,
    ),
    Layout(
        "maskfeat", "MaskFeat (facebookresearch/SlowFast)", (Part("student", ("",), "encoder"),), (VIT,),
        signs=(r"pred_head\.projections\.",), beside=(r"pred_head\.", r"hogs\."), method="maskfeat", view=BICUBIC,
    ),
)  # fmt: skip
