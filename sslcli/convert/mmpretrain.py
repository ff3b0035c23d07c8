"""MMPretrain (https://github.com/open-mmlab/mmpretrain), MMClassification 0.25 and MMSelfSup: ResNet, ViT, Swin."""

from pathlib import Path
from typing import Any

import torch

from sslcli.convert import openmmlab
from sslcli.convert._layout import Network, Written
from sslcli.convert._openmmlab import pixels
from sslcli.convert._rules import Rule, rename
from sslcli.convert._write import built, only, same, standard_resnet, suffixed, translated, write_tensors

VIT_RULES = (rename("patch_embed.projection.{leaf}", "patch_embed.proj.{leaf}"), *openmmlab.VIT_RULES)
"""The first rule that fits is taken: of the two names in use for the projection, MMPretrain's."""


def swin_rules(stages: int) -> tuple[Rule, ...]:
    """Names in a Swin transformer of so many stages: the last norm is called by the number of its stage."""
    return (rename(f"norm{stages - 1}.{{leaf}}", "norm.{leaf}"), *openmmlab.SWIN_RULES)


def write(network: Network, out: Path) -> Written:
    """A backbone below `state_dict`, without prefix.

    Raises:
        WeightsError: MMPretrain builds no such network, or the file is not called `.pth`.
        SslError: the file cannot be written, or does not hold what was written.
    """
    suffixed(out, ".pth")
    kind = only(network, "MMPretrain", "resnet", "vit", "swin")
    if kind == "resnet":
        tensors = dict(network.tensors)
        said = f'type="ResNet", depth={standard_resnet(network, "MMPretrain")}'
    else:
        trunk: Any = built(network).trunk
        rules = VIT_RULES if kind == "vit" else swin_rules(len(trunk.layers))
        tensors = translated(network, rules, "MMPretrain")
        said = _vit(network, trunk) if kind == "vit" else _swin(trunk)
    write_tensors(out, tensors, below="state_dict")
    same(tensors, torch.load(out, weights_only=True)["state_dict"])
    return Written(
        out,
        len(tensors),
        proof="read back under our names, every tensor is the same to the last bit",
        missing=("the classifier: it is learned",),
        use=("backbone=dict(", f"    {said},", f'    init_cfg=dict(type="Pretrained", checkpoint="{out}"),', ")"),
        notes=(
            pixels(network),
            *(
                ("the channels that patch merging joins stand in the order of `nn.Unfold`, as MMPretrain has them.",)
                if kind == "swin"
                else ()
            ),
        ),
    )


def _vit(network: Network, trunk: Any) -> str:
    shape = {
        "embed_dims": trunk.embed_dim, "num_layers": len(trunk.blocks), "num_heads": trunk.blocks[0].attn.num_heads,
        "feedforward_channels": trunk.blocks[0].mlp.fc1.out_features,
    }  # fmt: skip
    size, patch = trunk.patch_embed.img_size[0], trunk.patch_embed.patch_size[0]
    out = "cls_token" if network.backbone.get("pool", "cls") == "cls" else "avg_featmap"
    return (
        f'type="VisionTransformer", arch={shape}, img_size={size}, patch_size={patch}, out_type="{out}",\n'
        "    norm_cfg=dict(type='LN', eps=1e-6)"
    )


def _swin(trunk: Any) -> str:
    shape = {
        "embed_dims": trunk.embed_dim,
        "depths": [len(stage.blocks) for stage in trunk.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in trunk.layers],
    }
    window, patch = trunk.layers[0].blocks[0].window_size[0], trunk.patch_embed.patch_size[0]
    return (
        f'type="SwinTransformer", arch={shape}, img_size={trunk.patch_embed.img_size[0]}, patch_size={patch},\n'
        f"    window_size={window}"
    )
