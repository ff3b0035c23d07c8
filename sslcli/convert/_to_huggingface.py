"""Hugging Face transformers: a folder with `config.json`, `model.safetensors` and how to prepare an image.

Names are those of transformers 4 and of the files on its hub; transformers 5 reads and writes the same.
"""

import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcli.backbones.resnet import BASIC, BOTTLENECK
from sslcli.convert import huggingface as names
from sslcli.convert._layout import Network, Written
from sslcli.convert._rules import Rule
from sslcli.convert._write import (
    built,
    difference,
    images_for,
    only,
    replacing,
    standard_resnet,
    translated,
    write_tensors,
)
from sslcli.errors import WeightsError


def write(network: Network, out: Path) -> Written:
    """A folder that `AutoModel.from_pretrained` takes.

    Raises:
        WeightsError: transformers has no such network, or `out` is a file.
        SslError: the folder cannot be written, or the network there says something else.
    """
    if out.suffix or out.is_file():
        raise WeightsError(f"`{out}` must be a folder, new or one to be replaced", hint=f"e.g. `{out.with_suffix('')}`")
    kind = only(network, "transformers", "resnet", "vit", "swin")
    backbone = built(network)
    trunk: Any = backbone.trunk
    rules: tuple[Rule, ...]
    if kind == "resnet":
        config, rules, ours = _resnet(network), names.RESNET_RULES, trunk.forward_features
    elif kind == "vit":
        config, rules, ours = _vit(trunk), names.VIT_4_RULES, trunk.forward_features
    else:
        config, rules, ours = _swin(trunk), names.SWIN_4_RULES, _in_rows(trunk)
    tensors = translated(network, rules, "transformers")
    told: dict[str, float] = {}
    with replacing(out) as temporary:
        temporary.mkdir()
        write_tensors(temporary / "model.safetensors", tensors)
        for name, content in (("config", config), ("preprocessor_config", _preprocessor(network))):
            text = json.dumps(content, indent=2) + "\n"
            (temporary / f"{name}.json").write_text(text, encoding="utf-8")
        if find_spec("transformers") is not None:
            told["difference"] = difference(ours, _theirs(temporary, config), images_for(network))
    return Written(
        out,
        len(tensors),
        proof=_proof(told),
        difference=told.get("difference"),
        missing=("`pooler`: a layer of classifiers that was never trained",) if kind == "vit" else (),
        use=(
            "from transformers import AutoImageProcessor, AutoModel",
            f'processor = AutoImageProcessor.from_pretrained("{out}")',
            f'network = AutoModel.from_pretrained("{out}"{_LOADS[kind]})',
            _FEATURES[kind if kind != "vit" else f"vit_{network.backbone.get('pool', 'cls')}"],
        ),
    )


_LOADS = {"resnet": "", "vit": ", add_pooling_layer=False", "swin": ""}
_FEATURES = {
    "resnet": "features = network(**processor(image, return_tensors='pt')).pooler_output.flatten(1)",
    "swin": "features = network(**processor(image, return_tensors='pt')).pooler_output",
    "vit_cls": "features = network(**processor(image, return_tensors='pt')).last_hidden_state[:, 0]",
    "vit_mean": "features = network(**processor(image, return_tensors='pt')).last_hidden_state[:, 1:].mean(dim=1)",
}


def _proof(told: dict[str, float]) -> str:
    if told:
        return "transformers' own network gives the same features of two images, in double precision"
    return "read back under our names, every tensor is the same to the last bit (transformers is not installed here)"


def _resnet(network: Network) -> dict[str, Any]:
    depth = standard_resnet(network, "transformers")
    basic = depth in BASIC
    widths = (64, 128, 256, 512) if basic else (256, 512, 1024, 2048)
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": list(widths),
        "depths": list((BASIC if basic else BOTTLENECK)[depth]),
        "layer_type": "basic" if basic else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def _vit(trunk: Any) -> dict[str, Any]:
    block = trunk.blocks[0]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": trunk.embed_dim,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": block.norm1.eps,
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "num_channels": 3,
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def _swin(trunk: Any) -> dict[str, Any]:
    first = trunk.layers[0].blocks[0]
    windows = {block.window_size[0] for stage in trunk.layers for block in stage.blocks}
    return {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "num_channels": 3,
        "embed_dim": trunk.embed_dim,
        "depths": [len(stage.blocks) for stage in trunk.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in trunk.layers],
        "window_size": max(windows),
        "mlp_ratio": first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        "qkv_bias": first.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "layer_norm_eps": first.norm1.eps,
    }


def _preprocessor(network: Network) -> dict[str, Any]:
    view = network.view
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": view.resize},
        "do_center_crop": True,
        "crop_size": {"height": view.size, "width": view.size},
        "resample": {"bilinear": 2, "bicubic": 3}[view.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.normalize.mean),
        "image_std": list(view.normalize.std),
    }


def _theirs(folder: Path, config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The last hidden state of transformers' network from the folder, in double precision."""
    made: Any = getattr(import_module("transformers"), config["architectures"][0])
    extra = {"add_pooling_layer": False} if config["model_type"] == "vit" else {}
    network, info = made.from_pretrained(folder, output_loading_info=True, **extra)
    lacking = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    if lacking:
        raise WeightsError(f"transformers finds no place for, or no tensor called, `{lacking[0]}`")
    network = network.double().eval()

    def last(images: Tensor) -> Tensor:
        found: Tensor = network(pixel_values=images).last_hidden_state
        return found

    return last


def _in_rows(trunk: Any) -> Callable[[Tensor], Tensor]:
    """The last map of Swin (B, h, w, C) with its places in a row (B, h * w, C)."""

    def rows(images: Tensor) -> Tensor:
        return torch.flatten(trunk.forward_features(images), 1, 2)

    return rows
