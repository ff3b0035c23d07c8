"""Swin transformers: timm's names and numbers, masked patches, what does not fit."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sslcli.backbones import swin
from sslcli.errors import UserError

TINY = {"width": 8, "depths": (2, 1), "heads": (2, 4), "window": 4, "image_size": 32}


def build(**settings: object) -> swin.Swin:
    torch.manual_seed(0)
    return swin.build(swin.Config(**{**TINY, **settings}))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "window", "side"), [("tiny", 7, 224), ("base", 7, 224), ("large", 12, 384)])
def test_weights_load_into_timm(size, window, side):
    import timm

    with torch.device("meta"):
        theirs = timm.create_model(f"swin_{size}_patch4_window{window}_{side}", num_classes=0).state_dict()
        ours = swin.build(swin.Config(size=size, window=window, image_size=side)).trunk.state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("positions", ["none", "learned"])
def test_maps_taps_and_pooled_features(positions):
    net = build(positions=positions).eval()
    with torch.no_grad():
        maps, pooled = net.maps(images()), net(images())
        taps = net.taps(images(), ["pooled", "layers.1", "layers.0"])
    assert (net.dim, net.patch, net.patch_dim, net.grid, net.stride) == (16, 4, 8, 8, 8)
    assert maps.shape == taps["layers.1"].shape == (2, 16, 4, 4)
    assert taps["layers.0"].shape == (2, 8, 8, 8)
    torch.testing.assert_close(pooled, maps.mean(dim=(2, 3)))
    torch.testing.assert_close(taps["pooled"], pooled)
    if positions == "none":
        torch.testing.assert_close(pooled, net.trunk.forward_head(net.trunk.forward_features(images())))


def test_what_stands_in_for_masked_patches():
    net, token = build(positions="learned").eval(), torch.randn(8)
    masks = torch.zeros(2, 64, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(net.masked_maps(images(), masks, token), net.maps(images()))
        masks[:, :40] = True
        other = images()
        other[:, :, :20] = 0  # five rows of eight patches
        torch.testing.assert_close(net.masked_maps(other, masks, token), net.masked_maps(images(), masks, token))
        assert not torch.equal(net.masked_maps(images(), masks, -token), net.masked_maps(images(), masks, token))


def test_everything_learns():
    net = build(positions="learned", drop_path=0.1)
    net.trunk.set_grad_checkpointing(True)
    net(images()).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


def test_what_does_not_fit_is_refused():
    net = build()
    with pytest.raises(UserError, match="images of 36 x 32 pixels do not fit windows made for 32 x 32"):
        net(torch.randn(1, 3, 36, 32))
    with pytest.raises(UserError, match="`Swin` cannot leave patches out"):
        net.visible_tokens(images(), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(UserError, match=r"no tap `layers.2`"):
        net.taps(images(), ["layers.2"])
    for settings, message in (
        ({"depths": (2,)}, "are of 1 and 2 stages"),
        ({"heads": (3, 4)}, r"must divide its width \(got 3 and 8 in stage 0\)"),
        ({"image_size": 34}, r"`patch` must divide `image_size` \(got 4 and 34\)"),
    ):
        with pytest.raises(ValidationError, match=message):
            build(**settings)
