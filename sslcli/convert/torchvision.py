"""torchvision's own names: ResNets as everybody writes them, and its vision transformer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sslcli.convert._layout import Dialect, Layout, Network, Part, Tensors, Written
from sslcli.convert._rules import Rule, drop, rename


def keep(name: str, *, optional: bool = False) -> Rule:
    """The same name on both sides."""
    return rename(name, name, optional=optional)


RESNET_RULES = (
    keep("conv1.weight"),
    keep("bn1.{leaf}"),
    keep("layer{stage}.{b}.conv{c}.weight"),
    keep("layer{stage}.{b}.bn{c}.{leaf}"),
    keep("layer{stage}.{b}.downsample.{d}.{leaf}", optional=True),
    drop("fc.{rest}", "classifier or projection head"),
)


def _at_rest(network: nn.Module, theirs: Tensors, head: str) -> nn.Module:
    """A network of torchvision with these tensors and nothing for its classifier `head`."""
    setattr(network, head, nn.Identity())
    network.load_state_dict({name: x for name, x in theirs.items() if not name.startswith(f"{head}.")})
    return network.eval()


def resnet_source(backbone: Mapping[str, Any], theirs: Tensors) -> Callable[[Tensor], Tensor] | None:
    """The ResNet of torchvision with these tensors, where it has one."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    from sslcli.backbones.resnet import BASIC, BOTTLENECK

    if backbone["name"] != "resnet" or (backbone["width"], backbone["stem"]) != (64, "imagenet"):
        return None
    depth = backbone["depth"]
    blocks = list(BASIC[depth] if depth in BASIC else BOTTLENECK[depth])
    network = ResNet(BasicBlock if depth in BASIC else Bottleneck, blocks)
    return _at_rest(network, theirs, "fc")


RESNET = Dialect(
    "torchvision ResNet", "resnet", ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.bn2.bias"),
    RESNET_RULES, source=resnet_source,
)  # fmt: skip

_LAYER = "encoder.layers.encoder_layer_{i}"
VIT_RULES = (
    rename("class_token", "cls_token"),
    rename("encoder.pos_embedding", "pos_embed"),
    rename("conv_proj.{leaf}", "patch_embed.proj.{leaf}"),
    rename(f"{_LAYER}.ln_{{n}}.{{leaf}}", "blocks.{i}.norm{n}.{leaf}"),
    rename(f"{_LAYER}.self_attention.in_proj_weight", "blocks.{i}.attn.qkv.weight"),
    rename(f"{_LAYER}.self_attention.in_proj_bias", "blocks.{i}.attn.qkv.bias"),
    rename(f"{_LAYER}.self_attention.out_proj.{{leaf}}", "blocks.{i}.attn.proj.{leaf}"),
    rename(f"{_LAYER}.mlp.0.{{leaf}}", "blocks.{i}.mlp.fc1.{leaf}", optional=True),
    rename(f"{_LAYER}.mlp.3.{{leaf}}", "blocks.{i}.mlp.fc2.{leaf}", optional=True),
    rename(f"{_LAYER}.mlp.linear_{{n}}.{{leaf}}", "blocks.{i}.mlp.fc{n}.{leaf}", optional=True),  # before 0.12
    rename("encoder.ln.{leaf}", "norm.{leaf}"),
    drop("heads.{rest}", "classifier"),
)


def vit_source(backbone: Mapping[str, Any], theirs: Tensors) -> Callable[[Tensor], Tensor] | None:
    """The vision transformer of torchvision with these tensors."""
    from torchvision.models import VisionTransformer

    from sslcli.backbones.vit import Config

    if backbone["name"] != "vit" or any(".mlp.linear_" in name for name in theirs):
        return None
    cfg = Config.model_validate(dict(backbone))
    width, depth, heads = cfg.shape
    network = VisionTransformer(cfg.image_size, cfg.patch, depth, heads, width, 4 * width)
    return _at_rest(network, theirs, "heads")


VIT = Dialect(
    "torchvision ViT", "vit", ("class_token", "conv_proj.weight", "encoder.pos_embedding", "encoder.ln.weight"),
    VIT_RULES, source=vit_source,
)  # fmt: skip

_SWIN: list[Rule] = [
    rename("features.0.0.{leaf}", "patch_embed.proj.{leaf}"),
    rename("features.0.2.{leaf}", "patch_embed.norm.{leaf}"),
]
for _s in range(4):
    _block, _ours = f"features.{2 * _s + 1}.{{b}}", f"layers.{_s}.blocks.{{b}}"
    _SWIN += [
        rename(f"{_block}.norm{{n}}.{{leaf}}", f"{_ours}.norm{{n}}.{{leaf}}", optional=_s > 0),
        rename(f"{_block}.attn.qkv.{{leaf}}", f"{_ours}.attn.qkv.{{leaf}}", optional=_s > 0),
        rename(f"{_block}.attn.proj.{{leaf}}", f"{_ours}.attn.proj.{{leaf}}", optional=_s > 0),
        rename(
            f"{_block}.attn.relative_position_bias_table", f"{_ours}.attn.relative_position_bias_table", optional=_s > 0
        ),
        rename(f"{_block}.mlp.0.{{leaf}}", f"{_ours}.mlp.fc1.{{leaf}}", optional=_s > 0),
        rename(f"{_block}.mlp.3.{{leaf}}", f"{_ours}.mlp.fc2.{{leaf}}", optional=_s > 0),
        rename(f"features.{2 * _s + 2}.norm.{{leaf}}", f"layers.{_s + 1}.downsample.norm.{{leaf}}", optional=True),
        rename(f"features.{2 * _s + 2}.reduction.{{leaf}}", f"layers.{_s + 1}.downsample.reduction.{{leaf}}",
               optional=True),
    ]  # fmt: skip
SWIN_RULES = (
    *_SWIN,
    rename("norm.{leaf}", "norm.{leaf}"),
    drop("features.{s}.{b}.attn.relative_position_index", "made again"),
    drop("head.{rest}", "classifier"),
)


def swin_source(backbone: Mapping[str, Any], theirs: Tensors) -> Callable[[Tensor], Tensor] | None:
    """The Swin transformer of torchvision with these tensors."""
    from torchvision.models import SwinTransformer

    from sslcli.backbones.swin import Config

    cfg = Config.model_validate(dict(backbone))
    width, depths, heads = cfg.shape
    network = SwinTransformer(
        [cfg.patch, cfg.patch], width, list(depths), list(heads), [cfg.window, cfg.window], stochastic_depth_prob=0.0
    )
    return _at_rest(network, theirs, "head")


SWIN = Dialect(
    "torchvision Swin", "swin",
    ("features.0.0.weight", "features.1.0.attn.relative_position_bias_table", "norm.weight"),
    SWIN_RULES, source=swin_source,
)  # fmt: skip

LAYOUTS = (
    Layout(
        "torchvision", "a bare network under the names of torchvision", (Part("student", ("",), "network"),),
        (RESNET, VIT, SWIN), never=("projection_head", "prototypes", "top:lemniscate"),
    ),
)  # fmt: skip


def write(network: Network, out: Path) -> Written:
    """Our network as a state dict for torchvision; see `_to_torchvision`."""
    from sslcli.convert import _to_torchvision

    return _to_torchvision.write(network, out)
