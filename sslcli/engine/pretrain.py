"""The pretraining job: preset and folder in, run folder out."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sslcli import dist
from sslcli.config.presets import PretrainPreset, as_data, operational_keys
from sslcli.config.views import eval_view_for
from sslcli.contracts import Method, Progress, RunFacts
from sslcli.data import open_source
from sslcli.data.loader import Loader
from sslcli.data.source import Source
from sslcli.engine import checkpoint, loop, machine, optim
from sslcli.engine.build import facts_of, images_per_rank, method_of
from sslcli.engine.feed import Feed
from sslcli.engine.look import Look
from sslcli.engine.record import Record, Silent, Watcher, table
from sslcli.errors import DataError, SslError, StoppedOnRequest, UserError
from sslcli.nn.norm import group_batch_norm
from sslcli.seeds import seed_of
from sslcli.views import CropViews, build, picture

DECIDED_LATER = frozenset({"run.precision", "run.views", "data.workers"})
"""Keys that a preset may leave to the machine; a resumed run keeps what was decided at its start."""


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
    start: Mapping[str, Tensor] | None = None,
    watcher: Watcher | None = None,
    draw: Callable[[Path], None] | None = None,
) -> Outcome:
    """Run a pretraining experiment to its end, continuing what the folder already holds.

    Args:
        preset: the experiment.
        folder: its run folder.
        resume: `auto` continues an unfinished run of the same preset; `never` refuses a folder in use; a path continues
            from that checkpoint.
        start: weights for the backbone's trunk to begin with, by canonical name; only for a new run.
        watcher: who looks on.
        draw: called now and then with the folder, to refresh its pictures.

    Raises:
        UserError: the folder holds another experiment, cannot be written, or the preset does not fit data or machine.
        DivergedError: the numbers broke.
        StoppedOnRequest: a signal stopped the run after writing a checkpoint.
    """
    found = found_in(folder, resume)
    stored = None if found is None else found[1]
    writable(folder)
    source = open_source(preset.data.source)
    if stored is not None:
        preset = same_experiment(stored, preset, source, folder)
        if stored["progress"]["step"] >= stored["progress"]["total"]:
            return Outcome(folder, Progress(**stored["progress"]), fresh=False)
    if preset.run.deterministic:
        torch.use_deterministic_algorithms(True)
    seed = preset.seed
    views = build(preset.views, seed_of(seed, "views"))
    preset = machine.resolved(
        preset,
        resident=source.resident() is not None,
        reading=preset.run.views or faster_reading(source, views, preset),
    )
    record = Record(folder, watcher or Silent(), draw=draw, tensorboard=preset.run.tensorboard)
    record.batch_size = preset.data.batch_size
    with closing(loader_of(preset, source, views)) as loader, record, stop_signals() as stop_asked:
        facts = facts_of(preset, images=loader.images, steps_per_epoch=loader.steps_per_epoch)
        method = method_of(preset, facts)
        if start is not None and stored is None:
            method.backbone.trunk.load_state_dict(start)
            method.copy_student()
        training, groups = training_of(method, preset)
        feed = feed_of(loader, views, preset)
        at = Progress(step=0, total=facts.total_steps, steps_per_epoch=facts.steps_per_epoch, seed=seed)
        if stored is not None:
            training.restore(stored)
            at = Progress(**stored["progress"])
        record.open(preset, at)
        for line in (found[2] if found else []):
            record.say(f"warning: {line}; an earlier checkpoint is used")
        record.say(summary(preset, source, method, training, facts, groups, at))
        if at.step == 0:
            show_views(feed, preset, at, folder)
        store = checkpoint.Store(folder, preset.run.checkpoints.keep, facts.steps_per_epoch)
        state = partial(state_of, training, preset, facts, source)
        looked = Look(method, source, eval_view_for(preset.views), preset)
        try:
            with closing(store):
                at = loop.fit(
                    training, feed, preset, at,
                    look=looked, record=record, store=store, checkpoint=state, stop_asked=stop_asked,
                )  # fmt: skip
        except (StoppedOnRequest, loop.DivergedError):
            raise
        except KeyboardInterrupt:
            record.status("interrupted", at, "interrupted; the last checkpoint can be resumed")
            raise
        except BaseException as error:
            record.status("failed", at, str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise
        finally:
            record.skipped(feed.skipped, source.name)
        if feed.skipped:
            record.say(f"warning: {len(feed.skipped)} unreadable images were skipped, see {folder / 'skipped.txt'}")
        record.status("finished", at)
    return Outcome(folder, at, fresh=True)


def found_in(
    folder: Path, resume: Literal["auto", "never"] | Path
) -> tuple[Path, checkpoint.State, list[str]] | None:
    """The checkpoint to continue from, and why newer ones cannot be read."""
    if isinstance(resume, Path):
        path = checkpoint.newest(resume) if resume.is_dir() else resume
        return path, checkpoint.read(path), []
    if resume == "never":
        if (folder / "preset.yaml").exists() or checkpoint.all_in(folder):
            raise UserError(
                f"`{folder}` already holds a run", hint="choose another folder with `--out`, or use `--resume auto`"
            )
        return None
    return checkpoint.newest_whole(folder)


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


def same_experiment(
    stored: checkpoint.State, preset: PretrainPreset, source: Source, folder: Path
) -> PretrainPreset:
    """The preset of a run to be continued, once it is certain that it is the same experiment.

    Raises:
        UserError: the preset or the images differ; the differing keys are listed.
    """
    before, now = stored["preset"], as_data(preset)
    differing = [
        f"{key}: {old!r} -> {new!r}"
        for key, old, new in differences(before, now)
        if not free_to_change(key, new)
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
    decided = PretrainPreset.model_validate(before)
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


def faster_reading(source: Source, views: CropViews, preset: PretrainPreset) -> Literal["fast", "reference"]:
    """Which reading of the views is faster here: measured on up to 32 images; rank 0 decides for all."""
    if torch.cuda.is_available():
        return "fast"
    images = [source.read(index) for index in range(0)]
    for index in range(len(source)):
        if len(images) == 32:
            break
        try:
            images.append(source.read(index))
        except DataError:
            continue
    if not images:
        raise DataError(f"none of the {len(source)} images of `{preset.data.source.name}` can be read")
    numbers = torch.arange(len(images)).numpy()

    def fast() -> None:
        crops = [views.crop(image, index, 0) for index, image in enumerate(images)]
        views.finish([torch.stack([torch.from_numpy(c[v]) for c in crops]) for v in range(views.count)], numbers, 0)

    def reference() -> None:
        for index, image in enumerate(images):
            views.reference(image, index, 0)

    fast()  # the first call pays for imports and allocations
    chosen: Literal["fast", "reference"] = "fast" if seconds_of(fast) <= seconds_of(reference) else "reference"
    answer: Literal["fast", "reference"] = dist.broadcast_object(chosen)
    return answer


def seconds_of(work: Callable[[], None]) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def loader_of(preset: PretrainPreset, source: Source, views: CropViews) -> Loader:
    """The loader that a resolved preset describes."""
    look = views.reference if preset.run.views == "reference" else views.crop
    resident = source.resident() is not None and preset.run.views == "fast"
    return Loader(
        source,
        batch_size=preset.data.batch_size,
        seed=seed_of(preset.seed, "data"),
        look=None if resident else look,
        workers=preset.data.workers or 0,
        drop_last=preset.data.drop_last,
        fraction=preset.data.fraction,
        rank=dist.rank(),
        world=dist.world(),
        pin=dist.device().type == "cuda",
    )


def feed_of(loader: Loader, views: CropViews, preset: PretrainPreset) -> Feed:
    """Device batches of a resolved preset."""
    return Feed(
        loader,
        views,
        reading=preset.run.views or "fast",
        device=dist.device(),
        channels_last=preset.run.channels_last,
    )


def training_of(method: Method[Any], preset: PretrainPreset) -> tuple[loop.Training, str]:
    """Method, optimiser and scaler on this rank's device, and the printed table of parameter groups."""
    device = dist.device()
    group_batch_norm(method, local=images_per_rank(preset), group=preset.run.batch_norm)
    method.to(device, memory_format=torch.channels_last if preset.run.channels_last else torch.contiguous_format)
    lr = preset.optim.effective_lr(preset.data.batch_size)
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    groups = optim.param_groups(named, preset.optim, [*method.param_rules(), *preset.optim.rules])
    text = optim.table(groups)
    optimizer = optim.make_optimizer(groups, preset.optim, lr, device)
    scaler = torch.amp.GradScaler(device.type, enabled=preset.run.precision == "fp16")
    return loop.Training(method, dist.wrap(method), optimizer, scaler, lr), text


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


