"""Files without trust: every form torch ever wrote is read, and no code in any of them is run."""

import argparse
import collections
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from sslcli.convert._file import open_file
from sslcli.errors import WeightsError


class Evil:
    """Asks the reader to create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


class ConfigDict(dict):
    """As mmcv's: a dictionary with a class."""


def content() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "epoch": 3,
        "arch": "resnet50",
        "args": argparse.Namespace(patch_size=16, lr=np.float64(0.5), nested=argparse.Namespace(deep="x")),
        "best": np.float32(71.5),
        "cfg": ConfigDict(type="MoCo", sizes=[1, 2]),
        "state_dict": collections.OrderedDict(
            {
                "a.weight": base,
                "a.turned": base.t(),
                "a.part": base[1:3, ::2],
                "a.half": torch.ones(3, dtype=torch.float16),
                "a.bf16": torch.ones(2, dtype=torch.bfloat16),
                "a.count": torch.tensor(7),
                "a.flag": torch.tensor([True, False]),
                "a.none": torch.zeros(0, 3),
                "a.parameter": torch.nn.Parameter(torch.ones(2)),
            }
        ),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(5)}}},
        "scaler": {},
    }


@pytest.fixture(params=[True, False], ids=["zip", "before 1.6"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content(), path, _use_new_zipfile_serialization=request.param)
    return path


def test_every_form_of_torch_gives_the_same(saved: Path):
    found = open_file(saved)
    for name, tensor in content()["state_dict"].items():
        read = found.tensors[f"state_dict.{name}"]
        assert read.dtype == tensor.dtype, name
        assert torch.equal(read, tensor), name
    assert len(found.tensors) == 9
    assert found.facts.get("epoch", "arch") == 3
    assert found.facts.get("args.patch_size") == 16
    assert found.facts.get("args.lr") == 0.5
    assert found.facts.get("args.nested.deep") == "x"
    assert found.facts.get("best") == 71.5
    assert found.facts.get("cfg.type") == "MoCo"
    assert found.facts.get("cfg.sizes") == [1, 2]
    assert found.training == ("optimizer",)
    assert "argparse.Namespace" in found.things


def test_the_file_is_not_changed_through_its_tensors(saved: Path):
    before = saved.read_bytes()
    open_file(saved).tensors["state_dict.a.weight"].zero_()
    assert saved.read_bytes() == before


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_of_arrays(tmp_path: Path, protocol: int):
    path = tmp_path / "model.pkl"
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "f": np.asfortranarray(np.eye(3)), "s": np.int64(4)}
    with path.open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "someone"}, file, protocol=protocol)
    found = open_file(path)
    assert found.container == "pickle"
    assert torch.equal(found.tensors["model.w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found.tensors["model.f"], torch.eye(3, dtype=torch.float64))
    assert found.facts.get("model.s") == 4
    assert found.facts.get("__author__") == "someone"


def test_a_whole_network_is_read_as_its_state(tmp_path: Path):
    network = torchvision.models.resnet18(num_classes=3)
    torch.save({"net": network}, tmp_path / "net.pt")
    found = open_file(tmp_path / "net.pt")
    wanted = network.state_dict()
    assert {name.removeprefix("net.") for name in found.tensors} == set(wanted)
    assert all(torch.equal(found.tensors[f"net.{name}"], tensor) for name, tensor in wanted.items())
    torch.save(network, tmp_path / "bare.pt")
    assert set(open_file(tmp_path / "bare.pt").tensors) == set(wanted)


def test_safetensors_and_the_words_beside_it(tmp_path: Path):
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}')
    found = open_file(tmp_path / "model.safetensors")
    assert torch.equal(found.tensors["x"], torch.ones(2))
    assert found.facts.get("config.num_attention_heads") == 6
    assert found.metadata == {"format": "pt"}


@pytest.mark.parametrize("form", ["zip", "before 1.6", "pickle", "pickle 0"])
def test_no_code_is_run(tmp_path: Path, form: str):
    target, path = tmp_path / "pwned", tmp_path / "model.pth"
    loaded = {"state_dict": {"w": torch.ones(2)} if "pickle" not in form else {"n": 1}, "evil": Evil(target)}
    if "pickle" in form:
        path.write_bytes(pickle.dumps(loaded, protocol=0 if form == "pickle 0" else 4))
        pickle.loads(path.read_bytes())
    else:
        torch.save(loaded, path, _use_new_zipfile_serialization=form == "zip")
        torch.load(path, weights_only=False)
    assert target.exists()  # the payload works where a file is trusted
    target.rmdir()
    found = open_file(path)
    assert not target.exists()
    assert any("mkdir" in name for name in found.things)


def test_attributes_are_not_set_on_anything_real(tmp_path: Path):
    before = dict(vars(argparse.Namespace))
    program = b"cargparse\nNamespace\n}(Vspam\nVeggs\nub."  # BUILD on the class itself
    (tmp_path / "x.pkl").write_bytes(program)
    open_file(tmp_path / "x.pkl")
    assert dict(vars(argparse.Namespace)) == before


def zipped(path: Path, entries: dict[str, bytes], compress: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def test_a_zip_bomb_is_refused(tmp_path: Path):
    bomb = zipped(tmp_path / "b.pt", {"b/data.pkl": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(WeightsError, match="could unpack to any size"):
        open_file(bomb)


def test_a_pickle_that_grows_without_end_is_refused(tmp_path: Path):
    nested: list[Any] = [[Ellipsis]]
    for _ in range(40):
        nested = [nested] * 10
    (tmp_path / "laughs.pkl").write_bytes(pickle.dumps(nested))
    with pytest.raises(WeightsError, match="never ends"):
        open_file(tmp_path / "laughs.pkl")


def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path: Path):
    torch.save({"w": torch.zeros(3, 7)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    key = next(name for name in entries if name.endswith("data.pkl"))
    assert entries[key].count(b"K\x03K\x07") == 1
    entries[key] = entries[key].replace(b"K\x03K\x07", b"K\x03K\xff")
    with pytest.raises(WeightsError, match="reaches beyond"):
        open_file(zipped(tmp_path / "bad.pt", entries))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(saved: Path, share: float):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError) as caught:
        open_file(saved)
    assert saved.name in caught.value.message
    assert "\n" not in caught.value.message


def test_what_is_no_file_of_weights_is_refused_by_name(tmp_path: Path):
    script = zipped(tmp_path / "s", {"m/data.pkl": pickle.dumps({}), "m/code/__torch__.py": b"def forward(self): pass"})
    cases = {
        "empty.pth": (b"", "is empty"),
        "notes.pth": b"These are my notes,\nnot weights.\n",
        "table.pth": b"a,b,c\n1,2,3\n",
        "binary.pth": bytes(range(256)) * 4,
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        "page.pth": (b"<!DOCTYPE html><html></html>", "web page"),
        "other.zip": (zipped(tmp_path / "z", {"a/b.txt": b"x"}).read_bytes(), r"without `data\.pkl`"),
        "script.pt": (script.read_bytes(), "TorchScript"),
        "cut.safetensors": (struct.pack("<Q", 1000) + b"{", "not a whole safetensors"),
        "extension.pkl": (b"\x80\x02\x82\x01.", "no file of weights"),
    }
    for name, case in cases.items():
        data, told = case if isinstance(case, tuple) else (case, "no file of weights")
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError, match=told) as caught:
            open_file(tmp_path / name)
        assert name in caught.value.message
        assert "\n" not in caught.value.message
    with pytest.raises(WeightsError, match="no file"):
        open_file(tmp_path / "none.pth")
