"""Full-size methods have exactly the tensors of the official checkpoints, under a fixed renaming."""

import json

import pytest
import torch

from sslcli.config import choice, load
from sslcli.contracts import RunFacts

LINEAR = {"0.": "fc0.", "1.": "bn0.", "3.": "fc1."}
CASES = {
    "mocov3_vit_small": (
        "mocov3-vits16-300e",
        {
            "backbone.trunk.": "base_encoder.",
            "projector.": "base_encoder.head.",
            "slow_backbone.trunk.": "momentum_encoder.",
            "slow_projector.": "momentum_encoder.head.",
            "predictor.": "predictor.",
        },
    ),
    "mocov3_resnet50": (
        "mocov3-r50-100e",
        {
            "backbone.trunk.": "base_encoder.",
            "projector.": "base_encoder.fc.",
            "slow_backbone.trunk.": "momentum_encoder.",
            "slow_projector.": "momentum_encoder.fc.",
            "predictor.": "predictor.",
        },
    ),
    "simsiam_resnet50": (
        "simsiam-r50-100e",
        {"backbone.trunk.": "encoder.", "projector.": "encoder.fc.", "predictor.": "predictor."},
    ),
    "barlowtwins_resnet50": (
        "barlowtwins-r50-1000e",
        {"backbone.trunk.": "backbone.", "projector.": "projector.", "norm.": "bn."},
    ),
    "vicreg_resnet50": ("vicreg-r50-1000e", {"backbone.trunk.": "backbone.", "expander.": "projector."}),
    "mae_vit_base": (
        "mae-vitb16-800e",
        {"backbone.trunk.": "", "mask_token": "mask_token", "decoder_": "decoder_"},
    ),
    "simmim_vit_base": (
        "simmim-vitb16-800e",
        {"backbone.trunk.": "encoder.", "mask_token": "encoder.mask_token", "decoder.": "decoder."},
    ),
    "mmselfsup0x_byol": (
        "byol-r50-200e",
        {
            "backbone.trunk.": "online_net.0.",
            **{f"projector.{ours}": f"online_net.1.{theirs}" for ours, theirs in LINEAR.items()},
            "slow_backbone.trunk.": "target_net.0.",
            **{f"slow_projector.{ours}": f"target_net.1.{theirs}" for ours, theirs in LINEAR.items()},
            **{f"predictor.{ours}": f"head.predictor.{theirs}" for ours, theirs in LINEAR.items()},
        },
    ),
}
EXTRA = {
    "simsiam_resnet50": {"encoder.fc.6.bias"},
    "simmim_vit_base": {"encoder.rel_pos_bias.relative_position_index"},
}
"""Frozen, and taken out by the batch norm behind it; and numbers that never change."""


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_tensors(golden, name):
    wanted = json.loads((golden / "arch" / f"{name}.json").read_text())
    aliases = {key for key in wanted if name == "mmselfsup0x_byol" and key.startswith(("backbone.", "neck."))}
    preset, names = CASES[name]
    settings = load.load("pretrain", preset).preset
    with torch.device("meta"):
        backbone = choice.build("sslcli.backbones", settings.backbone)(settings.backbone)
        method = choice.build("sslcli.methods", settings.method)(
            settings.method, backbone, RunFacts(10_000, 4096, 4096, 10, 10)
        )
    found = {}
    for key, value in method.state_dict().items():
        ours = next(ours for ours in names if key.startswith(ours))
        found[names[ours] + key.removeprefix(ours)] = list(value.shape)
    assert found == {key: shape for key, shape in wanted.items() if key not in aliases | EXTRA.get(name, set())}