def summary(
    preset: PretrainPreset,
    source: Source,
    method: Method[Any],
    training: loop.Training,
    facts: RunFacts,
    groups: str,
    at: Progress,
) -> str:
    """What is about to happen, in a few lines."""
    own = sum(p.numel() for p in method.backbone.parameters())
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    rule = "" if preset.optim.per is None else f" = {preset.optim.lr:g} x {preset.data.batch_size}/{preset.optim.per}"
    rows = [
        ("method", f"{preset.method.name} on {preset.backbone.name}, {own / 1e6:.2f} M backbone, {trained / 1e6:.2f} M trained"),
        ("images", f"{facts.images} ({preset.data.source.name}), {facts.steps_per_epoch} steps per epoch, {facts.total_steps} steps"),
        ("batch", f"{preset.data.batch_size} over {dist.world()} rank(s), {images_per_rank(preset)} per forward pass, batch norm over {preset.run.batch_norm}"),
        ("learning rate", f"{training.lr:g}{rule}, {preset.schedule.name}"),
        ("arithmetic", f"{preset.run.precision} on {dist.device()}, views: {preset.run.views}, {preset.data.workers} loader workers"),
        ("start", "step 0" if at.step == 0 else f"resumed at step {at.step}"),
    ]  # fmt: skip
    return table(rows) + "\n" + groups


