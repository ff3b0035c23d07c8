from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from sslcli.config import load
from sslcli.config.base import Settings
from sslcli.config.place import described, sentence
from sslcli.config.presets import PretrainPreset
from sslcli.config.types import Count, Fraction, Positive
from sslcli.config.validate import validate
from sslcli.errors import PresetError


def problems(name: str, *overrides: str) -> list[str]:
    with pytest.raises(PresetError) as caught:
        load.load("pretrain", name, overrides)
    return caught.value.message.splitlines()


def test_five_mistakes_are_told_at_once(write) -> None:
    write(
        "five.yaml",
        """\
extends: ./good
about: {title: five mistakes}
run: {epochs: 0}
method:
  queue: -4
  temprature: 0.1
optim:
  lrr: 0.1
  momentum: fast
""",
    )
    assert problems("five") == [
        "preset `five` has 5 problem(s)",
        "  five.yaml:3: run.epochs: must be greater than 0 (got 0)",
        "  five.yaml:5: method.queue: must be at least 1 (got -4)",
        "  five.yaml:6: method.temprature: unknown key; did you mean `temperature`?",
        "  five.yaml:8: optim.lrr: unknown key; did you mean `lr`?",
        "  five.yaml:9: optim.momentum: must be a number (got 'fast')",
    ]


def test_problems_are_sorted_by_file_and_line_and_overrides_come_last(write) -> None:
    write("b.yaml", "extends: ./a\noptim: {momentum: 2}\nseed: -1\n")
    write("a.yaml", "extends: ./good\nrun:\n  epochs: 3\n\n\n\n\n\n\n  log_every: 0\n  clip: 0\n")
    lines = problems("b", "data.batch_size=0")
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        "a.yaml:10", "a.yaml:11", "b.yaml:2", "b.yaml:3", "-o data.batch_size=0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("seed: 1.5", "seed: must be a whole number (got 1.5)"),
        ("seed: 1e3x", "seed: must be a whole number (got '1e3x')"),
        ("seed:", "seed: must be a whole number (got null)"),
        ("optim: {nesterov: maybe}", "optim.nesterov: must be true or false (got 'maybe')"),
        ("optim: 3", "optim: must be a mapping that says which one with `name` (got 3)"),
        ("method: idea.py", "method: must be a mapping that says which one with `name` (got 'idea.py')"),
        ("run: 3", "run: must be a mapping of keys to values (got 3)"),
        ("about: {title: 3}", "about.title: must be text (got 3)"),
        ("about: {expects: 3}", "about.expects: must be a list (got 3)"),
        ("data: {source: {name: foldr}}", "data.source.name: no `foldr`; did you mean `folder`?"),
        ("data: {source: {name: folder}}", "data.source.path: missing: The folder; it is searched to any depth"),
        ("data: {fraction: 2}", "data.fraction: must be at most 1 (got 2)"),
        ("schedule: {end: 0}", "schedule: say which one with `name`: `constant`, `cosine`, "),
        ("schedule: {name: step}", "schedule: say when the rate drops either with `at` or with `every`"),
        ("schedule: {name: cosine, warmup: {epoch: 3}}", "schedule.warmup.epoch: unknown key; did you mean `epochs`?"),
        ("run: {precision: fp61}", "run.precision: must be `fp32`, `bf16` or `fp16`; did you mean `fp16`? (got "),
        ("run: {batch_norm: all}", "run.batch_norm: must be `global` or a whole number (got 'all')"),
        ("run: {batch_norm: 0}", "run.batch_norm: must be `global` or at least 1 (got 0)"),
        ("run: {steps: 3}", "run: give the length of the run either in `epochs` or in `steps`"),
        ("views: {groups: []}", "views.groups: must have at least 1 item (got [])"),
        ("views: {groups: [{scale: [0.2]}]}", "views.groups.0.scale: needs 2 items (got [0.2])"),
        ("views: {groups: [{scale: [1, 2, 3]}]}", "views.groups.0.scale: must have at most 2 items (got [1, 2, 3])"),
        ("views: {groups: [{scale: [0.5, 2]}]}", "views.groups.0: `scale` is a share of the image's area, at most 1"),
        ("views: {groups: [{jitter: {hue: 1}}]}", "views.groups.0.jitter.hue: must be at most 0.5 (got 1)"),
        ("views: {groups: [{blur: {simga: 1}}]}", "views.groups.0.blur.simga: unknown key; did you mean `sigma`?"),
        ("views: {crops: 3}", "views.crops: unknown key; "),
        ("optim: {rules: [{match: '('}]}", "optim.rules.0.match: not a regular expression"),
        ("optim: {rules: [{match: a, lr: 3}]}", "optim.rules.0.lr: unknown key; did you mean `lr_scale`?"),
        ("batch_size: 3", "batch_size: unknown key; did you mean `data.batch_size`?"),
        ("lr: 3", "lr: unknown key; did you mean `optim.lr`?"),
        ("optim.lr: 3", "optim.lr: unknown key; dots are for `-o`, a file nests `optim.lr`"),
        ("zzz: 3", "zzz: unknown key; there is `about`, `seed`, "),
        ("method: {name: mocco}", "method.name: no `mocco`; did you mean `moco`?"),
        ("backbone: {name: none.py}", "backbone.name: no file `none.py`"),
        ("method: {temp: 1}", "method.temp: unknown key; did you mean `temperature`?"),
    ],
)  # fmt: skip
def test_each_mistake_in_plain_words_at_its_line(write, section: str, line: str) -> None:
    write("x.yaml", f"extends: ./good\n\n{section}\n")
    first, *rest = problems("x")
    assert first == "preset `x` has 1 problem(s)"
    assert rest[0].startswith(f"  x.yaml:3: {line}")
    assert len(rest) == 1


