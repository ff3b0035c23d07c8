from pathlib import Path
from typing import Any

import pytest

from sslcli.config import load
from sslcli.config.presets import JOBS, PretrainPreset, as_data
from sslcli.errors import PresetError


def refused(name: str, *overrides: str, **extra: Any) -> list[str]:
    """The lines of the error that loading gives."""
    with pytest.raises(PresetError) as caught:
        load.load("pretrain", name, overrides, extra)
    return caught.value.message.splitlines()


def test_values_and_where_they_come_from(write) -> None:
    loaded = load.load("pretrain", "good", ["optim.lr=0.06", "views.groups.0.scale.1=0.9"], {"seed": (3, "--seed")})
    assert isinstance(loaded.preset, PretrainPreset)
    assert loaded.path == Path("good.yaml")
    assert loaded.preset.optim.lr == 0.06
    assert loaded.preset.seed == 3
    assert loaded.preset.views.groups[0].scale == (0.2, 0.9)
    assert loaded.data["optim"] == {"name": "sgd", "lr": 0.06, "per": 256}
    said = loaded.origin
    assert said["optim.lr"] == "-o optim.lr=0.06"
    assert said["seed"] == "--seed"
    assert said["optim.per"] == "good.yaml:16"
    assert said["views.groups.0.scale.0"] == "good.yaml:9"
    assert said["views.groups.0.scale.1"] == "-o views.groups.0.scale.1=0.9"
    assert said["views.groups.0.jitter.hue"] == "default"
    assert said["run.log_every"] == "default"
    assert said["method.temperature"] == "good.yaml:12"
    assert said.keys() == dict(load.every_key(as_data(loaded.preset))).keys()


def test_resolved_data_makes_the_same_preset(write) -> None:
    loaded = load.load("pretrain", "good")
    assert load.from_data("pretrain", loaded.resolved) == loaded.preset
    assert next(iter(loaded.resolved["optim"])) == "name"


# --- finding ---


