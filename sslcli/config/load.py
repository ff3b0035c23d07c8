"""From a preset's name to a validated preset: find the file, follow `extends`, apply overrides, validate.

Every value remembers who said it: a file and line, an override, a flag of the command line, or the default.
"""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast, overload

from sslcli.config import yaml_file
from sslcli.config.base import Settings
from sslcli.config.presets import JOBS, EvalPreset, PretrainPreset, as_data
from sslcli.config.validate import Problem, dotted, validate
from sslcli.errors import PresetError

P = TypeVar("P", bound=Settings, covariant=True)

DEFAULT = "default"
"""Origin of a value that nobody said."""
_SUFFIXES = (".yaml", ".yml")
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Loaded(Generic[P]):
    """A preset, and where everything in it comes from."""

    preset: P
    """The validated model."""
    data: dict[str, Any]
    """What was said: the files and overrides merged, without defaults."""
    origin: dict[str, str]
    """By dotted key: `file:line`, `-o key=value`, a flag such as `--data`, or `default`."""
    path: Path
    """The preset's own file."""

    @property
    def resolved(self) -> dict[str, Any]:
        """Every value as plain data, defaults included; sections begin with their `name`."""
        return cast(dict[str, Any], _name_first(as_data(self.preset)))


@dataclass
class Merged:
    """The files of a preset laid over one another, not validated."""

    path: Path
    data: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)


def roots() -> list[Path]:
    """The folders that hold shipped presets: the checkout's, and the copy inside an installed package."""
    checkout = _PACKAGE.parent
    found = [checkout / "presets"] if (checkout / "pyproject.toml").is_file() else []
    return [root for root in (*found, _PACKAGE / "_presets") if root.is_dir()]


def names(job: str) -> list[str]:
    """Names of the shipped presets of a job."""
    return sorted({path.stem for root in roots() for path in (root / job).glob("*.yaml")})


def find(job: str, name: str) -> Path:
    """The file that a name or path means.

    A path wins if the file exists or is spelled as one; then `./NAME.yaml`; then the shipped presets.

    Raises:
        PresetError: there is no such file; offers the nearest names.
    """
    given = Path(name)
    if given.is_file():
        return given
    if given.suffix not in _SUFFIXES:
        for path in (Path(f"{name}.yaml"), *(root / job / f"{name}.yaml" for root in roots())):
            if path.is_file():
                return path
        raise PresetError(f"no preset `{name}`{_advice(name, names(job))}", hint=f"`ssl presets list --job {job}`")
    raise PresetError(f"no file `{name}`{_advice(given.stem, names(job))}", hint=f"`ssl presets list --job {job}`")


def job_of(name: str) -> str:
    """The job a preset is for: that of the shipped preset of this name, else the one whose sections a file has.

    Raises:
        PresetError: there is no such preset for any job.
    """
    shipped = [job for job in JOBS if name in names(job)]
    if shipped:
        return shipped[0]
    given = Path(name) if Path(name).is_file() else Path(f"{name}.yaml")
    if not given.is_file():
        every = [known for job in JOBS for known in names(job)]
        raise PresetError(f"no preset `{name}`{_advice(given.stem, every)}", hint="`ssl presets list`")
    return max(JOBS, key=lambda job: len(merge_files(job, given).data.keys() & JOBS[job].model_fields.keys()))


def _advice(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(f'`{word}`' for word in close)}?" if close else ""