def test_sections_that_are_missing_are_named(write) -> None:
    write("empty.yaml", "")
    lines = problems("empty")
    assert lines[0] == "preset `empty` has 6 problem(s)"
    assert lines[1] == "  empty.yaml: data: missing: Which images, how many at a time"


def test_what_does_not_fit_together_names_the_file(write) -> None:
    write("x.yaml", "extends: ./good\nviews: {groups: [{repeat: 8}]}\n")
    assert problems("x")[1].startswith("  x.yaml: method `idea.py` needs ")


def test_keys_of_real_methods_are_suggested(write) -> None:
    write("x.yaml", "extends: ./good\nmethod:\n  name: moco\n  temprature: 0.2\nbackbone: {name: resnet, dept: 18}\n")
    assert problems("x") == [
        "preset `x` has 2 problem(s)",
        "  x.yaml:4: method.temprature: unknown key; did you mean `temperature`?",
        "  x.yaml:5: backbone.dept: unknown key; did you mean `depth`?",
    ]


class _Small(Settings):
    name: Literal["small"] = "small"
    x: Count = 1


class _Large(Settings):
    name: Literal["large"] = "large"
    y: Positive
    """How large. In metres."""


class _Whole(Settings):
    one: Annotated[_Small | _Large, Field(discriminator="name")] | None = None
    many: tuple[Annotated[_Small | _Large, Field(discriminator="name")], ...] = ()
    pair: tuple[Fraction, _Small] | None = None
    either: _Small | Count = 1


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"one": {"name": "small", "x": 0}}, "one.x: must be at least 1 (got 0)"),
        ({"one": {"name": "small", "small": 0}}, "one.small: unknown key; there is `name` and `x`"),
        ({"many": [{"name": "small"}, {"name": "large"}]}, "many.1.y: missing: How large"),
        ({"many": [{"name": "small", "x": 0}]}, "many.0.x: must be at least 1 (got 0)"),
        ({"many": [{"name": "huge"}]}, "many.0.name: no `huge`; there is `small`, `large`"),
        ({"many": [{}]}, "many.0: say which one with `name`: `small` and `large`"),
        ({"pair": [0.5, {"x": 0}]}, "pair.1.x: must be at least 1 (got 0)"),
        ({"pair": [0.5]}, "pair: needs 2 items (got [0.5])"),
        ({"either": {"x": 0}}, "either.x: must be at least 1 (got 0)"),
    ],
)
def test_tags_of_unions_never_show_in_keys(data: dict, line: str) -> None:
    with pytest.raises(PresetError) as caught:
        validate(_Whole, data, title="it")
    assert f"  {line}" in caught.value.message.splitlines()


def test_help_of_every_key_of_the_data(write) -> None:
    notes = dict(described(PretrainPreset, load.load("pretrain", "good").resolved))
    assert notes["method.temperature"] == "Divisor of similarities"
    assert notes["views.groups.0.jitter.hue"] == "Shift drawn from [-x, x] turns of the hue circle"
    assert notes["optim.lr"].startswith("Base learning rate")
    assert list(notes)[:2] == ["about", "about.title"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One. Two.", "One"),
        ("A name, e.g. `x$`. More.", "A name, e.g. `x$`"),
        ("`a`: this. `b`: that.", "`a`: this"),
        ("Two\nlines.", "Two lines"),
        ("(Goyal et al. 2017)", "(Goyal et al. 2017)"),
    ],
)
def test_first_sentences(text: str, first: str) -> None:
    assert sentence(text) == first


def test_validating_imports_no_torch(write) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from sslcli.config import load; load.load('pretrain', 'good'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path.cwd())
