"""Open sets chosen by name: `method: {name: moco}` is the module `sslcli/methods/moco.py`.

The folder is the registry. This is the one place that imports by string, so that adding a file is all it takes to
add a member, and a member that fails to import breaks only itself.
"""

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from sslcli.errors import PresetError


def members(package: str) -> list[str]:
    """Names in an open set, without importing any of them."""
    found = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_"))


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The closest of `words`, if any is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return close[0] if close else None


def module(package: str, name: str) -> ModuleType:
    """The module that `name` means: a member of `package`, a dotted module of the user's, or a path to a `.py` file.

    Raises:
        PresetError: there is no such member; the message offers the nearest.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if "." in name:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise PresetError(f"cannot import `{name}`: {error}") from None
    names = members(package)
    if name not in names:
        close = nearest(name, names)
        advice = f"; did you mean `{close}`?" if close else f"; there is {', '.join(names)}"
        raise PresetError(f"no `{name}`{advice}")
    return importlib.import_module(f"{package}.{name}")


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise PresetError(f"no file `{path}`")
    name = f"ssl_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PresetError(f"`{path}` is not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def chosen_from(package: str) -> BeforeValidator:
    """Validator for a field whose mapping names a member of `package`: it becomes that member's `Config`."""

    def choose(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "name" not in value:
            raise PydanticCustomError("name_missing", "say which one with `name`: {names}",
                                      {"names": ", ".join(members(package))})  # fmt: skip
        try:
            config = module(package, str(value["name"])).Config
        except PresetError as error:
            raise PydanticCustomError("no_such_name", "{reason}", {"reason": error.message}) from None
        return config.model_validate(value)

    return BeforeValidator(choose)


def build(package: str, config: Any) -> Callable[..., Any]:
    """The `build` function of the member whose `Config` this is."""
    made: Callable[..., Any] = sys.modules[type(config).__module__].build
    return made
