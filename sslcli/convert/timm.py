"""timm's names for transformers, which are also those of DeiT, DINO, MAE, MoCo v3 and official Swin and BEiT files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sslcli.convert._layout import Dialect, Layout, Network, Part, Tensors, Written
from sslcli.convert._rules import drop, rename
from sslcli.convert.torchvision import keep

VIT_RULES = (
    keep("cls_token", optional=True),
    keep("pos_embed"),
    keep("reg_token", optional=True),
    rename("register_tokens", "reg_token", optional=True),
    keep("patch_embed.proj.{leaf}"),
    keep("blocks.{i}.norm{n}.{leaf}"),
    keep("blocks.{i}.attn.qkv.{leaf}"),
    keep("blocks.{i}.attn.proj.{leaf}"),
    keep("blocks.{i}.ls{n}.gamma", optional=True),
    keep("blocks.{i}.mlp.fc{n}.{leaf}", optional=True),
    rename("blocks.{i}.mlp.w12.{leaf}", "blocks.{i}.mlp.fc1.{leaf}", optional=True),  # gated: both halves in one
    rename("blocks.{i}.mlp.w3.{leaf}", "blocks.{i}.mlp.fc2.{leaf}", optional=True),
    keep("norm.{leaf}", optional=True),
    keep("fc_norm.{leaf}", optional=True),
    drop("head.{rest}", "classifier or projection head"),
    drop("head_dist.{rest}", "classifier of the distillation token"),
    drop("pre_logits.{rest}", "layer before the classifier"),
    drop("mask_token", "stands for hidden patches while training"),
    drop("masked_embed", "stands for hidden patches while training"),
)
CHUNKED_RULES = (
    *(rule for rule in VIT_RULES if not (rule.theirs[0] or "").startswith("blocks.")),
    *(
        rename(
            f"blocks.{{chunk}}.{{i}}.{theirs}", f"blocks.{{i}}.{ours}", optional=not theirs.startswith(("norm", "attn"))
        )
        for theirs, ours in (
            ("norm{n}.{leaf}", "norm{n}.{leaf}"),
            ("attn.qkv.{leaf}", "attn.qkv.{leaf}"),
            ("attn.proj.{leaf}", "attn.proj.{leaf}"),
            ("ls{n}.gamma", "ls{n}.gamma"),
            ("mlp.fc{n}.{leaf}", "mlp.fc{n}.{leaf}"),
            ("mlp.w12.{leaf}", "mlp.fc1.{leaf}"),
            ("mlp.w3.{leaf}", "mlp.fc2.{leaf}"),
        )
    ),
)


def registers(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """With registers timm adds no position to the class token: the position goes into the token itself."""
    if "reg_token" not in ours or "cls_token" not in ours:
        return ours
    positions = ours["pos_embed"]
    grid = round((positions.shape[1] - 1) ** 0.5)
    if grid * grid != positions.shape[1] - 1:  # as timm has it already
        return ours
    return {**ours, "cls_token": ours["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


def vit_source(backbone: Mapping[str, Any], theirs: Tensors) -> Callable[[Tensor], Tensor] | None:
    """The vision transformer of timm with these tensors."""
    from timm.models.vision_transformer import VisionTransformer

    from sslcli.backbones.vit import Config

    known = ("head.", "head_dist.", "pre_logits.", "mask_token", "masked_embed")
    if backbone["name"] != "vit":
        return None
    cfg = Config.model_validate(dict(backbone))
    width, depth, heads = cfg.shape
    network = VisionTransformer(
        cfg.image_size, cfg.patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0,
        global_pool="token" if cfg.pool == "cls" else "avg", fc_norm=False,
    )  # fmt: skip
    network.load_state_dict({name: x for name, x in theirs.items() if not name.startswith(known)})
    return network.eval()


_VIT_ANCHORS = ("pos_embed", "patch_embed.proj.weight")
VIT = Dialect(
    "timm ViT", "vit", (*_VIT_ANCHORS, "blocks.0.attn.qkv.weight"), VIT_RULES,
    never=("dist_token", "blocks.0.attn.q_bias", "blocks.0.gamma_1", "patch_embed.proj.0.weight"),
    after=registers, source=vit_source,
)  # fmt: skip
VIT_IN_CHUNKS = Dialect(
    "timm ViT in chunks", "vit", (*_VIT_ANCHORS, "blocks.0.0.attn.qkv.weight"), CHUNKED_RULES, after=registers
)

BEIT_RULES = (
    keep("cls_token"),
    keep("pos_embed", optional=True),
    keep("rel_pos_bias.relative_position_bias_table", optional=True),
    keep("patch_embed.proj.{leaf}"),
    keep("blocks.{i}.gamma_{n}", optional=True),
    keep("blocks.{i}.norm{n}.{leaf}"),
    keep("blocks.{i}.attn.q_bias"),
    keep("blocks.{i}.attn.v_bias"),
    keep("blocks.{i}.attn.qkv.weight"),
    keep("blocks.{i}.attn.relative_position_bias_table", optional=True),
    keep("blocks.{i}.attn.proj.{leaf}"),
    keep("blocks.{i}.mlp.fc{n}.{leaf}"),
    keep("norm.{leaf}", optional=True),
    keep("fc_norm.{leaf}", optional=True),
    drop("rel_pos_bias.relative_position_index", "made again"),
    drop("blocks.{i}.attn.relative_position_index", "made again"),
    drop("mask_token", "stands for hidden patches while training"),
    drop("head.{rest}", "classifier"),
    drop("lm_head.{rest}", "predicts what was hidden"),
)
BEIT = Dialect(
    "timm BEiT", "beit", ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.0.attn.qkv.weight"),
    BEIT_RULES,
)  # fmt: skip

_SWIN_BLOCKS = (
    keep("patch_embed.proj.{leaf}"),
    keep("patch_embed.norm.{leaf}"),
    keep("absolute_pos_embed", optional=True),
    keep("layers.{s}.blocks.{b}.norm{n}.{leaf}"),
    keep("layers.{s}.blocks.{b}.attn.relative_position_bias_table"),
    keep("layers.{s}.blocks.{b}.attn.qkv.{leaf}"),
    keep("layers.{s}.blocks.{b}.attn.proj.{leaf}"),
    keep("layers.{s}.blocks.{b}.mlp.fc{n}.{leaf}"),
    keep("norm.{leaf}"),
    drop("layers.{s}.blocks.{b}.attn.relative_position_index", "made again"),
    drop("layers.{s}.blocks.{b}.attn_mask", "made again"),
    drop("mask_token", "stands for hidden patches while training"),
    drop("head.{rest}", "classifier"),
)
SWIN_RULES = (*_SWIN_BLOCKS, keep("layers.{s}.downsample.{rest}", optional=True))
OFFICIAL_SWIN_RULES = (
    *_SWIN_BLOCKS,
    rename("layers.{s}.downsample.{rest}", "layers.{s+1}.downsample.{rest}", optional=True),
)
_SWIN_ANCHORS = ("patch_embed.norm.weight", "layers.0.blocks.0.attn.relative_position_bias_table", "norm.weight")
SWIN = Dialect("timm Swin", "swin", _SWIN_ANCHORS, SWIN_RULES, never=("layers.0.downsample.reduction.weight",))
OFFICIAL_SWIN = Dialect(
    "official Swin", "swin", (*_SWIN_ANCHORS, "layers.0.downsample.reduction.weight"), OFFICIAL_SWIN_RULES
)

LAYOUTS = (
    Layout(
        "timm", "a bare transformer under the names of timm", (Part("student", ("",), "network"),),
        (VIT, VIT_IN_CHUNKS, BEIT, SWIN, OFFICIAL_SWIN), never=("decoder_", "lm_head", "hogs", "pred_head"),
    ),
)  # fmt: skip


def write(network: Network, out: Path) -> Written:
    """Our network as a state dict for timm; see `_to_timm`."""
    from sslcli.convert import _to_timm

    return _to_timm.write(network, out)
