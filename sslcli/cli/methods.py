"""ssl methods: which ideas are there?"""

import json
from pathlib import Path

from sslcli.cli.options import Json


def methods(as_json: Json = False) -> None:
    """List the self-supervised methods, with one line each."""
    import sslcli.methods
    from sslcli.config.choice import members

    folder = Path(sslcli.methods.__path__[0])
    rows = {name: title(folder / f"{name}.py") for name in members("sslcli.methods")}
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")


def title(module: Path) -> str:
    """First line of a module's docstring, with which the file begins; neither imports nor parses it."""
    with module.open(encoding="utf-8") as lines:
        return next(lines).strip().strip('"')
