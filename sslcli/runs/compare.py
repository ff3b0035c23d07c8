"""Several runs side by side: what was measured alike stands in one row, what was not says why."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslcli.errors import UserError
from sslcli.runs import ledger
from sslcli.runs.folder import Run, open_run


@dataclass(frozen=True, slots=True)
class Kind:
    """What two reports must have in common to be compared."""

    protocol: str
    """Its name, without marks."""
    settings: str
    """Hash of what the protocol fixes."""
    train: str
    """Fingerprint of the training images."""
    test: str
    """Fingerprint of the test images."""

    def differences(self, other: "Kind") -> tuple[str, ...]:
        """What keeps reports of this kind from being compared with those of another."""
        pairs = {
            "settings": (self.settings, other.settings),
            "training images": (self.train, other.train),
            "test images": (self.test, other.test),
        }
        return tuple(name for name, (one, two) in pairs.items() if one != two)


@dataclass(frozen=True, slots=True)
class Row:
    """Reports that may be compared."""

    kind: Kind
    metric: str
    """The metric that stands for all."""
    entries: dict[str, ledger.Entry]
    """By run, as it was named."""
    differs: tuple[str, ...] = ()
    """What is other than in the first row of this protocol."""
    metrics: tuple[str, ...] = field(default=())
    """All metrics, in their order."""


def folders(paths: Sequence[Path]) -> dict[str, Run]:
    """The runs, or the folders with reports on weights, by the names they were given.

    Raises:
        UserError: a folder is neither, or is named twice.
    """
    found: dict[str, Run] = {}
    for path in paths:
        name = str(path)
        if name in found:
            raise UserError(f"`{name}` is named twice", hint="name every run once")
        found[name] = Run(path) if (path / ledger.REPORTS).is_dir() else open_run(path)
    return found


def compared(runs: dict[str, Run]) -> list[Row]:
    """One row for each kind of report, the kind that most runs have first among those of its protocol.

    Of several reports of a kind on one run, the one on the latest step counts, and the newest of these.
    """
    table: dict[Kind, dict[str, ledger.Entry]] = {}
    for name, run in runs.items():
        for entry in run.reports:
            of_kind = table.setdefault(_kind(entry), {})
            if name not in of_kind or _late(entry) > _late(of_kind[name]):
                of_kind[name] = entry
    rows: list[Row] = []
    first: dict[str, Kind] = {}
    for kind in sorted(table, key=lambda kind: (kind.protocol, -len(table[kind]))):
        lead = first.setdefault(kind.protocol, kind)
        some = next(iter(table[kind].values()))
        metric = str(some.details.get("headline") or next(iter(some.metrics), ""))
        rows.append(Row(kind, metric, table[kind], kind.differences(lead), tuple(some.metrics)))
    return rows


def cell(entry: ledger.Entry | None, metric: str) -> str:
    """A value with its deviation over draws, `-` where there is none."""
    if entry is None or metric not in entry.metrics:
        return "-"
    spread = (entry.details.get("spread") or {}).get(metric)
    return f"{entry.metrics[metric]:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def as_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [
        {
            "protocol": row.kind.protocol,
            "protocol_hash": row.kind.settings,
            "train": row.kind.train,
            "test": row.kind.test,
            "headline": row.metric,
            "not_comparable_with_first": list(row.differs),
            "runs": {
                name: {
                    "label": entry.protocol,
                    "time": entry.time.isoformat(),
                    "metrics": entry.metrics,
                    "spread": entry.details.get("spread") or {},
                    "seeds": entry.details.get("seeds", 1),
                }
                for name, entry in row.entries.items()
            },
        }
        for row in rows
    ]


def _kind(entry: ledger.Entry) -> Kind:
    details = entry.details
    images = [str((details.get(part) or {}).get("fingerprint", "")) for part in ("train", "test")]
    return Kind(entry.protocol.partition("@")[0], str(details.get("protocol_hash", "")), *images)


def _late(entry: ledger.Entry) -> tuple[int, float]:
    return int((entry.details.get("weights") or {}).get("step", 0)), entry.time.timestamp()
