"""DALL-E's encoder: equal to OpenAI's code, and read from any file without running what is in it."""

import json
import math
import os
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sslcli.errors import WeightsError
from sslcli.nn.dalle import Encoder, digest_of, read_encoder


@pytest.mark.golden
@pytest.mark.parametrize("name", ["dalle_encoder_n1_s24_b2", "dalle_encoder_n1_s32", "dalle_encoder_n2_s16"])
def test_scores_and_words(golden: Path, filled: Callable, name: str):
    case = np.load(golden / "cae" / f"{name}.npz")
    meta = json.loads(str(case["meta"]))
    encoder = Encoder(meta["n_hid"], meta["n_blk_per_group"], meta["vocab_size"])
    assert {key: list(value.shape) for key, value in encoder.state_dict().items()} == meta["layout"]
    encoder.load_state_dict({key: torch.from_numpy(filled(key, shape)) for key, shape in meta["layout"].items()})
    images = torch.from_numpy(case["images01"])
    with torch.no_grad():
        np.testing.assert_allclose(encoder(images), case["logits"], atol=1e-4)
    np.testing.assert_array_equal(encoder.words_of(images), case["indices"].reshape(len(images), -1))
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(encoder.words_of(images), case["indices"].reshape(len(images), -1))


@pytest.mark.golden
def test_full_size_is_openais(golden: Path):
    wanted = json.loads((golden / "cae" / "dalle_encoder_layout.json").read_text())["layout"]
    with torch.device("meta"):
        found = Encoder().state_dict()
    assert {key: list(value.shape) for key, value in found.items()} == wanted


def small() -> Encoder:
    torch.manual_seed(0)
    return Encoder(8, 1, 16)


def pickled_module(monkeypatch: pytest.MonkeyPatch, path: Path, tensors: dict, *, legacy: bool = False) -> None:
    """Write a whole module as OpenAI's code pickles it; its classes are gone afterwards."""

    def part(name: str, module: str) -> type[nn.Module]:
        return type(name, (nn.Module,), {"__module__": module})

    made: dict[str, type[nn.Module]] = {
        "Encoder": part("Encoder", "dall_e.encoder"),
        "EncoderBlock": part("EncoderBlock", "dall_e.encoder"),
        "Conv2d": part("Conv2d", "dall_e.utils"),
    }
    with monkeypatch.context() as patch:
        for module in ("dall_e", "dall_e.encoder", "dall_e.utils"):
            patch.setitem(sys.modules, module, types.ModuleType(module))
        for name, kind in made.items():
            setattr(sys.modules[kind.__module__], name, kind)

        def conv(prefix: str) -> nn.Module:
            found = made["Conv2d"]()
            found.w, found.b = (nn.Parameter(tensors[f"{prefix}.{key}"], requires_grad=False) for key in ("w", "b"))
            found.use_float16, found.device = True, torch.device("cpu")
            return found

        def block(prefix: str) -> nn.Module:
            found = made["EncoderBlock"]()
            found.n_in, found.post_gain = 3, 1 / 16
            found.id_path = conv(f"{prefix}.id_path") if f"{prefix}.id_path.w" in tensors else nn.Identity()
            layers = [(f"{kind}_{i}", nn.ReLU() if kind == "relu" else conv(f"{prefix}.res_path.conv_{i}"))
                      for i in range(1, 5) for kind in ("relu", "conv")]  # fmt: skip
            found.res_path = nn.Sequential(OrderedDict(layers))
            return found

        encoder = made["Encoder"]()
        encoder.vocab_size, encoder.device = 16, torch.device("cpu")
        groups = [(f"group_{i}", nn.Sequential(OrderedDict(
            block_1=block(f"blocks.group_{i}.block_1"), **({"pool": nn.MaxPool2d(2)} if i < 4 else {}))))
            for i in range(1, 5)]  # fmt: skip
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv("blocks.output.conv")))
        encoder.blocks = nn.Sequential(OrderedDict([("input", conv("blocks.input")), *groups, ("output", output)]))
        torch.save(encoder, path, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("kind", ["module", "state dict", "safetensors"])
def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    encoder = small()
    path = tmp_path / ("encoder.safetensors" if kind == "safetensors" else "encoder.pkl")
    if kind == "module":
        pickled_module(monkeypatch, path, encoder.state_dict())
    elif kind == "state dict":
        torch.save(encoder.state_dict(), path)
    else:
        save_file(encoder.state_dict(), path)
    found = read_encoder(path)
    assert "dall_e" not in sys.modules
    assert digest_of(found) == digest_of(encoder)
    assert not any(p.requires_grad for p in found.parameters())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(found.words_of(images), encoder.words_of(images))


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


class Construct:
    """Has a class that the reader knows made with arguments, or from another function."""

    def __init__(self, call: Callable, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


def test_nothing_in_a_file_is_run(tmp_path: Path):
    loot, path = tmp_path / "loot", tmp_path / "encoder.pkl"
    state = small().state_dict()
    for payload in (
        Payload(loot),
        Construct(eval, f"open({str(loot)!r}, 'w')"),
        Construct(getattr, nn.ReLU, "forward"),
        Construct(nn.Linear, 3, 4),
        Construct(nn.ReLU, True),
    ):
        torch.save({**state, "blocks.input.b": payload}, path)
        with pytest.raises(WeightsError, match="cannot read tokenizer"):
            read_encoder(path)
        path.write_bytes(pickle.dumps(payload))
        with pytest.raises(WeightsError, match="cannot read tokenizer"):
            read_encoder(path)
    assert not loot.exists()
    torch.save({**state, "blocks.input.b": Payload(loot)}, path)
    with pytest.raises(WeightsError, match=r"it asks for `(posix|nt).system`|no pickle of tensors"):
        read_encoder(path)
    assert not loot.exists()


def test_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "encoder.pkl"
    with pytest.raises(WeightsError, match="no tokenizer") as caught:
        read_encoder(path)
    assert "cdn.openai.com" in caught.value.hint
    path.write_bytes(b"not a pickle")
    with pytest.raises(WeightsError, match="cannot read tokenizer"):
        read_encoder(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(WeightsError, match="another kind of file"):
        read_encoder(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match="does not hold the encoder"):
        read_encoder(path)
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="cannot read tokenizer"):
        read_encoder(path)


def test_initial_scale():
    weight = Encoder(32, 1, 64).blocks.input.w
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 49), rel=0.05)
