"""Classifiers on a network: against MAE's own, and what must never move."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.backbones import resnet, timm, vit
from sslcli.config.data import Data, Digits
from sslcli.config.load import load
from sslcli.config.supervised import Mix, TrainedConfig, TunedConfig
from sslcli.contracts import Backbone, Batch, Progress, RunFacts
from sslcli.engine import loop
from sslcli.engine.build import training_of
from sslcli.engine.classifier import (
    Classifier,
    Read,
    Training,
    average,
    lit,
    mean_read,
    normal,
    set_drop_path,
    tuned_reads,
)
from sslcli.errors import DataError, PresetError
from sslcli.evaluate import linear
from sslcli.features.weights import digest_of

FACTS = RunFacts(images=64, batch_size=8, part_size=8, steps_per_epoch=8, total_steps=16)
AT = Progress(step=3, total=16, steps_per_epoch=8, seed=5)
STD = (0.229, 0.224, 0.225)


def classifier(backbone: Backbone, reads: Any, *, frozen: bool = True, side: int = 32, **training: Any) -> Classifier:
    return Classifier(
        backbone, FACTS, reads=reads, classes=6, side=side, training=Training(std=STD, **training), std=0.01,
        frozen=frozen, at_once=3,
    )  # fmt: skip


def small() -> Backbone:
    torch.manual_seed(0)
    return resnet.build(resnet.Config(depth=10, width=8, stem="small"))


def small_vit() -> vit.ViT:
    torch.manual_seed(0)
    return vit.build(vit.Config(width=24, depth=3, heads=2, patch=8, image_size=32))


def batch(rows: int = 8, side: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 3, side, side, generator=generator)
    return Batch([images], torch.arange(rows), torch.arange(rows) % 6)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["gap", "cls", "gap_i20p5"])
def test_fine_tuning_is_that_of_mae(golden: Path, filled: Callable[..., Any], name: str):
    with np.load(golden / "finetune" / f"finetune_vit_{name}.npz") as file:
        case = {key: file[key] for key in file.files}
    meta = json.loads(str(case["meta"]))
    cfg = vit.Config(
        width=meta["dim"], depth=meta["depth"], heads=meta["heads"], patch=meta["patch"], image_size=meta["img"]
    )
    backbone = vit.build(cfg)
    reads = tuned_reads("mean" if meta["global_pool"] else "pooled", backbone)
    made = Classifier(
        backbone, FACTS, reads=reads, classes=meta["classes"], side=meta["img"], training=Training(std=STD), std=2e-5,
        frozen=False, at_once=8,
    ).double()  # fmt: skip
    ours = {
        key: key.replace("head.", "heads.class.linear.").replace("fc_norm.", "heads.class.norm.")
        if key.startswith(("head.", "fc_norm."))
        else f"backbone.trunk.{key}"
        for key in meta["layout"]
    }
    with torch.no_grad():
        for key, shape in meta["layout"].items():
            made.get_parameter(ours[key]).copy_(torch.from_numpy(filled(key, shape)))
    made.eval()
    images, labels = torch.from_numpy(case["imgs"]), torch.from_numpy(case["labels"])
    features = made.seen(backbone, images)["class"]
    if meta["global_pool"]:
        features = made.heads["class"].norm(features.flatten(1))  # type: ignore[operator]
    np.testing.assert_allclose(features.detach().numpy(), case["features"], atol=1e-9)
    logits = made.scores(images)["class"]
    np.testing.assert_allclose(logits.detach().numpy(), case["logits"], atol=1e-9)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    np.testing.assert_allclose(loss.item(), case["loss"], atol=1e-9)
    for key, name_of in {
        "grad_head_weight": "head.weight",
        "grad_patch_embed": "patch_embed.proj.weight",
        "grad_pos_embed": "pos_embed",
        "grad_qkv0": "blocks.0.attn.qkv.weight",
    }.items():
        np.testing.assert_allclose(made.get_parameter(ours[name_of]).grad, case[key], atol=1e-9)
    norms = {p.requires_grad for key, p in backbone.trunk.named_parameters() if key.startswith("norm.")}
    assert norms == {not meta["global_pool"]}  # with a norm of its own, the network's last one is read by nothing


@pytest.mark.golden
@pytest.mark.parametrize("name", ["a", "b", "zero"])
def test_lighting_is_that_of_mmselfsup(golden: Path, name: str):
    with np.load(golden / "lighting" / f"lighting_mmselfsup_{name}.npz") as file:
        case = {key: file[key] for key in file.files}
    plain, alpha = torch.from_numpy(case["x"])[None], torch.from_numpy(case["alpha"])[None]
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor(STD)[:, None, None]
    found = lit((plain - mean) / std, alpha, STD) * std + mean
    np.testing.assert_allclose(found[0], case["out"], atol=1e-6)


def test_colour_noise_is_normal_and_a_function_of_the_image():
    drawn = normal(7, torch.arange(20_000))
    assert drawn.mean(0).abs().max() < 0.03
    assert (drawn.std(0) - 1).abs().max() < 0.03
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 0.03
    assert torch.equal(normal(7, torch.tensor([5, 3])), drawn[[5, 3]])


@pytest.mark.golden
def test_rates_are_those_of_the_authors(golden: Path):
    for case in json.loads((golden / "finetune" / "abs_lr_rule.json").read_text())["cases"]:
        per = {"name": "adamw", "lr": case["blr"], "per": 256}
        cfg = TrainedConfig(name="x", optim=per, batch_size=case["eff_batch"])  # type: ignore[arg-type]
        assert cfg.optim.effective_lr(cfg.batch_size) == pytest.approx(case["lr"], rel=1e-12)
    for name, rate in {
        "linear-moco-v1": 30, "linear-simsiam-v1": 1.6, "linear-simclr-v1": 1.6, "linear-byol-v1": 0.8,
        "linear-swav-v1": 0.3, "linear-mae-v1": 6.4, "linear-mocov3-v1": 12, "linear-mocov3-r50-v1": 0.4,
        "linear-dino-v1": 0.004, "linear-multilayer-v1": 0.01, "finetune-mae-vitb-v1": 2e-3,
        "finetune-simmim-swinb-v1": 5e-3,
    }.items():  # fmt: skip
        cfg = load("eval", name).preset.evaluator
        assert isinstance(cfg, TrainedConfig)
        assert cfg.optim.effective_lr(cfg.batch_size) == pytest.approx(rate), name


def test_a_frozen_network_never_moves_and_its_features_need_no_gradient():
    backbone = small()
    before = digest_of(backbone.trunk.state_dict())
    made = classifier(backbone, linear.reads(linear.Config(), backbone)).train()
    assert made.training
    assert not any(module.training for module in backbone.modules())
    made(batch(), AT).loss.backward()
    assert digest_of(backbone.trunk.state_dict()) == before
    assert {name for name, p in made.named_parameters() if p.grad is not None} == {
        "heads.pooled.linear.weight",
        "heads.pooled.linear.bias",
    }
    whole = made.scores(batch().views[0])["pooled"]
    made.at_once = 100
    torch.testing.assert_close(made.scores(batch().views[0])["pooled"], whole)


def test_five_depths_give_about_nine_thousand_values():
    shapes = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
    found = [linear.nine_thousand(torch.zeros(1, c, s, s)) for c, s in shapes]
    assert [x[0].numel() for x in found] == [9216, 9216, 8192, 9216, 8192]
    assert [x.shape[1] for x in found] == [c for c, _ in shapes]
    backbone = small()
    cfg = linear.Config(taps=("stem", "layer4"), pooling="9k", norm="batch")
    made = classifier(backbone, linear.reads(cfg, backbone)).train()
    result = made(batch(), AT)
    assert set(result.scalars) == {"top1_stem", "top1_layer4"}
    each = [F.cross_entropy(s, batch().labels) for s in made.scores(batch().views[0]).values()]  # type: ignore[arg-type]
    torch.testing.assert_close(result.loss, torch.stack(each).sum())
    norm = made.heads["stem"].norm
    assert norm.weight is None
    assert norm.num_features == 8  # statistics are the channels', over images and cells


def test_dino_joins_class_tokens_of_the_last_blocks():
    backbone = small_vit().eval()
    cfg = linear.Config(last_blocks=2, patch_mean=True)
    (read,) = linear.reads(cfg, backbone).values()
    images = batch().views[0]
    found = read.of(backbone.taps(images, read.taps))
    last = backbone.trunk.get_intermediate_layers(images, 2, norm=True, return_prefix_tokens=True)
    tokens = [prefix[:, 0] for _, prefix in last]
    torch.testing.assert_close(found, torch.cat([*tokens, last[-1][0].mean(1)], dim=1))
    with pytest.raises(PresetError, match="vision transformer of 2 blocks"):
        linear.reads(cfg, small())
    with pytest.raises(PresetError, match="needs a vision transformer"):
        mean_read(small())


def test_augmentation_is_a_function_of_the_step_and_leaves_generators_alone():
    backbone = small()
    made = classifier(
        backbone, {"class": Read(("pooled",), average)}, frozen=False, erase=1.0, mix=Mix(), smoothing=0.1,
        lighting=0.1,
    )  # fmt: skip
    plain = batch()

    def prepared(at: Progress) -> tuple[Tensor, Tensor]:
        assert plain.labels is not None
        return made.prepared(replace(plain, views=[plain.views[0].clone()]), plain.labels, at)

    torch.manual_seed(1)
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # what timm draws from
    images, targets = prepared(AT)
    again, same = prepared(AT)
    other, _ = prepared(AT.next())
    assert torch.equal(images, again)
    assert torch.equal(targets, same)
    assert not torch.equal(images, other)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]
    expected = torch.randn(1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.randn(1), expected)
    with pytest.raises(DataError, match="even number"):
        made(batch(7), AT)


def test_blocks_are_skipped_as_timm_would():
    from timm.models.vision_transformer import VisionTransformer

    ours = small_vit().trunk
    set_drop_path(ours, 0.3)
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, drop_path_rate=0.3)
    for mine, other in zip(ours.blocks, theirs.blocks, strict=True):
        assert repr(mine.drop_path1) == repr(other.drop_path1)
        assert repr(mine.drop_path2) == repr(other.drop_path2)
    with pytest.raises(PresetError, match="no blocks that can be skipped"):
        set_drop_path(small().trunk, 0.1)


@pytest.mark.parametrize("name", ["finetune-mae-vitb-v1", "finetune-simmim-swinb-v1"])
def test_fine_tuning_protocols_take_a_step(name: str):
    cfg = load("eval", name, ("evaluator.batch_size=4",)).preset.evaluator
    assert isinstance(cfg, TunedConfig)
    backbone: Backbone = (
        small_vit() if "vit" in name else timm.build(timm.Config(model="swin_tiny_patch4_window7_224", image_size=64))
    )
    set_drop_path(backbone.trunk, cfg.drop_path)
    side = 32 if "vit" in name else 64
    made = classifier(backbone, tuned_reads(cfg.feature, backbone), frozen=False, side=side, erase=cfg.crop.erase,
                      mix=cfg.mix, smoothing=cfg.smoothing)  # fmt: skip
    recipe = cfg.recipe(Data(source=Digits(), batch_size=4), 0)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"precision": "fp32"})})
    training, _ = training_of(made, recipe)
    made.train()
    groups = training.optimizer.param_groups
    scales = {n: (g["lr_scale"], g["weight_decay"]) for g in groups for n in g["names"]}
    assert scales["heads.class.linear.weight"] == (1.0, 0.05)
    assert scales["heads.class.linear.bias"] == (1.0, 0.0)
    blocks = 3 if "vit" in name else 12
    decay = cfg.optim.layer_decay or 1.0
    assert scales["backbone.trunk.patch_embed.proj.weight"] == pytest.approx((decay ** (blocks + 1), 0.05))
    before = {n: p.clone() for n, p in made.named_parameters()}
    at = Progress(step=200, total=1000, steps_per_epoch=8, seed=0)
    result, norm, _ = loop.step(training, batch(4, side), at, recipe)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(norm)
    moved = {n for n, p in made.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(scales)


def test_the_following_copy_follows_with_its_statistics():
    made = classifier(small(), {"class": Read(("pooled",), average)}, frozen=False, ema=0.75).train()
    made.copy_student()
    assert made.slow is not None
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    old = {name: x.clone() for name, x in made.backbone.state_dict().items()}
    made(batch(), AT).loss.backward()
    optimizer.step()
    made.after_step(AT)
    new, slow = made.backbone.state_dict(), made.slow["backbone"].state_dict()
    for name in ("trunk.conv1.weight", "trunk.bn1.running_mean"):
        torch.testing.assert_close(slow[name], 0.75 * old[name] + 0.25 * new[name])
    made.eval()
    assert made.likeliest(batch().views[0], slow=True)["class"].shape == (8, 5)
