"""Vision transformers: timm's names and numbers, the start of MoCo v3 and MAE, images of any size."""

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sslcli.backbones import vit
from sslcli.errors import UserError
from sslcli.nn.positions import sincos_positions

TINY = {"size": "tiny", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image_size": 16}


def build(**settings: object) -> vit.ViT:
    torch.manual_seed(0)
    return vit.build(vit.Config(**settings))


def images(side: int = 16, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["img64", "s224"])
def test_features_are_timms(golden, filled, hashed, name):
    case = np.load(golden / "vit" / f"vit_tiny_patch16_224_{name}.npz")
    shape = tuple(case["input_shape"])
    net = build(size="tiny", image_size=int(shape[2])).double()
    net.trunk.load_state_dict({k: torch.from_numpy(filled(k, v.shape)) for k, v in net.trunk.state_dict().items()})
    x = torch.from_numpy(hashed(str(case["input_seed"]), math.prod(shape)).reshape(shape))
    np.testing.assert_allclose(x.sum(), case["input_sum"])
    seen: dict[str, Tensor] = {}
    for number in (0, 5, 11):
        net.trunk.blocks[number].register_forward_hook(lambda _, __, y, key=f"block{number}": seen.update({key: y}))
    with torch.no_grad():
        seen["final_norm"] = net.tokens(x)
        taps = net.taps(x, ["blocks.5", "pooled"])
    for key, tokens in seen.items():
        np.testing.assert_allclose(tokens[:, case["token_indices"]], case[f"{key}/tokens"], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(tokens.mean(1), case[f"{key}/token_mean"], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(taps["blocks.5"].flatten(2).mT, seen["block5"][:, 1:])
    torch.testing.assert_close(taps["pooled"], seen["final_norm"][:, 0])


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({"size": "tiny"}, "vit_tiny_patch16_224"),
        ({"size": "small"}, "vit_small_patch16_224"),
        ({"size": "base"}, "vit_base_patch16_224"),
    ],
)
def test_weights_load_into_timm(settings, model):
    import timm

    with torch.device("meta"):
        theirs = timm.create_model(model, num_classes=0).state_dict()
        ours = build(**settings, positions="sincos", init="normal").trunk.state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_sizes():
    with torch.device("meta"):
        large = build(size="large")
        small = build(size="small", heads=12)
    assert (large.dim, len(large.trunk.blocks), large.trunk.blocks[0].attn.num_heads) == (1024, 24, 16)
    assert (small.dim, len(small.trunk.blocks), small.trunk.blocks[0].attn.num_heads) == (384, 12, 12)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_small_stopgrad", {"size": "small", "heads": 12, "freeze_patch_embed": True}),
        ("vit_base", {"size": "base"}),
    ],
)
def test_start_of_mocov3(golden, name, settings):
    """Bounds and spread of every tensor as the authors draw it; the draws themselves differ."""
    recorded = json.loads((golden / "mocov3" / f"init_{name}.json").read_text())["params"]
    found = dict(build(**settings, depth=1, positions="sincos", init="mocov3").trunk.named_parameters())
    assert found.keys() == {key for key in recorded if not key.startswith("head")}
    for key, ours in found.items():
        theirs = recorded[key]
        assert list(ours.shape) == theirs["shape"], key
        assert ours.requires_grad == theirs["requires_grad"], key
        bound = max(abs(theirs["min"]), abs(theirs["max"]))
        assert ours.std(correction=0).item() == pytest.approx(theirs["std"], rel=0.1, abs=1e-12), key
        assert ours.mean().item() == pytest.approx(theirs["mean"], abs=0.02 * bound + 3e-7), key
        if key != "cls_token":
            assert ours.abs().max().item() == pytest.approx(bound, rel=0.01, abs=1e-12), key


def test_start_of_mae():
    net = build(size="tiny", depth=2, init="mae", image_size=32)
    qkv = net.trunk.blocks[1].attn.qkv
    assert qkv.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (192 + 3 * 192)), rel=0.01)
    assert net.trunk.blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (5 * 192)), rel=0.01)
    assert net.trunk.patch_embed.proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (768 + 192)), rel=0.01)
    assert net.trunk.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not qkv.bias.any()
    assert net.trunk.patch_embed.proj.bias.abs().max().item() == pytest.approx(1 / math.sqrt(768), rel=0.05)


def test_normal_start():
    net = build(size="tiny", depth=1, image_size=32)
    for weight in (net.trunk.blocks[0].attn.qkv.weight, net.trunk.pos_embed, net.trunk.cls_token):
        assert weight.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("first", ["row", "column"])
def test_fixed_positions(first):
    net = build(**TINY, positions="sincos", sincos_first=first)
    assert torch.equal(net.trunk.pos_embed[0], sincos_positions(16, 4, 4, first=first, prefix=1))
    net(images()).sum().backward()
    assert net.trunk.pos_embed.grad is None


def test_all_that_is_not_frozen_learns():
    for pool in ("cls", "mean"):
        net = build(**TINY, pool=pool, freeze_patch_embed=True)
        net(images()).square().sum().backward()
        frozen = {name for name, p in net.trunk.named_parameters() if p.grad is None}
        assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    net = build(**TINY)
    net(images()).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("side", [8, 16, 28])
def test_images_of_any_size(side):
    net = build(**TINY).eval()
    x = images(side)
    with torch.no_grad():
        tokens, maps, pooled = net.tokens(x), net.maps(x), net(x)
        taps = net.taps(x, ["pooled", "blocks.1"])
    assert maps.shape == taps["blocks.1"].shape == (2, 16, side // 4, side // 4)
    torch.testing.assert_close(maps.flatten(2).mT, tokens[:, 1:])
    torch.testing.assert_close(net.trunk.norm(taps["blocks.1"].flatten(2).mT), tokens[:, 1:])
    torch.testing.assert_close(pooled, tokens[:, 0])
    torch.testing.assert_close(taps["pooled"], pooled)
    assert list(taps) == ["pooled", "blocks.1"]


def test_small_crops_with_a_network_for_large_ones():
    """DINO's and SwAV's crops of 96 px in a network for 224 px, with gradients to the learned positions."""
    net = build(**{**TINY, "patch": 16, "image_size": 224})
    (net(images(224)).sum() + net(images(96)).square().sum()).backward()
    assert net.trunk.pos_embed.grad.abs().sum() > 0


def test_images_that_are_not_square():
    net = build(**TINY, pool="mean").eval()
    x = torch.randn(2, 3, 8, 24)
    with torch.no_grad():
        maps = net.maps(x)
        torch.testing.assert_close(net(x), maps.mean((2, 3)))
    assert maps.shape == (2, 16, 2, 6)


def test_drop_path_only_while_training():
    net = build(**TINY, drop_path=0.5)
    x = images()
    torch.manual_seed(0)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_images_that_cannot_be_cut_are_refused():
    with pytest.raises(UserError, match="images of 18 x 18 pixels cannot be cut into patches of 4"):
        build(**TINY)(images(18))
    with pytest.raises(UserError, match=r"no tap `blocks.2`"):
        build(**TINY).taps(images(), ["blocks.2"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, r"the number of heads must divide the width \(got 5 and 384\)"),
        ({"image_size": 225}, r"`patch` must divide `image_size` \(got 16 and 225\)"),
        ({"width": 18, "heads": 3, "positions": "sincos"}, r"needs a width that 4 divides \(got 18\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        vit.Config(**settings)
