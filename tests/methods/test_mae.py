"""MAE equal to the authors' code: loss, whole tiny models with gradients, initial weights, decayed parameters."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli.backbones import resnet, vit
from sslcli.config import load
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.engine.optim import param_groups
from sslcli.errors import UserError
from sslcli.methods import mae
from sslcli.methods.mae import painting_loss
from sslcli.nn.patches import images_of, patches_of, visible_and_masked
from sslcli.views.masks import random_masks, ranks

FACTS = RunFacts(images=100, batch_size=8, part_size=8, steps_per_epoch=2, total_steps=6)
AT = Progress(step=0, total=6, steps_per_epoch=2, seed=0)
TINY = {"patch": 4, "image_size": 16, "init": "mae", "positions": "sincos", "sincos_first": "column"}
WHOLE = {
    "forward_tiny_r075": ({"width": 32, "heads": 4}, {"width": 16, "depth": 2, "heads": 4}),
    "forward_tiny_r075_normpix": ({"width": 32, "heads": 4}, {"width": 16, "depth": 2, "heads": 4}),
    "forward_tiny_r050_dec1": ({"width": 24, "heads": 3}, {"width": 12, "depth": 1, "heads": 2}),
}


def ours(key: str) -> str:
    """Our name for a tensor of the authors'."""
    return key if key.startswith(("decoder_", "mask_token")) else f"backbone.trunk.{key}"


def build(backbone: dict[str, Any], **settings: Any) -> mae.MAE:
    torch.manual_seed(0)
    return mae.build(mae.Config(**settings), vit.build(vit.Config(**backbone)), FACTS)


