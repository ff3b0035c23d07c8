"""OpenMMLab's names: OpenSelfSup, MMSelfSup 0.x and 1.x, MMClassification and MMPretrain, Triplet and DenseCL.

A ResNet carries torchvision's names there. Transformers have names of their own, and Swin merges patches in another
order of channels. MMSelfSup 0.x keeps the trunk twice, as `backbone` and inside a container; both must agree.
"""

from torch import Tensor

from sslcli.convert._layout import Dialect, Facts, Layout, Part, Tensors
from sslcli.convert._rules import Change, Rule, drop, rename
from sslcli.convert.mocov3 import twelve_heads
from sslcli.convert.torchvision import RESNET, keep

_BLOCK = (
    rename("layers.{i}.ln{n}.{leaf}", "blocks.{i}.norm{n}.{leaf}", optional=True),
    rename("layers.{i}.norm{n}.{leaf}", "blocks.{i}.norm{n}.{leaf}", optional=True),
    rename("patch_embed.projection.{leaf}", "patch_embed.proj.{leaf}"),
    rename("layers.{i}.attn.proj.{leaf}", "blocks.{i}.attn.proj.{leaf}"),
    rename("layers.{i}.ffn.layers.0.0.{leaf}", "blocks.{i}.mlp.fc1.{leaf}"),
    rename("layers.{i}.ffn.layers.1.{leaf}", "blocks.{i}.mlp.fc2.{leaf}"),
    rename("ln1.{leaf}", "norm.{leaf}", optional=True),
    rename("norm1.{leaf}", "norm.{leaf}", optional=True),
    keep("fc_norm.{leaf}", optional=True),
    drop("mask_token", "stands for hidden patches while training"),
)
VIT_RULES: tuple[Rule, ...] = (
    keep("cls_token"),
    keep("pos_embed"),
    rename("layers.{i}.attn.qkv.{leaf}", "blocks.{i}.attn.qkv.{leaf}"),
    *_BLOCK,
)
BEIT_RULES: tuple[Rule, ...] = (
    keep("cls_token"),
    keep("pos_embed", optional=True),
    rename("rel_pos_bias.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table", optional=True),
    drop("rel_pos_bias.relative_position_index", "made again"),
    rename("layers.{i}.gamma_{n}", "blocks.{i}.gamma_{n}", optional=True),
    rename("layers.{i}.attn.q_bias", "blocks.{i}.attn.q_bias"),
    rename("layers.{i}.attn.v_bias", "blocks.{i}.attn.v_bias"),
    rename("layers.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.weight"),
    rename(
        "layers.{i}.attn.relative_position_bias_table", "blocks.{i}.attn.relative_position_bias_table", optional=True
    ),
    drop("layers.{i}.attn.relative_position_index", "made again"),
    *_BLOCK,
)
_VIT_ANCHORS = ("cls_token", "patch_embed.projection.weight", "layers.0.ffn.layers.0.0.weight")
VIT = Dialect("OpenMMLab ViT", "vit", _VIT_ANCHORS, VIT_RULES, never=("layers.0.attn.q_bias",))
BEIT = Dialect("OpenMMLab BEiT", "beit", (*_VIT_ANCHORS, "layers.0.attn.q_bias"), BEIT_RULES)


def _from_unfold(x: Tensor) -> Tensor:
    """(…, 4 C) by channel, row, column of the merged patch to column, row, channel, as in the official Swin."""
    apart: Tensor = x.unflatten(-1, (-1, 2, 2))
    return apart.movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3)


def _to_unfold(x: Tensor) -> Tensor:
    apart: Tensor = x.unflatten(-1, (2, 2, -1))
    return apart.movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3)


MERGED = Change(_from_unfold, _to_unfold)
"""`nn.Unfold` lays the four patches out channel by channel, the official Swin patch by patch."""

_AT, _OURS = "stages.{s}.blocks.{b}", "layers.{s}.blocks.{b}"
SWIN_RULES = (
    rename("patch_embed.projection.{leaf}", "patch_embed.proj.{leaf}"),
    keep("patch_embed.norm.{leaf}"),
    keep("absolute_pos_embed", optional=True),
    rename(f"{_AT}.norm{{n}}.{{leaf}}", f"{_OURS}.norm{{n}}.{{leaf}}"),
    rename(f"{_AT}.attn.w_msa.relative_position_bias_table", f"{_OURS}.attn.relative_position_bias_table"),
    rename(f"{_AT}.attn.w_msa.qkv.{{leaf}}", f"{_OURS}.attn.qkv.{{leaf}}"),
    rename(f"{_AT}.attn.w_msa.proj.{{leaf}}", f"{_OURS}.attn.proj.{{leaf}}"),
    rename(f"{_AT}.ffn.layers.0.0.{{leaf}}", f"{_OURS}.mlp.fc1.{{leaf}}"),
    rename(f"{_AT}.ffn.layers.1.{{leaf}}", f"{_OURS}.mlp.fc2.{{leaf}}"),
    rename("stages.{s}.downsample.norm.{leaf}", "layers.{s+1}.downsample.norm.{leaf}", MERGED, optional=True),
    rename("stages.{s}.downsample.reduction.weight", "layers.{s+1}.downsample.reduction.weight", MERGED, optional=True),
    rename("norm{last}.{leaf}", "norm.{leaf}"),
    drop(f"{_AT}.attn.w_msa.relative_position_index", "made again"),
    drop("mask_token", "stands for hidden patches while training"),
)
SWIN = Dialect(
    "OpenMMLab Swin", "swin", ("patch_embed.projection.weight", "stages.0.blocks.0.attn.w_msa.qkv.weight"), SWIN_RULES
)
DIALECTS = (RESNET, VIT, BEIT, SWIN)

