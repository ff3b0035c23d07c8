"""Rules between the parameter names of two layouts: a table is data, read from left to right or from right to left.

A rule holds templates such as `encoder.layer.{i}.output.dense.{leaf}`. `{leaf}` stands for one part of a dotted name,
`{rest}` for one or more, every other name for a number, which `{i+1}` shifts. What stands on one side must stand on the
other for the rule to work both ways.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from sslcli.errors import WeightsError

_PLACE = re.compile(r"\{(\w+?)([+-]\d+)?\}")
_KINDS = {"leaf": r"[^.]+", "rest": r".+"}


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to a tensor on its way."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]
    """The inverse."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a table; made by `rename`, `join` and `drop`."""

    theirs: tuple[str | None, ...]
    """Their names; several are joined along the first dimension, None among them being zeros."""
    ours: str | None
    """Our name, None where we have no use for it."""
    change: Change | None = None
    why: str = ""
    """Why it is dropped."""
    optional: bool = False
    """Whether a network of this layout may lack it."""

    @property
    def both_ways(self) -> bool:
        """Whether the rule can be read from our side."""
        named = [set(_places(name)) for name in self.theirs if name is not None]
        return self.ours is not None and all(names == set(_places(self.ours)) for names in named)


def rename(theirs: str, ours: str, change: Change | None = None, *, optional: bool = False) -> Rule:
    """The same tensor under another name, perhaps changed."""
    return Rule((theirs,), ours, change, optional=optional)


def join(theirs: Sequence[str | None], ours: str, *, optional: bool = False) -> Rule:
    """Tensors of theirs in one shape, laid end to end along the first dimension, are one of ours; None is zeros."""
    return Rule(tuple(theirs), ours, optional=optional)


def drop(theirs: str, why: str) -> Rule:
    """A tensor that we have no use for."""
    return Rule((theirs,), None, why=why, optional=True)


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of tensors under a table of rules."""

    tensors: dict[str, Tensor]
    """By their new names."""
    origin: dict[str, tuple[str, ...]]
    """New name to old names."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Old name to the reason."""
    unexpected: tuple[str, ...] = ()
    """Old names that no rule knows."""
    unused: tuple[str, ...] = ()
    """Templates of rules that found nothing though the layout demands it."""

    @property
    def whole(self) -> bool:
        """Whether every name was known and every rule found something."""
        return not (self.unexpected or self.unused)


