"""MaskFeat equal to the authors' code (SlowFast) and to MMSelfSup: targets, loss, gradients."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli import dist
from sslcli.backbones import resnet, vit
from sslcli.config import load
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.engine.optim import param_groups
from sslcli.errors import UserError
from sslcli.methods import maskfeat

FACTS = RunFacts(images=100, batch_size=2, part_size=2, steps_per_epoch=10, total_steps=100)
AT = Progress(step=0, total=100, steps_per_epoch=10, seed=0)
SLOWFAST = {
    "pred_head.transforms.0.0.": "backbone.trunk.norm.",
    "pred_head.projections.0.": "head.",
    "mask_token": "mask_token",
    "": "backbone.trunk.",
}
MMSELFSUP = {
    "backbone.layers.": "backbone.trunk.blocks.",
    "backbone.patch_embed.projection.": "backbone.trunk.patch_embed.proj.",
    "backbone.ln1.": "backbone.trunk.norm.",
    "backbone.mask_token": "mask_token",
    "backbone.": "backbone.trunk.",
    "head.head.": "head.",
    "ln1.": "norm1.",
    "ln2.": "norm2.",
    "ffn.layers.0.0.": "mlp.fc1.",
    "ffn.layers.1.": "mlp.fc2.",
}


def ours(key: str, names: dict[str, str]) -> str:
    """Our name of a reference's tensor."""
    head = next(start for start in names if key.startswith(start))
    key = names[head] + key.removeprefix(head)
    for theirs, mine in names.items():
        if theirs and ".blocks." in key:
            key = key.replace("." + theirs, "." + mine)
    return key


def method_of(meta: dict, names: dict[str, str], filled: Callable, cfg: maskfeat.Config, mlp_ratio: float = 4.0):
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = (
        (meta["dim"], meta["depth"], meta["heads"])
        if "dim" in meta
        else (meta["arch"]["embed_dims"], meta["arch"]["num_layers"], meta["arch"]["num_heads"])
    )
    backbone = vit.build(vit.Config(width=width, depth=depth, heads=heads, patch=meta["patch"], image_size=meta["img"]))
    backbone.trunk = VisionTransformer(
        img_size=meta["img"], patch_size=meta["patch"], embed_dim=width, depth=depth, num_heads=heads,
        mlp_ratio=mlp_ratio, num_classes=0, dynamic_img_size=True,
    )  # fmt: skip
    method = maskfeat.build(cfg, backbone, FACTS).double()
    own = method.state_dict()
    state = {ours(key, names): torch.from_numpy(filled(key, shape)) for key, shape in meta["layout"].items()
             if key not in meta["kept"]}  # fmt: skip
    method.load_state_dict({key: value.reshape(own[key].shape) for key, value in state.items()})
    return method


