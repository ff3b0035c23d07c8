"""Other tools' files: whose they are, which network is taken, and that it is the same network."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from sslcli.convert import huggingface, openmmlab, timm
from sslcli.convert import torchvision as vision
from sslcli.convert._find import convert, layouts, recognise
from sslcli.convert._rules import Rule, to_ours, to_theirs
from sslcli.errors import WeightsError
from sslcli.features.weights import begin_with, load, take_in
from sslcli.nn.sobel import Sobel

GOLDEN = Path(__file__).parents[1] / "golden"
R50 = {"name": "resnet", "depth": 50, "width": 64, "stem": "imagenet"}


def vit(size: str, patch: int = 16, image: int = 224, **more: Any) -> dict[str, Any]:
    return {"name": "vit", "size": size, "patch": patch, "image_size": image, **more}


def beit(**more: Any) -> dict[str, Any]:
    return {"name": "beit", "size": "base", "patch": 16, "image_size": 224, "layer_scale": 0.1, "pool": "mean", **more}


SHARED, CAE = beit(positions="none", bias="shared"), beit(positions="learned", bias="none")
SWIN = {"name": "swin", "size": "base", "patch": 4, "window": 6, "image_size": 192, "positions": "none"}
SMALL_12 = vit("small", heads=12)
CASES: dict[str, tuple[str, str, str, dict[str, Any] | None]] = {
    "barlowtwins_resnet50": ("barlowtwins", "backbone.", "barlowtwins", R50),
    "beit_base_pretrain": ("beit", "", "beit", SHARED),
    "cae_base_pretrain_atten": ("cae", "encoder.", "cae", CAE),
    "cae_base_pretrain_lxt": ("cae", "encoder.", "cae", CAE),
    "data2vec_vision_base_pretrain": ("beit", "", "data2vec", SHARED),
    "densecl_official": ("openmmlab", "encoder_q.0.", "densecl", R50),
    "dino_resnet50": ("dino", "backbone.", "dino", R50),
    "dino_vit_small16_backbone": ("timm", "", "unknown", vit("small")),
    "dino_vit_small16_multicrop_wrapper": ("dino", "backbone.", "dino", vit("small")),
    "dinov2_vitb14_backbone": ("dinov2", "", "dinov2", None),
    "dinov2_vits14_reg4_backbone": ("dinov2", "", "dinov2", None),
    "dinov2_vits14_student_chunked": ("dinov2", "backbone.", "dinov2", None),
    "hf_v4_beitformaskedimagemodeling": ("huggingface", "", "unknown", None),
    "hf_v4_data2vecvisionmodel": ("huggingface", "", "unknown", None),
    "hf_v4_dinov2model": ("huggingface", "", "unknown", None),
    "hf_v4_resnetmodel": ("huggingface", "", "unknown", {**R50, "depth": 14}),
    "hf_v4_swinformaskedimagemodeling": ("huggingface", "swin.", "unknown", None),
    "hf_v4_vitmaeforpretraining": ("huggingface", "vit.", "unknown", None),
    "hf_v5_beitformaskedimagemodeling": ("huggingface", "", "unknown", None),
    "hf_v5_data2vecvisionmodel": ("huggingface", "", "unknown", None),
    "hf_v5_dinov2model": ("huggingface", "", "unknown", None),
    "hf_v5_resnetmodel": ("huggingface", "", "unknown", {**R50, "depth": 14}),
    "hf_v5_swinformaskedimagemodeling": ("huggingface", "swin.", "unknown", None),
    "hf_v5_vitmaeforpretraining": ("huggingface", "vit.", "unknown", None),
    "ibot_vit_small_student": ("ibot", "backbone.", "ibot", vit("small")),
    "ibot_vit_small_teacher_shared_head": ("ibot", "backbone.", "ibot", vit("small")),
    "ijepa_vit_base16": ("ijepa", "encoder.", "ijepa", vit("base", class_token=False, pool="mean")),
    "mae_vit_base_patch16_finetune_gap": ("timm", "", "unknown", None),
    "mae_vit_base_patch16_pretrain": ("mae", "", "mae", vit("base")),
    "maskfeat_slowfast_vit_base_pretrain": ("maskfeat", "", "maskfeat", vit("base")),
    "mmselfsup0_cae_vit_base": ("openmmlab", "backbone.", "cae", CAE),
    "mmselfsup0_mae_vit_base": ("openmmlab", "backbone.", "mae", vit("base")),
    "mmselfsup0_maskfeat_vit_base": ("openmmlab", "backbone.", "maskfeat", vit("base")),
    "mmselfsup0_relative_loc_r50": ("openmmlab", "backbone.", "relative_loc", R50),
    "mmselfsup0_rotation_pred_r50": ("openmmlab", "backbone.", "rotation", R50),
    "mmselfsup0_simmim_swin_base": ("openmmlab", "backbone.", "simmim", SWIN),
    "mmselfsup0x_barlowtwins": ("openmmlab", "backbone.", "barlowtwins", R50),
    "mmselfsup0x_byol": ("openmmlab", "online_net.0.", "byol", R50),
    "mmselfsup0x_deepcluster": ("openmmlab", "backbone.", "deepcluster", {**R50, "sobel": True}),
    "mmselfsup0x_mocov1": ("openmmlab", "encoder_q.0.", "moco", R50),
    "mmselfsup0x_mocov2": ("openmmlab", "encoder_q.0.", "moco", R50),
    "mmselfsup0x_mocov3": ("openmmlab", "base_encoder.0.", "mocov3", SMALL_12),
    "mmselfsup0x_npid": ("openmmlab", "backbone.", "npid", R50),
    "mmselfsup0x_odc": ("openmmlab", "backbone.", "odc", R50),
    "mmselfsup0x_rotation_pred": ("openmmlab", "backbone.", "rotation", R50),
    "mmselfsup0x_simsiam": ("openmmlab", "encoder.0.", "simsiam", R50),
    "mmselfsup0x_swav": ("openmmlab", "backbone.", "swav", R50),
    "moco_v1_resnet50": ("moco", "encoder_q.", "moco", R50),
    "moco_v2_resnet50": ("moco", "encoder_q.", "moco", R50),
    "mocov3_resnet50": ("mocov3", "base_encoder.", "mocov3", R50),
    "mocov3_vit_small": ("mocov3", "base_encoder.", "mocov3", SMALL_12),
    "mocov3_vit_small_backbone": ("timm", "", "unknown", vit("small")),
    "npid_lemniscate_resnet50": ("torchvision", "", "unknown", R50),
    "openselfsup_simclr": ("openmmlab", "backbone.", "simclr", R50),
    "simclr_sthalles_resnet50": ("simclr", "backbone.", "simclr", R50),
    "simmim_swin_base_finetune_224_w7": ("timm", "", "unknown", {**SWIN, "window": 7, "image_size": 224}),
    "simmim_swin_base_pretrain_192_w6": ("simmim", "encoder.", "simmim", SWIN),
    "simmim_vit_base_pretrain": ("simmim", "encoder.", "simmim", SHARED),
    "simsiam_resnet50": ("simsiam", "encoder.", "simsiam", R50),
    "swav_resnet50": ("swav", "", "swav", R50),
    "triplet_official": ("openmmlab", "online_net.0.", "triplet", R50),
    "vicreg_resnet50": ("vicreg", "backbone.", "vicreg", R50),
    "vit_base_hf_v4": ("huggingface", "vit.", "unknown", vit("base")),
    "vit_base_hf_v5": ("huggingface", "vit.", "unknown", vit("base")),
}
REFUSED = {
    "deepcluster_alexnet": "an AlexNet or VGG of DeepCluster .*, and ssl has no such backbone",
    "mocov3_vit_conv_small_backbone": "in no layout that ssl knows",
}


def shapes(name: str) -> dict[str, Tensor]:
    """The tensors of a recorded layout; their zeros take no room."""
    told = json.loads((GOLDEN / "layouts" / f"{name}.json").read_text())
    zeros = {key: torch.zeros(()).expand(shape) for key, shape in told.items()}
    filters = {"sobel.0.weight": Sobel().grey, "sobel.1.weight": Sobel().kernels}
    return {key: filters.get(".".join(key.split(".")[-3:]), tensor) for key, tensor in zeros.items()}


def timm_model(name: str, **args: Any) -> torch.nn.Module:
    """A network of timm's without numbers in it."""
    from timm import create_model

    with torch.device("meta"):
        return create_model(name, num_classes=0, **args)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.golden
