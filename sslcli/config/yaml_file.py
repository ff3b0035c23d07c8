"""YAML as presets use it: YAML 1.2 scalars, no duplicate keys, and the file and line of every value.

PyYAML reads the scalars of YAML 1.1, where `1e-3` is text, `on` is true, `010` is eight and `12:30` is 750. Here a
plain word means what YAML 1.2's core schema says (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sslcli.errors import PresetError

_TAG = "tag:yaml.org,2002:"
_WIDTH = 100
_SHORT = 80


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _number(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_PLAIN: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), _integer),
    "float": (
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        lambda text: _number(text.lower()),
    ),
}


def _kind(text: str) -> str:
    return next((kind for kind, (pattern, _) in _PLAIN.items() if pattern.fullmatch(text)), "str")


def _convert(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    pattern, convert = _PLAIN[kind]
    if not pattern.fullmatch(text):
        raise ValueError(f"`{text}` is not {kind}")
    return convert(text)


class _Loader(yaml.SafeLoader):
    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _TAG + (_kind(value) if implicit[0] else "str")
        return _TAG + ("seq" if kind is yaml.SequenceNode else "map")


@dataclass(frozen=True)
class Document:
    """One YAML file: its data, and where each part of it stands."""

    path: Path
    data: dict[str, Any]
    """Mappings, lists, text, numbers, booleans and None."""
    origin: dict[str, str]
    """`path:line` of every key and list item, by dotted key, e.g. `views.groups.0.size`."""


def read(path: Path) -> Document:
    """Read a YAML file that holds one mapping.

    Raises:
        PresetError: the file cannot be read, is not YAML, has a duplicate key or is not a mapping; names the line.
    """
    label = shown(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PresetError(f"cannot read `{label}`: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise PresetError(f"{label}: not a text file in UTF-8 (byte {error.start})") from None
    origin: dict[str, str] = {}
    data = _parse(text, label, origin)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise PresetError(f"{label}:1: a preset is a mapping of keys to values, this is {_in_words(data)}")
    return Document(path, data, origin)


def parse_value(text: str) -> Any:
    """The value of `-o key=text`: a plain word by the rules above, or quoted text, a list or a mapping in flow style.

    Raises:
        PresetError: quotes or brackets do not close.
    """
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        return _parse(text, None, {})
    return _convert(_kind(text), text)


def shown(path: Path) -> str:
    """The path as a reader wants it: from the current folder where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _in_words(data: Any) -> str:
    return "a list" if isinstance(data, list) else f"`{data}`"


