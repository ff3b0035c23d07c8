"""Continuing a run: what it keeps, what is in its folder, and whether it is the same experiment."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from sslcli import dist
from sslcli.config.load import from_data
from sslcli.config.presets import PretrainPreset, as_data, operational_keys
from sslcli.contracts import Progress, RunFacts
from sslcli.data.source import Source
from sslcli.engine import checkpoint, loop
from sslcli.errors import UserError

DECIDED_LATER = frozenset({"run.precision", "run.views", "data.workers"})
"""Keys that a preset may leave to the machine; a resumed run keeps what was decided at its start."""


def found_in(folder: Path, resume: Literal["auto", "never"] | Path) -> tuple[Path, checkpoint.State, list[str]] | None:
    """The checkpoint to continue from, and why newer ones cannot be read."""
    if isinstance(resume, Path):
        path = checkpoint.meant(resume)
        return path, checkpoint.read(path), []
    if resume == "never":
        if (folder / "preset.yaml").exists() or checkpoint.all_in(folder):
            raise UserError(
                f"`{folder}` already holds a run", hint="choose another folder with `--out`, or use `--resume auto`"
            )
        return None
    found = checkpoint.newest_whole(folder)
    path = dist.broadcast_object(None if found is None else found[0])  # a shared disk may show ranks different files
    if path is None:
        return None
    return found if found is not None and found[0] == path else (path, checkpoint.read(path), [])


def after_restart(folder: Path, resume: Literal["auto", "never"] | Path) -> Literal["auto"] | Path:
    """What `--resume` means once the command has begun: its own newest checkpoint; before the first, what was asked."""
    if not isinstance(resume, Path):
        return "auto"
    begun = checkpoint.read(checkpoint.meant(resume))["progress"]["step"]
    written = checkpoint.all_in(folder)
    return "auto" if written and checkpoint.step_of(written[-1]) > begun else resume


def writable(folder: Path) -> None:
    """Make sure the run folder can be written.

    Raises:
        UserError: it cannot.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to `{folder}`: {error.strerror}", hint="choose another folder with `--out`"
        ) from error


def same_experiment(stored: checkpoint.State, preset: PretrainPreset, source: Source, folder: Path) -> PretrainPreset:
    """The preset of a run to be continued, once it is certain that it is the same experiment.

    Raises:
        UserError: the preset or the images differ; the differing keys are listed.
    """
    decided = from_data("pretrain", stored["preset"])  # fills in keys that are younger than the checkpoint
    before, now = as_data(decided), as_data(preset)
    differing = [
        f"{key}: {old!r} -> {new!r}" for key, old, new in differences(before, now) if not free_to_change(key, new)
    ]
    if differing:
        raise UserError(
            f"`{folder}` holds a run with another preset; these keys differ:\n  " + "\n  ".join(differing),
            hint="start the new experiment in another folder with `--out`",
        )
    if stored["source"]["fingerprint"] != source.fingerprint():
        raise UserError(
            f"`{folder}` was started on other images ({stored['source']['images']} of them; "
            f"now {len(source)}, fingerprint differs)",
            hint="point `--data` at the images the run was started on, or choose another folder with `--out`",
        )
    run = preset.run.model_copy(update={"precision": decided.run.precision, "views": decided.run.views})
    return preset.model_copy(update={"run": run})


def free_to_change(key: str, new: object) -> bool:
    """Whether a key may differ between a run and its resumption; the images are compared by what they are."""
    operational = operational_keys(PretrainPreset)
    return (
        any(key == name or key.startswith(f"{name}.") for name in operational)
        or (key in DECIDED_LATER and new is None)
        or key.startswith("data.source.")
    )


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves at which two pieces of plain data differ: dotted key, old value, new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{key}.{number}")
    elif old != new:
        yield key, old, new


def state_of(
    training: loop.Training, preset: PretrainPreset, facts: RunFacts, source: Source, at: Progress
) -> checkpoint.State:
    """Everything a checkpoint holds."""
    progress = asdict(at)
    del progress["part"]
    return {
        "progress": progress,
        "preset": as_data(preset),
        "facts": asdict(facts),
        "source": {"fingerprint": source.fingerprint(), "images": len(source), "classes": list(source.classes)},
        **training.state(),
    }