def test_every_recorded_layout_has_its_expectation():
    assert {path.stem for path in (GOLDEN / "layouts").glob("*.json")} == set(CASES) | set(REFUSED)


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_official_keys_are_recognised(name: str, tmp_path: Path):
    layout, prefix, method, backbone = CASES[name]
    found = convert(saved(tmp_path / "x.pth", {"state_dict": shapes(name), "optimizer": {"state": {}}}))
    assert (found.recognised.layout.name, found.found.prefix, found.network.method) == (layout, prefix, method)
    assert found.recognised.unexplained == ()
    assert found.unexpected == ()
    assert found.found.part.role == "student"
    if backbone is not None:
        assert found.network.backbone == backbone
    if backbone == R50:
        assert len(found.network.tensors) == 318
    if backbone == vit("base"):
        assert len(found.network.tensors) == 150


@pytest.mark.golden
@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_are_not_to_be_had_here_are_refused(name: str, tmp_path: Path):
    with pytest.raises(WeightsError, match=REFUSED[name]) as caught:
        convert(saved(tmp_path / "x.pth", {"state_dict": shapes(name)}))
    assert "\n" not in caught.value.message


def test_a_network_on_slopes_of_openmmlab_is_the_same_here(tmp_path: Path):
    """Beside the trunk, the filters as MMSelfSup has them: two convolutions, the second without a sum over colours."""
    torch.manual_seed(0)
    trunk = torchvision.models.resnet18()
    trunk.conv1 = torch.nn.Conv2d(2, 64, 7, stride=2, padding=3, bias=False)
    trunk.fc = torch.nn.Identity()
    grey, edges = torch.nn.Conv2d(3, 1, 1), torch.nn.Conv2d(1, 2, 3, padding=1)
    grey.weight.data.fill_(1 / 3)
    edges.weight.data[0, 0] = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    edges.weight.data[1, 0] = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])
    for filters in (grey, edges):
        filters.bias.data.zero_()
    sobel = torch.nn.Sequential(grey, edges)
    tensors = {f"backbone.{name}": x for name, x in trunk.state_dict().items()}
    tensors |= {"head.fc_cls.weight": torch.zeros(9, 512), "head.fc_cls.bias": torch.zeros(9)}
    tensors |= {f"sobel_layer.sobel.{name}": x for name, x in sobel.state_dict().items()}
    here = load(saved(tmp_path / "x.pth", {"state_dict": tensors})).backbone.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(here(images), trunk.eval()(sobel(images)))
    without = {name: x for name, x in tensors.items() if not name.startswith("sobel_layer.")}
    assert "taken to be slopes" in str(convert(saved(tmp_path / "y.pth", {"state_dict": without})).notes)
    tensors["sobel_layer.sobel.1.weight"] = -tensors["sobel_layer.sobel.1.weight"]
    with pytest.raises(WeightsError, match=r"`sobel_layer.sobel.1.weight` is none of the Sobel filters") as caught:
        convert(saved(tmp_path / "z.pth", {"state_dict": tensors}))
    assert "\n" not in caught.value.message


