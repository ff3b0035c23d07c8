"""The base of everything a preset may contain."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen words: unknown keys are refused, the sentence under a field is its help text."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


@dataclass(frozen=True)
class ViewNeeds:
    """What kind of views a method eats, and how many: checked while the preset is validated."""

    kind: Literal["crops", "patches", "rotations", "masked"] = "crops"
    at_least: int = 2
    at_most: int | None = 2
    even: bool = False
    """Whether masks must hide the same number of patches in all images."""
    blocks: bool = False
    """Whether masks must come with target blocks."""


class MethodConfig(Settings):
    """Base of every method's `Config`; the module's file name is its `name`."""

    views: ClassVar[ViewNeeds] = ViewNeeds()
    name: str


class BackboneConfig(Settings):
    """Base of every backbone's `Config`; the module's file name is its `name`."""

    name: str


class EvaluatorConfig(Settings):
    """Base of every evaluator's `Config`; the module's file name is its `name`."""

    protocol: ClassVar[str] = ""
    """The family of protocols whose newest version is meant where none is named; empty: the evaluator's own name."""
    name: str
