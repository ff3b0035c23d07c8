"""BEiT's vision transformers: timm's names and numbers, masked and left-out patches, what does not fit."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sslcli.backbones import beit
from sslcli.errors import UserError
from sslcli.nn.positions import sincos_positions

TINY = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "image_size": 16}


def build(**settings: object) -> beit.BEiT:
    torch.manual_seed(0)
    return beit.build(beit.Config(**{**TINY, **settings}))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_weights_load_into_timm():
    import timm

    settings = {"num_classes": 0, "use_fc_norm": False, "global_pool": "token"}
    with torch.device("meta"):
        theirs = timm.create_model("beit_base_patch16_224", **settings).state_dict()
        ours = beit.build(beit.Config(size="base", bias="blocks")).trunk.state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("bias", ["none", "shared", "blocks"])
@pytest.mark.parametrize("positions", ["none", "learned", "sincos"])
def test_maps_taps_and_pooled_features(positions, bias):
    net = build(positions=positions, bias=bias).eval()
    with torch.no_grad():
        maps, tokens = net.maps(images()), net.tokens(images())
        taps = net.taps(images(), ["pooled", "blocks.1"])
        torch.testing.assert_close(tokens, net.trunk.forward_features(images()))
    assert (net.dim, net.patch, net.patch_dim, net.grid, net.stride) == (16, 4, 16, 4, 4)
    assert maps.shape == taps["blocks.1"].shape == (2, 16, 4, 4)
    torch.testing.assert_close(maps.flatten(2).mT, tokens[:, 1:])
    torch.testing.assert_close(taps["pooled"], tokens[:, 0])
    if positions == "sincos":
        assert torch.equal(net.trunk.pos_embed[0], sincos_positions(16, 4, 4, first="row", prefix=1))


def test_what_stands_in_for_masked_patches():
    net, token = build().eval(), torch.randn(16)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(net.masked_maps(images(), masks, token), net.maps(images()))
        masks[:, :8] = True
        other = images()
        other[:, :, :8] = 0
        torch.testing.assert_close(net.masked_maps(other, masks, token), net.masked_maps(images(), masks, token))


def test_patches_left_out():
    net = build(positions="sincos", bias="none").eval()
    some = torch.tensor([[3, 0, 9], [1, 2, 15]])
    with torch.no_grad():
        tokens = net.visible_tokens(images(), some)
        torch.testing.assert_close(net.visible_tokens(images(), some.flip(1))[:, 1:], tokens[:, 1:].flip(1))
        every = torch.arange(16).expand(2, 16)
        torch.testing.assert_close(net.visible_tokens(images(), every), net.tokens(images()))
    for bias in ("shared", "blocks"):
        with pytest.raises(UserError, match="biased by relative position cannot leave patches out"):
            build(bias=bias).visible_tokens(images(), some)


@pytest.mark.parametrize("bias", ["shared", "blocks"])
def test_everything_learns(bias):
    net = build(positions="learned", bias=bias)
    net.trunk.set_grad_checkpointing(True)
    net(images()).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="images of 20 x 16 pixels do not fit positions made for 16 x 16"):
        build()(torch.randn(1, 3, 20, 16))
    for settings, message in (
        ({"heads": 3}, r"must divide the width \(got 3 and 16\)"),
        ({"width": 18, "positions": "sincos"}, r"needs a width that 4 divides \(got 18\)"),
        ({"image_size": 18}, r"`patch` must divide `image_size` \(got 4 and 18\)"),
    ):
        with pytest.raises(ValidationError, match=message):
            build(**settings)