def test_a_transformer_without_class_token_is_the_same_here(tmp_path: Path):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0, class_token=False,
        global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tensors = {f"module.{name}": x for name, x in theirs.state_dict().items()}
    taken = load(saved(tmp_path / "x.pth", {"encoder": tensors, "target_encoder": tensors, "predictor": {}}))
    assert taken.manifest.backbone["name"] == "vit"
    assert taken.manifest.backbone["class_token"] is False
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(taken.backbone.eval()(images), theirs(images))


@pytest.mark.parametrize(("width", "depth", "size", "heads"), [(1280, 32, "huge", 16), (384, 12, "small", 6)])
def test_sizes_of_the_papers_have_their_heads(width: int, depth: int, size: str, heads: int, tmp_path: Path):
    """The huge one has heads of 80 channels, all others of 64."""
    model = timm_model("vit_base_patch16_224", embed_dim=width, depth=depth, num_heads=heads, patch_size=14)
    tensors = {name: torch.zeros(()).expand(x.shape) for name, x in model.state_dict().items()}
    tensors |= {"decoder_embed.weight": torch.zeros(1), "decoder_blocks.0.norm1.weight": torch.zeros(1)}
    found = convert(saved(tmp_path / "x.pth", {"model": tensors}))
    assert found.network.backbone == vit(size, patch=14)
    assert not any("heads" in note for note in found.notes)