def _parse(text: str, label: str | None, origin: dict[str, str]) -> Any:
    """The data of one document; fills `origin` where there is a label."""

    def where(mark: yaml.Mark | None) -> str:
        if label is None:
            return ""
        return f"{label}:{mark.line + 1}: " if mark else f"{label}: "

    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise PresetError(f"{where(mark)}{_syntax_problem(error)}") from None
    except yaml.reader.ReaderError as error:
        raise PresetError(f"{where(None)}a character that YAML does not allow: {chr(int(error.character))!r}") from None

    def value(node: yaml.Node, key: str, above: tuple[int, ...]) -> Any:
        if id(node) in above:
            raise PresetError(f"{where(node.start_mark)}this alias contains itself")
        above = (*above, id(node))
        if node.tag not in (_TAG + kind for kind in ("map", "seq", "str", *_PLAIN)):
            raise PresetError(f"{where(node.start_mark)}tags are not read here (`{node.tag.replace(_TAG, '!!')}`)")
        if isinstance(node, yaml.MappingNode):
            return mapping(node, key, above)
        if isinstance(node, yaml.SequenceNode):
            return [entry(item, item.start_mark, _join(key, str(i)), above) for i, item in enumerate(node.value)]
        try:
            return _convert(node.tag.removeprefix(_TAG), node.value)
        except ValueError as error:
            raise PresetError(f"{where(node.start_mark)}{error}") from None

    def mapping(node: yaml.MappingNode, key: str, above: tuple[int, ...]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            word = value(key_node, "", above)
            if word == "<<" and key_node.style is None:
                raise PresetError(f"{where(key_node.start_mark)}merge keys (`<<`) are not read here; use `extends`")
            if not isinstance(word, str):
                raise PresetError(f"{where(key_node.start_mark)}a key must be text (got {word!r})")
            if node.flow_style and not key_node.style and ":" in word and value_node.start_mark == value_node.end_mark:
                before, _, behind = word.partition(":")
                raise PresetError(
                    f"{where(key_node.start_mark)}a space is missing after the colon of `{word}`: write "
                    f"`{before}: {behind}`"
                )
            if word in data:
                raise PresetError(
                    f"{where(key_node.start_mark)}`{_join(key, word)}` is given twice, first on line {lines[word]}"
                )
            lines[word] = key_node.start_mark.line + 1
            data[word] = entry(value_node, key_node.start_mark, _join(key, word), above)
        return data

    def entry(node: yaml.Node, mark: yaml.Mark, key: str, above: tuple[int, ...]) -> Any:
        if label is not None:
            origin[key] = f"{label}:{mark.line + 1}"
        return value(node, key, above)

    return None if node is None else value(node, "", ())


def _join(key: str, part: str) -> str:
    return f"{key}.{part}" if key else part


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    if "'\\t'" in problem:
        return "indent with spaces, not with tabs"
    if "cannot start any token" in problem:
        return f"{problem}; put text that starts with it in quotes"
    if "mapping values are not allowed here" in problem:
        return "a second `: ` on one line; put text that contains it in quotes"
    if "single document" in (error.context or ""):
        return "a second document (`---`); a preset is one"
    return problem


class _Dumper(yaml.SafeDumper):
    """Block style, short lists in one line, quotes round text that a YAML 1.2 or 1.1 reader would take for more."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is not yaml.ScalarNode:
            return _TAG + ("seq" if kind is yaml.SequenceNode else "map")
        if implicit[0] and (found := _kind(value)) != "str":
            return _TAG + found
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        scalars = not any(isinstance(item, (dict, list, tuple)) for item in sequence)
        short = scalars and sum(len(str(item)) + 2 for item in sequence) <= _SHORT
        return super().represent_sequence(tag, sequence, flow_style=short)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text.strip("\n") and not text[0].isspace() and not text.endswith("\n\n") else None
    if any(
        mark in text for mark in "\x85\u2028\u2029"
    ):  # line breaks to YAML, but to hardly an editor: written escaped
        style = '"'
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(data: Any, notes: Mapping[str, str] | None = None) -> str:
    """Plain data as YAML that `read` turns back into equal data, keys in their order.

    `notes` are comments by dotted key: one line each, set behind a value where it fits and above its key elsewhere.
    """
    text: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=_WIDTH
    )
    return _annotated(text, notes) if notes else text


def _annotated(text: str, notes: Mapping[str, str]) -> str:
    lines = text.removesuffix("\n").split("\n")
    behind: dict[int, str] = {}
    above: dict[int, list[str]] = {}

    def visit(node: yaml.Node, key: str) -> None:
        if isinstance(node, yaml.SequenceNode) and not node.flow_style:
            for i, item in enumerate(node.value):
                visit(item, _join(key, str(i)))
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            place = _join(key, key_node.value)
            first = key_node.start_mark.line
            if place in notes:
                note = " ".join(notes[place].split())
                one_line = value_node.end_mark.line == first
                if one_line and len(lines[first]) + len(note) + 4 <= _WIDTH + 20:
                    behind[first] = note
                else:
                    above[first] = _comment(note, lines[first], spaced=not key and first > 0)
            visit(value_node, place)

    root = yaml.compose(text, Loader=_Loader)
    if root is not None:
        visit(root, "")
    out: list[str] = []
    for i, line in enumerate(lines):
        out += above.get(i, [])
        out.append(f"{line}  # {behind[i]}" if i in behind else line)
    return "\n".join(out) + "\n"


def _comment(text: str, line: str, spaced: bool) -> list[str]:
    """A comment above a line, no deeper than it, lest it join a text above; sections also get an empty line."""
    start = " " * (len(line) - len(line.lstrip(" "))) + "# "
    lines = textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=start)
    return ["", *lines] if spaced else lines
