import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from sslcli.config import yaml_file
from sslcli.errors import PresetError


@pytest.fixture
def error_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The message with which `p.yaml` of this content is refused."""
    monkeypatch.chdir(tmp_path)

    def read(content: str | bytes) -> str:
        path = Path("p.yaml")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(PresetError) as caught:
            yaml_file.read(path)
        return caught.value.message

    return read


SCALARS = {
    "1e-3": 0.001, "1e3": 1000.0, "3e-2": 0.03, "-1.5E+2": -150.0, ".5": 0.5, "1.": 1.0, "0.0": 0.0,
    "on": "on", "off": "off", "yes": "yes", "No": "No", "y": "y", "true": True, "False": False, "tRue": "tRue",
    "010": 10, "0o17": 15, "0x1F": 31, "+3": 3, "-7": -7, "1_000": "1_000", "0b1": "0b1",
    "12:30": "12:30", "1:2:3": "1:2:3", "2024-01-01": "2024-01-01", "2024-01-01 10:00:00": "2024-01-01 10:00:00",
    "null": None, "~": None, "": None, "Null": None, "none": "none", "e3": "e3", "1e": "1e", ".": ".", "-": "-",
    "=": "=", "1.2.3": "1.2.3", "resnet": "resnet",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any, tmp_path: Path) -> None:
    assert yaml_file.parse_value(text) == value
    assert type(yaml_file.parse_value(text)) is type(value)
    if text not in ("-", "="):  # not plain words inside a file
        path = tmp_path / "x.yaml"
        path.write_text(f"key: {text}\n")
        assert yaml_file.read(path).data == {"key": value}


def test_infinity_and_nan() -> None:
    assert yaml_file.parse_value("-.inf") == -math.inf
    assert math.isnan(yaml_file.parse_value(".nan"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[0.2, 1]", [0.2, 1]),
        ("[on, 1e-3, 010]", ["on", 0.001, 10]),
        ("{name: lars, lr: 3e-1}", {"name": "lars", "lr": 0.3}),
        ("'1e-3'", "1e-3"),
        ('"a: b"', "a: b"),
        ("run #3: a *star* & more", "run #3: a *star* & more"),
        (" padded ", "padded"),
        (".*\\.bias$", ".*\\.bias$"),
    ],
)
def test_values_of_overrides(text: str, value: Any) -> None:
    assert yaml_file.parse_value(text) == value


@pytest.mark.parametrize("text", ["[1, 2", "{a: 1", "'open", "{a: 1, a: 2}"])
def test_values_that_do_not_close_are_refused(text: str) -> None:
    with pytest.raises(PresetError):
        yaml_file.parse_value(text)


@pytest.mark.parametrize("text", ["{name:/x.py}", "{depth: 18, name:/x.py}", "[{name:/x.py}]"])
def test_a_colon_without_a_space_is_told(text: str, tmp_path: Path) -> None:
    wanted = "a space is missing after the colon of `name:/x.py`: write `name: /x.py`"
    with pytest.raises(PresetError, match=f"^{wanted}$"):
        yaml_file.parse_value(text)
    path = tmp_path / "x.yaml"
    path.write_text(f"seed: 1\nmethod: {text}\n")
    with pytest.raises(PresetError, match=f"x.yaml:2: {wanted}$"):
        yaml_file.read(path)
    assert yaml_file.parse_value("{url: http://x, 'a:b': , a: }") == {"url": "http://x", "a:b": None, "a": None}


def test_every_key_and_item_knows_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    path = Path("sub/x.yaml")
    path.write_text("# comment\na: 1\nb:\n  c: {d: 2,\n    e: 3}\n  f:\n    - x\n    - g: [4,\n       5]\n")
    document = yaml_file.read(path)
    assert document.data == {"a": 1, "b": {"c": {"d": 2, "e": 3}, "f": ["x", {"g": [4, 5]}]}}
    assert {key: origin.removeprefix("sub/x.yaml:") for key, origin in document.origin.items()} == {
        "a": "2", "b": "3", "b.c": "4", "b.c.d": "4", "b.c.e": "5", "b.f": "6", "b.f.0": "7", "b.f.1": "8",
        "b.f.1.g": "8", "b.f.1.g.0": "8", "b.f.1.g.1": "9",
    }  # fmt: skip


def test_an_empty_file_is_an_empty_mapping_and_aliases_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# nothing\n")
    assert yaml_file.read(path).data == {}
    path.write_bytes("\ufeffa: &one {x: 1}\r\nb: *one\r\n".encode())
    assert yaml_file.read(path).data == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim:\n  lr: 1\n  per: 2\n  lr: 3\n", "p.yaml:4: `optim.lr` is given twice, first on line 2"),
        ("a: 1\nb: [1, 2\nc: 3\n", "p.yaml:3: "),
        ("a:\n\tb: 1\n", "p.yaml:2: indent with spaces, not with tabs"),
        ("a: b: c\n", "p.yaml:1: a second `: ` on one line; put text that contains it in quotes"),
        ("a: @x\n", "put text that starts with it in quotes"),
        ("a: 1\n---\nb: 2\n", "p.yaml:2: a second document"),
        ("- a\n", "p.yaml:1: a preset is a mapping of keys to values, this is a list"),
        ("hello\n", "p.yaml:1: a preset is a mapping of keys to values, this is `hello`"),
        ("1: a\n", "p.yaml:1: a key must be text (got 1)"),
        ("[a]: b\n", "p.yaml:1: a key must be text"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "p.yaml:3: merge keys (`<<`) are not read here; use `extends`"),
        ("a: &x [*x]\n", "p.yaml:1: this alias contains itself"),
        ("a: *x\n", "p.yaml:1: found undefined alias 'x'"),
        ("a: !!python/object:os.system x\n", "p.yaml:1: tags are not read here (`!!python/object:os.system`)"),
        ("a: !!int x\n", "p.yaml:1: `x` is not int"),
        (b"a: \xff\n", "p.yaml: not a text file in UTF-8 (byte 3)"),
        ("a: \x00\n", "p.yaml: a character that YAML does not allow: '\\x00'"),
    ],
)
def test_files_that_are_refused(error_of, content: str | bytes, message: str) -> None:
    assert message in error_of(content)
    assert error_of(content).startswith("p.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"cannot read `.*none\.yaml`: no such file or directory"):
        yaml_file.read(tmp_path / "none.yaml")
    with pytest.raises(PresetError, match="is a directory"):
        yaml_file.read(tmp_path)


TEXTS = [
    "plain", "on", "1e-3", "010", "12:30", "2024-01-01", "~", "null", "true", "", " ", " lead", "trail ", "a: b",
    "a #b", "#", "-", "- x", "?", ":", "[", "]", "{x}", "*a", "&a", "!t", "%d", "@x", "`x`", "'", '"', "it's", "a\nb",
    "a\nb\n", "a\n\n", "\n", "\n a\nb", "tab\tx", "é → 日本", "\u2028", "a\x85b", "\\", "<<", "=", ".inf", "0x1f",
    "1_0", "word " * 60, "x" * 300, "a: b\n- c\n  d", "---", "...", "no", "y", "0o17", "1:2:3", "\ufeffx", "😀", "\x07",
]  # fmt: skip


KEYS = [text for text in TEXTS if "\n" not in text and len(text) < 50]


def nested(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(8 if depth else 5)
    if kind >= 6:
        return {draw.choice(KEYS): nested(draw, depth - 1) for _ in range(draw.randrange(4))}
    if kind == 5:
        return [nested(draw, depth - 1) for _ in range(draw.randrange(5))]
    numbers = [0, -3, 10**12, 0.1, 1e-6, 1e22, -1e300, 4 / 3, math.inf, 1.0, True, False, None]
    return draw.choice(TEXTS) if kind < 3 else draw.choice(numbers)


@pytest.mark.parametrize("seed", range(150))
def test_what_is_dumped_reads_back_equal(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    data = {text: nested(draw, 3) for text in draw.sample(KEYS, 6)}
    notes = {key: draw.choice(["short", "a longer note " * 12]) for key in list(data) + [f"{k}.0" for k in data]}
    path = tmp_path / "x.yaml"
    for text in (yaml_file.dump(data), yaml_file.dump(data, notes)):
        path.write_text(text, encoding="utf-8")
        found = yaml_file.read(path).data
        assert found == data
        assert repr(found) == repr(data)  # 1 is not 1.0 is not True; keys in order
        assert yaml.safe_load(text) == data  # a YAML 1.1 reader understands the same


def test_dump_is_readable() -> None:
    data = {"b": {"groups": [{"size": 224, "scale": [0.2, 1.0]}, {"size": 96}]}, "a": [], "lr": 1e-6, "name": "moco"}
    assert yaml_file.dump(data) == (
        "b:\n  groups:\n    - size: 224\n      scale: [0.2, 1.0]\n    - size: 96\na: []\nlr: 1.0e-06\nname: moco\n"
    )


def test_notes_stand_behind_values_and_above_sections() -> None:
    data = {"seed": 0, "run": {"epochs": 2, "at": [1, 2]}, "items": [{"x": 1}]}
    notes = {"seed": "the seed", "run": "how long", "run.at": "when", "items.0.x": "one", "absent": "nothing"}
    assert yaml_file.dump(data, notes) == (
        "seed: 0  # the seed\n\n# how long\nrun:\n  epochs: 2\n  at: [1, 2]  # when\nitems:\n  - x: 1  # one\n"
    )