def to_ours(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> Applied:
    """Their tensors under our names; the first rule that knows a name takes it.

    Raises:
        WeightsError: two tensors land on one name, or tensors to be joined are not all there or differ in shape.
    """
    table = tuple(rules)
    out: dict[str, Tensor] = {}
    origin: dict[str, tuple[str, ...]] = {}
    dropped: dict[str, str] = {}
    unexpected: list[str] = []
    used: set[int] = set()
    waiting: dict[tuple[int, str], dict[int, str]] = {}
    for name, tensor in tensors.items():
        found = _first(table, name)
        if found is None:
            unexpected.append(name)
            continue
        number, slot, values = found
        rule = table[number]
        used.add(number)
        if rule.ours is None:
            dropped[name] = rule.why
        elif len(rule.theirs) == 1:
            _put(
                out, origin, _filled(rule.ours, values), (name,), rule.change.to_ours(tensor) if rule.change else tensor
            )
        else:
            waiting.setdefault((number, _filled(rule.ours, values)), {})[slot] = name
    for (number, ours), names in waiting.items():
        _put(out, origin, ours, tuple(names.values()), _joined(table[number], ours, names, tensors))
    return Applied(out, origin, dropped, tuple(unexpected), _unused(table, used))


def to_theirs(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> Applied:
    """Our tensors under their names: the same table read from right to left; rules that cannot be are passed over.

    Raises:
        WeightsError: two tensors land on one name, or a tensor cannot be divided.
    """
    table = tuple(rule for rule in rules if rule.both_ways)
    out: dict[str, Tensor] = {}
    origin: dict[str, tuple[str, ...]] = {}
    unexpected: list[str] = []
    used: set[int] = set()
    for name, tensor in tensors.items():
        found = next(
            ((n, v) for n, v in enumerate(_read(rule.ours or "", name) for rule in table) if v is not None), None
        )
        if found is None:
            unexpected.append(name)
            continue
        number, values = found
        rule = table[number]
        used.add(number)
        if len(rule.theirs) == 1:
            changed = rule.change.to_theirs(tensor) if rule.change else tensor
            _put(out, origin, _filled(rule.theirs[0] or "", values), (name,), changed)
            continue
        if len(tensor) % len(rule.theirs):
            raise WeightsError(f"`{name}`, {tuple(tensor.shape)}, cannot be divided into {len(rule.theirs)}")
        for theirs, share in zip(rule.theirs, tensor.chunk(len(rule.theirs)), strict=True):
            if theirs is not None:
                _put(out, origin, _filled(theirs, values), (name,), share)
    return Applied(out, origin, {}, tuple(unexpected), _unused(table, used))


def unknown(rules: Iterable[Rule], names: Iterable[str]) -> list[str]:
    """Those of their names that no rule knows."""
    table = tuple(rules)
    return [name for name in names if _first(table, name) is None]


def _first(table: tuple[Rule, ...], name: str) -> tuple[int, int, dict[str, str]] | None:
    """Number of the first rule that knows a name of theirs, which of its templates, and what stands in the places."""
    for number, rule in enumerate(table):
        for slot, template in enumerate(rule.theirs):
            values = None if template is None else _read(template, name)
            if values is not None:
                return number, slot, values
    return None


def _joined(rule: Rule, ours: str, names: Mapping[int, str], tensors: Mapping[str, Tensor]) -> Tensor:
    wanted = [slot for slot, theirs in enumerate(rule.theirs) if theirs is not None]
    lacking = [rule.theirs[slot] for slot in wanted if slot not in names]
    if lacking:
        raise WeightsError(f"`{ours}` cannot be put together: there is `{names[min(names)]}`, but no `{lacking[0]}`")
    parts = {slot: tensors[names[slot]] for slot in wanted}
    shapes = {tuple(part.shape) for part in parts.values()}
    if len(shapes) > 1:
        raise WeightsError(f"`{ours}` cannot be put together: its parts have the shapes {sorted(shapes)}")
    like = parts[wanted[0]]
    return torch.cat([parts.get(slot, torch.zeros_like(like)) for slot in range(len(rule.theirs))])


def _put(
    out: dict[str, Tensor], origin: dict[str, tuple[str, ...]], name: str, old: tuple[str, ...], tensor: Tensor
) -> None:
    if name in out:
        raise WeightsError(f"both `{origin[name][0]}` and `{old[0]}` would become `{name}`")
    out[name] = tensor
    origin[name] = old


def _unused(table: tuple[Rule, ...], used: set[int]) -> tuple[str, ...]:
    return tuple(
        next(name for name in rule.theirs if name is not None)
        for number, rule in enumerate(table)
        if number not in used and not rule.optional
    )


def _places(template: str) -> list[str]:
    return [found[1] for found in _PLACE.finditer(template)]


@cache
def _pattern(template: str) -> tuple[re.Pattern[str], tuple[tuple[str, int], ...]]:
    """A template as a regular expression, and what to subtract from the number in each place."""
    places = tuple((found[1], int(found[2] or 0)) for found in _PLACE.finditer(template))
    literal = [re.escape(text) for text in _PLACE.sub("\0", template).split("\0")]
    text = literal[0]
    for (name, _), after in zip(places, literal[1:], strict=True):
        text += f"({_KINDS.get(name, '[0-9]+')}){after}"
    return re.compile(text), places


def _read(template: str, name: str) -> dict[str, str] | None:
    """What stands in the places of a template that a name fits, None where it does not."""
    pattern, places = _pattern(template)
    found = pattern.fullmatch(name)
    if found is None:
        return None
    values: dict[str, str] = {}
    for (place, shift), text in zip(places, found.groups(), strict=True):
        value = text if place in _KINDS else str(int(text) - shift)
        if values.setdefault(place, value) != value or value.startswith("-"):
            return None
    return values


def _filled(template: str, values: Mapping[str, str]) -> str:
    def one(found: re.Match[str]) -> str:
        return str(int(values[found[1]]) + int(found[2])) if found[2] else values[found[1]]

    return _PLACE.sub(one, template)
