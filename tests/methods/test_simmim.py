"""SimMIM equal to the authors' code: loss, whole tiny models (Swin, ViT) with gradients, decayed parameters."""

import json
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli.backbones import beit, resnet, swin
from sslcli.config import load
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.engine.optim import param_groups
from sslcli.errors import UserError
from sslcli.methods import simmim
from sslcli.methods.simmim import painting_loss

FACTS = RunFacts(images=100, batch_size=8, part_size=8, steps_per_epoch=2, total_steps=6)
AT = Progress(step=0, total=6, steps_per_epoch=2, seed=0)


def ours(key: str) -> str:
    """Our name for a tensor of the authors', whose stages end with what timm's begin with."""
    key = key.removeprefix("encoder.")
    if key.startswith(("mask_token", "decoder")):
        return key
    merging = re.fullmatch(r"layers\.(\d+)\.downsample\.(.*)", key)
    return (
        f"backbone.trunk.layers.{int(merging[1]) + 1}.downsample.{merging[2]}" if merging else f"backbone.trunk.{key}"
    )


@pytest.mark.golden
@pytest.mark.parametrize("name", ["allmask", "f32", "n2_i16_p4", "n3_i12_p2", "nomask"])
def test_loss(golden, name):
    case = np.load(golden / "simmim" / f"loss_{name}.npz")
    painted = torch.from_numpy(case["pred"]).requires_grad_()
    masks = torch.from_numpy(case["mask"]).flatten(1)
    loss = painting_loss(painted, torch.from_numpy(case["imgs"]), masks)
    (gradient,) = torch.autograd.grad(loss, painted)
    tolerance = 1e-5 if name == "f32" else 1e-9
    np.testing.assert_allclose(loss.detach(), case["loss"], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(gradient, case["grad_pred"], rtol=tolerance, atol=tolerance)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["forward_swin_d12", "forward_swin_ape_w3", "forward_vit_sharedrpb"])
def test_whole_model(golden, filled, name):
    case = np.load(golden / "simmim" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    said = meta["kwargs"]
    shape = {"width": said["embed_dim"], "patch": said["patch_size"], "image_size": said["img_size"]}
    if meta["kind"] == "vit":
        backbone = beit.build(beit.Config(**shape, depth=said["depth"], heads=said["num_heads"]))
        parts = {f"act/blocks.{n}": block for n, block in enumerate(backbone.trunk.blocks)}
    else:
        positions = "learned" if said["ape"] else "none"
        stages = {"depths": said["depths"], "heads": said["num_heads"], "window": said["window_size"]}
        backbone = swin.build(swin.Config(**shape, **stages, positions=positions))
        for stage in backbone.trunk.layers if said["mlp_ratio"] != 4 else ():
            for block in stage.blocks:
                narrow(block.mlp, said["mlp_ratio"])
        parts = {f"act/layers.{n - 1}": stage.downsample for n, stage in enumerate(backbone.trunk.layers) if n}
        parts[f"act/layers.{len(said['depths']) - 1}"] = backbone.trunk.layers[-1]
    method = simmim.build(simmim.Config(), backbone, FACTS).double()
    assert backbone.stride == meta["encoder_stride"]
    keys = meta["filled"]
    method.load_state_dict({ours(key): torch.from_numpy(filled(key, meta["layout"][key])) for key in keys})
    seen: dict[str, Tensor] = {}
    for key, part in [*parts.items(), ("x_rec", method.decoder)]:
        part.register_forward_hook(lambda _, __, y, key=key: seen.update({key: y.detach()}))

    masks = torch.from_numpy(case["mask"]).flatten(1).bool()
    images = torch.from_numpy(case["imgs"])
    loss = method(Batch([images], torch.arange(len(masks)), masks=masks), AT).loss
    loss.backward()
    for key, found in seen.items():
        np.testing.assert_allclose(found.reshape(case[key].shape), case[key], rtol=1e-9, atol=1e-9, err_msg=key)
    z = backbone.masked_maps(images, masks, method.mask_token[0, 0]).detach()
    np.testing.assert_allclose(z, case["z"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(loss.detach(), case["loss"], rtol=1e-9)
    gradients = np.load(golden / "simmim" / f"{name}.grads.npz")
    found = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    assert found.keys() == {ours(key.removeprefix("grad/")) for key in gradients.files}
    for key in gradients.files:
        wanted = found[ours(key.removeprefix("grad/"))]
        np.testing.assert_allclose(wanted, gradients[key], rtol=1e-9, atol=1e-9, err_msg=key)


def narrow(mlp: torch.nn.Module, ratio: float) -> None:
    """Give a block the hidden width of the recording; presets have 4 times the block's."""
    width = mlp.fc1.in_features
    mlp.fc1 = torch.nn.Linear(width, int(ratio * width))
    mlp.fc2 = torch.nn.Linear(int(ratio * width), width)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["d12", "d8_3stage"])
def test_features_of_swin(golden, filled, name):
    case = np.load(golden / "simmim" / f"swin_classifier_{name}.npz")
    said = json.loads(str(case["meta"]))["kwargs"]
    backbone = swin.build(
        swin.Config(
            width=said["embed_dim"], depths=said["depths"], heads=said["num_heads"], patch=said["patch_size"],
            window=said["window_size"], image_size=said["img_size"],
        )
    )  # fmt: skip
    theirs = {ours(key): key for key in json.loads(str(case["meta"]))["filled"]}
    state = backbone.double().state_dict()
    backbone.load_state_dict(
        {key: torch.from_numpy(filled(theirs[f"backbone.{key}"], value.shape)) for key, value in state.items()}
    )
    features = backbone.eval()(torch.from_numpy(case["imgs"])).detach()
    np.testing.assert_allclose(features, case["features"], rtol=1e-9, atol=1e-9)


@pytest.mark.golden
def test_decayed_parameters(golden):
    recorded = json.loads((golden / "simmim" / "pretrain_param_groups_swin_base.json").read_text())
    preset = load.load("pretrain", "simmim-swinb-192-100e").preset
    with torch.device("meta"):
        method = simmim.build(preset.method, swin.build(preset.backbone), FACTS)
    groups = param_groups(method.named_parameters(), preset.optim, [*method.param_rules(), *preset.optim.rules])
    found = {frozenset(group["names"]): group["weight_decay"] for group in groups}
    assert found == {
        frozenset(map(ours, recorded["has_decay"])): 0.05,
        frozenset(map(ours, recorded["no_decay"])): 0.0,
    }


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="`simmim` hides patches, which a `ResNet` does not have"):
        simmim.build(simmim.Config(), resnet.build(resnet.Config(depth=10, width=8)), FACTS)
    backbone = swin.build(swin.Config(width=8, depths=(1, 1), heads=(2, 2), window=4, image_size=32))
    method = simmim.build(simmim.Config(), backbone, FACTS)
    with pytest.raises(UserError, match="masks are drawn for 16 patches, but the network cuts an image into 64"):
        method.painted(torch.randn(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.bool))
