"""I-JEPA equal to the authors' code: whole tiny models with gradients, schedules, initial weights, weight decay."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli.backbones import resnet, vit
from sslcli.config import load
from sslcli.config.schedule import Cosine, Warmup, factor
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.engine.optim import param_groups
from sslcli.errors import PresetError, UserError
from sslcli.methods import ijepa
from sslcli.methods.ijepa import foresight

FACTS = RunFacts(images=100, batch_size=8, part_size=8, steps_per_epoch=2, total_steps=6)
AT = Progress(step=0, total=6, steps_per_epoch=2, seed=0)
NO_CLASS = {"positions": "sincos", "sincos_first": "column", "class_token": False, "init": "ijepa", "pool": "mean"}
TINY = {**NO_CLASS, "patch": 4, "image_size": 16, "width": 16, "depth": 1, "heads": 2}


def ours(key: str) -> str:
    """Our name for a tensor of the authors'."""
    return key.replace("target_encoder.", "slow_backbone.trunk.").replace("encoder.", "backbone.trunk.", 1)


def build(backbone: dict[str, Any], **settings: Any) -> ijepa.IJEPA:
    torch.manual_seed(0)
    return ijepa.build(ijepa.Config(**settings), vit.build(vit.Config(**backbone)), FACTS)


def of_image(masks: np.ndarray) -> Tensor:
    """The authors' masks (T, B, M) as ours, (B, T, M)."""
    return torch.from_numpy(masks).transpose(0, 1).contiguous()


@pytest.mark.golden
@pytest.mark.parametrize("name", ["forward_d16", "forward_d20_b1", "forward_d12_nenc2"])
def test_whole_model(golden, filled, name):
    """Where there are several contexts, each is a batch of ours, and the loss is the mean of theirs."""
    case = np.load(golden / "ijepa" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    method = build(
        {
            **NO_CLASS,
            "patch": meta["patch"],
            "image_size": meta["img"],
            "width": meta["dim"],
            "depth": meta["depth"],
            "heads": meta["heads"],
        },
        width=meta["predictor_dim"],
        depth=meta["predictor_depth"],
        heads=meta["heads"],
    ).double()
    weights = {ours(key): torch.from_numpy(filled(key, meta["layout"][key])) for key in meta["filled"]}
    fixed = {"encoder.pos_embed": "pos_embed", "target_encoder.pos_embed": "pos_embed"}
    for key, recorded in {**fixed, "predictor.predictor_pos_embed": "predictor_pos_embed"}.items():
        np.testing.assert_allclose(method.state_dict()[ours(key)], case[recorded], atol=1e-6)
        weights[ours(key)] = torch.from_numpy(case[recorded])
    method.load_state_dict(weights)

    images, blocks = torch.from_numpy(case["x"]), of_image(case["masks_pred"])
    exactly = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(method.slow_backbone.tokens(images), case["target_full"], **exactly)
    contexts = [torch.from_numpy(numbers) for numbers in case["masks_enc"]]
    shape = (len(blocks[0]), len(contexts), len(images))  # theirs: targets, contexts, images
    context, pred, targets = (case[key].reshape(*size, *case[key].shape[1:]) for key, size in (
        ("context", shape[1:]), ("pred", shape), ("targets", shape)))  # fmt: skip
    losses = []
    for number, numbers in enumerate(contexts):
        found = method.backbone.visible_tokens(images, numbers).detach()
        np.testing.assert_allclose(found, context[number], **exactly)
        foreseen = method.foreseen(images, numbers, blocks)
        np.testing.assert_allclose(foreseen.transpose(0, 1).detach(), pred[:, number], **exactly)
        wanted = method.true(images)[torch.arange(len(images))[:, None, None], blocks]
        np.testing.assert_allclose(wanted.transpose(0, 1), targets[:, number], **exactly)
        masks = torch.ones(len(images), method.backbone.grid**2, dtype=torch.bool).scatter_(1, numbers, False)
        losses.append(method(Batch([images], torch.arange(len(images)), masks=masks, blocks=blocks), AT).loss)
    loss = torch.stack(losses).mean()
    np.testing.assert_allclose(loss.detach(), case["loss"], **exactly)
    loss.backward()
    gradients = np.load(golden / "ijepa" / f"{name}.grads.npz")
    found = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    assert found.keys() == {ours(key.removeprefix("grad/")) for key in gradients.files}
    for key in gradients.files:
        np.testing.assert_allclose(found[ours(key.removeprefix("grad/"))], gradients[key], **exactly, err_msg=key)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["schedules_a", "schedules_nowarm", "schedules_past_end"])
