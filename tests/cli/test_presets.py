import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sslcli.cli.presets import app
from sslcli.config import load, yaml_file
from sslcli.config.presets import JOBS
from sslcli.errors import PresetError, UserError

GOOD = """\
about: {title: "Mine: a test"}
data:
  source: {name: digits}
  batch_size: 64
views: {name: crops, groups: [{repeat: 2, size: 32, scale: [0.2, 1]}]}
backbone: {name: resnet, depth: 18, stem: cifar}
method: {name: moco, queue: 1024}
optim: {name: sgd, lr: 3e-2, per: 256}
run: {epochs: 2}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a valid preset `good.yaml` in it."""
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(GOOD)
    return tmp_path


def ran(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: str) -> UserError:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    return caught.value


def test_list_names_every_shipped_preset_with_its_title() -> None:
    rows = json.loads(ran("list", "--json").stdout)
    assert [(row["job"], row["name"]) for row in rows] == [(job, name) for job in JOBS for name in load.names(job)]
    assert all(row["title"] and Path(row["path"]).is_file() for row in rows)
    lines = ran("list").stdout.splitlines()
    assert len(lines) == len(rows)
    assert all(row["name"] in line and row["title"] in line for row, line in zip(rows, lines, strict=True))
    assert {row["job"] for row in json.loads(ran("list", "--job", "eval", "--json").stdout)} == {"eval"}


