import json
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from parts import ran

from sslcli.cli.convert import targets
from sslcli.errors import UserError, WeightsError


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 as torchvision saves it."""
    path = tmp_path_factory.mktemp("theirs") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def test_the_folder_is_the_list_of_targets():
    assert {"torchvision", "timm", "huggingface", "detectron2", "mmdet", "mmseg", "mmpretrain", "onnx"} == set(
        targets()
    )


def test_from_one_tool_to_another(theirs: Path, tmp_path: Path):
    done = ran("convert", "detectron2", theirs, tmp_path / "r.pkl")
    assert done.stdout == f"{tmp_path / 'r.pkl'}\n"
    assert "120 tensors matched, 1 missing, 0 unexpected" in done.stderr
    assert "STRIDE_IN_1X1: False" in done.stderr
    assert "note: detectron2's own defaults are for other weights" in done.stderr
    with (tmp_path / "r.pkl").open("rb") as file:
        written = pickle.load(file)["model"]
    stem = torch.load(theirs, weights_only=True)["conv1.weight"]
    assert torch.equal(torch.from_numpy(written["stem.conv1.weight"]), stem)
    told = json.loads(ran("convert", "mmdet", theirs, tmp_path / "r.pth", "--json").stdout)
    assert (told["path"], told["tensors"]) == (str(tmp_path / "r.pth"), 120)


def test_what_does_not_go_together_is_refused(tiny_run: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="detectron2 has no ResNet with depth 10"):
        ran("convert", "detectron2", tiny_run, tmp_path / "r.pkl")
    with pytest.raises(UserError, match="no `detectron`; did you mean `detectron2`") as caught:
        ran("convert", "detectron", tiny_run, tmp_path / "r.pkl")
    assert "mmpretrain: MMPretrain" in str(caught.value.hint)
    with pytest.raises(UserError, match=r"^`nosuch` is no tool that files are written for$") as caught:
        ran("convert", "nosuch", tiny_run, tmp_path / "r.pkl")
    choices = [line.split(":")[0].strip() for line in str(caught.value.hint).splitlines()[1:]]
    assert choices == ["ssl", *targets()]
    assert not list(tmp_path.iterdir())


def test_a_run_goes_into_the_files_that_take_it(tiny_run: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="no ResNet of depth 10 and width 8") as caught:
        ran("convert", "timm", tiny_run, tmp_path / "r.safetensors")
    assert "onnx" in str(caught.value.hint)


@pytest.mark.golden
def test_a_checkpoint_of_moco_becomes_what_its_own_converter_makes_of_it(golden: Path, tmp_path: Path):
    recorded = json.loads((golden / "converters" / "moco_to_detectron2_r18_v1.json").read_text())
    rows = recorded["mapping_old_new_shape_dtype"]
    state = {
        old: torch.full(shape, number, dtype=getattr(torch, dtype))
        for number, (old, _, shape, dtype) in enumerate(rows)
    }
    twin = {name.replace("encoder_q", "encoder_k"): -tensor for name, tensor in state.items()}
    queue = {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    file = tmp_path / "checkpoint_0199.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": {**state, **twin, **queue}, "optimizer": {}}, file)
    done = ran("convert", "detectron2", file, tmp_path / "r.pkl")
    assert "120 tensors matched" in done.stderr
    with (tmp_path / "r.pkl").open("rb") as pickled:
        found = pickle.load(pickled)["model"]
    kept = {new: number for number, (_, new, *_) in enumerate(rows) if not new.startswith("stem.fc")}
    assert found.keys() == kept.keys()
    assert all((found[name] == number).all() for name, number in kept.items())
