import json
from pathlib import Path

import pytest
from parts import ran

from sslcli.engine import checkpoint
from sslcli.errors import UserError


def test_says_what_was_written_and_what_comes_next(run: Path):
    done = ran("extract-backbone", run)
    assert done.stdout == "run/backbone.safetensors\n"
    assert "72 of 72 tensors written and read back, names as in torchvision" in done.stderr
    assert "largest difference of features 0" in done.stderr
    assert "next: ssl eval knn run/backbone.safetensors" in done.stderr
    assert (run / "backbone.manifest.json").is_file()


def test_the_short_form_and_json(run: Path):
    told = json.loads(ran("extract", run, "--out", "b.safetensors", "--format", "torchvision", "--json").stdout)
    assert (told["file"], told["matched"], told["difference"]) == ("b.safetensors", 72, 0)
    assert told["manifest"]["step"] == 4


def test_extracting_an_extracted_file_says_so(run: Path):
    ran("extract", run)
    before = (run / "backbone.safetensors").stat().st_mtime_ns
    done = ran("extract", "run/backbone.safetensors")
    assert "extracted backbone already: nothing to do" in done.stderr
    assert (run / "backbone.safetensors").stat().st_mtime_ns == before


def test_a_checkpoint_cut_in_half_is_one_clear_error(run: Path):
    newest = checkpoint.newest(run)
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.raises(UserError, match=newest.name) as caught:
        ran("extract", run)
    assert "earlier" in str(caught.value.hint)
    assert ran("extract", checkpoint.all_in(run)[0]).stdout == "run/backbone_step_00000002.safetensors\n"
