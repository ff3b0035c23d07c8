"""Rules between layouts: both ways the same, nothing lost without a word."""

import pytest
import torch

from sslcli.convert._rules import Change, drop, join, rename, to_ours, to_theirs
from sslcli.errors import WeightsError

RULES = (
    rename("embed.{leaf}", "patch.{leaf}"),
    rename("layer.{i}.down.{rest}", "layers.{i+1}.down.{rest}"),
    join(("layer.{i}.q.{leaf}", "layer.{i}.k.{leaf}", "layer.{i}.v.{leaf}"), "layers.{i}.qkv.{leaf}"),
    join(("layer.{i}.q_bias", None, "layer.{i}.v_bias"), "layers.{i}.qkv_bias", optional=True),
    rename("turned", "flipped", Change(lambda x: x.flip(0), lambda x: x.flip(0)), optional=True),
    drop("index", "made again"),
)
THEIRS = {
    "embed.weight": torch.arange(3.0),
    "layer.0.down.norm.weight": torch.ones(1),
    **{f"layer.11.{n}.weight": torch.full((2, 3), float(i)) for i, n in enumerate("vqk")},
    "turned": torch.arange(4.0),
}


def test_a_table_is_read_both_ways():
    ours = to_ours(RULES, {**THEIRS, "index": torch.zeros(1)})
    assert ours.whole
    assert ours.dropped == {"index": "made again"}
    assert set(ours.tensors) == {"patch.weight", "layers.1.down.norm.weight", "layers.11.qkv.weight", "flipped"}
    assert ours.tensors["layers.11.qkv.weight"][:, 0].tolist() == [1, 1, 2, 2, 0, 0]
    assert ours.tensors["flipped"].tolist() == [3, 2, 1, 0]
    assert set(ours.origin["layers.11.qkv.weight"]) == {f"layer.11.{n}.weight" for n in "qkv"}
    back = to_theirs(RULES, ours.tensors)
    assert back.whole
    assert back.tensors.keys() == THEIRS.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in THEIRS.items())


def test_what_is_missing_between_joined_tensors_is_zero():
    biases = {"layer.0.q_bias": torch.ones(2), "layer.0.v_bias": torch.full((2,), 3.0)}
    ours = to_ours(RULES, biases)
    assert ours.tensors["layers.0.qkv_bias"].tolist() == [1, 1, 0, 0, 3, 3]
    back = to_theirs(RULES, ours.tensors).tensors
    assert back.keys() == biases.keys()
    assert torch.equal(back["layer.0.v_bias"], biases["layer.0.v_bias"])


def test_unknown_names_and_idle_rules_are_told():
    found = to_ours(RULES, {"embed.weight": torch.zeros(1), "layer.x.q.weight": torch.zeros(1)})
    assert found.unexpected == ("layer.x.q.weight",)
    assert found.unused == ("layer.{i}.down.{rest}", "layer.{i}.q.{leaf}")
    assert not found.whole
    assert to_theirs(RULES, {"other": torch.zeros(1)}).unexpected == ("other",)


def test_a_number_that_the_shift_makes_negative_fits_no_rule():
    assert to_theirs(RULES, {"layers.0.down.norm.weight": torch.zeros(1)}).unexpected == ("layers.0.down.norm.weight",)


def test_two_tensors_for_one_name_are_refused():
    rules = (rename("a.{leaf}", "x.{leaf}"), rename("b.{leaf}", "x.{leaf}"))
    with pytest.raises(WeightsError, match=r"both `a\.w` and `b\.w` would become `x\.w`"):
        to_ours(rules, {"a.w": torch.zeros(1), "b.w": torch.zeros(1)})


def test_parts_that_lack_or_differ_are_refused():
    with pytest.raises(WeightsError, match=r"but no `layer\.\{i\}\.v\.\{leaf\}`"):
        to_ours(RULES, {f"layer.0.{n}.weight": torch.zeros(2) for n in "qk"})
    with pytest.raises(WeightsError, match="its parts have the shapes"):
        to_ours(RULES, {f"layer.0.{n}.weight": torch.zeros(2 + (n == "v")) for n in "qkv"})
    with pytest.raises(WeightsError, match="cannot be divided into 3"):
        to_theirs(RULES, {"layers.0.qkv.weight": torch.zeros(4)})


def test_a_rule_that_loses_a_number_works_one_way():
    chunked = (rename("blocks.{chunk}.{i}.{rest}", "blocks.{i}.{rest}"),)
    assert to_ours(chunked, {"blocks.1.4.norm.weight": torch.zeros(1)}).tensors.keys() == {"blocks.4.norm.weight"}
    assert to_theirs(chunked, {"blocks.4.norm.weight": torch.zeros(1)}).unexpected == ("blocks.4.norm.weight",)
