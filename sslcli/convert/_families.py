"""Which network is it? The `backbone` section of a preset, inferred from shapes of tensors under our names."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sslcli.backbones import beit as beit_backbone
from sslcli.backbones import swin as swin_backbone
from sslcli.backbones import vit as vit_backbone
from sslcli.backbones.resnet import BASIC, BOTTLENECK
from sslcli.convert._layout import Facts, Inferred, Tensors
from sslcli.errors import WeightsError
from sslcli.nn.sobel import Sobel

GROUPED: dict[tuple[tuple[int, ...], int, int], str] = {
    ((3, 4, 6, 3), 128, 32): "resnext50_32x4d",
    ((3, 4, 23, 3), 256, 32): "resnext101_32x8d",
    ((3, 4, 23, 3), 256, 64): "resnext101_64x4d",
    ((3, 4, 6, 3), 128, 1): "wide_resnet50_2",
    ((3, 4, 23, 3), 128, 1): "wide_resnet101_2",
}
"""Blocks, channels of the first 3 x 3 convolution and groups of the residual networks that only timm builds here."""


def resnet(ours: Tensors, raw: Tensors, facts: Facts) -> Inferred:
    """Depth, width and stem of a residual network under torchvision's names.

    Raises:
        WeightsError: it is none that can be built here.
    """
    width, colours, side, _ = ours["conv1.weight"].shape
    if colours not in (2, 3):
        raise WeightsError(
            f"the first convolution takes {colours} channels, networks here 3 colours or 2 maps of slopes"
        )
    front = {"sobel": True} if colours == 2 else {}
    counts = tuple(_count(ours, f"layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in ours
    middle = ours["layer1.0.conv2.weight"].shape
    groups = middle[0] // middle[1] if bottleneck else 1
    if bottleneck and (groups > 1 or middle[0] != width):
        named = GROUPED.get((counts, middle[0], groups))
        if named is None or width != 64 or side != 7 or front:
            raise WeightsError(f"a residual network of {counts} blocks with {groups} groups of {middle[1]} channels")
        return Inferred({"name": "timm", "model": named})
    known = BOTTLENECK if bottleneck else BASIC
    depth = next((depth for depth, blocks in known.items() if tuple(blocks) == counts), None)
    if depth is None or side not in (3, 7) or ours["layer4.0.conv1.weight"].shape[0] != 8 * width:
        raise WeightsError(f"a residual network of {counts} blocks with a first convolution of {side} x {side}")
    notes: tuple[str, ...] = ()
    if side == 3:
        notes = ("the first convolution is 3 x 3: taken to have stride 1 and padding 1 and no pooling after it",)
    stem = "imagenet" if side == 7 else "cifar"
    return Inferred({"name": "resnet", "depth": depth, "width": width, "stem": stem, **front}, notes)


def slopes(beside: Tensors) -> tuple[str, ...]:
    """What is to be said of a network that looks at slopes, whose filters a file has beside it or not at all.

    Raises:
        WeightsError: they are others than ours.
    """
    ours = Sobel()
    wanted = {"sobel.0.weight": ours.grey, "sobel.1.weight": ours.kernels, "sobel.0.bias": 0, "sobel.1.bias": 0}
    theirs = [(name, end, beside[name]) for name in beside for end in wanted if name.endswith(end)]
    for name, end, filters in theirs:
        if not torch.allclose(filters.float(), torch.as_tensor(wanted[end]).expand_as(filters).float(), atol=1e-6):
            raise WeightsError(f"`{name}` is none of the Sobel filters that `resnet` has in front of 2 channels")
    if theirs:
        return ()
    return ("the first convolution takes 2 channels: taken to be slopes by Sobel filters, which are not in the file",)


def vit(ours: Tensors, raw: Tensors, facts: Facts) -> Inferred:
    """Width, depth, heads and patches of a vision transformer under timm's names; what `vit` lacks, timm builds.

    Raises:
        WeightsError: its patches do not form a square.
    """
    width, _, patch, _ = ours["patch_embed.proj.weight"].shape
    depth = _count(ours, "blocks.")
    usual = next((heads for *shape, heads in vit_backbone.SIZES.values() if shape == [width, depth]), None)
    heads, notes = _heads(width, facts, usual)
    with_class = "cls_token" in ours
    registers = ours["reg_token"].shape[1] if "reg_token" in ours else 0
    places = ours["pos_embed"].shape[1]
    apart = registers > 0  # timm gives no position to the class token where there are registers
    grid = _square(places - (1 if with_class and not apart else 0), "positions")
    hidden = ours["blocks.0.mlp.fc1.weight"].shape[0]
    gated = ours["blocks.0.mlp.fc2.weight"].shape[1] != hidden
    size = grid * patch
    special: dict[str, Any] = {}
    if registers:
        special |= {"reg_tokens": registers, "no_embed_class": True}
    if "blocks.0.ls1.gamma" in ours:
        special |= {"init_values": 1.0}
    if "fc_norm.weight" in ours:
        special |= {"global_pool": "avg", "fc_norm": True}
    if "blocks.0.attn.qkv.bias" not in ours:
        special |= {"qkv_bias": False}
    if hidden != 4 * width or gated:
        special |= {"mlp_ratio": (hidden + 0.5) / width}  # timm rounds down
    if not special:
        found = _sized("vit", vit_backbone.SIZES, (width, depth, heads), ("width", "depth", "heads"), default="small")
        alone = {} if with_class else {"class_token": False, "pool": "mean"}
        return Inferred({**found, "patch": patch, "image_size": size, **alone}, notes)
    if not with_class:
        special = {"class_token": False, "global_pool": "avg", "fc_norm": False, **special}
    shape = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    args = {**shape, "dynamic_img_size": True, **special}
    model = "vit_giant_patch14_dinov2" if gated else "vit_base_patch16_224"
    return Inferred({"name": "timm", "model": model, "image_size": size, "args": args}, notes)


def beit(ours: Tensors, raw: Tensors, facts: Facts) -> Inferred:
    """Width, depth, heads, positions and biases of BEiT's vision transformer under timm's names.

    Features are averaged over patches, as these networks are fine-tuned.
    """
    width, _, patch, _ = ours["patch_embed.proj.weight"].shape
    depth = _count(ours, "blocks.")
    shared, single = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
    bias = "shared" if shared in ours else "blocks" if single in ours else "none"
    notes: tuple[str, ...] = ()
    if bias == "none":
        heads, notes = _heads(width, facts)
        if "pos_embed" in ours:
            grid = _square(ours["pos_embed"].shape[1] - 1, "positions")
        else:
            grid = 224 // patch
            notes = (*notes, "it has no positions at all")
    else:
        entries, heads = ours[shared if bias == "shared" else single].shape
        grid = (_square(entries - 3, "relative positions") + 1) // 2
    scaled = "blocks.0.gamma_1" in ours
    if "fc_norm.weight" in ours:  # fine-tuned: the norm stands behind the mean
        args = {
            "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads,
            "init_values": 0.1 if scaled else None, "use_abs_pos_emb": "pos_embed" in ours,
            "use_rel_pos_bias": bias == "blocks", "use_shared_rel_pos_bias": bias == "shared",
        }  # fmt: skip
        return Inferred(
            {"name": "timm", "model": "beit_base_patch16_224", "image_size": grid * patch, "args": args}, notes
        )
    found = _sized("beit", beit_backbone.SIZES, (width, depth, heads), ("width", "depth", "heads"), default="base")
    return Inferred(
        {
            **found,
            "patch": patch,
            "image_size": grid * patch,
            "positions": "learned" if "pos_embed" in ours else "none",
            "bias": bias,
            "layer_scale": 0.1 if scaled else None,
            "pool": "mean",
        },
        notes,
    )


def swin(ours: Tensors, raw: Tensors, facts: Facts) -> Inferred:
    """Width, depths, heads, window and image size of a Swin transformer under timm's names."""
    width, _, patch, _ = ours["patch_embed.proj.weight"].shape
    stages = _count(ours, "layers.")
    tables = [ours[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(stages)]
    depths = [_count(ours, f"layers.{stage}.blocks.") for stage in range(stages)]
    window = (_square(tables[0].shape[0], "relative positions") + 1) // 2
    mask = next((x for name, x in raw.items() if name.endswith("layers.0.blocks.1.attn_mask")), None)
    told = facts.get("config.image_size", "config.img_size")
    notes: tuple[str, ...] = ()
    if mask is not None:
        side = math.isqrt(mask.shape[0]) * window * patch
    elif isinstance(told, int):
        side = told
    elif "absolute_pos_embed" in ours:
        side = _square(ours["absolute_pos_embed"].shape[1], "positions") * patch
    else:
        side = window * patch * 2 ** (stages - 1)
        notes = (f"the size of images is not in the file: {side} px, one window in the last stage, are taken",)
    shape = (width, tuple(depths), tuple(table.shape[1] for table in tables))
    found = _sized("swin", swin_backbone.SIZES, shape, ("width", "depths", "heads"), default="base")
    positions = "learned" if "absolute_pos_embed" in ours else "none"
    return Inferred({**found, "patch": patch, "window": window, "image_size": side, "positions": positions}, notes)


FAMILIES = {"resnet": resnet, "vit": vit, "beit": beit, "swin": swin}


def _heads(width: int, facts: Facts, usual: int | None = None) -> tuple[int, tuple[str, ...]]:
    """Attention heads: what a file beside says, otherwise the usual or one for 64 channels; shapes do not tell."""
    told = facts.get("config.num_attention_heads", "config.num_heads")
    if type(told) is int and told > 0 and width % told == 0:
        return told, ()
    heads = usual or max(1, width // 64)
    if width % heads:
        heads = 1
    return heads, (f"attention heads are not in the file: {heads}, one for {width // heads} channels, are taken",)


def _count(names: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow a prefix: blocks or stages, counted from 0."""
    found = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    numbers = sorted(int(text) for text in found if text.isdigit())
    if numbers != list(range(len(numbers))):
        raise WeightsError(f"the numbers behind `{prefix}` are not whole: {numbers}")
    return len(numbers)


def _square(number: int, what: str) -> int:
    side = math.isqrt(max(number, 0))
    if side * side != number or not side:
        raise WeightsError(f"its {number} {what} do not form a square")
    return side


def _sized(
    name: str, sizes: Mapping[str, tuple[Any, ...]], shape: tuple[Any, ...], keys: tuple[str, ...], *, default: str
) -> dict[str, Any]:
    """The backbone by its size where it has one, otherwise by what it consists of."""
    size = next((size for size, known in sizes.items() if known == shape), None)
    if size is not None:
        return {"name": name, "size": size}
    return {"name": name, "size": default, **dict(zip(keys, shape, strict=True))}
