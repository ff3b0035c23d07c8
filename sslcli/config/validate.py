"""From plain data to a validated preset, or to one error that names every problem with its file and line."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sslcli.config.place import Place, homes, locate, sentence
from sslcli.config.spelling import nearest, none_such
from sslcli.errors import PresetError

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a preset."""

    origin: str
    """`file:line`, the override that said it, or empty where neither is known."""
    key: str
    """Dotted key, empty for the preset as a whole."""
    message: str
    """What is wrong, in plain words."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin, self.key, self.message) if part)


def validate(
    model: type[M],
    data: Mapping[str, Any],
    *,
    title: str,
    origin: Mapping[str, str] | None = None,
    whole: str = "",
    found: Sequence[Problem] = (),
) -> M:
    """Validate plain data.

    Args:
        model: what the data must satisfy.
        data: mappings, lists and scalars.
        title: what to call the data in the error, e.g. "preset `mine`".
        origin: `file:line` or override of each dotted key.
        whole: origin of what concerns no single key.
        found: problems found before, reported together with the new ones.

    Raises:
        PresetError: the data is not valid; one line for each problem, sorted by file and line.
    """
    problems = list(found)
    try:
        valid = model.model_validate(data)
    except ValidationError as error:
        problems += _problems(model, data, error.errors(include_url=False), origin or {}, whole)
    if problems:
        raise failure(title, problems)
    return valid


def failure(title: str, problems: Iterable[Problem]) -> PresetError:
    """The error that lists these problems by file and line."""
    listed = sorted(problems, key=_by_file_and_line)
    lines = [f"{title} has {len(listed)} problem(s)", *(f"  {problem}" for problem in listed)]
    return PresetError("\n".join(lines))


def origin_of(origin: Mapping[str, str], key: Sequence[str | int], whole: str = "") -> str:
    """Where a key was said: its own origin, or that of the innermost mapping or list around it."""
    for end in range(len(key), 0, -1):
        said = origin.get(dotted(key[:end]))
        if said is not None:
            return said
    return whole


def dotted(key: Sequence[str | int]) -> str:
    """A path as one writes it behind `-o`."""
    return ".".join(str(part) for part in key)


def _by_file_and_line(problem: Problem) -> tuple[bool, str, int]:
    place = re.fullmatch(r"(.*):(\d+)", problem.origin)
    return (False, place[1], int(place[2])) if place else (True, problem.origin, 0)


def _problems(
    model: type[BaseModel],
    data: Mapping[str, Any],
    errors: Sequence[ErrorDetails],
    origin: Mapping[str, str],
    whole: str,
) -> list[Problem]:
    """One problem for each key; what the arms of a union say of the same value is joined.

    A key that is missing because it is misspelt counts once, as the misspelling.
    """
    meant = {
        (*place.key[:-1], _nearest_field(place))
        for place in (locate(model, data, error["loc"]) for error in errors if error["type"] == "extra_forbidden")
    }
    messages: dict[tuple[str | int, ...], list[str]] = {}
    values: dict[tuple[str | int, ...], str] = {}
    for error in errors:
        if error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
            continue  # pydantic counts only the items that are valid; those that are not have their own error
        place = locate(model, data, error["loc"])
        if error["type"] == "missing" and place.key in meant:
            continue
        key, message, value = _said(model, data, place, error)
        messages.setdefault(key, []).append(message)
        values[key] = value
    return [
        Problem(origin_of(origin, key, whole), dotted(key), f"{_either(said)}{values[key]}")
        for key, said in messages.items()
    ]


def _said(
    model: type[BaseModel], data: Mapping[str, Any], place: Place, error: ErrorDetails
) -> tuple[tuple[str | int, ...], str, str]:
    """The key that is at fault, what is wrong with it, and ` (got …)` where the value says more."""
    key, kind, context = place.key, error["type"], error.get("ctx", {})
    if kind == "missing" and key and isinstance(key[-1], int):
        around = locate(model, data, error["loc"][:-1])
        return around.key, f"needs {len(around.shape.items)} items", _got(around.value)
    if kind == "missing":
        help_text = place.field.description if place.field else None
        return key, f"missing: {sentence(help_text)}" if help_text else "missing", ""
    if kind == "extra_forbidden":
        return key, _unknown(model, data, place), ""
    if kind in ("union_tag_not_found", "name_missing"):
        return key, f"say which one with `name`: {_listed(place.shape.names())}", ""
    if kind == "union_tag_invalid":
        return (*key, "name"), none_such(str(context["tag"]), place.shape.names()), ""
    if kind == "no_such_name":
        return (*key, "name"), str(context["reason"]), ""
    if kind in ("value_error", "assertion_error"):
        message = str(context["error"])
        whole = isinstance(place.value, dict) or not key or "(got" in message
        return key, message, "" if whole else _got(error["input"])
    if kind in ("model_type", "model_attributes_type", "dict_type") and place.shape.names():
        return key, "must be a mapping that says which one with `name`", _got(error["input"])
    return key, _translated(error, context), _got(error["input"])


def _nearest_field(place: Place) -> str | None:
    return nearest(str(place.key[-1]), place.owner.model_fields) if place.owner else None


def _unknown(model: type[BaseModel], data: Mapping[str, Any], place: Place) -> str:
    """An unknown key, with the field of the same model that is nearest, or the place where a field is called so."""
    word = str(place.key[-1])
    elsewhere = homes(model, data, word.rpartition(".")[2])
    if "." in word and elsewhere:
        return f"unknown key; dots are for `-o`, a file nests `{elsewhere[0]}`"
    close = _nearest_field(place)
    if close or elsewhere:
        return f"unknown key; did you mean `{close or elsewhere[0]}`?"
    return f"unknown key; there is {_listed(place.owner.model_fields)}" if place.owner else "unknown key"


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
_PHRASES = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "none_required": "must be null",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
}


def _translated(error: ErrorDetails, context: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]:g}"
    if kind in ("too_short", "too_long"):
        words, count = (
            ("at least", context["min_length"]) if kind == "too_short" else ("at most", context["max_length"])
        )
        return f"must have {words} {count} {'item' if count == 1 else 'items'}"
    if kind == "literal_error":
        return _one_of(error["input"], re.findall(r"'([^']*)'|(-?\w+)", str(context["expected"])))
    if kind in _PHRASES:
        return _PHRASES[kind]
    message = error["msg"].replace("Input should be", "must be").replace("Input should", "must")
    return message[:1].lower() + message[1:]


def _one_of(given: Any, expected: Sequence[tuple[str, str]]) -> str:
    """What a closed set of words allows, with the nearest to what was given; an unquoted `or` is no word of it."""
    words = [quoted or plain for quoted, plain in expected if plain != "or"]
    close = nearest(given, words) if isinstance(given, str) and len(words) > 2 else None
    return f"must be {_listed(words, 'or')}" + (f"; did you mean `{close}`?" if close else "")


def _listed(words: Iterable[str], last: str = "and") -> str:
    quoted = [f"`{word}`" for word in words]
    if len(quoted) < 2:
        return "".join(quoted) or "nothing to choose from"
    return f"{', '.join(quoted[:-1])} {last} {quoted[-1]}"


def _either(messages: Sequence[str]) -> str:
    """One message from those of several arms of a union: `must be a` and `must be b` become `must be a or b`."""
    said = list(dict.fromkeys(messages))
    if all(message.startswith("must be ") for message in said):
        return "must be " + " or ".join(message.removeprefix("must be ") for message in said)
    return "; ".join(said)


def _got(value: Any) -> str:
    if value is None:
        return " (got null)"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f" (got {text if len(text) <= 60 else text[:57] + '...'})"
