"""Contestants in turn, in one process: processor time, the best of some rounds."""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

ENDINGS = (".jpg", ".jpeg", ".png")

Contest = dict[str, tuple[int, Callable[[], object]]]
"""Name of a contestant, how many images one call works on, and the call."""


def contest(entries: Contest, rounds: int) -> dict[str, float]:
    """Images per second of processor time, after a call that does not count."""
    best = dict.fromkeys(entries, 0.0)
    for _, work in entries.values():
        work()
    for _ in range(rounds):
        for name, (images, work) in entries.items():
            begun = time.process_time()
            work()
            best[name] = max(best[name], images / (time.process_time() - begun))
    return {name: round(rate, 1) for name, rate in best.items()}


def installed(package: str) -> bool:
    """Whether a peer can take part."""
    return importlib.util.find_spec(package) is not None


def images_in(folder: Path, endings: tuple[str, ...] = ENDINGS) -> list[Path]:
    """Image files below a folder, sorted; ends the program where there are none."""
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in endings)
    if not found:
        sys.exit(f"error: no {' or '.join(endings)} below {folder}")
    return found
