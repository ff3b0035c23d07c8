"""ResNets are torchvision's and timm's: names, shapes, initialisation, features."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from sslcli.backbones import resnet
from sslcli.errors import UserError


def build(**settings: object) -> resnet.ResNet:
    return resnet.build(resnet.Config(**settings))


@pytest.mark.parametrize("depth", [18, 50])
def test_weights_load_into_torchvision_and_timm(depth):
    import timm
    import torchvision

    state = build(depth=depth).trunk.state_dict()
    timm.create_model(f"resnet{depth}", num_classes=0).load_state_dict(state, strict=True)
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    report = theirs.load_state_dict(state, strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"]
    assert report.unexpected_keys == []
    assert list(state) == [key for key in theirs.state_dict() if not key.startswith("fc.")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("depth", [18, 50])
def test_features_are_torchvisions(depth, training):
    import torchvision

    net = build(depth=depth).double().train(training)
    theirs = getattr(torchvision.models, f"resnet{depth}")().double().train(training)
    theirs.load_state_dict(net.trunk.state_dict(), strict=False)
    seen: dict[str, torch.Tensor] = {}
    for name in ("relu", "layer1", "layer2", "layer3", "layer4", "avgpool"):
        getattr(theirs, name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.clone()}))
    x = torch.randn(2, 3, 45, 45, dtype=torch.float64)
    with torch.no_grad():
        theirs(x)
        found = net.taps(x, net.tap_names())
        torch.testing.assert_close(net.eval().maps(x), net.taps(x, ["layer4"])["layer4"])
        torch.testing.assert_close(net(x), net.taps(x, ["pooled"])["pooled"])
    assert list(found) == ["stem", "layer1", "layer2", "layer3", "layer4", "pooled"]
    for name, value in zip(("relu", "layer1", "layer2", "layer3", "layer4", "avgpool"), found.values(), strict=True):
        torch.testing.assert_close(value, seen[name].flatten(1) if name == "avgpool" else seen[name])
    assert found["pooled"].shape == (2, net.dim)


def test_initialisation_is_torchvisions():
    import torchvision

    torch.manual_seed(0)
    net, theirs = build(depth=50), torchvision.models.resnet50()
    for (name, a), b in zip(net.trunk.state_dict().items(), theirs.state_dict().values(), strict=False):
        if a.dim() == 4:
            assert a.mean().abs() < 4 * b.std() / a.numel() ** 0.5, name
            torch.testing.assert_close(a.std(), b.std(), rtol=0.05, atol=0)
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize(("depth", "last"), [(18, "bn2"), (50, "bn3")])
def test_blocks_start_as_the_identity_on_request(depth, last):
    zero, plain = build(depth=depth, zero_init_residual=True), build(depth=depth)
    for net, gain in ((zero, 0.0), (plain, 1.0)):
        gains = [p for name, p in net.trunk.named_parameters() if name.endswith(f"{last}.weight")]
        assert gains
        assert all((p == gain).all() for p in gains)
    assert (zero.trunk.bn1.weight == 1).all()


@pytest.mark.parametrize(
    ("stem", "shapes"),
    [("imagenet", [16, 8, 4, 2, 1]), ("cifar", [32, 32, 16, 8, 4]), ("small", [16, 16, 8, 4, 2])],
)
@pytest.mark.parametrize("width", [12, 64])
def test_stems(stem, shapes, width):
    net = build(depth=10, width=width, stem=stem)
    taps = net.taps(torch.randn(2, 3, 32, 32), net.tap_names())
    pooled = taps.pop("pooled")
    assert [tap.shape[-1] for tap in taps.values()] == shapes
    assert [tap.shape[1] for tap in taps.values()] == [width, width, 2 * width, 4 * width, 8 * width]
    assert pooled.shape == (2, net.dim) == (2, 8 * width)
    standard = {name for name, _ in build(depth=10).trunk.named_parameters()}
    assert {name for name, _ in net.trunk.named_parameters()} == standard
    for conv in (m for m in net.trunk.modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        torch.testing.assert_close(conv.weight.std().item(), (2 / fan_out) ** 0.5, rtol=0.2, atol=0)


@pytest.mark.parametrize("depth", [10, 14, 18, 26, 34, 50, 101, 152])
def test_depth_counts_weighted_layers(depth):
    with torch.device("meta"):
        net = build(depth=depth, width=8)
    convolutions = [n for n, m in net.trunk.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    assert len(convolutions) + 1 == depth  # and the classifier that is not there
    assert net.dim == 8 * 8 * (1 if depth in (10, 18, 34) else 4)


def test_an_unknown_tap_is_refused():
    with pytest.raises(UserError, match="no tap `layer5`") as error:
        build(depth=10, width=8).taps(torch.zeros(1, 3, 32, 32), ["layer4", "layer5"])
    assert error.value.hint == "there is stem, layer1, layer2, layer3, layer4, pooled"


def test_reading_a_preset_imports_no_timm():
    modules = "sslcli.backbones.resnet, sslcli.backbones.timm"
    script = f"import sys, {modules}; assert not {{'timm', 'torchvision'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