def show_views(feed: Feed, preset: PretrainPreset, at: Progress, folder: Path) -> None:
    """Draw what the network sees of the first images: `views.png`."""
    batch = next(iter(feed.epoch(at, None)), None)
    if batch is not None and dist.is_main():
        views = [view[:8].float().cpu() for view in batch.views]
        picture(views, preset.views.normalize, folder / "views.png")


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Notice SIGTERM and SIGUSR1 instead of dying of them; yields a function that says whether one came."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)

    watched = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in watched}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dry_run(preset: PretrainPreset, *, steps: int = 2) -> list[tuple[str, str]]:
    """Validate preset, data and machine by taking a few real steps; nothing is written.

    Returns:
        Rows (name, value) to print: parameters, memory, images per second, time and disk needed, learning rate.
    """
    source = open_source(preset.data.source)
    views = build(preset.views, seed_of(preset.seed, "views"))
    reading = preset.run.views or faster_reading(source, views, preset)
    preset = machine.resolved(preset, resident=source.resident() is not None, reading=reading)
    with closing(loader_of(preset, source, views)) as loader:
        facts = facts_of(preset, images=loader.images, steps_per_epoch=loader.steps_per_epoch)
        method = method_of(preset, facts)
        training, groups = training_of(method, preset)
        feed = feed_of(loader, views, preset)
        at = Progress(step=0, total=facts.total_steps, steps_per_epoch=facts.steps_per_epoch, seed=preset.seed)
        method.train()
        losses, seconds = [], []
        for batch in islice(feed.epoch(at, None), steps):
            begun = time.perf_counter()
            result = loop.accumulate(training, batch, at, preset)
            method.before_update(at)
            loop.clip(training, preset.run.clip)
            optim.set_lr(training.optimizer, training.lr, loop.factor(preset.schedule, at.step, at.total, at.steps_per_epoch))
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=True)
            method.after_step(at)
            at = at.next()
            losses.append(float(result.loss))
            seconds.append(time.perf_counter() - begun + feed.waited)
            feed.waited = 0.0
        if not all(map(torch.isfinite, torch.tensor(losses))):
            raise SslError("the loss of the first steps is not finite", hint="try `-o run.precision=fp32`")
    bytes_written = size_of(state_of(training, preset, facts, source, at))
    rate = preset.data.batch_size / min(seconds)
    parameters = sum(p.numel() for p in method.parameters())
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return [
        ("images", f"{facts.images} ({preset.data.source.name})"),
        ("parameters", f"{parameters / 1e6:.2f} M, of which {trained / 1e6:.2f} M are trained"),
        ("steps", f"{facts.total_steps} ({facts.steps_per_epoch} per epoch)"),
        ("learning rate", f"{training.lr:g} at a batch of {preset.data.batch_size}"),
        ("arithmetic", f"{preset.run.precision} on {dist.device()}, views: {preset.run.views}, {preset.data.workers} workers"),
        ("loss", " ".join(f"{loss:.4f}" for loss in losses)),
        ("memory", f"{loop.memory_gb():.2f} GB"),
        ("speed", f"{rate:.1f} images/s (from {len(seconds)} steps)"),
        ("time", f"about {_duration(facts.total_steps * preset.data.batch_size / rate)}"),
        ("disk", f"about {bytes_written * (preset.run.checkpoints.keep.last + 1) / 1e6:.0f} MB of checkpoints"),
        ("groups", "\n" + groups),
    ]  # fmt: skip


def size_of(value: Any) -> int:
    """Bytes of all tensors in nested state."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(size_of(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(size_of(item) for item in value)
    return 0


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds > 172800 else f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{seconds / 60:.1f} minutes"
