"""Our weights in other tools' files: their names, their fields, their features; and refusals with a reason."""

import json
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sslcli.config import choice
from sslcli.config.views import EvalView
from sslcli.convert import (
    _to_huggingface,
    _to_timm,
    _to_torchvision,
    detectron2,
    huggingface,
    mmdet,
    mmpretrain,
    mmseg,
    onnx,
    torchvision,
)
from sslcli.convert._find import convert
from sslcli.convert._layout import Network
from sslcli.convert._rules import to_theirs
from sslcli.convert._write import difference, replacing, same
from sslcli.errors import SslError, UserError, WeightsError
from sslcli.seeds import seed_here

SMALL = EvalView(resize=64, size=64)
VIT = {"name": "vit", "width": 48, "depth": 2, "heads": 4, "image_size": 64}
SWIN = {"name": "swin", "width": 12, "depths": (2, 2, 2, 1), "heads": (2, 2, 4, 4), "image_size": 128, "window": 4}
R18 = {"name": "resnet", "depth": 18}


def network(config: dict[str, Any], view: EvalView = SMALL) -> Network:
    """A network of ours in which no tensor is as it starts."""
    cfg = choice.config_of("sslcli.backbones", config["name"]).model_validate(config)
    seed_here(0, "init")
    backbone = choice.build("sslcli.backbones", cfg)(cfg)
    with torch.no_grad():
        for part in backbone.modules():
            if isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.1)
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
    return Network(dict(backbone.trunk.state_dict()), cfg.model_dump(mode="json"), view)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / "converters" / f"{name}.json").read_text())


def numbered(names: dict[str, list[int]]) -> dict[str, Tensor]:
    """A tensor of its own constant for every name."""
    return {
        name: torch.full(shape, number, dtype=torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        for number, (name, shape) in enumerate(names.items())
    }


@pytest.mark.golden
@pytest.mark.parametrize(("recorded", "depth"), [("moco_to_detectron2_r18_v1", 18), ("moco_to_detectron2_r50_v2", 50)])
def test_the_pickle_for_detectron2_is_the_one_that_moco_writes(golden: Path, tmp_path: Path, recorded: str, depth: int):
    known = read(golden, recorded)
    rows = [row for row in known["mapping_old_new_shape_dtype"] if not row[1].startswith("stem.fc")]
    ours = numbered({old.removeprefix("module.encoder_q."): shape for old, _, shape, _ in rows})
    done = detectron2.write(Network(ours, {"name": "resnet", "depth": depth}), tmp_path / "r.pkl")
    with done.path.open("rb") as file:
        found = pickle.load(file)
    assert found.keys() == known["pickle_top_level"].keys()
    assert found["matching_heuristics"] is True
    assert found["__author__"] == "ssl"
    assert done.tensors == len(found["model"]) == len(rows)
    for number, (_, new, shape, dtype) in enumerate(rows):
        array = found["model"][new]
        assert isinstance(array, np.ndarray)
        assert array.flags.writeable  # torch.from_numpy warns otherwise
        assert (list(array.shape), str(array.dtype)) == (shape, dtype)
        assert (array == number).all()
    if depth == 50:
        assert len(rows) == 318


def test_the_pickle_names_nothing_that_old_numpy_lacks(tmp_path: Path):
    done = detectron2.write(network(R18), tmp_path / "r.pkl")
    assert b"numpy._core" not in done.path.read_bytes()
    said = "\n".join(done.use)
    assert "STRIDE_IN_1X1: False" in said
    assert "PIXEL_MEAN: [123.675, 116.28, 103.53]" in said
    assert "PIXEL_STD: [58.395, 57.12, 57.375]" in said
    assert 'FORMAT: "RGB"' in said
    assert "RES2_OUT_CHANNELS: 64" in said


@pytest.mark.golden
@pytest.mark.parametrize("tool", [mmdet, mmseg])
def test_the_file_for_openmmlab_is_the_one_that_its_converter_writes(golden: Path, tmp_path: Path, tool: Any):
    known = read(golden, "selfsup2mmdet_moco_r50_v1")
    rows = [row for row in known["mapping_old_new_shape"] if not row[1].startswith("fc.")]
    ours = numbered({old.removeprefix("module.encoder_q."): shape for old, _, shape in rows})
    done = tool.write(Network(ours, {"name": "resnet", "depth": 50}), tmp_path / "r.pth")
    found = torch.load(done.path, weights_only=True)
    assert list(found) == known["checkpoint_top_level"]
    assert {name: list(tensor.shape) for name, tensor in found["state_dict"].items()} == {
        new: shape for _, new, shape in rows
    }
    same(ours, found["state_dict"])
    assert any("norm_eval=False" in line for line in done.use)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda x: x,
    **{f"rows[{i}*D:{i + 1}*D]": (lambda x, i=i: x.chunk(3)[i]) for i in range(3)},
}