def test_a_path_wins_then_the_current_folder_then_the_shipped_presets(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, wheel = tmp_path / "presets", tmp_path / "wheel"
    monkeypatch.setattr(load, "roots", lambda: [shipped, wheel])
    for path in ("presets/pretrain/one.yaml", "wheel/pretrain/one.yaml", "wheel/pretrain/two.yaml", "three.yaml"):
        write(path, "")
    write("wheel/pretrain/three.yaml", "")
    assert load.names("pretrain") == ["one", "three", "two"]
    assert load.find("pretrain", "one") == shipped / "pretrain" / "one.yaml"
    assert load.find("pretrain", "two") == wheel / "pretrain" / "two.yaml"
    assert load.find("pretrain", "three") == Path("three.yaml")
    assert load.find("pretrain", "wheel/pretrain/three.yaml") == Path("wheel/pretrain/three.yaml")
    write("one", "")
    assert load.find("pretrain", "one") == Path("one")


def test_unknown_names_offer_the_nearest(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "roots", lambda: [tmp_path / "presets"])
    for name in ("mocov2-r50-200e", "mocov2-r50-800e", "simclr-r50-200e"):
        write(f"presets/pretrain/{name}.yaml", "")
    with pytest.raises(PresetError) as caught:
        load.find("pretrain", "moco2-r50-200e")
    assert caught.value.message.startswith("no preset `moco2-r50-200e`; did you mean `mocov2-r50-200e` or ")
    assert caught.value.hint == "`ssl presets list --job pretrain`"
    with pytest.raises(PresetError) as caught:
        load.find("pretrain", "qqq")
    assert caught.value.message == "no preset `qqq`"
    with pytest.raises(PresetError) as caught:
        load.find("pretrain", "runs/simclr-r50-200e.yaml")
    assert caught.value.message == "no file `runs/simclr-r50-200e.yaml`; did you mean `simclr-r50-200e` or " + (
        "`mocov2-r50-200e` or `mocov2-r50-800e`?"
    )


def test_the_job_of_a_file_is_the_one_whose_sections_it_has(write) -> None:
    write("protocol.yaml", "evaluator: {name: knn}\n")
    assert load.job_of("protocol") == "eval"
    assert load.job_of("good.yaml") == "pretrain"
    with pytest.raises(PresetError, match="no preset `absent`"):
        load.job_of("absent")


# --- extends ---


def test_later_parents_win_and_the_file_wins_over_all(write) -> None:
    write("a.yaml", "extends: ./good\noptim: {lr: 1, weight_decay: 0.1}\nseed: 1\n")
    write("b.yaml", "optim: {lr: 2}\nseed: 2\n")
    write("c.yaml", "extends: [./a, b.yaml]\nseed: 3\n")
    loaded = load.load("pretrain", "c")
    assert loaded.data["optim"] == {"name": "sgd", "lr": 2, "per": 256, "weight_decay": 0.1}
    assert loaded.data["seed"] == 3
    assert "extends" not in loaded.data
    assert [loaded.origin[f"optim.{key}"] for key in ("name", "lr", "weight_decay")] == [
        "good.yaml:14", "b.yaml:1", "a.yaml:2",
    ]  # fmt: skip


def test_lists_replace_and_forget_where_their_items_came_from(write) -> None:
    write("child.yaml", "extends: ./good\nviews:\n  groups:\n    - {size: 16}\n    - {size: 24}\n")
    loaded = load.load("pretrain", "child")
    assert loaded.data["views"] == {"name": "crops", "groups": [{"size": 16}, {"size": 24}]}
    assert loaded.origin["views.groups.0.scale"] == "default"
    assert loaded.origin["views.groups.1.size"] == "child.yaml:5"


def test_a_mapping_that_changes_its_name_replaces_its_parent_whole(write) -> None:
    write("child.yaml", "extends: ./good\noptim: {name: lars, lr: 0.3}\n")
    loaded = load.load("pretrain", "child")
    assert loaded.data["optim"] == {"name": "lars", "lr": 0.3}
    assert loaded.origin["optim.per"] == "default"
    write("same.yaml", "extends: ./good\noptim: {name: sgd, lr: 0.3}\n")
    assert load.load("pretrain", "same").data["optim"] == {"name": "sgd", "lr": 0.3, "per": 256}


def test_null_replaces_a_mapping(write) -> None:
    write("child.yaml", "extends: ./good\nschedule: {name: cosine, warmup: {epochs: 1}}\n")
    write("grandchild.yaml", "extends: ./child\nschedule: {warmup: null}\n")
    assert load.load("pretrain", "grandchild").preset.schedule.warmup is None


def test_two_parents_with_a_common_base_do_not_undo_each_other(write) -> None:
    write("first.yaml", "extends: ./good\nseed: 1\n")
    write("second.yaml", "extends: ./good\noptim: {lr: 5}\n")
    write("good.yaml", Path("good.yaml").read_text() + "seed: 9\n")
    write("both.yaml", "extends: [./first, ./second]\n")
    loaded = load.load("pretrain", "both")
    assert (loaded.data["seed"], loaded.data["optim"]["lr"]) == (1, 5)


def test_names_start_from_the_shipped_presets_and_paths_from_the_file(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "roots", lambda: [tmp_path / "presets"])
    write("presets/base/common.yaml", Path("good.yaml").read_text())
    write("presets/pretrain/shipped.yaml", "extends: base/common\nseed: 1\n")
    write("mine/own.yaml", "extends: shipped\nseed: 2\n")
    write("mine/deep/own.yaml", "extends: ../own\nseed: 3\n")
    loaded = load.load("pretrain", "mine/deep/own.yaml")
    assert loaded.data["seed"] == 3
    assert loaded.origin["optim.lr"] == "presets/base/common.yaml:15"
    assert refused(write("x.yaml", "extends: base/comon\n").name) == [
        "x.yaml:1: extends: no `base/comon`; did you mean `base/common`?"
    ]
    assert refused(write("x.yaml", "seed: 1\nextends:\n  - ./good\n  - ./absent\n").name) == [
        "x.yaml:4: extends: no file `absent.yaml`"
    ]


def test_circles_are_reported_as_a_path(write) -> None:
    write("a.yaml", "extends: ./b\n")
    write("b.yaml", "extends: ./c\n")
    write("c.yaml", "extends: ./b\n")
    assert refused("a") == ["`extends` goes in a circle: `b.yaml` → `c.yaml` → `b.yaml`"]


@pytest.mark.parametrize("said", ["3", "{a: b}", "[a, 3]"])
def test_extends_must_be_names(write, said: str) -> None:
    write("x.yaml", f"seed: 1\nextends: {said}\n")
    assert refused("x")[0].startswith("x.yaml:2: extends: must be a name or a list of names")


# --- overrides ---


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.name=lars", "optim.lr=0.3"],
        ["optim.lr=0.3", "optim.name=lars"],
        ["optim={name: lars, lr: 0.3}"],
        ["optim={name: lars, lr: 9}", "optim.lr=0.3"],
    ],
)
def test_overrides_follow_the_rules_of_files_in_any_order(write, overrides: list[str]) -> None:
    loaded = load.load("pretrain", "good", overrides)
    assert loaded.data["optim"] == {"name": "lars", "lr": 0.3}
    assert loaded.origin["optim.per"] == "default"


def test_overrides_reach_into_lists_and_make_what_is_missing(write) -> None:
    loaded = load.load(
        "pretrain", "good",
        ["views.groups.0.size=16", "views.groups.0.jitter.hue=0.2", "schedule.name=cosine", "schedule.warmup.epochs=1",
         "views.groups.0.blur={p: 1}", "about.title=run #3: a test", "optim.rules=[{one_dim: true}]",
         "optim.rules.0.weight_decay=0"],
    )  # fmt: skip
    group = loaded.preset.views.groups[0]
    assert (group.size, group.repeat, group.jitter.p, group.jitter.hue, group.blur.p) == (16, 2, 0.8, 0.2, 1)
    assert loaded.preset.schedule.warmup.epochs == 1
    assert loaded.preset.about.title == "run #3: a test"
    assert loaded.preset.optim.rules[0].weight_decay == 0
    assert loaded.origin["schedule.warmup.epochs"] == "-o schedule.warmup.epochs=1"
    assert loaded.origin["views.groups.0.jitter.p"] == "good.yaml:10"


