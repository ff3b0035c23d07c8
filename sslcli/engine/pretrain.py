"""The pretraining job: preset and folder in, run folder out."""

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from sslcli import dist
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Method, Progress
from sslcli.data import open_source
from sslcli.engine import checkpoint, loop
from sslcli.engine.build import (
    facts_of,
    feed_of,
    images_per_rank,
    loader_of,
    look_of,
    method_of,
    training_of,
)
from sslcli.engine.feed import Feed
from sslcli.engine.launch import launched, restarted
from sslcli.engine.monitor import Monitor
from sslcli.engine.plan import decided, summary
from sslcli.engine.record import Record, Silent, Watcher
from sslcli.engine.resume import found_in, same_experiment, state_of, writable
from sslcli.errors import SslError, StoppedOnRequest
from sslcli.views import Seen, picture


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a pretraining job ended."""

    folder: Path
    at: Progress
    fresh: bool
    """Whether any step was taken."""


def pretrain(
    preset: PretrainPreset,
    folder: Path,
    *,
    resume: Literal["auto", "never"] | Path = "auto",
    start: Callable[[Method[Any]], str] | None = None,
    watcher: Watcher | None = None,
    draw: Callable[[Path], None] | None = None,
) -> Outcome:
    """Run a pretraining experiment to its end, continuing what the folder already holds.

    Args:
        preset: the experiment.
        folder: its run folder.
        resume: `auto` continues an unfinished run of the same preset; `never` refuses a folder in use; a path continues
            from that checkpoint.
        start: called on the method of a new run, to put weights into it; says in one line what it did.
        watcher: who looks on.
        draw: called now and then with the folder, to refresh its pictures.

    Raises:
        UserError: the folder holds another experiment, cannot be written, or the preset does not fit data or machine.
        DivergedError: the numbers broke.
        CollapsedError: the features did, and the preset says to stop then.
        StoppedOnRequest: a signal stopped the run after writing a checkpoint.
    """
    found = found_in(folder, resume)
    stored = None if found is None else found[1]
    source = open_source(preset.data.source)
    writable(folder)
    if stored is not None:
        preset = same_experiment(stored, preset, source, folder)
        if stored["progress"]["step"] >= stored["progress"]["total"]:
            return Outcome(folder, Progress(**stored["progress"]), fresh=False)
    if preset.run.deterministic:
        torch.use_deterministic_algorithms(True)
    preset, views = decided(preset, source)
    record = Record(
        folder,
        preset.data.batch_size,
        watcher or Silent(),
        draw=draw,
        tensorboard=preset.run.tensorboard,
        loggers=preset.run.loggers,
    )
    with closing(loader_of(preset, source, views)) as loader, record, stop_signals() as stop_asked:
        facts = facts_of(preset, images=len(source), steps_per_epoch=loader.steps_per_epoch)
        method = method_of(preset, facts)
        begun = start(method) if start is not None and stored is None else None
        training, groups = training_of(method, preset)
        feed = feed_of(loader, views, preset)
        at = Progress(step=0, total=facts.total_steps, steps_per_epoch=facts.steps_per_epoch, seed=preset.seed)
        if stored is not None:
            training.restore(stored)
            at = Progress(**stored["progress"])
        record.open(preset, at)
        for line in found[2] if found else []:
            record.say(f"warning: {line}; an earlier checkpoint is used")
        if dist.is_main() and (aside := checkpoint.set_aside(folder, at.step)):
            record.say(f"warning: renamed {len(aside)} checkpoint(s) beyond step {at.step}, e.g. `{aside[-1]}`")
        if why := restarted():
            record.say(f"{why}; " + (f"resumed at step {at.step}" if found else "no checkpoint yet: begun anew"))
        if begun is not None:
            record.say(begun)
        record.say(summary(preset, source, training, facts, groups, at))
        if dist.is_main() and not (folder / "views.png").exists():
            show_views(feed, preset, at, folder)
        store = checkpoint.Store(folder, preset.run.checkpoints.keep, facts.steps_per_epoch, shared=training.shared)
        try:
            with record.failures_told(at), closing(store):
                at = loop.fit(
                    training,
                    feed,
                    preset,
                    at,
                    look=look_of(training, source, preset),
                    monitor=Monitor(
                        method,
                        source,
                        preset,
                        images_at_once=images_per_rank(preset),
                        steps_per_epoch=facts.steps_per_epoch,
                        record=record,
                    ),
                    record=record,
                    store=store,
                    checkpoint=partial(state_of, training, preset, facts, source),
                    stop_asked=stop_asked,
                )
        except StoppedOnRequest:
            record.skipped(feed.skipped, source.name)
            raise
        record.skipped(feed.skipped, source.name)
        record.status("finished", at)
    return Outcome(folder, at, fresh=True)


def show_views(feed: Feed, preset: PretrainPreset, at: Progress, folder: Path) -> None:
    """Draw what the network sees of the first images: `views.png`."""
    batch = next(iter(feed.epoch(at)), None)
    if batch is not None:
        views, targets = ([tensor[:8].float().cpu() for tensor in some] for some in (batch.views, batch.targets))
        masks = None if batch.masks is None else batch.masks[:8].cpu()
        picture(Seen(views, masks, targets), preset.views, folder / "views.png")


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Notice SIGTERM and SIGUSR1 instead of dying of them; yields a function that says whether one came.

    A rank that ends with an error of ours does not die of them afterwards either.
    """
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)

    watched = (signal.SIGTERM, signal.SIGUSR1)
    after: dict[int, Any] = {number: signal.signal(number, note) for number in watched}
    try:
        yield lambda: bool(caught)
    except SslError:
        if launched():  # a launcher ends all ranks when the first has ended, and must not cut off what others say
            after = dict.fromkeys(watched, signal.SIG_IGN)
        raise
    finally:
        for number, handler in after.items():
            signal.signal(number, handler)
