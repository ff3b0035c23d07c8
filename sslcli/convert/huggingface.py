"""Names of Hugging Face transformers, of version 4 (and of files on the hub) and of version 5."""

from pathlib import Path

from sslcli.convert._layout import Dialect, Layout, Network, Part, Written
from sslcli.convert._rules import Rule, drop, join, rename
from sslcli.convert.timm import registers

_QKV_4, _QKV_5 = ("attention.attention.query", "attention.attention.key", "attention.attention.value"), (
    "attention.q_proj", "attention.k_proj", "attention.v_proj",
)  # fmt: skip


def _patches(before: str = "") -> tuple[Rule, ...]:
    return (
        rename(f"{before}embeddings.cls_token", "cls_token"),
        rename(f"{before}embeddings.position_embeddings", "pos_embed", optional=True),
        rename(f"{before}embeddings.patch_embeddings.projection.{{leaf}}", "patch_embed.proj.{leaf}"),
        drop(f"{before}embeddings.mask_token", "stands for hidden patches while training"),
    )


def _joined(layer: str, names: tuple[str, ...]) -> Rule:
    return join([f"{layer}.{name}.{{leaf}}" for name in names], "blocks.{i}.attn.qkv.{leaf}")


_ENDS = (
    rename("layernorm.{leaf}", "norm.{leaf}", optional=True),
    drop("pooler.{rest}", "layer behind the class token that only its own classifier uses"),
)


def _vit(layer: str, qkv: tuple[str, ...], out: str, fc1: str, fc2: str) -> tuple[Rule, ...]:
    return (
        *_patches(),
        _joined(layer, qkv),
        rename(f"{layer}.{out}.{{leaf}}", "blocks.{i}.attn.proj.{leaf}"),
        rename(f"{layer}.{fc1}.{{leaf}}", "blocks.{i}.mlp.fc1.{leaf}"),
        rename(f"{layer}.{fc2}.{{leaf}}", "blocks.{i}.mlp.fc2.{leaf}"),
        rename(f"{layer}.layernorm_before.{{leaf}}", "blocks.{i}.norm1.{leaf}"),
        rename(f"{layer}.layernorm_after.{{leaf}}", "blocks.{i}.norm2.{leaf}"),
        *_ENDS,
    )


VIT_4_RULES = _vit("encoder.layer.{i}", _QKV_4, "attention.output.dense", "intermediate.dense", "output.dense")
VIT_5_RULES = _vit("layers.{i}", _QKV_5, "attention.o_proj", "mlp.fc1", "mlp.fc2")
VIT_4 = Dialect(
    "transformers 4 ViT", "vit",
    ("embeddings.position_embeddings", "encoder.layer.0.attention.attention.query.weight",
     "encoder.layer.0.layernorm_before.weight"),
    VIT_4_RULES, never=("encoder.layer.0.lambda_1",),
)  # fmt: skip
VIT_5 = Dialect(
    "transformers 5 ViT", "vit", ("embeddings.position_embeddings", "layers.0.attention.q_proj.weight"), VIT_5_RULES,
    never=("layers.0.lambda_1",),
)  # fmt: skip


def _dinov2(qkv: tuple[str, ...], out: str) -> tuple[Rule, ...]:
    layer = "encoder.layer.{i}"
    return (
        *_patches(),
        rename("embeddings.register_tokens", "reg_token", optional=True),
        _joined(layer, qkv),
        rename(f"{layer}.{out}.{{leaf}}", "blocks.{i}.attn.proj.{leaf}"),
        rename(f"{layer}.layer_scale{{n}}.lambda1", "blocks.{i}.ls{n}.gamma"),
        rename(f"{layer}.norm{{n}}.{{leaf}}", "blocks.{i}.norm{n}.{leaf}"),
        rename(f"{layer}.mlp.fc{{n}}.{{leaf}}", "blocks.{i}.mlp.fc{n}.{leaf}", optional=True),
        rename(f"{layer}.mlp.weights_in.{{leaf}}", "blocks.{i}.mlp.fc1.{leaf}", optional=True),
        rename(f"{layer}.mlp.weights_out.{{leaf}}", "blocks.{i}.mlp.fc2.{leaf}", optional=True),
        *_ENDS,
    )