def test_a_list_item_can_be_replaced(write) -> None:
    loaded = load.load("pretrain", "good", ["views.groups=[{repeat: 1}, {repeat: 1}]", "views.groups.1={size: 64}"])
    assert loaded.data["views"]["groups"] == [{"repeat": 1}, {"repeat": 1, "size": 64}]


def test_of_two_overrides_of_one_key_the_later_wins_and_both_win_over_flags(write) -> None:
    loaded = load.load("pretrain", "good", ["seed=1", "seed=2"], {"seed": (3, "--seed")})
    assert (loaded.preset.seed, loaded.origin["seed"]) == (2, "-o seed=2")


def test_loading_twice_gives_equal_presets_and_leaves_no_trace(write) -> None:
    flag = {"data.source": ({"name": "digits", "split": "test"}, "--data")}
    changed = load.load("pretrain", "good", ["data.source.split=all"], flag)
    assert changed.preset.data.source.split == "all"
    assert flag == {"data.source": ({"name": "digits", "split": "test"}, "--data")}
    assert load.load("pretrain", "good").preset == load.load("pretrain", "good").preset


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr", ": write `-o key=value`, e.g. `-o optim.lr=0.1`"),
        ("=3", ": write `-o key=value`, e.g. `-o optim.lr=0.1`"),
        ("optim..lr=3", ": write `-o key=value`, e.g. `-o optim.lr=0.1`"),
        ("optim.lrr=3", ": optim.lrr: unknown key; did you mean `lr`?"),
        ("optm.lr=3", ": optm: unknown key; did you mean `optim`?"),
        ("epochs=3", ": epochs: unknown key; did you mean `run.epochs`?"),
        ("method.name=moko", ": method.name: no `moko`; did you mean `moco`?"),
        ("optim.name=sdg", ": optim.name: no `sdg`; did you mean `sgd`?"),
        ("views.groups.1.size=3", ": views.groups.1.size: `views.groups` has 1 item(s), counted from 0 (got `1`)"),
        ("views.groups.x.size=3", ": views.groups.x.size: `views.groups` has 1 item(s), counted from 0 (got `x`)"),
        ("optim.rules.0.lr_scale=3", ": optim.rules.0.lr_scale: reaches into a list that is not there; "),
        ("run.epochs=[1", ": run.epochs: "),
        ("data.batch_size=0", ": data.batch_size: must be at least 1 (got 0)"),
        ("extends=base/x", ": extends: unknown key"),
    ],
)  # fmt: skip
def test_an_override_at_fault_is_named(write, override: str, line: str) -> None:
    first, *rest = refused("good", override)
    assert first == "preset `good` has 1 problem(s)"
    assert rest[0].startswith(f"  -o {override}{line}")
    assert len(rest) == 1


def test_a_file_at_fault_is_named_although_an_override_reached_into_its_list(write) -> None:
    lines = refused("good", "views.groups.0.scale.1=0.1")
    assert lines[1:] == ["  good.yaml:9: views.groups.0.scale: the smaller number comes first (got [0.2, 0.1])"]


def test_a_flag_at_fault_is_named(write) -> None:
    assert refused("good", seed=(-1, "--seed")) == [
        "preset `good` has 1 problem(s)",
        "  --seed: seed: must be at least 0 (got -1)",
    ]


def test_a_missing_key_points_at_the_override_that_made_the_section(write) -> None:
    assert refused("good", "optim.name=lars")[1].startswith("  -o optim.name=lars: optim.lr: missing: Base learning")


# --- stored data ---


def test_stored_data_is_validated_with_the_same_words(write) -> None:
    data = load.load("pretrain", "good").resolved
    data["method"]["temprature"] = 1
    data["run"]["epochs"] = "many"
    with pytest.raises(PresetError) as caught:
        load.from_data("pretrain", data, "the preset in `last.pt`")
    assert caught.value.message.splitlines() == [
        "the preset in `last.pt` has 2 problem(s)",
        "  method.temprature: unknown key; did you mean `temperature`?",
        "  run.epochs: must be a number (got 'many')",
    ]


# --- what is shipped ---

SHIPPED = [(job, name) for job in JOBS for name in load.names(job)]


@pytest.mark.parametrize(("job", "name"), SHIPPED)
def test_every_shipped_preset_is_valid_and_says_what_it_is(job: str, name: str) -> None:
    loaded = load.load(job, name)
    assert load.from_data(job, loaded.resolved) == loaded.preset
    assert loaded.resolved["about"]["title"]
    assert load.job_of(name) == job
