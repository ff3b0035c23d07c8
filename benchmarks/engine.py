"""What the engine costs: images per second of `ssl pretrain`'s own loop against a bare loop on resident tensors.

Three loops over the same method, batch and optimiser, in turn, in one process:

- bare: forward, backward, optimiser step, `after_step`, on one batch that never changes: the compute floor;
- engine: the engine's step (schedule, seeds, clipping norm, metrics, signals, checkpoints, run folder), same batch;
- whole: the engine fed by its loader and views, as `ssl pretrain` runs it.

    python benchmarks/engine.py [--preset NAME] [--steps N] [--rounds N] [-o KEY=VALUE ...]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from sslcli import dist
from sslcli.config.load import load
from sslcli.config.presets import PretrainPreset
from sslcli.contracts import Batch, Progress
from sslcli.engine import loop
from sslcli.engine.plan import assembled
from sslcli.engine.pretrain import pretrain


def wait() -> None:
    """Wait until the device has done all it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], None]) -> float:
    """Wall time of one call, device work included."""
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


class Loops:
    """The bare loop and the engine's step over the same method and optimiser."""

    def __init__(self, preset: PretrainPreset, steps: int) -> None:
        run = preset.run.model_copy(update={"views": "fast"})
        parts = assembled(preset.model_copy(update={"run": run}))
        self.preset, self.training, self.feed, self.at = parts.preset, parts.training, parts.feed, parts.at
        self.steps = steps
        self.close = parts.close
        self.batch: Batch = next(iter(self.feed.epoch(self.at, None)))

    def bare(self) -> None:
        """The compute floor."""
        method, optimizer = self.training.method, self.training.optimizer
        for _ in range(self.steps):
            with loop.autocast(self.preset, dist.device()):
                result = method(self.batch, self.at)
            result.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(self.at)

    def engine(self) -> None:
        """The engine's step on the same batch."""
        for _ in range(self.steps):
            loop.step(self.training, self.batch, self.at, self.preset)

    def whole(self) -> None:
        """The engine's step on what loader and views deliver."""
        for batch in self._stream():
            loop.step(self.training, batch, self.at, self.preset)

    def parts(self) -> dict[str, float]:
        """Seconds of the optimiser's and of the slow twin's update, each the best of three: they follow every step."""
        method, optimizer = self.training.method, self.training.optimizer
        method(self.batch, self.at).loss.backward()
        updates = {"optimiser": optimizer.step, "after_step": lambda: method.after_step(self.at)}
        found = {name: min(seconds(update) for _ in range(3)) for name, update in updates.items()}
        optimizer.zero_grad(set_to_none=True)
        return found

    def _stream(self) -> Iterator[Batch]:
        taken, epoch = 0, 0
        while taken < self.steps:
            at = Progress(epoch * self.at.steps_per_epoch, self.at.total, self.at.steps_per_epoch, self.at.seed)
            for batch in self.feed.epoch(at, None):
                yield batch
                taken += 1
                if taken == self.steps:
                    return
            epoch += 1


def measure(name: str, overrides: list[str], steps: int, rounds: int) -> dict[str, object]:
    """Images per second of the three loops and their ratios, each the median over rounds."""
    preset = load("pretrain", name, overrides).preset
    loops = Loops(preset, steps)
    kinds = {"bare": loops.bare, "engine": loops.engine, "whole": loops.whole}
    with closing(loops):
        for work in kinds.values():
            work()
        spent: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, work in kinds.items():
                spent[kind].append(seconds(work))
    images = steps * preset.data.batch_size
    medians = {kind: statistics.median(times) for kind, times in spent.items()}
    ratio = {
        kind: statistics.median(b / t for b, t in zip(spent["bare"], spent[kind], strict=True))
        for kind in ("engine", "whole")
    }
    stall, parts = checkpoint_stall(preset), loops.parts()
    step = medians["engine"] / steps
    return {
        "preset": name,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        **{f"{kind} img/s": round(images / medians[kind], 1) for kind in kinds},
        "engine / bare": round(ratio["engine"], 3),
        "whole / bare": round(ratio["whole"], 3),
        "checkpoint stall / step": round(stall / step, 2),
        **{f"{name} / step": round(spent / step, 3) for name, spent in parts.items()},
    }


def checkpoint_stall(preset: PretrainPreset) -> float:
    """Seconds that the loop waits at a checkpoint: the median over a short run that writes one at every step."""
    waits: list[float] = []
    save = loop.Store.save

    def timed(self: loop.Store, step: int, state: loop.State) -> None:
        self.wait()  # a real run writes far less often: the previous file is on disk long before
        begun = time.perf_counter()
        save(self, step, state)
        waits.append(time.perf_counter() - begun)

    loop.Store.save = timed  # type: ignore[method-assign]
    run = preset.run.model_copy(
        update={
            "epochs": None,
            "steps": 6,
            "checkpoints": preset.run.checkpoints.model_copy(update={"every_steps": 1}),
            "tensorboard": False,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        pretrain(preset.model_copy(update={"run": run}), Path(folder))
    loop.Store.save = save  # type: ignore[method-assign]
    return statistics.median(waits)


def main() -> None:
    """Print a row per preset as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", help="preset to measure; may be repeated")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    for name in arguments.preset or ["demo-digits"]:
        row = measure(name, arguments.overrides, arguments.steps, arguments.rounds)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
