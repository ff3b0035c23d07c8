"""The shipped pretraining presets say what the papers and their authors' code say."""

import math
import re
from pathlib import Path

import pytest

from sslcli.config import load
from sslcli.config.base import Settings
from sslcli.config.presets import PretrainPreset
from sslcli.config.views import IMAGENET_MEAN


def preset_of(name: str) -> PretrainPreset:
    return load.load("pretrain", name).preset


def said(section: Settings, **expected: object) -> None:
    """Every expected value is in the section, compared as plain data."""
    data = section.model_dump(mode="json")
    assert {key: data[key] for key in expected} == expected


def test_every_old_preset_has_one_of_ours():
    page = Path(__file__).parents[2] / "docs" / "reference" / "old-presets.md"
    rows = re.findall(r"^\| `(.+?)`.*? \| `(.+?)`(?: with `-o (.+?)`)?", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 40 + 14 + 3  # MMSelfSup, OpenSelfSup but for one, Triplet
    for old, name, override in rows:
        preset = load.load("pretrain", name, [override] if override else []).preset
        length = re.search(r"(\d+)e(?:-fp16)?$|ep(\d+)", old)
        assert length is None or preset.run.epochs == int(length[1] or length[2])
        images = re.search(r"(\d+)xb(\d+)(?:-fp16)?(?:-accum(\d+))?", old)
        if images:
            gpus, each, accumulate = (int(number or 1) for number in images.groups())
            assert preset.data.batch_size == gpus * each * accumulate
            assert preset.run.accumulate == accumulate


JITTER = {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}


@pytest.mark.parametrize("name", load.names("pretrain"))
def test_every_preset_says_what_it_is(name):
    about = preset_of(name).about
    assert about.title
    assert about.paper.startswith("https://")
    assert about.follows
    unpublished = name.endswith("-cpu") or name.startswith("demo-") or "No result is published" in about.follows
    assert unpublished == (not about.expects)


@pytest.mark.parametrize(("name", "precision"), [("mocov1-r50-200e", None), ("mocov1-r50-fp16-200e", "fp16")])
def test_mocov1(name, precision):
    preset = preset_of(name)
    said(preset.method, name="moco", mlp=False, dim=128, queue=65536, momentum=0.999, temperature=0.07, symmetric=False)
    (group,) = preset.views.groups
    said(group, repeat=2, size=224, scale=[0.2, 1.0], grey=0.2, grey_first=True, blur=None, solarize=None, flip=0.5)
    said(group, jitter={"p": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4})
    said(preset.optim, name="sgd", lr=0.03, per=256, momentum=0.9, nesterov=False, weight_decay=1e-4, rules=[])
    said(preset.schedule, name="step", at=[120, 160], gamma=0.1, warmup=None, by="epoch")
    said(preset.run, epochs=200, batch_norm=32, precision=precision)
    assert preset.data.batch_size == 256
    assert preset.data.drop_last
    said(preset.backbone, name="resnet", depth=50, width=64, stem="imagenet", zero_init_residual=False)


@pytest.mark.parametrize(("name", "epochs"), [("mocov2-r50-200e", 200), ("mocov2-r50-800e", 800)])
def test_mocov2(name, epochs):
    preset = preset_of(name)
    said(preset.method, name="moco", mlp=True, hidden=None, queue=65536, momentum=0.999, temperature=0.2)
    (group,) = preset.views.groups
    said(group, repeat=2, size=224, scale=[0.2, 1.0], grey=0.2, grey_first=False, jitter=JITTER, flip=0.5)
    said(group, blur={"p": 0.5, "sigma": [0.1, 2.0]}, interpolation="bilinear")
    said(preset.optim, name="sgd", lr=0.03, per=256, momentum=0.9, weight_decay=1e-4)
    said(preset.schedule, name="cosine", by="epoch", end=0.0, warmup=None)
    said(preset.run, epochs=epochs, batch_norm=32)


@pytest.mark.parametrize(
    ("name", "batch", "lr"),
    [("simclr-r50-200e", 256, 0.3), ("simclr-r50-512-200e", 512, 0.6), ("simclr-r50-4096-200e", 4096, 4.8)],
)
def test_simclr(name, batch, lr):
    preset = preset_of(name)
    said(preset.method, name="simclr", temperature=0.1, dim=128, hidden=2048, layers=2, batch_norm=True, joint=True)
    (group,) = preset.views.groups
    said(group, repeat=2, size=224, scale=[0.08, 1.0], grey=0.2, blur={"p": 0.5, "sigma": [0.1, 2.0]})
    said(group, jitter={"p": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2})
    said(preset.optim, name="lars", variant="lr_inside", momentum=0.9, weight_decay=1e-6, eta=0.001, nesterov=False)
    (rule,) = preset.optim.rules
    said(rule, one_dim=True, weight_decay=0.0, adapt=False)
    said(preset.schedule, name="cosine", by="epoch")
    assert preset.schedule.warmup is not None
    said(preset.schedule.warmup, epochs=10.0, start=1e-4, shape="linear", by="step", subtract=False)
    said(preset.run, epochs=200, batch_norm="global")
    said(preset.backbone, depth=50, zero_init_residual=True)
    assert preset.data.batch_size == batch
    assert math.isclose(preset.optim.effective_lr(batch), lr)


def test_simclr_on_cifar10_as_lightly():
    preset = preset_of("simclr-r18-cifar10-200e")
    said(preset.method, temperature=0.5, dim=128, hidden=512, layers=2, batch_norm=True, joint=False)
    (group,) = preset.views.groups
    said(group, size=32, scale=[0.08, 1.0], flip=0.5, jitter=JITTER, grey=0.2, blur=None)
    assert preset.views.normalize.mean == IMAGENET_MEAN
    said(preset.optim, name="sgd", momentum=0.9, weight_decay=5e-4)
    assert math.isclose(preset.optim.effective_lr(512), 0.24)
    said(preset.schedule, name="cosine", by="epoch", warmup=None)
    said(preset.backbone, depth=18, stem="cifar", width=64)
    said(preset.run, epochs=200, batch_norm="global")
    assert preset_of("simclr-r18-cifar10-800e").run.epochs == 800


def test_simclr_on_cifar10_as_dkobak():
    preset = preset_of("simclr-r18-cifar10-1000e")
    said(preset.method, temperature=0.5, dim=128, hidden=1024, layers=2, batch_norm=False, joint=False)
    (group,) = preset.views.groups
    said(group, size=32, scale=[0.2, 1.0], flip=0.5, jitter=JITTER, grey=0.1, blur=None)
    said(preset.views.normalize, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    said(preset.optim, name="sgd", lr=0.03, per=256, momentum=0.9, weight_decay=5e-4)
    said(preset.run, epochs=1000)
    assert not preset.data.drop_last


def test_moco_on_cifar10_as_in_the_authors_demo():
    preset = preset_of("mocov2-r18-cifar10-200e")
    said(preset.method, mlp=False, dim=128, queue=4096, momentum=0.99, temperature=0.1, symmetric=False)
    (group,) = preset.views.groups
    said(group, size=32, scale=[0.08, 1.0], flip=0.5, jitter=JITTER, grey=0.2, blur=None)
    said(preset.optim, name="sgd", momentum=0.9, weight_decay=5e-4)
    assert preset.optim.effective_lr(512) == 0.06
    assert preset.data.batch_size // 8 == preset.run.batch_norm == 64  # its SplitBatchNorm cuts 512 images into 8


@pytest.mark.parametrize(("name", "precision"), [("rotation-r50-70e", None), ("rotation-r50-fp16-70e", "fp16")])
def test_rotation(name, precision):
    preset = preset_of(name)
    said(preset.method, name="rotation")
    assert preset.views.name == "rotations"
    said(preset.views.crop, size=224, scale=[0.08, 1.0], flip=0.5, jitter=None, grey=0.0, interpolation="bilinear")
    said(preset.optim, name="sgd", lr=0.2, momentum=0.9, nesterov=False, weight_decay=1e-4, rules=[])
    assert preset.optim.effective_lr(128) == 0.2
    seventy_epochs_in_steps(preset)
    said(preset.run, batch_norm="global", precision=precision)
    assert preset.data.batch_size == 8 * 16
    assert preset.views.eval_view.size == 224


def test_relative_location():
    preset = preset_of("relative-loc-r50-70e")
    said(preset.method, name="relative_loc", hidden=4096, momentum=0.003, dropout=0.5)
    said(preset.views, name="patches", resize=292, size=255, gap=0, jitter=21, grey=0.66, interpolation="bilinear")
    assert (preset.views.cell, preset.views.patch) == (85, 64)
    said(preset.views.eval_view, resize=292, size=255)
    said(preset.optim, name="sgd", momentum=0.9, weight_decay=1e-4)
    assert preset.optim.effective_lr(512) == 0.2
    (rule,) = preset.optim.rules
    assert rule.weight_decay == 5e-4
    assert [rule.selects(key, 2) for key in ("neck.0.weight", "head.weight", "backbone.trunk.fc.weight")] == [
        True, True, False,
    ]  # fmt: skip
    seventy_epochs_in_steps(preset)
    said(preset.run, batch_norm=64, precision=None)
    assert preset.data.batch_size == 8 * 64


def seventy_epochs_in_steps(preset: PretrainPreset) -> None:
    said(preset.schedule, name="step", at=[30, 50], gamma=0.1, by="epoch")
    assert preset.schedule.warmup is not None
    said(preset.schedule.warmup, epochs=5.0, start=0.1, shape="linear", by="step", subtract=False)
    assert preset.run.epochs == 70


@pytest.mark.parametrize(
    ("name", "size", "patch", "epochs"),
    [
        ("mae-vitb16-300e", "base", 16, 300),
        ("mae-vitb16-400e", "base", 16, 400),
        ("mae-vitb16-fp16-400e", "base", 16, 400),
        ("mae-vitb16-800e", "base", 16, 800),
        ("mae-vitb16-1600e", "base", 16, 1600),
        ("mae-vitl16-800e", "large", 16, 800),
        ("mae-vitl16-1600e", "large", 16, 1600),
        ("mae-vith14-1600e", "huge", 14, 1600),
    ],
)
def test_mae(name, size, patch, epochs):
    preset = preset_of(name)
    said(preset.method, name="mae", width=512, depth=8, heads=16, normalized=True, positions_first="column")
    said(preset.views, name="masked", patch=patch, mask={"name": "random", "ratio": 0.75}, target=None)
    said(preset.views.crop, size=224, scale=[0.2, 1.0], ratio=[3 / 4, 4 / 3], interpolation="bicubic", flip=0.5)
    said(preset.views.crop, jitter=None, grey=0.0, blur=None, solarize=None)
    said(preset.backbone, name="vit", size=size, patch=patch, image_size=224, init="mae", drop_path=0.0, pool="cls")
    said(preset.backbone, positions="sincos", sincos_first="column", freeze_patch_embed=False)
    said(preset.optim, name="adamw", betas=[0.9, 0.95], weight_decay=0.05)
    assert preset.optim.effective_lr(4096) == 2.4e-3
    said(preset.schedule, name="cosine", by="step", end=0.0)
    said(preset.schedule.warmup, epochs=40, start=0.0, shape="linear", by="step", subtract=True)
    said(preset.run, epochs=epochs, clip=None, precision="fp16" if "fp16" in name else None)
    said(preset.data, batch_size=4096, drop_last=True)


@pytest.mark.parametrize(
    ("name", "lr", "epochs"),
    [("simmim-swinb-192-100e", 2e-4, 100), ("simmim-swinb-192-800e", 1e-4, 800), ("simmim-swinl-192-800e", 1e-4, 800),
     ("simmim-vitb16-800e", 1e-4, 800)],
)  # fmt: skip
def test_simmim(name, lr, epochs):
    preset, vit = preset_of(name), "vit" in name
    said(preset.method, name="simmim")
    side = 224 if vit else 192
    said(preset.views, patch=16 if vit else 4, mask={"name": "grid", "ratio": 0.6, "cell": 32})
    said(preset.views.crop, size=side, scale=[0.67, 1.0], ratio=[3 / 4, 4 / 3], interpolation="bilinear", flip=0.5)
    if vit:
        said(preset.backbone, name="beit", size="base", bias="shared", positions="none", layer_scale=0.1, drop_path=0.1)
    else:
        large = "swinl" in name
        said(preset.backbone, name="swin", size="large" if large else "base", window=12 if large else 6, patch=4)
        said(preset.backbone, image_size=192, drop_path=0.0, positions="none")
    said(preset.optim, name="adamw", lr=lr, per=512, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.05)
    said(preset.schedule.warmup, epochs=10, start=0.005, shape="linear", by="step", subtract=False)
    if epochs == 100:
        said(preset.schedule, name="cosine", by="step", end=0.05)
    else:
        said(preset.schedule, name="step", at=[700], gamma=0.1)
    said(preset.run, epochs=epochs, clip=5.0)
    said(preset.data, batch_size=2048)


@pytest.mark.parametrize(
    ("name", "epochs", "window", "start", "end", "subtract"),
    [
        ("maskfeat-vitb16-300e", 300, 16, 1e-6, 1e-6, False),
        ("maskfeat-vitb16-1600e", 1600, None, 0.005, 8e-6, True),
        ("maskfeat-vitl16-1600e", 1600, None, 0.005, 8e-6, True),
    ],
)
def test_maskfeat(name, epochs, window, start, end, subtract):
    preset = preset_of(name)
    said(preset.method, name="maskfeat", bins=9, cell=8, window=window)
    said(preset.views, name="masked", patch=16, target=None)
    said(preset.views.crop, size=224, scale=[0.5, 1.0], ratio=[0.75, 1.3333], interpolation="bicubic", jitter=None)
    said(preset.views.mask, name="blocks", patches=78, least=15, most=None, aspect=[0.3, 1 / 0.3], exact=False)
    size = "large" if "vitl" in name else "base"
    said(preset.backbone, name="vit", size=size, patch=16, positions="learned", init="normal", drop_path=0.0)
    said(preset.optim, name="adamw", betas=[0.9, 0.999], weight_decay=0.05)
    assert preset.data.batch_size == 2048
    lr = preset.optim.effective_lr(2048)
    assert lr == pytest.approx(1.6e-3)
    assert preset.schedule.end * lr == pytest.approx(end)
    said(preset.schedule, name="cosine", by="step")
    said(preset.schedule.warmup, epochs=30, start=start, shape="linear", by="step", subtract=subtract)
    said(preset.run, epochs=epochs, clip=0.02)


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "hidden", "drop_path", "aligned_with"),
    [
        ("cae-vitb16-300e", 300, 10, 75, 0.0, "previous"),
        ("cae-vitb16-800e", 800, 20, 98, 0.1, "current"),
        ("cae-vitb16-1600e", 1600, 40, 98, 0.1, "current"),
    ],
)
def test_cae(name, epochs, warmup, hidden, drop_path, aligned_with):
    preset = preset_of(name)
    said(preset.method, name="cae", target="tokens", words=8192, align=2.0, aligned_with=aligned_with, width=None)
    said(preset.method, heads=12, regressor_depth=4, decoder_depth=4, layer_scale=0.1, drop_path=drop_path)
    said(preset.views.crop, size=224, scale=[0.08, 1.0], interpolation="bicubic", flip=0.5, jitter=None)
    said(preset.views.mask, name="blocks", patches=hidden, least=16, most=None, aspect=[0.3, 1 / 0.3], exact=True)
    said(preset.views.target, size=112, interpolation="lanczos", normalize={"mean": [0.0] * 3, "std": [1.0] * 3})
    said(preset.backbone, name="beit", size="base", positions="sincos", bias="none", layer_scale=0.1, init="cae")
    said(preset.backbone, drop_path=drop_path)
    said(preset.optim, name="adamw", lr=1.5e-3, per=None, betas=[0.9, 0.999], weight_decay=0.05)
    assert preset.data.batch_size == 2048
    assert preset.schedule.end * preset.optim.lr == pytest.approx(1e-5)
    said(preset.schedule, name="cosine", by="step")
    said(preset.schedule.warmup, epochs=warmup, start=0.0, shape="linear", by="step", subtract=True)
    said(preset.run, epochs=epochs, clip=3.0)