_METHODS = (
    ("densecl", ("queue2", "encoder_q.1.mlp2.")),
    ("moco", ("queue",)),
    ("mocov3", ("base_encoder.", "momentum_encoder.")),
    ("byol", ("online_net.", "target_net.")),
    ("simsiam", ("encoder.0.",)),
    ("swav", ("head.prototypes",)),
    ("barlowtwins", ("head.bn.running_mean",)),
    ("mae", ("neck.decoder_pos_embed",)),
    ("cae", ("neck.regressors.",)),
    ("simmim", ("neck.decoder.",)),
    ("maskfeat", ("hog_layer.", "target_generator.weight_x")),
    ("deepcluster", ("sobel_layer.",)),
    ("odc", ("neck.bn0.running_mean", "head.fc_cls.weight")),
    ("npid", ("neck.fc.weight",)),
    ("simsiam", ("head.predictor.",)),
)


def method(tensors: Tensors, facts: Facts) -> str:
    """How it was trained, from the names of what stands beside the trunk."""
    head = tensors.get("head.fc_cls.weight")
    if "neck.fc.weight" in tensors and "neck.bn.weight" in tensors and head is not None and len(head) == 8:
        return "relative_loc"
    if head is not None and len(head) == 4 and not any(name.startswith("neck.") for name in tensors):
        return "rotation"
    for name, signs in _METHODS:
        if name == "odc" and not all(sign in tensors for sign in signs):
            continue
        if any(one.startswith(sign) for one in tensors for sign in signs):
            if name == "byol" and "online_net.1.fc1.bias" in tensors:
                return "triplet"
            return name
    if any(one.startswith("neck.fc1.") for one in tensors):
        return "simclr"
    return "unknown"


_BESIDE = (
    r"neck\.", r"head\.", r"queue", r"data_preprocessor\.", r"sobel_layer\.", r"hog_layer\.", r"target_generator\.",
    r"(encoder_[qk]|online_net|target_net|base_encoder|momentum_encoder|encoder)\.(1\.|steps)", r"inter_neck",
    r"encoder_k\.", r"target_net\.", r"momentum_encoder\.", r"teacher\.", r"memory_bank\.",
)  # fmt: skip


def _container(student: str, teacher: str, said: tuple[str, str]) -> Layout:
    parts = [Part("student", (f"{student}.0.",), said[0], aliases=("backbone.",))]
    if teacher:
        parts.append(Part("teacher", (f"{teacher}.0.",), said[1]))
    return Layout(
        "openmmlab", "OpenSelfSup, MMSelfSup 0.x", tuple(parts), DIALECTS, signs=(rf"{student}\.0\.",),
        never=(r"_feature_blocks",), beside=_BESIDE, method=method,
        settings=twelve_heads,
    )  # fmt: skip


LAYOUTS = (
    _container("encoder_q", "encoder_k", ("query encoder", "key encoder")),
    _container("online_net", "target_net", ("online network", "target network")),
    _container("base_encoder", "momentum_encoder", ("encoder", "momentum encoder")),
    _container("encoder", "", ("encoder", "")),
    Layout(
        "openmmlab", "OpenSelfSup, MMSelfSup, MMPretrain",
        (
            Part("student", ("backbone.",), "backbone"),
            Part("teacher", ("teacher.", "encoder_k.0.", "target_net.0.", "momentum_encoder.0."), "teacher"),
        ),
        DIALECTS, signs=(r"backbone\.", r"(neck|head)\."),
        never=(r"encoder_q\.0", r"online_net\.0", r"base_encoder\.0", r"encoder\.0", r"head\.(mlp|last_layer)\."),
        beside=_BESIDE, method=method, settings=twelve_heads,
    ),
    Layout(
        "openmmlab", "an extracted backbone of OpenMMLab", (Part("student", ("", "backbone."), "backbone"),),
        (VIT, BEIT, SWIN), never=(r"(neck|head)\.", r"teacher\."),
    ),
)  # fmt: skip