@overload
def load(
    job: Literal["pretrain"],
    name: str,
    overrides: Sequence[str] = (),
    extra: Mapping[str, tuple[Any, str]] | None = None,
) -> Loaded[PretrainPreset]: ...
@overload
def load(
    job: Literal["eval"],
    name: str,
    overrides: Sequence[str] = (),
    extra: Mapping[str, tuple[Any, str]] | None = None,
) -> Loaded[EvalPreset]: ...
@overload
def load(
    job: str,
    name: str,
    overrides: Sequence[str] = (),
    extra: Mapping[str, tuple[Any, str]] | None = None,
) -> Loaded[Settings]: ...
def load(
    job: str,
    name: str,
    overrides: Sequence[str] = (),
    extra: Mapping[str, tuple[Any, str]] | None = None,
) -> Loaded[Any]:
    """Find, merge, override and validate a preset.

    Args:
        job: `pretrain` or `eval`.
        name: a preset's name or the path of a file.
        overrides: `key=value` as given to `-o`, values in YAML; they win over everything else.
        extra: values that flags of the command line set, `{"seed": (3, "--seed")}`; they win over the files.

    Raises:
        PresetError: there is no such preset, or it is wrong; every problem is listed with its file and line.
    """
    merged = merge_files(job, find(job, name))
    problems: list[Problem] = []
    flags = [(key, value, label) for key, (value, label) in (extra or {}).items()]
    for key, value, label in (*flags, *_parsed(overrides, problems)):
        message = _put(merged, tuple(key.split(".")), value, label)
        if message:
            problems.append(Problem(label, key, message))
    preset = validate(
        JOBS[job],
        merged.data,
        title=f"preset `{name}`",
        origin=merged.origin,
        whole=yaml_file.shown(merged.path),
        found=problems,
    )
    said = {key: merged.origin.get(key, DEFAULT) for key, _ in every_key(as_data(preset))}
    return Loaded(preset, merged.data, said, merged.path)


@overload
def from_data(job: Literal["pretrain"], data: Mapping[str, Any], title: str = ...) -> PretrainPreset: ...
@overload
def from_data(job: Literal["eval"], data: Mapping[str, Any], title: str = ...) -> EvalPreset: ...
@overload
def from_data(job: str, data: Mapping[str, Any], title: str = ...) -> Settings: ...
def from_data(job: str, data: Mapping[str, Any], title: str = "the stored preset") -> Settings:
    """Validate plain data, such as a checkpoint's.

    Raises:
        PresetError: the data is not a preset of this job; the message starts with `title`.
    """
    return validate(JOBS[job], data, title=title)


