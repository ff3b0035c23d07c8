"""What an experiment costs: counts that can be worked out by hand or were measured by others."""

import pytest
import torch
from torch import Tensor, nn

from sslcli.config.load import load
from sslcli.engine import count

RESNETS = {18: (11_176_512, 3.63, 0.67), 50: (23_508_032, 8.17, 1.50), 101: (42_500_160, 15.60, 2.87)}
VITS = {"small": (9.20, 1.62), "base": (35.13, 6.38)}


@pytest.mark.parametrize("depth", RESNETS)
def test_known_sizes_of_resnets(depth: int):
    """Parameters are torchvision's without classifier; operations those of He et al. 2016, table 1, twice."""
    parameters, large, small = RESNETS[depth]
    for side, known in ((224, large), (96, small)):
        part, view = count.backbone_cost({"name": "resnet", "depth": depth}, side)
        assert part.parameters == part.trainable == parameters
        assert view.flops / 1e9 == pytest.approx(known, abs=0.006)


@pytest.mark.parametrize("size", VITS)
def test_known_sizes_of_vits(size: str):
    for side, known in zip((224, 96), VITS[size], strict=True):
        _, view = count.backbone_cost({"name": "vit", "size": size}, side)
        assert view.flops / 1e9 == pytest.approx(known, abs=0.006)


def test_resnet50_is_4_09_billion_multiplications():
    _, view = count.backbone_cost({"name": "resnet", "depth": 50}, 224)
    assert view.flops / 2e9 == pytest.approx(4.09, abs=0.005)


def test_every_part_of_moco_is_counted_by_itself():
    cost = count.cost_of(load("pretrain", "mocov2-r50-200e").preset, 1_281_167)
    parts = {part.name: part for part in cost.parts}
    assert list(parts) == ["backbone", "head", "slow_backbone", "slow_head", "queue", count.OWN]
    assert parts["slow_backbone"].trainable == parts["slow_head"].trainable == 0
    assert parts["slow_backbone"].parameters == parts["backbone"].parameters
    head = 2048 * 2048 + 2048 * 128
    assert parts["head"].parameters == head + 2048 + 128
    assert parts["head"].flops == 2 * head
    assert parts["queue"].buffers == 65536 * 128 * 4 + 8
    assert parts[count.OWN].flops == 2 * 128 * 65536  # one query against the queue
    assert cost.forward == sum(part.flops for part in cost.parts)
    assert cost.views == (count.View(224, 224, 2, 8_174_272_512),)
    twin = parts["slow_backbone"].flops
    assert (cost.step - twin) / (cost.forward - twin) == pytest.approx(2.97, abs=0.01)
    assert cost.steps == 200 * (1_281_167 // 256)
    assert cost.run == pytest.approx(cost.step * 256 * cost.steps)
    assert cost.memory["weights"] == 4 * sum(part.parameters for part in cost.parts)
    assert cost.memory["optimizer"] == cost.memory["gradients"]  # momentum


def test_a_module_whose_inner_layers_are_called_counts_as_itself():
    """DenseCL asks the backbone for maps, not for the pooled feature."""
    cost = count.cost_of(load("pretrain", "densecl-r50-200e").preset, 10_000)
    parts = {part.name: part for part in cost.parts}
    assert parts["backbone"].flops == parts["slow_backbone"].flops == 8_174_272_512


def test_hidden_patches_are_not_counted():
    """MAE, ViT-B: 50 of 197 tokens through the encoder, all through a decoder of 8 blocks and 512 channels."""
    cost = count.cost_of(load("pretrain", "mae-vitb16-400e", ["data.batch_size=64"]).preset, 10_000)
    backbone = next(part for part in cost.parts if part.name == "backbone")
    assert cost.counted_on == 64
    assert cost.forward / 1e9 == pytest.approx(19.6, abs=0.05)
    assert backbone.flops < 0.27 * cost.views[0].flops


def test_a_constructor_that_looks_at_values_is_run_for_real():
    cost = count.cost_of(load("pretrain", "cae-cifar10-cpu").preset, 1000)
    assert cost.forward > next(part.flops for part in cost.parts if part.name == "backbone") > 0


def test_crops_of_two_sizes_add_up():
    cost = count.cost_of(load("pretrain", "dino-vits16-100e").preset, 10_000)
    large, small = cost.views
    assert (large.count, small.count) == (2, 8)
    backbone = next(part for part in cost.parts if part.name == "backbone")
    assert backbone.flops == 2 * large.flops + 8 * small.flops
    assert cost.memory["optimizer"] == 2 * cost.memory["gradients"]  # two moments


def test_shapes_alone_and_real_numbers_agree(monkeypatch: pytest.MonkeyPatch):
    preset = load("pretrain", "demo-digits", ["data.batch_size=2", "data.source.count=8"]).preset
    hollow = count.cost_of(preset, 8)

    def refuse(module: nn.Module) -> None:
        raise RuntimeError("it looks at values")

    monkeypatch.setattr(count, "hollow", refuse)
    monkeypatch.setattr(count, "views_of", lambda *_: hollow.views)
    real = count.cost_of(preset, 8)
    assert real == hollow
    assert real.counted_on == 2


def test_hollow_tensors_keep_shapes_and_ties():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    with torch.device("meta"):
        count.hollow(module := nn.Sequential(first, second, nn.BatchNorm1d(3)))
    tensors: dict[str, Tensor] = module.state_dict()
    assert all(tensor.is_meta for tensor in tensors.values())
    assert tensors["2.num_batches_tracked"].dtype == torch.int64
    assert first.weight is second.weight
    assert first.bias.requires_grad
    assert not second.bias.requires_grad


def test_a_bank_grows_with_the_images():
    preset = load("pretrain", "npid-r50-200e").preset
    cost = count.cost_of(preset, 1_281_167)
    assert next(part for part in cost.parts if part.name == "bank").buffers == 1_281_167 * 128 * 4
