"""JSON Schema of a preset, so that editors complete keys, show their help and mark mistakes."""

import copy
import sys
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

from pydantic import BaseModel, Field, create_model

from sslcli.config import choice
from sslcli.config.base import Settings
from sslcli.config.place import shape_of
from sslcli.config.presets import JOBS
from sslcli.errors import PresetError

Json = dict[str, Any]

_OWN_MODULE: Json = {
    "title": "a module of your own: dotted.name or file.py",
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": r"\."}},
    "required": ["name"],
}


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def schema(job: str, say: Callable[[str], None] = _to_stderr) -> Json:
    """The JSON Schema (draft 2020-12) of a job's presets, as they are written: `extends` and partial sections allowed.

    Members of open sets are imported for it; one that fails to import is left out and `say` is told.
    """
    model = JOBS[job]
    found = _with_members(model, say).model_json_schema()
    for node in _mappings(found):
        if "oneOf" in node and "discriminator" in node:
            _allow_partial(node, found["$defs"])
    for name, field in model.model_fields.items():
        if shape_of(field).package is not None:
            found["properties"][name].setdefault("oneOf", []).append(_OWN_MODULE)
    required = found.pop("required", [])
    for definition in found["$defs"].values():
        _drop_inherited(definition)
    extends = {
        "title": "Extends",
        "description": "A preset, or several, to start from: later ones win, this file wins over all.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"ssl {job} preset",
        **{key: value for key, value in found.items() if key not in ("title", "properties", "$defs")},
        "properties": {"extends": extends, **found["properties"]},
        "if": {"not": {"required": ["extends"]}},
        "then": {"required": required},
        "$defs": found["$defs"],
    }


def _with_members(model: type[Settings], say: Callable[[str], None]) -> type[BaseModel]:
    """The model with each open set spelled out as the union of its members."""
    spelled: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        package = shape_of(field).package
        if package is None:
            continue
        configs = _configs(package, say)
        if configs:
            spelled[name] = (reduce(or_, configs), Field(discriminator="name", description=field.description))
    return create_model(model.__name__, __base__=model, **spelled)


def _configs(package: str, say: Callable[[str], None]) -> list[Any]:
    """`Config` of every member that can be imported, each under a name of its own."""
    found: list[Any] = []
    for name in choice.members(package):
        try:
            config = choice.config_of(package, name)
        except PresetError as error:
            say(f"left out `{name}`: {error.message}")
            continue
        # All are called `Config`; in the schema each needs a name of its own.
        found.append(create_model(f"{package.rpartition('.')[2]}_{name}", __base__=config, __doc__=config.__doc__))
    return found


def _mappings(node: Any) -> list[Json]:
    """Every mapping inside a schema."""
    inside = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    return ([node] if isinstance(node, dict) else []) + [below for part in inside for below in _mappings(part)]


def _allow_partial(union: Json, definitions: Json) -> None:
    """Let a section that is chosen by `name` leave the name to a parent."""
    members = {tag: definitions[ref.rpartition("/")[2]] for tag, ref in union["discriminator"]["mapping"].items()}
    keys: dict[str, list[Json]] = {}
    for member in members.values():
        member["required"] = sorted({"name", *member.get("required", [])})
        for key, value in member["properties"].items():
            if key != "name" and value not in keys.setdefault(key, []):
                keys[key].append(value)
    union["oneOf"].append(
        {
            "title": "other values for the one that a parent chose",
            "type": "object",
            "not": {"required": ["name"]},
            "properties": {
                key: copy.deepcopy(values[0] if len(values) == 1 else {"anyOf": values}) for key, values in keys.items()
            },
            "additionalProperties": False,
        }
    )


def _drop_inherited(definition: Json) -> None:
    """A parent may have said what is required; all a section must say is which one it is, where that is the choice."""
    required = [
        key for key in definition.pop("required", []) if key == "name" and "const" in definition["properties"][key]
    ]
    if required:
        definition["required"] = required