@pytest.mark.golden
@pytest.mark.parametrize(
    ("recorded", "rules"),
    [
        ("vit_timm_to_hf_v4_d2", huggingface.VIT_4_RULES),
        ("vit_timm_to_torchvision_d2", torchvision.VIT_RULES),
        ("vit_timm_to_mmcls025_d2", mmpretrain.VIT_RULES),
    ],
)
def test_names_of_transformers(golden: Path, recorded: str, rules: Any):
    rows = next(value for key, value in read(golden, recorded).items() if key.startswith("mapping"))
    rows = [row for row in rows if not row[0].startswith("head.")]
    ours = {old: torch.randn(6, 2) for old, _, _ in rows}
    found = to_theirs(rules, ours)
    assert not found.unexpected
    expected = {new.removeprefix("vit."): OPS[op](ours[old]) for old, new, op in rows}
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.golden
def test_names_of_swin_and_the_order_of_merged_patches(golden: Path):
    to_ours = {old: new for old, new, *_ in _mapping(read(golden, "swin_official_to_timm_d12"))}
    rows = [(to_ours[old], new, op) for old, new, op in _mapping(read(golden, "swin_official_to_mmcls025_d12"))]
    channels = 12
    ours = {old: torch.randn(2, 4 * channels) for old, _, _ in rows}
    found = to_theirs(mmpretrain.swin_rules(2), ours)
    assert not found.unexpected
    order = [(j * 2 + i) * channels + c for c in range(channels) for i in range(2) for j in range(2)]
    for old, new, op in rows:
        expected = ours[old] if op == "copy" else ours[old][:, order]
        assert torch.equal(found.tensors[new], expected)
    assert len(found.tensors) == len(rows)


def _mapping(recorded: dict[str, Any]) -> list[list[str]]:
    rows = next(value for key, value in recorded.items() if key.startswith("mapping"))
    return [row for row in rows if not row[0].startswith("head.")]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("kind", "config", "rules"),
    [
        ("ResNetModel", {"name": "resnet", "depth": 14}, huggingface.RESNET_RULES),
        ("SwinForMaskedImageModeling",
         {"name": "swin", "width": 96, "depths": (2, 2), "heads": (3, 6)}, huggingface.SWIN_4_RULES),
    ],
)  # fmt: skip
def test_names_and_shapes_of_hugging_face(golden: Path, kind: str, config: dict[str, Any], rules: Any):
    known = next(v for k, v in read(golden, "hf_other_layouts_v4")["layouts"].items() if k.startswith(kind))
    names = {
        name.removeprefix("swin."): shape
        for name, shape in known.items()
        if not name.startswith("decoder.") and not name.endswith(("mask_token", "relative_position_index"))
    }
    found = to_theirs(rules, network(config).tensors)
    assert not found.unexpected
    assert {name: list(tensor.shape) for name, tensor in found.tensors.items()} == names


@pytest.mark.parametrize(
    "config",
    [{"name": "resnet", "depth": 18, "stem": "padded"}, VIT, {**VIT, "pool": "mean"}, SWIN],
    ids=["resnet", "cls", "mean", "swin"],
)
def test_torchvision_says_the_same(tmp_path: Path, config: dict[str, Any]):
    done = _to_torchvision.write(network(config), tmp_path / "t.pth")
    assert done.difference is not None
    assert done.difference < 1e-12
    assert done.missing
    assert _typed(done.use).load_state_dict  # the lines that are printed work
    assert bool(done.notes) == (config.get("pool") == "mean")


@pytest.mark.parametrize(
    "config",
    [
        {"name": "resnet", "depth": 18, "stem": "cifar"},
        VIT,
        {**VIT, "pool": "mean", "positions": "sincos"},
        SWIN,
        {"name": "timm", "model": "resnet18"},
    ],
    ids=["resnet", "cls", "mean", "swin", "timm"],
)
def test_timm_says_the_same(tmp_path: Path, config: dict[str, Any]):
    given = network(config)
    done = _to_timm.write(given, tmp_path / "t.safetensors")
    assert done.difference is not None
    assert done.difference < 1e-12
    same(given.tensors, _typed(done.use).state_dict())


def _typed(lines: tuple[str, ...]) -> Any:
    place: dict[str, Any] = {}
    exec("\n".join(lines), place)
    return place["network"]


