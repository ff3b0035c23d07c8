"""Which model, and which of its fields, stands at a place in a preset's data.

The types of a preset say it only together with the data: a union is decided by `name`, an open set by the module that
`name` means. Error messages, comments and suggestions all need to know.
"""

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sslcli.config import choice
from sslcli.errors import PresetError

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Shape:
    """What a value may be, as far as keys go."""

    models: tuple[type[BaseModel], ...] = ()
    """The models a mapping may be validated by."""
    items: tuple[Any, ...] = ()
    """The types of list items: one for all, or one each."""
    tagged: bool = False
    """Whether `name` decides among `models`; pydantic then puts the tag into the paths of its errors."""
    package: str | None = None
    """The open set that `name` chooses from."""

    def names(self) -> list[str]:
        """What `name` may say, where there is a choice."""
        if self.package is not None:
            return choice.members(self.package)
        return [str(model.model_fields["name"].default) for model in self.models] if self.tagged else []

    def model(self, data: Any) -> type[BaseModel] | None:
        """The model of this mapping, if its `name` says or there is only one."""
        name = data.get("name") if isinstance(data, dict) else None
        if self.package is not None:
            try:
                return choice.config_of(self.package, str(name)) if name is not None else None
            except PresetError:
                return None
        if len(self.models) == 1:
            return self.models[0]
        return next(
            (model for model in self.models if self.tagged and model.model_fields["name"].default == name), None
        )

    def item(self, index: int) -> Any:
        """The type of one list item, or None where nothing is known of it."""
        if not self.items:
            return None
        return self.items[min(index, len(self.items) - 1)]


def shape_of(hint: Any, notes: Sequence[Any] = ()) -> Shape:
    """The shape a type annotation allows; `notes` are what stood beside it in `Annotated`."""
    if isinstance(hint, FieldInfo):
        return shape_of(hint.annotation, [*hint.metadata, hint])
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return shape_of(args[0], [*notes, *args[1:]])
    package = next((note.package for note in notes if isinstance(note, choice.ChosenFrom)), None)
    tagged = any(isinstance(note, FieldInfo) and note.discriminator is not None for note in notes)
    if origin in (Union, types.UnionType):
        arms = [shape_of(arm) for arm in args]
        return Shape(
            models=tuple(model for arm in arms for model in arm.models),
            items=next((arm.items for arm in arms if arm.items), ()),
            tagged=tagged or any(arm.tagged for arm in arms),
            package=package or next((arm.package for arm in arms if arm.package), None),
        )
    if origin in (tuple, list):
        return Shape(items=tuple(arg for arg in args if arg is not Ellipsis))
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return Shape((hint,), tagged=tagged, package=package)
    return Shape()


@dataclass(frozen=True)
class Place:
    """Somewhere in a preset's data."""

    key: Key
    """The path through the data, without the tags that pydantic adds."""
    owner: type[BaseModel] | None
    """The model whose field (or whose unknown key) this is."""
    field: FieldInfo | None
    """The field, where the key names one."""
    shape: Shape
    """What may stand here."""
    value: Any
    """What stands here, None where nothing does."""


def locate(model: type[BaseModel], data: Any, path: Sequence[str | int]) -> Place:
    """Follow the path of a pydantic error through the data it was raised for."""
    place = Place((), None, None, Shape((model,)), data)
    tag_seen = False
    for at, part in enumerate(path):
        node, last = place.value, at + 1 == len(path)
        if isinstance(node, list) and isinstance(part, int):
            item = node[part] if part < len(node) else None
            hint = place.shape.item(part)
            place = Place((*place.key, part), None, None, shape_of(hint) if hint is not None else Shape(), item)
            tag_seen = False
        elif isinstance(node, dict) and isinstance(part, str):
            if place.shape.tagged and not tag_seen and part == node.get("name"):
                tag_seen = True
                continue
            owner = place.shape.model(node)
            field = owner.model_fields.get(part) if owner else None
            if part not in node and field is None and not last:
                continue  # the label of an arm of an untagged union
            shape = shape_of(field) if field else Shape()
            place = Place((*place.key, part), owner, field, shape, node.get(part))
            tag_seen = False
    return place


def described(model: type[BaseModel], data: Any) -> Iterator[tuple[str, str]]:
    """Dotted key and first sentence of every field that the data mentions, outermost first."""

    def visit(shape: Shape, node: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, list):
            for i, item in enumerate(node):
                hint = shape.item(i)
                if hint is not None:
                    yield from visit(shape_of(hint), item, f"{key}{i}.")
        owner = shape.model(node) if isinstance(node, dict) else None
        if owner is None:
            return
        for word, value in node.items():
            field = owner.model_fields.get(word)
            if field is not None:
                if field.description:
                    yield f"{key}{word}", sentence(field.description)
                yield from visit(shape_of(field), value, f"{key}{word}.")

    yield from visit(Shape((model,)), data, "")


def homes(model: type[BaseModel], data: Any, word: str) -> list[str]:
    """Dotted keys of the fields called `word` that a preset of this data could have, outermost first."""
    found: list[str] = []
    level: list[tuple[str, Shape, Any]] = [("", Shape((model,)), data)]
    while level:
        below: list[tuple[str, Shape, Any]] = []
        for key, shape, node in level:
            owner = shape.model(node)
            if owner is None:
                continue
            if word in owner.model_fields:
                found.append(f"{key}{word}")
            for name, field in owner.model_fields.items():
                value = node.get(name) if isinstance(node, dict) else None
                below.append((f"{key}{name}.", shape_of(field), value))
        level = below
    return found


def sentence(text: str) -> str:
    """The first sentence of a field's help, on one line, without its full stop."""
    line = " ".join(text.split())
    return re.split(r"(?<!e\.g)(?<!i\.e)(?<!vs)\. (?=[A-Z`])", line, maxsplit=1)[0].removesuffix(".")
