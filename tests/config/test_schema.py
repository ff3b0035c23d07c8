import re
import sys
from pathlib import Path
from typing import Any

import pytest

from sslcli.config import load, yaml_file
from sslcli.config.choice import members
from sslcli.config.presets import JOBS
from sslcli.config.schema import schema

TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
    "number": (int, float),
}  # fmt: skip
TALK = {"title", "description", "default", "discriminator", "$schema", "$defs", "format", "then"}


def accepts(node: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """JSON Schema as far as ours goes; a keyword it does not know is an error."""

    def holds(word: str, said: Any) -> bool:
        match word:
            case "$ref":
                return accepts(root["$defs"][said.rpartition("/")[2]], value, root)
            case "type":
                return isinstance(value, TYPES[said]) and not (said in ("integer", "number") and value in (True, False)
                                                               and isinstance(value, bool))  # fmt: skip
            case "const":
                return value == said
            case "enum":
                return value in said
            case "not":
                return not accepts(said, value, root)
            case "anyOf":
                return any(accepts(arm, value, root) for arm in said)
            case "oneOf":
                return sum(accepts(arm, value, root) for arm in said) == 1
            case "if":
                return not accepts(said, value, root) or accepts(node["then"], value, root)
        if isinstance(value, dict):
            match word:
                case "properties":
                    return all(accepts(said[key], value[key], root) for key in said.keys() & value.keys())
                case "additionalProperties":
                    assert said is False
                    return value.keys() <= node["properties"].keys()
                case "required":
                    return set(said) <= value.keys()
        if isinstance(value, list):
            match word:
                case "items":
                    return all(accepts(said, item, root) for item in value[len(node.get("prefixItems", ())) :])
                case "prefixItems":
                    return all(accepts(arm, item, root) for arm, item in zip(said, value, strict=False))
                case "minItems":
                    return len(value) >= said
                case "maxItems":
                    return len(value) <= said
        if isinstance(value, int | float):
            match word:
                case "minimum":
                    return value >= said
                case "maximum":
                    return value <= said
                case "exclusiveMinimum":
                    return value > said
                case "exclusiveMaximum":
                    return value < said
        if isinstance(value, str) and word == "pattern":
            return re.search(said, value) is not None
        known = {"properties", "additionalProperties", "required", "items", "prefixItems", "minItems", "maxItems",
                 "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern"}  # fmt: skip
        assert word in known, f"unknown keyword {word}"
        return True

    return all(holds(word, said) for word, said in node.items() if word not in TALK)


@pytest.fixture(scope="module")
def pretrain() -> dict[str, Any]:
    return schema("pretrain")


def test_every_member_is_an_arm_of_a_real_union(pretrain) -> None:
    for field, package in (("method", "sslcli.methods"), ("backbone", "sslcli.backbones")):
        union = pretrain["properties"][field]
        mapping = union["discriminator"]["mapping"]
        assert union["discriminator"]["propertyName"] == "name"
        assert sorted(mapping) == members(package)
        assert {"$ref": mapping[members(package)[0]]} in union["oneOf"]
        for name, ref in mapping.items():
            arm = pretrain["$defs"][ref.rpartition("/")[2]]
            assert arm["properties"]["name"]["const"] == name
            assert arm["additionalProperties"] is False


def test_help_texts_come_along(pretrain) -> None:
    moco = pretrain["$defs"]["methods_moco"]
    assert moco["description"].startswith("Momentum contrast")
    assert moco["properties"]["queue"]["description"] == "How many keys of past images serve as negatives."
    assert pretrain["properties"]["method"]["description"] == "How it learns."


@pytest.mark.parametrize("job", JOBS)
def test_files_and_resolved_presets_satisfy_the_schema(job: str) -> None:
    made = schema(job)
    assert load.names(job)
    for name in load.names(job):
        loaded = load.load(job, name)
        assert accepts(made, yaml_file.read(loaded.path).data, made), name
        assert accepts(made, loaded.resolved, made), name


WHOLE: dict[str, Any] = {
    "data": {"source": {"name": "digits"}}, "views": {"name": "crops", "groups": [{"repeat": 2, "scale": [0.2, 1]}]},
    "backbone": {"name": "resnet"}, "method": {"name": "moco"}, "optim": {"name": "sgd", "lr": 1}, "run": {"epochs": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"method": {"name": "moco", "queue": 16}},
        {"method": {"name": "mine.py", "anything": 3}},
        {"method": {"name": "lab.mine"}},
        {"run": {"epochs": 2, "batch_norm": 32, "clip": None}},
        {"schedule": {"name": "cosine", "warmup": {"epochs": 5}}},
    ],
)
def test_what_is_right_is_accepted(pretrain, change: dict[str, Any]) -> None:
    assert accepts(pretrain, WHOLE | change, pretrain)


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"name": "mocco"}},
        {"method": {"name": "moco", "temprature": 0.2}},
        {"method": {"name": "moco", "queue": 0}},
        {"method": {"name": "simclr", "queue": 16}},
        {"optim": {"name": "sgd", "lr": "fast"}},
        {"optim": {"name": "mine.py"}},
        {"run": {"epochs": 1, "precision": "fp61"}},
        {"views": {"name": "crops", "groups": [{"scale": [0.2]}]}},
        {"seed": True},
        {"sede": 1},
        {"extends": 3},
    ],
)
def test_what_is_wrong_is_refused(pretrain, change: dict[str, Any]) -> None:
    assert not accepts(pretrain, WHOLE | change, pretrain)


def test_a_file_that_extends_may_leave_out_what_its_parent_says(pretrain) -> None:
    assert accepts(pretrain, {"extends": "base/x", "method": {"queue": 16}, "optim": {"lr": 1}}, pretrain)
    assert not accepts(pretrain, {"extends": "base/x", "method": {"queueue": 16}}, pretrain)
    assert not accepts(pretrain, {"method": {"name": "moco"}}, pretrain)


def test_a_member_that_fails_to_import_is_left_out_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sslcli.methods

    (tmp_path / "broken.py").write_text("import no_such_dependency\n")
    monkeypatch.setattr(sslcli.methods, "__path__", [*sslcli.methods.__path__, str(tmp_path)])
    made = schema("pretrain")
    assert "broken" in members("sslcli.methods")
    assert "broken" not in made["properties"]["method"]["discriminator"]["mapping"]
    assert "moco" in made["properties"]["method"]["discriminator"]["mapping"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "left out `broken`: cannot import `broken`: No module named 'no_such_dependency'\n"
    assert "sslcli.methods.broken" not in sys.modules