def test_momentum_moves_as_theirs(golden, name):
    case = np.load(golden / "ijepa" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    method, total = build(TINY, width=8, depth=1, heads=2, momentum=meta["ema"][0]), meta["T_max"]
    for step in (0, 1, total // 2, total - 1):
        with torch.no_grad():
            for fast, follower in zip(method.backbone.parameters(), method.slow_backbone.parameters(), strict=True):
                fast.fill_(0.0)
                follower.fill_(1.0)
        method.after_step(Progress(step=step, total=total, steps_per_epoch=total, seed=0))
        kept = method.slow_backbone.trunk.norm.weight[0]
        assert kept == pytest.approx(case["ema_momentum_linear"][step], abs=1e-6)


def test_initial_weights_and_decayed_parameters():
    """Every linear layer and the patch projection start normal, deviation 0.02; biases, gains are not decayed."""
    preset = load.load("pretrain", "ijepa-vitb16-600e").preset
    method = build({**NO_CLASS, "size": "base", "depth": 1}, depth=1)
    named = [(key, p) for key, p in method.named_parameters() if p.requires_grad]
    for name, parameter in named:
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert parameter.abs().max() < 0.13, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and "weight" in name))), name
    for group in param_groups(named, preset.optim, preset.optim.rules):
        shapes = {method.get_parameter(name).ndim > 1 for name in group["names"]}
        assert shapes == {group["weight_decay"] == 0.04}
        assert group["weight_decay"] in (0.0, 0.04)


def test_loss_is_smooth():
    foreseen = torch.tensor([0.0, 0.5, -3.0]).reshape(1, 1, 1, 3)
    assert foresight(foreseen, torch.zeros(1, 1, 1, 3)).item() == pytest.approx((0.125 + 2.5) / 3)


def test_a_target_is_foreseen_by_itself_and_hidden_pixels_do_not_reach_the_network():
    method = build(TINY, width=8, depth=2, heads=2)
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    blocks = torch.tensor([[[1, 2, 5, 6], [8, 9, 12, 13]]])
    both = method.foreseen(images, torch.tensor([[0, 3]]), blocks)
    torch.testing.assert_close(method.foreseen(images, torch.tensor([[0, 3]]), blocks[:, 1:]), both[:, 1:])
    both.square().sum().backward()
    reached = images.grad.abs().sum(dim=1).reshape(4, 4, 4, 4).sum(dim=(1, 3)).flatten().nonzero().flatten()
    assert reached.tolist() == [0, 3]


def test_spread_tells_a_collapse_over_images():
    method = build(TINY, width=8, depth=1, heads=2)
    images = torch.randn(4, 3, 16, 16)
    masks = torch.arange(16).expand(4, 16) >= 4
    blocks = torch.arange(8, 12).expand(4, 1, 4)

    def spread() -> float:
        return method(Batch([images], torch.arange(4), masks=masks, masked=12, blocks=blocks), AT).scalars["spread"]

    assert spread() > 0.01
    torch.nn.init.zeros_(method.slow_backbone.trunk.patch_embed.proj.weight)  # what is left are the positions
    assert spread() < 1e-5


@pytest.mark.golden
@pytest.mark.parametrize("name", ["schedules_a", "schedules_nowarm"])
def test_rates_are_a_step_ahead(golden, name):
    case = np.load(golden / "ijepa" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    base, steps = meta["ref_lr"], len(case["lr"])
    start = meta["start_lr"] / base
    warmup = Warmup(steps=meta["warmup_steps"], start=start, subtract=True) if meta["warmup_steps"] else None
    schedule = Cosine(end=meta["final_lr"] / base, warmup=warmup, ahead=1)
    found = [base * factor(schedule, step, meta["T_max"], 10) for step in range(steps)]
    np.testing.assert_allclose(found, case["lr"], rtol=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="`ijepa` hides patches, which a `ResNet` does not have"):
        ijepa.build(ijepa.Config(), resnet.build(resnet.Config(depth=10, width=8)), FACTS)
    with pytest.raises(PresetError, match="needs masks with target blocks"):
        load.load("pretrain", "ijepa-cifar10-cpu", ("views.mask={name: random}",), {})
    with pytest.raises(PresetError, match="lower it, or raise"):
        load.load("pretrain", "ijepa-cifar10-cpu", ("views.mask.more_than=10",), {})
    with pytest.raises(PresetError, match="set `pool: mean`"):
        load.load("pretrain", "ijepa-cifar10-cpu", ("backbone.pool=cls",), {})
    assert load.load("pretrain", "mae-cifar10-cpu", ("views.mask={name: multiblock, more_than: 5}",), {}).preset