@pytest.mark.golden
@pytest.mark.parametrize("name", ["forward_slowfast_d16_i48"])
def test_the_whole_method_as_in_slowfast(golden: Path, filled: Callable, name: str):
    case = np.load(golden / "maskfeat" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    method = method_of(meta, SLOWFAST, filled, maskfeat.Config())
    images, masks = torch.from_numpy(case["imgs"]), torch.from_numpy(case["mask"]).flatten(1).bool()
    maps = method.backbone.masked_maps(images, masks, method.mask_token[0, 0])
    predictions = method.head(maps.flatten(2).mT).detach()
    np.testing.assert_allclose(predictions, case["pred_all"], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(predictions[masks], case["pred_masked"], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(method.targets(images)[masks], case["target_masked_f32"], atol=1e-5)
    loss = method(Batch(views=[images], index=torch.arange(len(images)), masks=masks), AT).loss
    loss.backward()
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=1e-6)
    grads = np.load(golden / "maskfeat" / f"{name}.grads.npz")
    found = dict(method.named_parameters())
    assert len(grads.files) == len(found)
    for key in grads:
        grad = found[ours(key.removeprefix("grad/"), SLOWFAST)].grad
        np.testing.assert_allclose(grad.reshape(grads[key].shape), grads[key], rtol=1e-6, atol=1e-7, err_msg=key)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["forward_mmselfsup_d12", "forward_mmselfsup_d8_h1"])
def test_the_whole_method_as_in_mmselfsup(golden: Path, filled: Callable, name: str):
    case = np.load(golden / "maskfeat" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    method = method_of(meta, MMSELFSUP, filled, maskfeat.Config(window=16), mlp_ratio=2)
    pixels = torch.from_numpy(case["images_u8"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.from_numpy(case[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    images, masks = (pixels - mean) / std, torch.from_numpy(case["mask"]).flatten(1)
    np.testing.assert_allclose(method.targets(images), case["hog"], atol=1e-5)
    method(Batch(views=[images.double()], index=torch.arange(len(images)), masks=masks), AT).loss.backward()
    for key, parameter in {
        "grad_patch_embed": method.backbone.trunk.patch_embed.proj.weight,
        "grad_mask_token": method.mask_token,
        "grad_head": method.head.weight,
    }.items():
        np.testing.assert_allclose(parameter.grad.reshape(case[key].shape), case[key], rtol=1e-5, atol=1e-7)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["loss_mmselfsup_n1_l4", "loss_mmselfsup_n2_l3", "loss_mmselfsup_uneven"])
def test_loss_as_in_mmselfsup(golden: Path, name: str):
    case = {key: torch.from_numpy(value) for key, value in np.load(golden / "maskfeat" / f"{name}.npz").items()}
    latent, weight = case["latent"].requires_grad_(), case["head_weight"].requires_grad_()
    predictions = torch.nn.functional.linear(latent[:, 1:], weight, case["head_bias"])
    loss = maskfeat.masked_error(predictions, case["hog"], case["mask"].flatten(1))
    loss.backward()
    torch.testing.assert_close(loss, case["loss"])
    torch.testing.assert_close(latent.grad, case["grad_latent"])
    torch.testing.assert_close(weight.grad, case["grad_head_weight"])


@pytest.mark.golden
@pytest.mark.parametrize(
    "name", ["labels_slowfast_china64_f4", "labels_slowfast_china64_f8", "labels_slowfast_two48_f3"]
)
def test_loss_as_in_slowfast(golden: Path, name: str):
    case = {key: torch.from_numpy(value) for key, value in np.load(golden / "maskfeat" / f"{name}.npz").items()
            if key != "meta"}  # fmt: skip
    predictions = torch.zeros_like(case["all_tokens"])
    predictions[case["mask"]] = case["pred"]
    predictions.requires_grad_()
    loss = maskfeat.masked_error(predictions, case["all_tokens"], case["mask"])
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(predictions.grad[case["mask"]], case["grad_pred"], rtol=1e-5, atol=1e-8)
    assert not predictions.grad[~case["mask"]].any()


def error_and_gradient(predictions: Tensor, targets: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    rank, world = dist.rank(), dist.world()
    mine = predictions.chunk(world)[rank].clone().requires_grad_()
    loss = maskfeat.masked_error(mine, targets.chunk(world)[rank], masks.chunk(world)[rank])
    loss.backward()
    return dist.mean(loss), mine.grad / world


@pytest.mark.dist
def test_every_patch_weighs_alike_on_two_ranks(two_ranks):
    generator = torch.Generator().manual_seed(0)
    predictions, targets = (torch.randn(4, 9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[0, :7] = masks[1, 2] = masks[3, 4:6] = True  # eight on the first rank, two on the second
    loss, gradient = error_and_gradient(predictions, targets, masks)
    answers = two_ranks(error_and_gradient, predictions, targets, masks)
    for found, _ in answers:
        torch.testing.assert_close(found, loss)
    torch.testing.assert_close(torch.cat([found for _, found in answers]), gradient)


def small(**settings: object) -> maskfeat.MaskFeat:
    torch.manual_seed(0)
    backbone = vit.build(vit.Config(width=16, depth=1, heads=2, patch=4, image_size=16))
    return maskfeat.build(maskfeat.Config(**{"cell": 4, **settings}), backbone, FACTS)


def test_hidden_patches_are_not_seen():
    method = small()
    images = torch.randn(2, 3, 16, 16)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[:, 5] = True
    other = images.clone()
    other[:, :, 4:8, 4:8] = 9.0
    seen = method.backbone.masked_maps(images, masks, method.mask_token[0, 0])
    assert torch.equal(seen, method.backbone.masked_maps(other, masks, method.mask_token[0, 0]))


def test_all_but_biases_and_gains_are_decayed():
    optim = load.load("pretrain", "maskfeat-vitb16-300e").preset.optim
    method = small()
    groups = param_groups(method.named_parameters(), optim, optim.rules)
    free = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert all(re.search(r"bias|norm|gamma", name) for name in free)
    assert {"head.bias", "backbone.trunk.blocks.0.norm1.weight"} < free


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"`method\.cell` 3 must divide the backbone's patch") as caught:
        small(cell=3)
    assert caught.value.hint
    with pytest.raises(UserError, match="got none"):
        maskfeat.build(maskfeat.Config(), resnet.build(resnet.Config(depth=10, width=8, stem="small")), FACTS)
    with pytest.raises(UserError, match=r"`method\.window` 5 must divide the side of the images, 16 pixels"):
        small(window=5).targets(torch.randn(1, 3, 16, 16))
