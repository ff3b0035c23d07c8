"""Any timm network serves as a backbone."""

import pytest
import torch

from sslcli.backbones import timm as backbone
from sslcli.errors import PresetError, UserError


def build(model: str, image_size: int | None = None) -> backbone.Timm:
    torch.manual_seed(0)
    return backbone.build(backbone.Config(model=model, image_size=image_size)).eval()


@pytest.mark.parametrize(
    ("model", "image_size", "pixels", "grid"),
    [
        ("resnet18", None, 64, 2),
        ("vit_tiny_patch16_224", 64, 64, 4),
        ("convnext_atto", None, 64, 2),
        ("swin_tiny_patch4_window7_224", 64, 64, 2),
        ("mobilenetv3_small_050", None, 64, 2),
    ],
)
def test_maps_taps_and_pooled_features(model, image_size, pixels, grid):
    net = build(model, image_size)
    x = torch.randn(2, 3, pixels, pixels)
    with torch.no_grad():
        pooled, maps = net(x), net.maps(x)
        stage, last = net.tap_names()[0], net.tap_names()[-2]
        taps = net.taps(x, [last, "pooled", stage])
    assert pooled.shape == (2, net.dim)
    assert maps.shape[0] == 2
    assert maps.shape[2:] == (grid, grid)
    assert list(taps) == [last, "pooled", stage]
    torch.testing.assert_close(taps["pooled"], pooled)
    assert taps[last].shape == maps.shape
    assert taps[stage].dim() == 4


def test_a_vits_map_is_its_patch_tokens():
    net = build("vit_tiny_patch16_224", 48)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        tokens = net.trunk.forward_features(x)
        torch.testing.assert_close(net.maps(x).flatten(2).transpose(1, 2), tokens[:, 1:])
        torch.testing.assert_close(net(x), tokens[:, 0])


def test_every_parameter_is_used():
    for model, image_size in (("vit_tiny_patch16_224", 32), ("resnet18", None)):
        net = build(model, image_size).train()
        net(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert not [name for name, p in net.named_parameters() if p.grad is None]


def test_an_unknown_network_is_refused_with_the_nearest():
    with pytest.raises(PresetError, match=r"`backbone.model`: timm \S+ has no network `resnt50`") as error:
        build("resnt50")
    assert error.value.hint == "did you mean `resnet50`?"


def test_an_image_size_for_a_network_that_takes_any_is_refused():
    with pytest.raises(PresetError, match=r"`backbone.image_size`: the shape of `resnet18`"):
        build("resnet18", 32)


def test_an_unknown_tap_is_refused():
    with pytest.raises(UserError, match="no tap `head`"):
        build("resnet18").taps(torch.zeros(1, 3, 32, 32), ["head"])


def test_what_else_a_network_is_built_with():
    size = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "reg_tokens": 2, "no_embed_class": True}
    config = backbone.Config(model="vit_tiny_patch16_224", image_size=32, args=size)
    network = backbone.build(config)
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    assert network.trunk.reg_token.shape == (1, 2, 32)
    with pytest.raises(PresetError, match=r"`backbone\.args`: timm cannot build"):
        backbone.build(backbone.Config(model="vit_tiny_patch16_224", args={"registers": 2}))