@pytest.mark.golden
def test_whole_training_files(tmp_path: Path):
    dino, ibot, ijepa = shapes("dino_vit_small16_multicrop_wrapper"), shapes("ibot_vit_small_student"), {}
    for key, tensor in shapes("ijepa_vit_base16").items():
        half, _, rest = key.partition(".")
        ijepa.setdefault(half, {})[f"module.{rest}"] = tensor
    ijepa["target_encoder"] = ijepa["encoder"]
    wrapped = {f"module.{key}": tensor for key, tensor in dino.items()}
    centre = {"center": torch.zeros(1, 8)}
    cases: tuple[tuple[str, dict[str, Any], str, str], ...] = (
        ("dino", {"student": wrapped, "teacher": dino, "dino_loss": centre}, "teacher.backbone.", "student.backbone."),
        ("ibot", {"student": {f"module.{k}": v for k, v in ibot.items()}, "teacher": ibot, "ibot_loss": centre},
         "teacher.backbone.", "student.backbone."),
        ("ijepa", ijepa, "target_encoder.", "encoder."),
        ("lemniscate", {"state_dict": shapes("npid_lemniscate_resnet50"), "lemniscate": 0}, "", ""),
    )  # fmt: skip
    for layout, content, usual, student in cases:
        path = saved(tmp_path / f"{layout}.pth", {**content, "epoch": 3})
        for part, prefix in ((None, usual), ("student", student)):
            found = convert(path, part=part)
            assert (found.recognised.layout.name, found.found.prefix) == (layout, prefix)
            assert found.recognised.unexplained == ()
    with pytest.raises(WeightsError, match=r"has no `teacher`; it has `student` \(the network\)"):
        convert(tmp_path / "lemniscate.pth", part="teacher")


def renamed(network: Mapping[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): tensor for name, tensor in network.items() if not name.startswith("fc.")}


def test_ports_of_methods_that_are_no_classes_here(tmp_path: Path):
    r10 = dict(resnet10().state_dict())
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}

    def in_a_row(name: str) -> str:
        first, _, rest = name.partition(".")
        return f"{places[first]}.{rest}"

    def at(prefix: str, change: Callable[[str], str] = str) -> dict[str, Tensor]:
        return renamed(r10, lambda name: f"{prefix}{change(name)}")

    head = {"weight": torch.zeros(2, 2)}
    trunk = {"trunk": {f"_feature_blocks.{name}": x for name, x in r10.items()}, "heads": head}
    cases: dict[str, tuple[dict[str, Any], str, str]] = {
        "lightly": ({"state_dict": {**at("backbone.", in_a_row), **at("backbone_momentum.", in_a_row),
                                    "projection_head.layers.0.weight": head["weight"]}}, "moco", "backbone."),
        "sololearn": ({"state_dict": {**at("backbone."), **at("momentum_backbone."), "classifier.weight":
                                      head["weight"], "projector.0.weight": head["weight"]},
                       "hyper_parameters": {"method": "byol"}}, "byol", "backbone."),
        "vissl": ({"classy_state_dict": {"base_model": {"model": trunk}, "losses": []}, "config": {}}, "unknown",
                  "base_model.model.trunk._feature_blocks."),
        "byol": ({**at("online_encoder.net."), **at("target_encoder.net."), **at("net."),
                  "online_encoder.projector.net.0.weight": head["weight"],
                  "online_predictor.0.weight": head["weight"]}, "byol", "online_encoder.net."),
        "simclr": ({**at("encoder."), "projector.0.weight": head["weight"]}, "simclr", "encoder."),
        "plain": (at("encoder."), "unknown", "encoder."),
        "openmmlab": ({"state_dict": {**at("backbone."), **at("target_net.module.0."), "neck.fc0.weight":
                                      head["weight"], "head.predictor.fc0.weight": head["weight"],
                                      "data_preprocessor.mean": torch.zeros(3, 1, 1)}, "message_hub": {"x": 1}},
                      "byol", "backbone."),
    }  # fmt: skip
    for layout, (content, method, prefix) in cases.items():
        found = convert(saved(tmp_path / f"{layout}.ckpt", content))
        assert (found.recognised.layout.name, found.network.method, found.found.prefix) == (layout, method, prefix)
        assert found.recognised.unexplained == ()
        assert found.network.backbone == {**R50, "depth": 10}
        assert all(torch.equal(x, r10[name]) for name, x in found.network.tensors.items())
        assert len(found.network.tensors) == 72