def every_key(data: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every mapping, list and leaf inside plain data, outermost first."""
    inside: Iterator[tuple[str, Any]] = iter(())
    if isinstance(data, dict):
        inside = iter(data.items())
    elif isinstance(data, list):
        inside = ((str(i), item) for i, item in enumerate(data))
    for word, value in inside:
        yield dotted((*prefix, word)), value
        yield from every_key(value, (*prefix, word))


def _name_first(data: Any) -> Any:
    if isinstance(data, list):
        return [_name_first(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {word: _name_first(data[word]) for word in sorted(data, key=lambda word: word != "name")}


def merge_files(job: str, path: Path) -> Merged:
    """A preset's file laid over those it extends.

    A file that is reached twice counts once, where it is reached first, so that two parents with a common base do
    not undo each other.

    Raises:
        PresetError: a file is missing, is not YAML, or `extends` goes in a circle.
    """
    merged = Merged(path)
    _lay_file(merged, job, path, chain=(), seen=set())
    return merged


def _lay_file(merged: Merged, job: str, path: Path, chain: tuple[Path, ...], seen: set[Path]) -> None:
    real = path.resolve()
    if real in chain:
        circle = [*chain[chain.index(real) :], real]
        raise PresetError(f"`extends` goes in a circle: {' → '.join(f'`{yaml_file.shown(p)}`' for p in circle)}")
    if real in seen:
        return
    seen.add(real)
    document = yaml_file.read(path)
    data = dict(document.data)
    for name, origin in _parents(data.pop("extends", None), document.origin):
        _lay_file(merged, job, _parent(job, name, path, origin), (*chain, real), seen)
    _lay(merged.data, merged.origin, data, document.origin)


def _parents(said: Any, origin: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each name in `extends`, with the line that says it."""
    if said is None:
        return []
    if isinstance(said, str):
        return [(said, origin["extends"])]
    if isinstance(said, list) and all(isinstance(name, str) for name in said):
        return [(name, origin[f"extends.{i}"]) for i, name in enumerate(said)]
    raise PresetError(f"{origin['extends']}: extends: must be a name or a list of names (got {said!r})")


def _parent(job: str, name: str, child: Path, origin: str) -> Path:
    """The file that `extends: name` means: a path next to the child, or a name inside the shipped presets."""
    if name.startswith(("./", "../", "/")) or name.endswith(_SUFFIXES):
        path = child.parent / name
        found = path if path.suffix in _SUFFIXES else path.with_name(f"{path.name}.yaml")
        if found.is_file():
            return found
        raise PresetError(f"{origin}: extends: no file `{yaml_file.shown(found)}`")
    for root in roots():
        for found in (root / f"{name}.yaml", root / job / f"{name}.yaml"):
            if found.is_file():
                return found
    known = {str(path.relative_to(root).with_suffix("")) for root in roots() for path in root.rglob("*.yaml")}
    raise PresetError(
        f"{origin}: extends: no `{name}`{_advice(name, [*sorted(known), *names(job)])}",
        hint="a file of your own is written as a path, e.g. `./mine.yaml`",
    )


def _lay(
    data: dict[str, Any],
    origin: dict[str, str],
    top: Mapping[str, Any],
    top_origin: Mapping[str, str],
    key: tuple[str, ...] = (),
) -> None:
    """Lay a mapping over another in place: mappings merge unless their `name` changes, everything else replaces."""
    for word, value in top.items():
        here = (*key, word)
        below = data.get(word)
        if isinstance(value, dict) and isinstance(below, dict) and not _renames(below, value):
            origin[dotted(here)] = top_origin[dotted(here)]
            _lay(below, origin, value, top_origin, here)
        else:
            _forget(origin, here)
            data[word] = copy.deepcopy(value)
            origin[dotted(here)] = top_origin[dotted(here)]
            origin |= {inner: top_origin[inner] for inner, _ in every_key(value, here)}


def _renames(below: Mapping[str, Any], top: Mapping[str, Any]) -> bool:
    return "name" in below and "name" in top and below["name"] != top["name"]


def _forget(origin: dict[str, str], key: tuple[str, ...]) -> None:
    inside = f"{dotted(key)}."
    for said in [said for said in origin if said.startswith(inside)]:
        del origin[said]


def _parsed(overrides: Sequence[str], problems: list[Problem]) -> list[tuple[str, Any, str]]:
    """Key, value and label of each override; a change of `name` comes first, since it clears what stood around it."""
    parsed: list[tuple[str, Any, str]] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key, label = key.strip(), f"-o {text}"
        if not equals or not all(key.split(".")):
            problems.append(Problem(label, "", "write `-o key=value`, e.g. `-o optim.lr=0.1`"))
            continue
        try:
            parsed.append((key, yaml_file.parse_value(value), label))
        except PresetError as error:
            problems.append(Problem(label, key, error.message))
    return sorted(parsed, key=lambda item: not item[0].endswith(".name"))


def _put(merged: Merged, key: tuple[str, ...], value: Any, label: str) -> str | None:
    """Lay one value over the data in place; says what is wrong if the key cannot be reached."""
    node: Any = merged.data
    depth = 0
    while True:
        word, around = key[depth], dotted(key[:depth])
        if isinstance(node, list) and not (word.isdecimal() and int(word) < len(node)):
            return f"`{around}` has {len(node)} item(s), counted from 0 (got `{word}`)"
        below = node[int(word)] if isinstance(node, list) else node.get(word)
        depth += 1
        if depth == len(key) or not isinstance(below, dict | list):
            break
        node = below
    here, rest = key[:depth], key[depth:]
    if any(part.isdecimal() for part in rest):
        return "reaches into a list that is not there; give the whole list"
    for part in reversed(rest):
        value = {part: value}
    said = dict.fromkeys([dotted(here), *(inner for inner, _ in every_key(value, here))], label)
    if isinstance(node, list):
        item = {word: below}
        _lay(item, merged.origin, {word: value}, said, here[:-1])
        node[int(word)] = item[word]
        return None
    if word == "name" and _renames(node, {"name": value}):
        node.clear()
        _forget(merged.origin, here[:-1])
        merged.origin[dotted(here[:-1])] = label
    _lay(node, merged.origin, {word: value}, said, here[:-1])
    return None