@pytest.mark.parametrize("config", [R18, VIT, SWIN], ids=["resnet", "vit", "swin"])
def test_a_folder_for_transformers(tmp_path: Path, config: dict[str, Any]):
    done = _to_huggingface.write(network(config), tmp_path / "net")
    assert {path.name for path in done.path.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    told = json.loads((done.path / "config.json").read_text())
    assert told["model_type"] == config["name"]
    if config is VIT:
        assert (told["num_attention_heads"], told["layer_norm_eps"]) == (4, 1e-6)
    if find_spec("transformers") is not None:
        assert done.difference is not None
        assert done.difference < 1e-12
    else:
        assert "not installed" in done.proof
    again = _to_huggingface.write(network(config), tmp_path / "net")  # replaces the folder
    assert again.path == done.path


@pytest.mark.parametrize("config", [VIT, SWIN], ids=["vit", "swin"])
def test_mmpretrain_reads_transformers_too(tmp_path: Path, config: dict[str, Any]):
    done = mmpretrain.write(network(config), tmp_path / "m.pth")
    found = torch.load(done.path, weights_only=True)["state_dict"]
    assert ("ln1.weight" if config is VIT else "norm3.weight") in found
    assert eval("\n".join(done.use).removeprefix("backbone="), {"dict": dict})["init_cfg"]["type"] == "Pretrained"


@pytest.mark.parametrize(
    ("tool", "config", "file"),
    [
        (detectron2, R18, "r.pkl"),
        (mmdet, R18, "r.pth"),
        (mmpretrain, VIT, "v.pth"),
        (mmpretrain, SWIN, "s.pth"),
        (_to_torchvision, VIT, "v.safetensors"),
        (_to_torchvision, SWIN, "s.pth"),
        (_to_timm, VIT, "v.pth"),
        (_to_huggingface, VIT, "v"),
        (_to_huggingface, SWIN, "s"),
        (_to_huggingface, R18, "r"),
    ],
)
def test_what_is_written_is_read_again(tmp_path: Path, tool: Any, config: dict[str, Any], file: str):
    given = network(config)
    same(given.tensors, convert(tool.write(given, tmp_path / file).path).network.tensors)


@pytest.mark.skipif(find_spec("onnxscript") is not None, reason="onnxscript is installed")
def test_onnx_says_what_it_needs(tmp_path: Path):
    with pytest.raises(UserError, match="not installed") as caught:
        onnx.write(network(VIT), tmp_path / "v.onnx")
    assert "sslcli[onnx]" in str(caught.value.hint)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("onnxscript") is None, reason="onnxscript is not installed")
def test_onnx_says_the_same_for_another_batch(tmp_path: Path):
    done = onnx.write(network(VIT), tmp_path / "v.onnx")
    assert done.difference is None or done.difference < 1e-5
    assert "opset 18" in done.notes[0]


@pytest.mark.parametrize(
    ("tool", "config", "file", "match"),
    [
        (detectron2, VIT, "v.pkl", "detectron2 has no place for a `vit`: it takes resnet"),
        (detectron2, {**R18, "stem": "cifar"}, "r.pkl", "no ResNet with the stem `cifar`"),
        (detectron2, {**R18, "width": 16}, "r.pkl", "no ResNet with width 16"),
        (detectron2, R18, "r.pth", "must end in `.pkl`"),
        (mmdet, SWIN, "s.pth", "MMDetection has no place for a `swin`"),
        (mmseg, R18, "r.safetensors", "must end in `.pth`"),
        (_to_torchvision, {"name": "timm", "model": "convnext_atto"}, "c.pth", "no place for a `convnext_atto`"),
        (_to_timm, {**R18, "width": 16}, "r.pth", "no ResNet of depth 18 and width 16"),
        (_to_huggingface, R18, "net.safetensors", "must be a folder"),
        (onnx, R18, "r.pth", "must end in `.onnx`"),
    ],
)
def test_wrong_pairings_are_refused_and_nothing_is_written(
    tmp_path: Path, tool: Any, config: dict[str, Any], file: str, match: str
):
    with pytest.raises(WeightsError, match=match):
        tool.write(network(config), tmp_path / file)
    assert not list(tmp_path.iterdir())


def test_a_network_that_says_something_else_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = torch.rand(1, 2)
    with pytest.raises(SslError, match="says something else"):
        difference(lambda x: x, lambda x: x + 1e-6, images)
    with pytest.raises(SslError, match="says something else"):
        difference(lambda x: x, lambda x: x * float("nan"), images)
    forget = tuple(rule for rule in detectron2.RULES if "shortcut.norm" not in str(rule.theirs))
    monkeypatch.setattr(detectron2, "RULES", forget)
    with pytest.raises(WeightsError, match=r"no place for `layer2.0.downsample.1.weight` and \d+ more"):
        detectron2.write(network(R18), tmp_path / "r.pkl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "trouble", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path, trouble: Exception):
    target = tmp_path / "w.safetensors"
    target.write_text("old")

    def write() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise trouble

    with pytest.raises(SslError, match=r"cannot write .* No space left on device"):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
