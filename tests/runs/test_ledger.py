import json
from pathlib import Path

import pytest

from sslcli.contracts import Report
from sslcli.runs import ledger


def report(protocol: str, value: float) -> Report:
    return Report(protocol, {"top1": value}, {"seed": 1, "versions": {"torch": "2.14"}})


def test_the_newest_report_stays_and_the_ledger_keeps_all(tmp_path: Path) -> None:
    for protocol, value in (("knn-v1", 50.0), ("linear-v1", 60.0), ("knn-v1", 55.0)):
        path = ledger.append(tmp_path, report(protocol, value))
        assert path == tmp_path / "reports" / f"{protocol}.json"
    assert [(e.protocol, e.metrics["top1"]) for e in ledger.reports(tmp_path)] == [("knn-v1", 55), ("linear-v1", 60)]
    assert [e.metrics["top1"] for e in ledger.history(tmp_path)] == [50, 60, 55]
    assert ledger.reports(tmp_path)[0].details == {"seed": 1, "versions": {"torch": "2.14"}}
    assert json.loads((tmp_path / "reports" / "knn-v1.json").read_text())["metrics"] == {"top1": 55.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.jsonl", "reports"]
    assert len(list((tmp_path / "reports").iterdir())) == 2


def test_a_ledger_cut_short_by_a_crash_loses_one_line_only(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        ledger.append(tmp_path, report("knn-v1", value))
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [e.metrics["top1"] for e in ledger.history(tmp_path)] == [1]
    ledger.append(tmp_path, report("knn-v1", 3.0))
    assert [e.metrics["top1"] for e in ledger.history(tmp_path)] == [1, 3]


def test_details_that_are_no_plain_data_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        ledger.append(tmp_path, Report("knn-v1", {}, {"model": object()}))
    assert list(tmp_path.iterdir()) == []


def test_no_reports_are_no_reports(tmp_path: Path) -> None:
    assert ledger.reports(tmp_path) == []
    assert ledger.history(tmp_path) == []
