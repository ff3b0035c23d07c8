"""A folder to write presets in, with a method and a backbone of the user's own that need no torch."""

from collections.abc import Callable
from pathlib import Path

import pytest

METHOD = """
from sslcli.config.base import MethodConfig
from sslcli.config.types import Count, Positive


class Config(MethodConfig):
    name: str
    queue: Count = 4
    temperature: Positive = 0.2
    \"\"\"Divisor of similarities. A smaller one is sharper.\"\"\"
"""
BACKBONE = """
from sslcli.config.base import BackboneConfig
from sslcli.config.types import Count


class Config(BackboneConfig):
    name: str
    width: Count = 8
"""
GOOD = """
data:
  source: {name: digits}
  batch_size: 64
views:
  name: crops
  groups:
    - repeat: 2
      size: 32
      scale: [0.2, 1]
      jitter: {p: 0.8}
backbone: {name: net.py}
method: {name: idea.py, temperature: 0.1}
optim:
  name: sgd
  lr: 3e-2
  per: 256
run: {epochs: 2}
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into the current folder, which holds `idea.py`, `net.py` and the valid preset `good.yaml`."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    write("idea.py", METHOD)
    write("net.py", BACKBONE)
    write("good.yaml", GOOD.lstrip("\n"))
    return write