def test_list_imports_no_torch() -> None:
    code = (
        "import sys\nfrom sslcli.cli.presets import app\n"
        "app(['list'], standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_list_goes_on_past_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "presets/pretrain").mkdir(parents=True)
    (folder / "presets/pretrain/broken.yaml").write_text("a: [1\n")
    (folder / "presets/pretrain/fine.yaml").write_text(GOOD)
    monkeypatch.setattr(load, "roots", lambda: [folder / "presets"])
    lines = ran("list").stdout.splitlines()
    assert lines[0].startswith("pretrain  broken  (cannot be read: presets/pretrain/broken.yaml:2: ")
    assert lines[1] == "pretrain  fine    Mine: a test"


def test_show_prints_yaml_that_loads_to_the_same_preset() -> None:
    shown = ran("show", "good", "-o", "optim.lr=0.1").stdout
    Path("shown.yaml").write_text(shown)
    assert load.load("pretrain", "shown").preset == load.load("pretrain", "good", ["optim.lr=0.1"]).preset
    assert json.loads(ran("show", "good", "--json").stdout) == load.load("pretrain", "good").resolved


def test_show_origin_says_where_each_value_is_from() -> None:
    Path("child.yaml").write_text("extends: ./good\noptim: {lr: 1}\n")
    shown = ran("show", "child", "--origin", "-o", "views.groups.0.scale.1=0.9", "--set", "seed=7").stdout
    for line in (
        "seed: 7  # -o seed=7",
        "  lr: 1.0  # child.yaml:2",
        "  per: 256  # good.yaml:8",
        "      scale: [0.2, 0.9]  # good.yaml:5, -o views.groups.0.scale.1=0.9",
        "  momentum: 0.9  # default",
    ):
        assert line in shown.splitlines()
    assert yaml.safe_load(shown)["seed"] == 7
    data = json.loads(ran("show", "child", "--origin", "--json").stdout)
    assert data["preset"]["optim"]["lr"] == 1
    assert data["origin"]["optim.lr"] == "child.yaml:2"


def test_every_value_of_a_shown_preset_has_an_origin() -> None:
    shown = ran("show", "good", "--origin").stdout
    leaves = [line for line in shown.splitlines() if not line.rstrip().endswith(":")]
    assert leaves
    assert all("  # " in line for line in leaves)


def test_show_of_a_protocol_needs_no_job() -> None:
    assert json.loads(ran("show", "knn-v1", "--json").stdout)["evaluator"]["name"] == "knn"


def test_diff_goes_leaf_by_leaf() -> None:
    Path("other.yaml").write_text(
        "extends: ./good\nabout: {title: Other}\noptim: {name: lars, lr: 3e-2, per: 256}\n"
        "views: {groups: [{repeat: 2, size: 32, scale: [0.3, 1], blur: {p: 1}}]}\n"
    )
    rows = [line.split() for line in ran("diff", "good", "other").stdout.splitlines()]
    assert rows[0] == ["good", "other"]
    assert ["about.title", "Mine:", "a", "test", "Other"] in rows
    assert ["optim.name", "sgd", "lars"] in rows
    assert ["optim.eta", "-", "0.001"] in rows
    assert ["views.groups.0.scale", "[0.2,", "1.0]", "[0.3,", "1.0]"] in rows
    assert ["views.groups.0.blur", "null", "-"] in rows
    assert ["views.groups.0.blur.p", "-", "1.0"] in rows
    assert not any(row[0] in ("optim.lr", "method.queue") for row in rows)
    found = json.loads(ran("diff", "good", "other", "--json").stdout)["differences"]
    assert found["optim.name"] == {"a": "sgd", "b": "lars"}
    assert found["optim.eta"] == {"b": 0.001}


def test_diff_of_equal_presets_says_so_on_stderr() -> None:
    Path("same.yaml").write_text("extends: ./good\n")
    result = ran("diff", "good", "same")
    assert (result.stdout, result.stderr) == ("", "no difference\n")


def test_check_tells_every_problem_of_every_preset() -> None:
    Path("bad.yaml").write_text("extends: ./good\nseed: -1\noptim: {lrr: 3}\n")
    Path("worse.yaml").write_text("a: [1\n")
    result = ran("check", "good", "bad", "worse.yaml", "absent", code=2)
    assert result.stdout.splitlines() == ["ok  good", "bad bad", "bad worse.yaml", "bad absent"]
    assert result.stderr.splitlines() == [
        "error: preset `bad` has 2 problem(s)",
        "  bad.yaml:2: seed: must be at least 0 (got -1)",
        "  bad.yaml:3: optim.lrr: unknown key; did you mean `lr`?",
        "error: worse.yaml:2: expected ',' or ']', but got '<stream end>'",
        "error: no preset `absent`",
    ]
    rows = json.loads(ran("check", "bad", "good", "--json", code=2).stdout)
    assert [(row["name"], len(row["problems"])) for row in rows] == [("bad", 2), ("good", 0)]


def test_check_of_everything_shipped_finds_nothing() -> None:
    rows = ran("check").stdout.splitlines()
    assert rows == [f"ok  {name}" for job in JOBS for name in load.names(job)]


def test_schema_is_json_on_stdout() -> None:
    assert "method" in json.loads(ran("schema").stdout)["properties"]
    assert "evaluator" in json.loads(ran("schema", "--job", "eval").stdout)["properties"]


def test_copy_writes_every_value_with_its_meaning() -> None:
    result = ran("copy", "good", "mine.yaml", "-o", "seed=5")
    assert result.stdout == ""
    assert result.stderr == "wrote mine.yaml\nnext: edit it, then `ssl presets check mine.yaml`\n"
    text = Path("mine.yaml").read_text()
    assert "  queue: 1024  # How many keys of past images serve as negatives\n" in text
    assert "\n\n# The optimiser\noptim:\n  name: sgd\n  lr: 0.03  # Base learning rate" in text
    assert max(map(len, text.splitlines())) <= 120
    assert load.load("pretrain", "mine").preset == load.load("pretrain", "good", ["seed=5"]).preset
    assert yaml_file.read(Path("mine.yaml")).data == load.load("pretrain", "mine").resolved


def test_copy_into_a_folder_keeps_the_name(folder: Path) -> None:
    (folder / "sub").mkdir()
    ran("copy", "knn-v1", "sub")
    assert load.load("eval", "sub/knn-v1.yaml").preset == load.load("eval", "knn-v1").preset


def test_copy_never_overwrites() -> None:
    error = refused("copy", "good", "good.yaml")
    assert error.message == "`good.yaml` exists already"
    assert Path("good.yaml").read_text() == GOOD
    assert refused("copy", "good", "no/such/folder.yaml").message == (
        "cannot write `no/such/folder.yaml`: no such file or directory"
    )


@pytest.mark.parametrize(("job", "name"), [(job, name) for job in JOBS for name in load.names(job)])
def test_every_shipped_preset_survives_being_copied(job: str, name: str) -> None:
    ran("copy", name, "copied.yaml", "--job", job)
    assert load.load(job, "copied").preset == load.load(job, name).preset


def test_errors_are_the_users_kind() -> None:
    assert isinstance(refused("show", "goood"), PresetError)
    assert isinstance(refused("diff", "good", "goood"), PresetError)
    assert ran("show", "good", "--job", "nothing", code=2).stderr


def test_completion_offers_names() -> None:
    from sslcli.cli.presets import _complete

    assert "knn-v1" in _complete("knn")
    assert _complete("no-such") == []
