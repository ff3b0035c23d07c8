"""Weights as files: what goes out comes back the same; what is damaged, foreign or does not fit is refused by name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslcli.config.load import load as load_preset
from sslcli.contracts import RunFacts
from sslcli.engine import checkpoint
from sslcli.engine.build import method_of
from sslcli.engine.pretrain import pretrain
from sslcli.errors import SslError, WeightsError
from sslcli.features import weights
from sslcli.features.weights import Manifest, digest_of, extract, load, save


@pytest.fixture
def extracted(tiny_run: Path, tmp_path: Path) -> Path:
    return extract(tiny_run, tmp_path / "b.safetensors").path


def rewritten(path: Path, change: dict[str, Tensor | None], **manifest: object) -> Path:
    """The file with some tensors replaced, added or taken away, and a manifest that agrees."""
    known = json.loads(path.with_name(f"{path.stem}.manifest.json").read_text())
    tensors = {name: t for name, t in {**load_file(path), **change}.items() if t is not None}
    text = json.dumps({**known, "digest": digest_of(tensors), **manifest})
    out = path.with_name("changed.safetensors")
    save_file(tensors, out, metadata={"ssl": text})
    return out


def test_a_run_a_checkpoint_and_an_extracted_file_hold_the_same(tiny_run: Path, extracted: Path):
    found = [load(what) for what in (tiny_run, checkpoint.newest(tiny_run), extracted, str(extracted))]
    assert len({w.digest for w in found}) == 1
    images = torch.rand(2, 3, 32, 32)
    out = [w.backbone(images) for w in found]
    assert all(torch.equal(out[0], other) for other in out)
    assert not any(module.training for w in found for module in w.backbone.modules())
    assert not any(p.requires_grad for w in found for p in w.backbone.parameters())
    assert [w.run for w in found] == [tiny_run, tiny_run, None, None]
    assert found[2].preset().method.name == "simclr"


def test_the_weights_are_the_students_of_the_checkpoint(tiny_run: Path):
    state = checkpoint.read(checkpoint.newest(tiny_run))
    stored = {name.removeprefix("backbone.trunk."): t for name, t in state["method"].items() if "trunk" in name}
    assert load(tiny_run).digest == digest_of(stored)


def test_the_manifest_says_where_the_weights_come_from(tiny_run: Path, extracted: Path):
    side = json.loads(extracted.with_name("b.manifest.json").read_text())
    manifest = Manifest.model_validate(side)
    assert manifest == load(extracted).manifest
    assert (manifest.method, manifest.step, manifest.epoch, manifest.layout) == ("simclr", 4, 2.0, "torchvision")
    assert manifest.view.size == 32
    assert manifest.view.normalize.mean == (0.485, 0.456, 0.406)
    assert manifest.backbone["width"] == 8
    assert manifest.source.images == 64
    assert manifest.source.classes == tuple("0123456789")
    assert manifest.preset == checkpoint.read(checkpoint.newest(tiny_run))["preset"]
    assert manifest.tensors == len(load_file(extracted))
    assert manifest.digest == digest_of(load_file(extracted))


def test_any_bit_changes_the_digest():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    seen = {
        digest_of(tensors),
        digest_of({**tensors, "a": tensors["a"].reshape(3, 2)}),
        digest_of({**tensors, "a": tensors["a"].nextafter(torch.tensor(9.0))}),
        digest_of({"b": tensors["a"], "n": tensors["n"]}),
        digest_of({**tensors, "n": torch.tensor(3, dtype=torch.int32)}),
    }
    assert len(seen) == 5
    assert digest_of({"n": tensors["n"], "a": tensors["a"].t().contiguous().t()}) == digest_of(tensors)


def test_a_resnet50_goes_into_timm_and_torchvision(tmp_path: Path):
    settings = (
        "data.source.count=16", "data.batch_size=8", "run.epochs=null", "run.steps=1", "run.views=fast",
        "run.tensorboard=false", "backbone.depth=50", "backbone.width=64", "backbone.stem=imagenet",
    )  # fmt: skip
    pretrain(load_preset("pretrain", "demo-digits", settings).preset, tmp_path / "run")
    done = extract(tmp_path / "run")
    assert done.path == tmp_path / "run" / "backbone.safetensors"
    assert (done.matched, done.manifest.tensors, done.difference) == (318, 318, 0)
    tensors = load_file(done.path)
    ours = load(done.path).backbone
    images = torch.rand(2, 3, 64, 64)

    theirs = timm.create_model("resnet50", num_classes=0).eval()
    theirs.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=0)

    vision = torchvision.models.resnet50()
    fc = {name: t for name, t in vision.state_dict().items() if name.startswith("fc.")}
    vision.load_state_dict({**tensors, **fc}, strict=True)
    vision.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(vision.eval()(images), ours(images))


def test_moco_exports_the_query_encoder_and_a_vit_timms_names(tmp_path: Path):
    settings = (
        "method={name: moco, queue: 64}", "data.source.count=16", "data.batch_size=8", "run.epochs=null",
        "run.steps=2", "run.views=fast", "run.tensorboard=false",
        "backbone={name: vit, size: tiny, depth: 2, patch: 8, image_size: 32}",
    )  # fmt: skip
    pretrain(load_preset("pretrain", "demo-digits", settings).preset, tmp_path)
    found = load(tmp_path)
    state = checkpoint.read(checkpoint.newest(tmp_path))["method"]
    query = {n.removeprefix("backbone.trunk."): t for n, t in state.items() if n.startswith("backbone.trunk.")}
    assert found.digest == digest_of(query)
    assert found.manifest.layout == "timm"
    assert {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight"} <= set(query)


def test_extracting_again_does_nothing(extracted: Path):
    before = extracted.stat().st_mtime_ns
    again = extract(extracted)
    assert (again.already, again.path) == (True, extracted)
    assert extracted.stat().st_mtime_ns == before
    copied = extract(extracted, extracted.with_name("copy.safetensors"))
    assert copied.already
    assert load(copied.path).digest == load(extracted).digest
    assert load(copied.path).manifest == load(extracted).manifest


def test_one_checkpoint_of_a_run_goes_beside_the_last(tiny_run: Path):
    first = checkpoint.all_in(tiny_run)[0]
    done = extract(first)
    assert done.path == tiny_run / f"backbone_{first.stem}.safetensors"
    assert done.manifest.step == 2
    assert load(tiny_run).manifest.step == 4


def test_a_stale_extracted_file_is_not_used(tiny_run: Path):
    extract(checkpoint.all_in(tiny_run)[0], tiny_run / weights.FILE)
    assert load(tiny_run).manifest.step == 4
    assert extract(tiny_run).manifest.step == 4  # and is replaced
    assert load(tiny_run).file == tiny_run / weights.FILE
    shutil.rmtree(tiny_run / "checkpoints")
    assert load(tiny_run).manifest.step == 4


def test_another_layout_is_refused(tiny_run: Path, tmp_path: Path):
    assert extract(tiny_run, tmp_path / "t.safetensors", layout="timm").matched > 0
    with pytest.raises(WeightsError, match="torchvision, not of `detectron2`"):
        extract(tiny_run, tmp_path / "d.safetensors", layout="detectron2")


def test_missing_unexpected_and_misshapen_tensors_are_told(extracted: Path):
    for change, told in (
        ({"bn1.weight": None}, r"1 missing \(`bn1\.weight`\)"),
        ({"fc.weight": torch.zeros(2, 2)}, r"1 unexpected \(`fc\.weight`\)"),
        ({"bn1.weight": torch.zeros(5)}, r"1 of another shape \(`bn1\.weight`\)"),
    ):
        path = rewritten(extracted, change)
        with pytest.raises(WeightsError, match=told) as caught:
            load(path)
        assert caught.value.hint is not None
        assert "--allow-partial" in caught.value.hint
        partly = load(path, allow_partial=True)
        assert not partly.match.whole
        assert partly.digest != load(extracted).digest or "fc.weight" in change


def test_a_file_that_fits_nowhere_is_refused_even_in_part(extracted: Path):
    nothing = dict.fromkeys(load_file(extracted)) | {"encoder.weight": torch.zeros(2)}
    with pytest.raises(WeightsError, match="0 tensors match"):
        load(rewritten(extracted, nothing), allow_partial=True)


def test_tensors_the_manifest_does_not_describe_are_refused(extracted: Path):
    path = rewritten(extracted, {"bn1.weight": torch.ones(8) * 2}, digest="0" * 64)
    with pytest.raises(WeightsError, match="not the ones its manifest describes"):
        load(path)


def test_values_that_are_not_finite_are_refused(tiny_run: Path, extracted: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match=r"`bn1\.weight` holds values that are not finite"):
        load(rewritten(extracted, {"bn1.weight": torch.full((8,), torch.nan)}), allow_partial=True)
    state = checkpoint.read(checkpoint.newest(tiny_run))
    state["method"]["backbone.trunk.bn1.weight"][0] = torch.inf
    broken = tmp_path / "step_00000009.pt"
    checkpoint.write(broken, state)
    with pytest.raises(WeightsError, match="not finite"):
        load(broken)


def test_foreign_and_damaged_files_are_refused_by_name(tiny_run: Path, extracted: Path, tmp_path: Path):
    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    whole = extracted.read_bytes()
    newest = checkpoint.newest(tiny_run).read_bytes()
    foreign = tmp_path / "resnet50.pth"
    torch.save({"state_dict": {"conv1.weight": torch.zeros(2)}}, foreign)
    half = tmp_path / "half.pt"
    torch.save({"format": 1, "version": "0.1.0", "method": {}}, half)
    bare = tmp_path / "bare.safetensors"
    save_file({"conv1.weight": torch.zeros(2)}, bare)
    alexnet = rewritten(extracted, {}, backbone={"name": "alexnet"}).rename(tmp_path / "alexnet.safetensors")
    cases = {
        tmp_path / "none.pt": "no run folder or weights file",
        written("cut.safetensors", whole[: len(whole) // 2]): "not a whole safetensors file",
        written("empty.safetensors", b""): "not a whole safetensors file",
        written("cut.pt", newest[: len(newest) // 2]): "cut short",
        written("empty.pt", b""): "is empty",
        written("old.pth.tar", pickle.dumps({"a": 1})): "holds no tensors",
        written("notes.txt", b"weights"): "no file of weights",
        written("text.pth", b"hello this is text"): "it makes no sense as a pickle",
        foreign: "in no layout that ssl knows",
        half: "lacks `preset`",
        bare: "in no layout that ssl knows",
        rewritten(extracted, {}, format=2).rename(
            tmp_path / "later.safetensors"
        ): "manifest this version does not understand",
        alexnet: "cannot be built here: no `alexnet`",
    }
    for path, told in cases.items():
        with pytest.raises(WeightsError, match=told) as caught:
            load(path)
        assert path.name in str(caught.value) or path == alexnet
    for path in (foreign, bare):
        with pytest.raises(WeightsError) as caught:
            load(path)
        assert caught.value.hint is not None
        assert "ssl inspect" in caught.value.hint


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    path = tmp_path / "step_00000001.pt"
    torch.save({"format": 1, "method": Evil()}, path)
    with pytest.raises(WeightsError):
        load(path)
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_of_another_network_is_refused(tiny_run: Path, tmp_path: Path):
    state = checkpoint.read(checkpoint.newest(tiny_run))
    state["preset"]["backbone"]["width"] = 16
    path = tmp_path / "step_00000001.pt"
    checkpoint.write(path, state)
    with pytest.raises(WeightsError, match="does not fit the network its preset describes"):
        load(path)
    state["preset"]["backbone"]["wdth"] = 16
    checkpoint.write(path, state)
    with pytest.raises(WeightsError, match="preset this version does not understand"):
        load(path)


def test_an_interrupted_write_leaves_the_old_file(extracted: Path):
    found = load(extracted)
    before = extracted.read_bytes()
    found.backbone.trunk.bn1.weight.data[0] = torch.nan
    with pytest.raises(WeightsError, match="not finite"):
        save(found.backbone, found.manifest, extracted)
    with pytest.raises(SslError, match="cannot write"):
        save(load(extracted).backbone, found.manifest, extracted / "below" / "x.safetensors")
    assert extracted.read_bytes() == before
    assert not list(extracted.parent.glob(".*tmp"))


def test_an_untrained_network_is_a_function_of_its_seed():
    config = {"name": "resnet", "depth": 10, "width": 8, "stem": "small"}
    nets = [weights.network(config, seed=seed) for seed in (0, 0, 1)]
    digests = [digest_of(net.trunk.state_dict()) for net in nets]
    assert digests[0] == digests[1] != digests[2]


def test_facts_of_a_checkpoint_rebuild_the_method(tiny_run: Path):
    state = checkpoint.read(checkpoint.newest(tiny_run))
    preset = load(tiny_run).preset()
    method = method_of(preset, RunFacts(**state["facts"]))
    assert set(method.state_dict()) == set(state["method"])


def test_the_slow_twin_of_a_run_can_be_asked_for(tmp_path: Path):
    method = "method={name: moco, queue: 64}"
    settings = ("data.source.count=64", "data.batch_size=32", "run.epochs=1", "run.views=fast", "run.monitor=null",
                "run.tensorboard=false", "backbone.width=8", method)  # fmt: skip
    pretrain(load_preset("pretrain", "demo-digits", settings).preset, tmp_path)
    state = checkpoint.read(checkpoint.newest(tmp_path))["method"]
    for part, place in (("student", "backbone"), ("teacher", "slow_backbone"), (None, "backbone")):
        found = load(tmp_path, part=part).backbone.trunk.state_dict()
        assert torch.equal(found["layer1.0.conv1.weight"], state[f"{place}.trunk.layer1.0.conv1.weight"])
    assert not torch.equal(state["slow_backbone.trunk.conv1.weight"], state["backbone.trunk.conv1.weight"])


def test_a_part_that_is_not_there_is_refused(tiny_run: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="`simclr` has no network `teacher`"):
        load(tiny_run, part="teacher")
    file = extract(tiny_run, tmp_path / "b.safetensors").path
    with pytest.raises(WeightsError, match="holds one network only"):
        load(file, part="student")
