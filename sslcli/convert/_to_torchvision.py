"""To torchvision: ResNet, vision transformer, Swin."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.backbones.resnet import BASIC, BOTTLENECK
from sslcli.convert import torchvision as names
from sslcli.convert._layout import Network, Written
from sslcli.convert._write import (
    built,
    difference,
    images_for,
    only,
    other_stem,
    standard_resnet,
    suffixed,
    translated,
    write_tensors,
)
from sslcli.errors import WeightsError

_VITS = {
    (768, 12, 12, 16): "vit_b_16", (768, 12, 12, 32): "vit_b_32", (1024, 24, 16, 16): "vit_l_16",
    (1024, 24, 16, 32): "vit_l_32",
}  # fmt: skip
"""Width, blocks, heads and patch of the transformers that torchvision has a function for."""


def write(network: Network, out: Path) -> Written:
    """A state dict under torchvision's names.

    Raises:
        WeightsError: torchvision builds no such network.
        SslError: the file cannot be written, or the network there says something else.
    """
    suffixed(out, ".pth", ".pt", ".safetensors")
    kind = only(network, "torchvision", "resnet", "vit", "swin")
    load = (
        f'safetensors.torch.load_file("{out}")'
        if out.suffix == ".safetensors"
        else f'torch.load("{out}", weights_only=True)'
    )
    ours = built(network)
    if kind == "resnet":
        theirs, lines, head = _resnet(network, ours.trunk)
        tensors = dict(network.tensors)
    elif kind == "swin":
        theirs, lines, head = _swin(ours.trunk)
        tensors = translated(network, names.SWIN_RULES, "torchvision")
    else:
        theirs, lines, head = _vit(ours.trunk)
        tensors = translated(network, names.VIT_RULES, "torchvision")
    lacking = [name for name in theirs.load_state_dict(tensors, strict=False).missing_keys if "index" not in name]
    if lacking:
        raise WeightsError(f"torchvision's network wants `{lacking[0]}`, which this one has not")
    if kind == "vit":
        trunk: Any = ours.trunk
        gap = difference(trunk.forward_features, _Tokens(theirs), images_for(network))
    else:
        gap = difference(ours, theirs, images_for(network))
    write_tensors(out, tensors)
    return Written(
        out,
        len(tensors),
        proof="torchvision's own network gives the same features of two images, in double precision",
        difference=gap,
        missing=(f"`{head}`: the classifier",),
        use=("import torch, torchvision", *lines, f"network.load_state_dict({load}, strict=False)"),
        notes=("these weights were pooled by the mean of patches; torchvision reads the class token.",)
        if network.backbone.get("pool") == "mean"
        else (),
    )


def _resnet(network: Network, trunk: Any) -> tuple[nn.Module, list[str], str]:
    """Torchvision's network, the lines that make it, and the name of its classifier."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    depth = standard_resnet(network, "torchvision", stem=None)
    theirs = ResNet(
        BasicBlock if depth in BASIC else Bottleneck, list((BASIC if depth in BASIC else BOTTLENECK)[depth])
    )
    theirs.fc = nn.Identity()
    lines = [f"network = torchvision.models.resnet{depth}()"]
    for name, layer in other_stem(trunk).items():
        setattr(theirs, name, layer)
        lines.append(f"network.{name} = torch.nn.{layer!r}")
    return theirs.double().eval(), lines, "fc"


def _vit(trunk: Any) -> tuple[nn.Module, list[str], str]:
    from torchvision.models import VisionTransformer

    block, embed = trunk.blocks[0], trunk.patch_embed
    shape = (trunk.embed_dim, len(trunk.blocks), block.attn.num_heads, embed.patch_size[0])
    hidden = block.mlp.fc1.out_features
    theirs = VisionTransformer(embed.img_size[0], shape[3], shape[1], shape[2], shape[0], hidden)
    theirs.heads = nn.Identity()
    known = _VITS.get(shape) if hidden == 4 * shape[0] else None
    made = (
        f"{known}(image_size={embed.img_size[0]})"
        if known
        else f"VisionTransformer({embed.img_size[0]}, {shape[3]}, {shape[1]}, {shape[2]}, {shape[0]}, {hidden})"
    )
    return theirs.double().eval(), [f"network = torchvision.models.{made}"], "heads.head"


def _swin(trunk: Any) -> tuple[nn.Module, list[str], str]:
    from torchvision.models import SwinTransformer

    first, patch = trunk.layers[0].blocks[0], trunk.patch_embed.patch_size[0]
    depths = [len(stage.blocks) for stage in trunk.layers]
    heads = [stage.blocks[0].attn.num_heads for stage in trunk.layers]
    window = max(block.window_size[0] for stage in trunk.layers for block in stage.blocks)
    ratio = first.mlp.fc1.out_features / first.mlp.fc1.in_features
    theirs = SwinTransformer([patch] * 2, trunk.embed_dim, depths, heads, [window] * 2, mlp_ratio=ratio)
    theirs.head = nn.Identity()
    made = f"SwinTransformer({[patch] * 2}, {trunk.embed_dim}, {depths}, {heads}, {[window] * 2}, mlp_ratio={ratio:g})"
    return theirs.double().eval(), [f"network = torchvision.models.{made}"], "head"


class _Tokens(nn.Module):
    """All tokens of torchvision's transformer after the last norm."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        patches = self.network._process_input(images)
        first = self.network.class_token.expand(len(images), -1, -1)
        tokens: Tensor = self.network.encoder(torch.cat([first, patches], dim=1))
        return tokens