def test_the_copy_that_differs_is_told_and_the_average_alone_is_refused(tmp_path: Path):
    r10 = resnet10().state_dict()
    both = {**renamed(r10, lambda n: f"encoder_q.0.{n}"), **renamed(r10, lambda n: f"backbone.{n}")}
    assert not [n for n in convert(saved(tmp_path / "same.pth", {"state_dict": both})).notes if "differs" in n]
    both["backbone.conv1.weight"] = both["backbone.conv1.weight"] + 1
    found = convert(saved(tmp_path / "differs.pth", {"state_dict": both}))
    assert any("differs in 1 tensors (`conv1.weight`)" in note for note in found.notes)
    assert torch.equal(found.network.tensors["conv1.weight"], r10["conv1.weight"])
    alone = {f"module.encoder_k.{name}": x for name, x in r10.items()}
    with pytest.raises(WeightsError, match="in no layout"):
        convert(saved(tmp_path / "k.pth", {"state_dict": alone}))


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("vit_timm_to_torchvision_d2", vision.VIT_RULES),
        ("vit_timm_to_mmcls025_d2", openmmlab.VIT_RULES),
        ("vit_timm_to_hf_v4_d2", huggingface.VIT_4_RULES),
        ("vit_timm_to_hf_v5_d3_h4", huggingface.VIT_5_RULES),
    ],
)
def test_names_of_transformers_are_those_that_were_proven(name: str, rules: Sequence[Rule]):
    told = json.loads((GOLDEN / "key_maps" / f"{name}.json").read_text())
    mapping = next(value for key, value in told.items() if key.startswith("mapping"))
    ours, theirs = {}, {}
    for number, (here, there, action) in enumerate(mapping):
        if here.startswith("head") or there.startswith(("head", "classifier")):
            continue
        wide = ours.setdefault(here, torch.arange(6.0) + 100 * number)
        if action == "copy":
            theirs[there] = wide
        else:
            start = int(action.removeprefix("rows[")[0])
            theirs[there] = wide[2 * start : 2 * start + 2]
    theirs = {key.removeprefix("vit."): value for key, value in theirs.items()}
    found = to_ours(rules, theirs)
    assert found.unexpected == ()
    assert found.tensors.keys() == ours.keys()
    assert all(torch.equal(found.tensors[key], value) for key, value in ours.items())
    back = to_theirs(rules, ours)
    assert back.tensors.keys() == theirs.keys()
    assert all(torch.equal(back.tensors[key], value) for key, value in theirs.items())


@pytest.mark.golden
def test_swin_merges_patches_in_the_order_of_each_tool():
    to_timm = json.loads((GOLDEN / "key_maps/swin_official_to_timm_d8_3.json").read_text())
    to_mmcls = json.loads((GOLDEN / "key_maps/swin_official_to_mmcls025_d8_3.json").read_text())
    shape = dict(to_timm["official_layout"])
    draw = torch.Generator().manual_seed(0)
    official = {name: torch.rand(shape[name], generator=draw) for name, _ in to_timm["mapping_official_timm"]}
    ours = to_ours(timm.OFFICIAL_SWIN_RULES, official)
    assert ours.unexpected == ()
    for name, there in to_timm["mapping_official_timm"]:
        if not there.startswith("head"):
            assert torch.equal(ours.tensors[there], official[name]), name
    mmcls = {}
    for name, there, action in to_mmcls["mapping_official_mmcls_op"]:
        x = official[name]
        if action == "unfold_permute":  # dst[c * 4 + i * 2 + j] = src[(j * 2 + i) * C + c]
            width = x.shape[-1] // 4
            order = [(j * 2 + i) * width + c for c in range(width) for i in (0, 1) for j in (0, 1)]
            x = x[..., order]
        mmcls[there] = x
    found = to_ours(openmmlab.SWIN_RULES, mmcls)
    assert found.unexpected == ()
    assert found.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(found.tensors[name], x) for name, x in ours.tensors.items())
    merged = {name: x for name, x in ours.tensors.items() if "downsample" in name}
    back = to_theirs(openmmlab.SWIN_RULES, merged).tensors
    assert all(torch.equal(x, mmcls[name]) for name, x in back.items())