@pytest.mark.golden
@pytest.mark.parametrize(
    "name", ["normpix_f32", "normpix_flatpatch", "normpix_n2_i16_p4", "normpix_uneven", "plain_n2_i16_p4",
             "plain_onemask"],
)  # fmt: skip
def test_loss(golden, name):
    case = np.load(golden / "mae" / f"loss_{name}.npz")
    painted = torch.from_numpy(case["pred"]).requires_grad_()
    loss = painting_loss(
        painted, torch.from_numpy(case["imgs"]), torch.from_numpy(case["mask"]), normalized=bool(case["norm_pix_loss"])
    )
    (gradient,) = torch.autograd.grad(loss, painted)
    tolerance = {"normpix_f32": 1e-5, "normpix_flatpatch": 1e-6}.get(name, 1e-9)
    np.testing.assert_allclose(loss.detach(), case["loss"], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(gradient, case["grad_pred"], rtol=tolerance, atol=tolerance)


def test_loss_of_nothing_is_no_number():
    images = torch.randn(1, 3, 8, 8)
    assert painting_loss(torch.randn(1, 4, 48), images, torch.zeros(1, 4, dtype=torch.bool), normalized=True).isnan()


@pytest.mark.golden
@pytest.mark.parametrize("name", ["n1_i16_p16", "n1_i24_p8", "n2_i16_p4", "n2_i6_p2"])
def test_patches(golden, name):
    case = np.load(golden / "mae" / f"patchify_{name}.npz")
    images, side = torch.from_numpy(case["imgs"]), int(case["patch_size"])
    np.testing.assert_array_equal(patches_of(images, side), case["patches"])
    back = images_of(torch.from_numpy(case["tokens"]), side, *images.shape[2:])
    np.testing.assert_array_equal(back, case["unpatchify_tokens"])


@pytest.mark.golden
@pytest.mark.parametrize("name", WHOLE)
def test_whole_model(golden, filled, name):
    case = np.load(golden / "mae" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    backbone, decoder = WHOLE[name]
    method = build({**TINY, **backbone, "depth": 2}, **decoder, normalized=meta["norm_pix_loss"]).double()
    weights = {ours(key): torch.from_numpy(filled(key, meta["layout"][key])) for key in meta["filled"]}
    for key in ("pos_embed", "decoder_pos_embed"):
        fixed = method.state_dict()[ours(key)]
        np.testing.assert_allclose(fixed, case[key], atol=1e-6)
        weights[ours(key)] = torch.from_numpy(case[key])
    method.load_state_dict(weights)
    seen: dict[str, Tensor] = {}
    blocks = [(f"blocks.{n}", block) for n, block in enumerate(method.backbone.trunk.blocks)]
    blocks += [(f"decoder_blocks.{n}", block) for n, block in enumerate(method.decoder_blocks)]
    for key, block in [*blocks, ("latent", method.backbone.trunk.norm), ("pred", method.decoder_pred)]:
        block.register_forward_hook(lambda _, __, y, key=key: seen.update({key: y.detach()}))

    masks = torch.from_numpy(random_masks(case["noise"], 0.5 if "r050" in name else 0.75))
    np.testing.assert_array_equal(masks, case["mask"].astype(bool))
    batch = Batch([torch.from_numpy(case["imgs"])], torch.arange(len(masks)), masks=masks)
    loss = method(batch, AT).loss
    loss.backward()

    order = np.argsort(case["noise"], axis=1)[:, : (~case["mask"].astype(bool)).sum(axis=1)[0]]  # theirs, by noise
    place = 1 + np.argsort(np.argsort(order, axis=1), axis=1)  # where these stand among ours, row by row
    place = np.concatenate([np.zeros((len(place), 1), dtype=int), place], axis=1)
    for key in ("latent", "blocks.0", "blocks.1"):
        found = np.take_along_axis(seen[key].numpy(), place[:, :, None], axis=1)
        np.testing.assert_allclose(found, case[key if key == "latent" else f"act/{key}"], rtol=1e-9, atol=1e-9)
    for key in (key for key in case.files if key.startswith("act/decoder")):
        np.testing.assert_allclose(seen[key.removeprefix("act/")], case[key], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(seen["pred"][:, 1:], case["pred"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(loss.detach(), case["loss"], rtol=1e-9)
    if (golden / "mae" / f"{name}.grads.npz").exists():
        gradients = np.load(golden / "mae" / f"{name}.grads.npz")
        found = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
        assert found.keys() == {ours(key.removeprefix("grad/")) for key in gradients.files}
        for key in gradients.files:
            wanted = found[ours(key.removeprefix("grad/"))]
            np.testing.assert_allclose(wanted, gradients[key], rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.golden
def test_initial_weights(golden):
    """Mean, spread and bounds of what the authors draw for a ViT-B, here with one block."""
    recorded = json.loads((golden / "mae" / "init_stats_mae_vit_base.json").read_text())["stats"]
    fixed = {"size": "base", "depth": 1, "init": "mae", "positions": "sincos", "sincos_first": "column"}
    state = build(fixed, depth=1).state_dict()
    assert state.keys() <= set(map(ours, recorded))
    for key, said in recorded.items():
        if ours(key) in state:
            found = state[ours(key)].double()
            assert list(found.shape) == said["shape"]
            np.testing.assert_allclose(found.std(), said["std"], rtol=0.1, atol=1e-12, err_msg=key)
            width = said["max"] - said["min"]
            np.testing.assert_allclose(found.mean(), said["mean"], atol=0.03 * width, err_msg=key)
            if "token" not in key:  # tokens are normal, everything else has bounds
                np.testing.assert_allclose([found.min(), found.max()], [said["min"], said["max"]], atol=0.05 * width)


@pytest.mark.golden
def test_decayed_parameters(golden):
    recorded = json.loads((golden / "mae" / "pretrain_param_groups_vit_base.json").read_text())
    preset = load.load("pretrain", "mae-vitb16-800e").preset
    with torch.device("meta"):
        method = mae.build(preset.method, vit.build(preset.backbone), FACTS)
    named = [(key, p) for key, p in method.named_parameters() if p.requires_grad]
    groups = param_groups(named, preset.optim, preset.optim.rules)
    found = {frozenset(group["names"]): group["weight_decay"] for group in groups}
    assert found == {frozenset(map(ours, group["params"])): group["weight_decay"] for group in recorded["groups"]}
    assert preset.optim.weight_decay == 0.05


def test_the_order_of_visible_patches_does_not_matter():
    noise = np.random.default_rng(0).random((2, 16))
    masks = torch.from_numpy(random_masks(noise, 0.75))
    seen, unseen = visible_and_masked(masks, 12)
    assert torch.equal(torch.cat([seen, unseen], 1).sort(1).values, torch.arange(16).expand(2, 16))
    assert torch.equal(seen, visible_and_masked(masks, None)[0])
    assert set(np.argwhere(ranks(noise)[0] < 4)[:, 0]) == set(seen[0].tolist())
    net = vit.build(vit.Config(**TINY, width=16, depth=2, heads=2)).eval()
    x = torch.randn(2, 3, 16, 16)
    there, back = net.visible_tokens(x, seen), net.visible_tokens(x, seen.flip(1))
    torch.testing.assert_close(there[:, 1:], back[:, 1:].flip(1))
    torch.testing.assert_close(net.visible_tokens(x, torch.arange(16).expand(2, 16)), net.tokens(x))


def test_hidden_pixels_do_not_reach_the_network():
    method = build({**TINY, "width": 16, "depth": 1, "heads": 2}, width=16, depth=1, heads=2)
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    masks = torch.ones(1, 16, dtype=torch.bool)
    masks[0, 5] = False
    method.painted(images, masks).square().sum().backward()
    reached = patches_of(images.grad, 4).abs().sum(dim=2)[0].nonzero()
    assert reached.tolist() == [[5]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="`mae` hides patches, which a `ResNet` does not have"):
        mae.build(mae.Config(), resnet.build(resnet.Config(depth=10, width=8)), FACTS)
    method = build({**TINY, "width": 16, "depth": 1, "heads": 2}, width=16, depth=1, heads=2)
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(UserError, match="masks are drawn for 64 patches, but the network cuts an image into 16"):
        method.painted(x, torch.ones(2, 64, dtype=torch.bool))
    uneven = torch.ones(2, 16, dtype=torch.bool).tril()
    with pytest.raises(UserError, match="different numbers of patches"):
        method.painted(x, uneven)


def test_a_painting_is_worth_one_at_first():
    """Patches are standardised: painting nothing costs the variance (P - 1) / P of a patch."""
    images = torch.randn(4, 3, 32, 32)
    masks = torch.from_numpy(random_masks(np.random.default_rng(0).random((4, 16)), 0.75))
    loss = painting_loss(torch.zeros(4, 16, 192), images, masks, normalized=True)
    assert math.isclose(loss, 191 / 192, rel_tol=1e-4)


def test_a_perfect_painting_is_the_image(monkeypatch):
    method = build({**TINY, "width": 16, "depth": 1, "heads": 2}, width=16, depth=1, heads=2)
    images = torch.randn(2, 3, 16, 16)
    patches = patches_of(images, 4)
    mean, deviation = mae.moments(patches)
    monkeypatch.setattr(method, "painted", lambda images, masks: (patches - mean) / deviation)
    torch.testing.assert_close(method.reconstruction(images, torch.ones(2, 16, dtype=torch.bool)), images)