def _beit(before: str, layer: str, qkv: tuple[str, ...], out: str, fc1: str, fc2: str, shared: str) -> tuple[Rule, ...]:
    at = f"{before}{layer}"
    return (
        *_patches(before),
        rename(f"{before}{shared}.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table",
               optional=True),
        rename(f"{at}.attention.attention.relative_position_bias.relative_position_bias_table",
               "blocks.{i}.attn.relative_position_bias_table", optional=True),
        rename(f"{at}.attention.relative_position_bias.relative_position_bias_table",
               "blocks.{i}.attn.relative_position_bias_table", optional=True),
        rename(f"{at}.lambda_{{n}}", "blocks.{i}.gamma_{n}", optional=True),
        join([f"{at}.{name}.weight" for name in qkv], "blocks.{i}.attn.qkv.weight"),
        rename(f"{at}.{qkv[0]}.bias", "blocks.{i}.attn.q_bias"),
        rename(f"{at}.{qkv[2]}.bias", "blocks.{i}.attn.v_bias"),
        rename(f"{at}.{out}.{{leaf}}", "blocks.{i}.attn.proj.{leaf}"),
        rename(f"{at}.{fc1}.{{leaf}}", "blocks.{i}.mlp.fc1.{leaf}"),
        rename(f"{at}.{fc2}.{{leaf}}", "blocks.{i}.mlp.fc2.{leaf}"),
        rename(f"{at}.layernorm_before.{{leaf}}", "blocks.{i}.norm1.{leaf}"),
        rename(f"{at}.layernorm_after.{{leaf}}", "blocks.{i}.norm2.{leaf}"),
        rename(f"{before}pooler.layernorm.{{leaf}}", "fc_norm.{leaf}", optional=True),
        rename(f"{before}layernorm.{{leaf}}", "norm.{leaf}", optional=True),
        *(() if not before else (rename("layernorm.{leaf}", "norm.{leaf}", optional=True),)),
        drop("classifier.{rest}", "classifier"),
        drop("lm_head.{rest}", "predicts what was hidden"),
        drop(f"{at}.attention.attention.relative_position_bias.relative_position_index", "made again"),
        drop(f"{before}{shared}.relative_position_index", "made again"),
    )  # fmt: skip


def _beits() -> tuple[Dialect, ...]:
    made: list[Dialect] = []
    for before in ("beit.", "data2vec_vision.", ""):
        made += [
            Dialect(
                "transformers 4 BEiT", "beit",
                (f"{before}embeddings.cls_token", f"{before}encoder.layer.0.attention.attention.query.weight",
                 f"{before}encoder.layer.0.lambda_1"),
                _beit(before, "encoder.layer.{i}", _QKV_4, "attention.output.dense", "intermediate.dense",
                      "output.dense", "encoder.relative_position_bias"),
            ),
            Dialect(
                "transformers 5 BEiT", "beit",
                (f"{before}embeddings.cls_token", f"{before}layers.0.attention.q_proj.weight",
                 f"{before}layers.0.lambda_1"),
                _beit(before, "layers.{i}", _QKV_5, "attention.o_proj", "mlp.fc1", "mlp.fc2", "shared_position_bias"),
            ),
        ]  # fmt: skip
    return tuple(made)


def _swin(qkv: tuple[str, ...], out: str, bias: str, fc1: str, fc2: str) -> tuple[Rule, ...]:
    at, ours = "encoder.layers.{s}.blocks.{b}", "layers.{s}.blocks.{b}"
    return (
        rename("embeddings.patch_embeddings.projection.{leaf}", "patch_embed.proj.{leaf}"),
        rename("embeddings.norm.{leaf}", "patch_embed.norm.{leaf}"),
        rename("embeddings.position_embeddings", "absolute_pos_embed", optional=True),
        drop("embeddings.mask_token", "stands for hidden patches while training"),
        join([f"{at}.{name}.{{leaf}}" for name in qkv], f"{ours}.attn.qkv.{{leaf}}"),
        rename(f"{at}.{out}.{{leaf}}", f"{ours}.attn.proj.{{leaf}}"),
        rename(f"{at}.{bias}.relative_position_bias_table", f"{ours}.attn.relative_position_bias_table"),
        rename(f"{at}.{fc1}.{{leaf}}", f"{ours}.mlp.fc1.{{leaf}}"),
        rename(f"{at}.{fc2}.{{leaf}}", f"{ours}.mlp.fc2.{{leaf}}"),
        rename(f"{at}.layernorm_before.{{leaf}}", f"{ours}.norm1.{{leaf}}"),
        rename(f"{at}.layernorm_after.{{leaf}}", f"{ours}.norm2.{{leaf}}"),
        rename("encoder.layers.{s}.downsample.{rest}", "layers.{s+1}.downsample.{rest}", optional=True),
        rename("layernorm.{leaf}", "norm.{leaf}"),
        drop(f"{at}.{bias}.relative_position_index", "made again"),
    )  # fmt: skip