@pytest.mark.golden
@pytest.mark.parametrize(
    "name", ["dino_vit_i16", "ibot_vit_i16", "dinov2_vit_i16", "dinov2_vit_reg4", "dinov2_vit_swiglu"]
)
def test_features_are_those_of_the_authors(name: str, tmp_path: Path, filled: Any):
    case = np.load(GOLDEN / "foreign" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    state = {key: torch.from_numpy(np.asarray(filled(key, shape))) for key, shape in dict(meta["layout"]).items()}
    weights = load(saved(tmp_path / "x.pth", state), changes={"heads": meta["heads"]})
    assert weights.match.whole
    with torch.no_grad():
        images = torch.from_numpy(case["x_16x16" if name.startswith("dino_") else "x"]).float()
        pooled, maps = weights.backbone(images), weights.backbone.maps(images)
    if name.startswith("dinov2"):
        expected, patches = case["cls"], case["patch"]
    elif name.startswith("ibot"):
        expected, patches = case["out_unmasked"][:, 0], case["out_unmasked"][:, 1:]
    else:
        expected, patches = case["out_16x16"], None
    np.testing.assert_allclose(pooled.numpy(), expected, atol=5e-6)
    if patches is not None:
        np.testing.assert_allclose(maps.flatten(2).mT.numpy(), patches, atol=5e-6)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["simmim_vit", "simmim_swin"])
