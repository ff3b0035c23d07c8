import sys
from pathlib import Path

import pytest

from sslcli.config import choice
from sslcli.errors import PresetError


def test_members_are_the_files_of_the_folder() -> None:
    folder = Path(choice.__file__).parents[1] / "methods"
    assert choice.members("sslcli.methods") == sorted(
        path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")
    )


def test_two_files_of_one_name_stay_apart_and_each_is_run_once(tmp_path: Path) -> None:
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "idea.py").write_text(f"value = {value}\n")
    first, second = (choice.module("sslcli.methods", str(tmp_path / folder / "idea.py")) for folder in "ab")
    assert (first.value, second.value) == (1, 2)
    assert choice.module("sslcli.methods", str(tmp_path / "a" / "idea.py")) is first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.py", "no file `nothing.py`"),
        ("no.such.module", "cannot import `no.such.module`"),
        ("..x", "no `..x`"),
        ("1.5", "no `1.5`"),
        ("simclrr", "no `simclrr`; did you mean `simclr`?"),
        ("zzzzzz", "no `zzzzzz`; there is "),
    ],
)
def test_names_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(PresetError) as caught:
        choice.module("sslcli.methods", name)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_thing\n", "cannot import `bad.py`: No module named 'no_such_thing'"),
        ("def (\n", "cannot import `bad.py`: invalid syntax"),
        ("x = 1\n", "`bad.py` exports no `Config`"),
        ("Config = 3\n", "`bad.py` exports no `Config`"),
    ],
)
def test_user_modules_that_cannot_serve(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text(code)
    with pytest.raises(PresetError) as caught:
        choice.config_of("sslcli.methods", "bad.py")
    assert message in caught.value.message


def test_a_bug_in_a_user_module_keeps_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "buggy.py"
    path.write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        choice.module("sslcli.methods", str(path))
    assert set(sys.modules) == before  # half a module is not kept
