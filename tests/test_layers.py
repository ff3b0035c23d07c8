import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "words", [["--help"], ["pretrain", "--help"], ["presets", "list"], ["methods"], ["runs", "list", "--help"]]
)
def test_words_need_no_torch(words: list[str]):
    script = (
        "import sys\n"
        "from sslcli.cli import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'torchvision', 'timm', 'sklearn', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script, *words], check=True, capture_output=True)


def test_help_needs_no_more_than_the_parser():
    """What `ssl --help` costs, every completion and every mistyped word costs too."""
    script = (
        "import sys\n"
        "from sslcli.cli import app\n"
        "try:\n    app(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'pydantic', 'yaml', 'rich.console', 'rich.progress'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_the_version_is_printed():
    done = subprocess.run([sys.executable, "-m", "sslcli", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("ssl ")