CLUSTERING_JITTER = {"p": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 1.0, "hue": 0.5}


@pytest.mark.parametrize(("name", "sobel"), [("deepcluster-sobel-r50-200e", True), ("deepcluster-r50-200e", False)])
def test_deepcluster(name, sobel):
    preset = preset_of(name)
    said(preset.method, name="deepcluster", clusters=10000, components=256, iterations=20, every=1)
    said(preset.method, balance=True, reweight=0.0)
    (group,) = preset.views.groups
    said(group, repeat=1, size=224, scale=[0.08, 1.0], rotate=2.0, jitter=CLUSTERING_JITTER, grey=0.2, blur=None)
    said(group, interpolation="bilinear", flip=0.5, grey_first=False)
    said(preset.optim, name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-5)
    (rule,) = preset.optim.rules
    said(rule, match="^head", momentum=0.0)
    said(preset.schedule, name="step", at=[400], gamma=0.1, by="epoch")
    said(preset.run, epochs=200, batch_norm=64)
    said(preset.backbone, depth=50, sobel=sobel, zero_init_residual=False)
    assert preset.data.batch_size == 512
    assert preset.optim.effective_lr(512) == 0.1


def test_odc():
    preset = preset_of("odc-r50-440e")
    said(preset.method, name="odc", hidden=512, dim=256, dropout=0.5, clusters=10000, iterations=20, momentum=0.5)
    said(preset.method, centroids_every=10, min_cluster=20, reweight=0.5, replace=True)
    (group,) = preset.views.groups
    said(group, size=224, scale=[0.08, 1.0], rotate=2.0, jitter=CLUSTERING_JITTER, grey=0.2, blur=None)
    said(preset.optim, name="sgd", momentum=0.9, weight_decay=1e-5)
    (rule,) = preset.optim.rules
    said(rule, match="^head", momentum=0.0)
    said(preset.schedule, name="step", at=[400], gamma=0.4, by="epoch")
    said(preset.run, epochs=440, batch_norm="global")
    said(preset.backbone, depth=50, sobel=False)
    assert preset.data.batch_size == 512
    assert preset.optim.effective_lr(512) == 0.06