SWIN_4_RULES = _swin(
    ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense", "attention.self",
    "intermediate.dense", "output.dense",
)  # fmt: skip
SWIN_5_RULES = _swin(_QKV_5, "attention.o_proj", "attention.relative_position_bias", "mlp.fc1", "mlp.fc2")
SWIN_4 = Dialect(
    "transformers 4 Swin", "swin", ("embeddings.norm.weight", "encoder.layers.0.blocks.0.attention.self.query.weight"),
    SWIN_4_RULES,
)  # fmt: skip
SWIN_5 = Dialect(
    "transformers 5 Swin", "swin", ("embeddings.norm.weight", "encoder.layers.0.blocks.0.attention.q_proj.weight"),
    SWIN_5_RULES,
)  # fmt: skip

_BLOCK = "encoder.stages.{s}.layers.{b}"
RESNET_RULES = (
    rename("embedder.embedder.convolution.weight", "conv1.weight"),
    rename("embedder.embedder.normalization.{leaf}", "bn1.{leaf}"),
    rename(f"{_BLOCK}.layer.{{c}}.convolution.weight", "layer{s+1}.{b}.conv{c+1}.weight"),
    rename(f"{_BLOCK}.layer.{{c}}.normalization.{{leaf}}", "layer{s+1}.{b}.bn{c+1}.{leaf}"),
    rename(f"{_BLOCK}.shortcut.convolution.weight", "layer{s+1}.{b}.downsample.0.weight", optional=True),
    rename(f"{_BLOCK}.shortcut.normalization.{{leaf}}", "layer{s+1}.{b}.downsample.1.{leaf}", optional=True),
)
RESNET = Dialect(
    "transformers ResNet", "resnet",
    ("embedder.embedder.convolution.weight", "encoder.stages.0.layers.0.layer.0.convolution.weight"),
    RESNET_RULES,
)  # fmt: skip
DINOV2_4 = Dialect(
    "transformers 4 DINOv2", "vit",
    ("embeddings.position_embeddings", "encoder.layer.0.attention.attention.query.weight",
     "encoder.layer.0.layer_scale1.lambda1"),
    _dinov2(_QKV_4, "attention.output.dense"), after=registers,
)  # fmt: skip
DINOV2_5 = Dialect(
    "transformers 5 DINOv2", "vit",
    ("embeddings.position_embeddings", "encoder.layer.0.attention.q_proj.weight",
     "encoder.layer.0.layer_scale1.lambda1"),
    _dinov2(_QKV_5, "attention.o_proj"), after=registers,
)  # fmt: skip

_PREFIXES = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", "swin.", "resnet.", "")
LAYOUTS = (
    Layout(
        "huggingface", "Hugging Face transformers", (Part("student", _PREFIXES, "network"),),
        (VIT_4, VIT_5, DINOV2_4, DINOV2_5, SWIN_4, SWIN_5, RESNET, *_beits()),
        signs=(r"(\w+\.)?(embeddings|embedder)\.",),
        beside=(r"classifier\.", r"decoder\.", r"pooler\.", r"lm_head\.", r"(cls|distillation)_classifier\."),
    ),
)  # fmt: skip


def write(network: Network, out: Path) -> Written:
    """Our network as a folder for transformers; see `_to_huggingface`."""
    from sslcli.convert import _to_huggingface

    return _to_huggingface.write(network, out)
