"""Open sets chosen by name: `method: {name: moco}` is the module `sslcli/methods/moco.py`.

The folder is the registry. This is the one place that imports by string, so that adding a file is all it takes to
add a member, and a member that fails to import breaks only itself.
"""

import importlib
import importlib.util
import pkgutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sslcli.config.spelling import none_such
from sslcli.errors import PresetError


def members(package: str) -> list[str]:
    """Names in an open set, without importing any of them."""
    found = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_"))


def module(package: str, name: str) -> ModuleType:
    """The module that `name` means: a member of `package`, a dotted module of the user's, or a path to a `.py` file.

    Raises:
        PresetError: there is no such member (the message offers the nearest), or it cannot be imported.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    names = members(package)
    dotted = "." in name and all(part.isidentifier() for part in name.split("."))
    if not dotted and name not in names:
        raise PresetError(none_such(name, names))
    try:
        return importlib.import_module(name if dotted else f"{package}.{name}")
    except ImportError as error:
        raise PresetError(f"cannot import `{name}`: {error}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise PresetError(f"no file `{path}`")
    # The path is part of the name, so that two files of the same name in two folders stay apart.
    name = f"ssl_user_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PresetError(f"`{path}` is not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except (ImportError, SyntaxError) as error:
        del sys.modules[name]
        raise PresetError(f"cannot import `{path}`: {error}") from error
    except BaseException:
        del sys.modules[name]
        raise
    return loaded


def config_of(package: str, name: str) -> type[BaseModel]:
    """The `Config` that the module called `name` exports.

    Raises:
        PresetError: there is no such module, or it exports no `Config`.
    """
    found = vars(module(package, name)).get("Config")
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise PresetError(f"`{name}` exports no `Config`")
    return found


@dataclass(frozen=True)
class ChosenFrom:
    """Marks a field whose mapping names a member of `package`: it is validated by that member's `Config`."""

    package: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._choose, handler(source))

    def _choose(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "name" not in value:
            raise PydanticCustomError("name_missing", "say which one with `name`: {names}",
                                      {"names": ", ".join(members(self.package))})  # fmt: skip
        try:
            config = config_of(self.package, str(value["name"]))
        except PresetError as error:
            raise PydanticCustomError("no_such_name", "{reason}", {"reason": error.message}) from None
        return config.model_validate(value)


def chosen_from(package: str) -> ChosenFrom:
    """Annotation of a field whose mapping names a member of `package`: it becomes that member's `Config`."""
    return ChosenFrom(package)


def build(package: str, config: Any) -> Callable[..., Any]:
    """The `build` function of the member whose `Config` this is."""
    made: Callable[..., Any] = sys.modules[type(config).__module__].build
    return made