def test_interclr():
    preset = preset_of("interclr-r50-200e")
    said(preset.method, name="interclr", dim=128, hidden=None, queue=65536, momentum=0.999, temperature=0.2)
    said(preset.method, clusters=10000, memory_momentum=0.0, centroids_every=10, min_cluster=20, share_head=True)
    said(preset.method, inter=0.25, warmup_epochs=0, choose="semihard", negatives=16384, pool=128000, replace=True)
    said(preset.method, intra_cosine_margin=0.0, intra_arc_margin=0.0, inter_cosine_margin=-0.5, inter_arc_margin=0.0)
    assert preset.views == preset_of("mocov2-r50-200e").views
    assert preset.optim == preset_of("mocov2-r50-200e").optim
    assert preset.schedule == preset_of("mocov2-r50-200e").schedule
    said(preset.run, epochs=200, batch_norm=32)
    assert preset.data.batch_size == 256


@pytest.mark.parametrize(
    ("name", "size", "patch", "depth", "heads", "epochs", "warmup"),
    [
        ("ijepa-vith14-300e", "huge", 14, 12, 16, 300, {"epochs": 40, "start": 0.2}),
        ("ijepa-vitb16-600e", "base", 16, 6, 12, 600, {"epochs": 15, "start": 0.1}),
    ],
)
def test_ijepa(name, size, patch, depth, heads, epochs, warmup):
    preset = preset_of(name)
    said(preset.method, name="ijepa", width=384, depth=depth, heads=heads, momentum=0.996)
    said(preset.views.crop, size=224, scale=[0.3, 1.0], interpolation="bilinear", flip=0.0, jitter=None, grey=0.0)
    said(preset.views.mask, name="multiblock", targets=4, target_scale=[0.15, 0.2], target_aspect=[0.75, 1.5])
    said(preset.views.mask, context_scale=[0.85, 1.0], more_than=10, among=128)
    assert preset.views.patch == patch
    said(preset.backbone, size=size, patch=patch, class_token=False, init="ijepa", pool="mean", drop_path=0.0)
    said(preset.backbone, positions="sincos", sincos_first="column")
    said(preset.optim, name="adamw", lr=1e-3, per=None, betas=[0.9, 0.999], weight_decay=0.04, weight_decay_end=0.4)
    (rule,) = preset.optim.rules
    said(rule, one_dim=True, weight_decay=0.0)
    said(preset.schedule, name="cosine", by="step", end=1e-3, ahead=1)
    assert preset.schedule.warmup is not None
    said(preset.schedule.warmup, shape="linear", by="step", subtract=True, **warmup)
    said(preset.run, epochs=epochs, clip=None, precision="bf16")
    assert preset.data.batch_size == 2048
