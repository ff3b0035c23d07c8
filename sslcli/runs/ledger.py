"""The results of a run: `reports/<protocol>.json`, the newest of each, and `ledger.jsonl`, all there ever were."""

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import AwareDatetime, BaseModel, ValidationError

if TYPE_CHECKING:
    from sslcli.contracts import Report

REPORTS, LEDGER = "reports", "ledger.jsonl"


class Entry(BaseModel):
    """A report as it lies on disk."""

    time: AwareDatetime
    """When it was written."""
    protocol: str
    metrics: dict[str, float]
    """Percentages in [0, 100]."""
    details: dict[str, Any]


def append(run: Path, report: "Report") -> Path:
    """Note a report in a run folder; the file of its protocol, which now holds it, is returned.

    Raises:
        OSError: the folder cannot be written.
        TypeError: the details are not plain data.
    """
    entry = {"time": datetime.now(UTC).astimezone().isoformat(timespec="seconds"), **asdict(report)}
    line = json.dumps(entry) + "\n"
    target = run / REPORTS / f"{report.protocol}.json"
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    temporary.replace(target)
    with (run / LEDGER).open("a+b") as file:
        file.write(line.encode() if _ends_clean(file) else b"\n" + line.encode())
    return target


def reports(run: Path) -> list[Entry]:
    """The newest report of each protocol, by name; a file that cannot be read is left out."""
    found = []
    for path in sorted((run / REPORTS).glob("*.json")):
        try:
            found.append(Entry.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError):
            continue
    return found


def history(run: Path) -> list[Entry]:
    """All reports ever made on a run, oldest first; a line cut short by a crash is left out."""
    try:
        lines = (run / LEDGER).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Entry.model_validate_json(line))
        except ValidationError:
            continue
    return found


def _ends_clean(file: BinaryIO) -> bool:
    """Whether the next line can just be appended: the file is empty or ends with a line's end."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