def test_masked_features_are_those_of_simmim(name: str, tmp_path: Path, filled: Any):
    case = np.load(GOLDEN / "foreign" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    state = {key: torch.from_numpy(np.asarray(filled(key, shape))) for key, shape in dict(meta["layout"]).items()}
    state |= {key: torch.from_numpy(case[f"buffer/{key}"]) for key in meta["kept"] if f"buffer/{key}" in case.files}
    weights = load(saved(tmp_path / "x.pth", {"model": state}))
    assert weights.match.whole
    assert weights.manifest.method == "simmim"
    masks = torch.from_numpy(case["mask"]).flatten(1).bool()
    with torch.no_grad():
        token = state["encoder.mask_token"].float().flatten()
        found = weights.backbone.masked_maps(torch.from_numpy(case["imgs"]).float(), masks, token)
    np.testing.assert_allclose(found.numpy(), case["z"], atol=1e-5)


def resnet10() -> torch.nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def small_networks() -> dict[str, torch.nn.Module]:
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    return {
        "resnet10": resnet10(),
        "vit": torchvision.models.VisionTransformer(32, 8, 2, 1, 64, 256, num_classes=3),
        "swin": torchvision.models.SwinTransformer([4, 4], 32, [1, 1, 2, 1], [1, 2, 4, 8], [2, 2], num_classes=3),
        "timm": TimmViT(32, 8, embed_dim=64, depth=2, num_heads=1, num_classes=3),
    }


@pytest.mark.parametrize("name", ["resnet10", "vit", "swin", "timm"])
def test_the_equality_is_proven_by_running_both(name: str, tmp_path: Path):
    torch.manual_seed(0)
    network = small_networks()[name]
    path = saved(tmp_path / "net.pth", network.state_dict())
    done = take_in(path, tmp_path / "ours.safetensors", changes={"image_size": 64} if name == "swin" else {})
    assert done.proof is not None
    assert done.proof < 1e-10
    assert done.weights.match.whole
    again = load(done.extracted.path)
    assert again.converted is None
    assert again.manifest.origin is not None
    assert again.manifest.origin.file == "net.pth"
    assert again.digest == done.weights.digest
    if name == "timm":
        assert take_in(done.extracted.path, tmp_path / "again.safetensors").extracted.manifest == again.manifest


def test_a_file_that_two_layouts_explain_must_be_named(tmp_path: Path):
    path = saved(tmp_path / "x.pth", resnet10().state_dict())
    assert recognise(path).layout.name == "torchvision"
    with pytest.raises(WeightsError, match="no `torchvison`; did you mean `torchvision`"):
        recognise(path, layout="torchvison")
    with pytest.raises(WeightsError, match="in no layout"):
        recognise(path, layout="moco")


def test_layouts_say_what_they_are():
    for one in layouts():
        assert one.title
        assert one.parts
        assert {part.role for part in one.parts} <= {"student", "teacher"}
        assert one.dialects


def test_positions_are_resampled_for_a_run_with_other_images(tmp_path: Path):
    from sslcli.config.load import load as load_preset
    from sslcli.engine.build import facts_of, method_of

    network = small_networks()["timm"]
    path = saved(tmp_path / "net.pth", {f"module.base_encoder.{k}": v for k, v in network.state_dict().items()})
    preset = load_preset(
        "pretrain", "demo-digits",
        ("data.source.count=64", "data.batch_size=32", "run.epochs=1",
         "backbone={name: vit, width: 64, depth: 2, heads: 1, patch: 8, image_size: 64}"),
    ).preset  # fmt: skip
    method = method_of(preset, facts_of(preset, images=64, steps_per_epoch=2))
    said = begin_with(method, path)
    assert "the encoder of MoCo v3" in said
    assert "positions resampled from 4 x 4 to 8 x 8" in said
    assert torch.equal(method.backbone.state_dict()["trunk.norm.weight"], network.state_dict()["norm.weight"])


def test_values_that_are_not_finite_and_wrong_shapes_are_refused(tmp_path: Path):
    state = resnet10().state_dict()
    broken = {**state, "layer2.0.bn1.bias": torch.full((128,), torch.nan)}
    with pytest.raises(WeightsError, match=r"`layer2\.0\.bn1\.bias` holds values that are not finite"):
        load(saved(tmp_path / "nan.pth", broken))
    misshapen = {**state, "layer2.0.bn1.bias": torch.zeros(7)}
    with pytest.raises(WeightsError, match=r"1 of another shape \(`layer2\.0\.bn1\.bias`\)"):
        load(saved(tmp_path / "shape.pth", misshapen))
    lacking = {name: x for name, x in state.items() if name != "layer3.0.conv2.weight"}
    with pytest.raises(WeightsError, match=r"1 missing \(`layer3\.0\.conv2\.weight`\)"):
        load(saved(tmp_path / "lacks.pth", lacking))
    assert load(tmp_path / "lacks.pth", allow_partial=True).match.missing == ("layer3.0.conv2.weight",)
    with pytest.raises(WeightsError, match="holds no tensors"):
        load(saved(tmp_path / "none.pth", {"epoch": 3}))


def test_old_files_without_counters_and_in_half_precision(tmp_path: Path):
    state = resnet10().state_dict()
    old = {name: x.half() for name, x in state.items() if "num_batches" not in name}
    weights = load(saved(tmp_path / "old.pth.tar", {"state_dict": old}))
    assert weights.match.whole
    assert weights.manifest.origin is not None
    told = " ".join(weights.manifest.origin.notes)
    assert "12 counters of batch norms" in told
    assert "stored as float16, converted to float32" in told
    assert next(weights.backbone.parameters()).dtype == torch.float32


def test_the_first_convolution_of_small_networks(tmp_path: Path):
    network = resnet10()
    network.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=2, bias=False)
    network.maxpool = torch.nn.Identity()
    network.fc = torch.nn.Identity()
    state = {f"backbone.{name}": x for name, x in network.eval().state_dict().items()}
    content = {"state_dict": {**state, "classifier.weight": torch.zeros(2, 512)}}
    weights = load(saved(tmp_path / "solo.ckpt", content))
    assert weights.manifest.backbone["stem"] == "padded"
    assert weights.manifest.view.size == 32
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(weights.backbone(images), network(images))
    plain = convert(saved(tmp_path / "plain.pth", network.state_dict()))
    assert plain.network.backbone["stem"] == "cifar"
    assert any("stride 1 and padding 1" in note for note in plain.notes)
