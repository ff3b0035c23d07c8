"""The one loop: in what order does time pass?"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from sslcli import dist
from sslcli.config.schedule import factor
from sslcli.contracts import Batch, Look, Method, Progress, Recipe, StepResult
from sslcli.engine import optim
from sslcli.engine.checkpoint import State, Store
from sslcli.engine.feed import Feed
from sslcli.engine.monitor import Monitor
from sslcli.engine.record import Note, Record
from sslcli.errors import DivergedError, StoppedOnRequest
from sslcli.nn.norm import average_statistics_, counted_once
from sslcli.seeds import seed_here

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CLIP_EPS = 1e-6
"""Added to a norm before dividing by it, as torch and DINO do."""


@dataclass(frozen=True, slots=True)
class Training:
    """The things a run moves: everything whose state a checkpoint holds."""

    method: Method  # type: ignore[type-arg]
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    lr: float
    """Effective base learning rate."""

    @property
    def shared(self) -> bool:
        """Whether some of the state lies in shares, so that all ranks write it."""
        return any(dist.is_share(x) for x in self.method.state_dict().values())

    def state(self) -> State:
        """Everything that changes with time."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: State) -> None:
        """Put everything back as it was; the state holds whole tensors, of which a sharded run takes its shares."""
        mine = self.method.state_dict()
        shares = {name: dist.share_of(x, mine[name]) if name in mine else x for name, x in state["method"].items()}
        self.method.load_state_dict(shares)
        self.optimizer.load_state_dict(optim.shares_of(state["optimizer"], self.optimizer))
        self.scaler.load_state_dict(state["scaler"])


def fit(
    training: Training,
    feed: Feed,
    preset: Recipe,
    at: Progress,
    *,
    look: Look,
    monitor: Monitor | None,
    record: Record,
    store: Store,
    checkpoint: Callable[[Progress], State],
    stop_asked: Callable[[], bool],
) -> Progress:
    """Train from `at` to the end.

    Raises:
        DivergedError: the loss or the gradient is not finite.
        CollapsedError: the network stopped telling images apart, and the preset says to stop then.
        StoppedOnRequest: a signal asked to stop; a checkpoint has been written.
    """
    method, run = training.method, preset.run
    every = run.checkpoints.every_steps or max(1, round(run.checkpoints.every_epochs * feed.steps_per_epoch))
    meter = Meter(preset.data.batch_size, record, tolerated=run.skip_limit if run.on_nonfinite == "skip" else 0)
    method.train()
    while not at.done:
        if at.starts_epoch:
            with meter.paused():
                method.before_epoch(at, look)
        for batch in feed.epoch(at, method.sample_weights(), method.sample_groups()):
            result, norm, lr = step(training, batch, at, preset)
            at = at.next()
            record.reached(at)
            meter.add(at.step, result, norm)
            if at.step % run.log_every == 0 or at.done:
                record.note(meter.note(at, lr, feed), at)
            if monitor is not None and monitor.due(at):
                with meter.paused():
                    dist.lent(training.wrapped, partial(monitor.look, at, result.scalars))
            stopping = dist.any_rank(stop_asked())
            if at.step % every == 0 or at.done or stopping:
                meter.check(at)
                if dist.is_main() or training.shared:
                    store.save(at.step, checkpoint(at))
            if stopping and not at.done:
                store.wait()
                record.status("stopped", at, "stopped on request")
                raise StoppedOnRequest(
                    f"stopped on request at step {at.step}; the checkpoint is written",
                    hint=f"continue with `{record.again}`",
                )
            if at.done:
                break
    store.wait()
    return at


def step(training: Training, batch: Batch, at: Progress, preset: Recipe) -> tuple[StepResult, Tensor, float]:
    """One optimiser update: its loss, the norm of its gradient, its learning rate."""
    method, optimizer, scaler = training.method, training.optimizer, training.scaler
    lr = optim.set_lr(optimizer, training.lr, factor(preset.schedule, at.step, at.total, at.steps_per_epoch))
    if preset.optim.weight_decay_end is not None:
        done = (at.step + preset.schedule.ahead) / at.total
        optim.set_weight_decay(optimizer, preset.optim.weight_decay, preset.optim.weight_decay_end, done)
    result = accumulate(training, batch, at, preset)
    method.before_update(at)
    norm = clip(training, preset.run.clip, each=preset.run.clip_each)
    if preset.run.on_nonfinite == "skip":
        leave_out(optimizer, ~torch.isfinite(norm))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    method.after_step(at)
    average_statistics_(method)
    if scaler.is_enabled():  # an overflow is the scaler's affair: it lowers the scale and skips the step
        norm = norm.nan_to_num(posinf=0.0)
    return result, norm, lr


def accumulate(training: Training, batch: Batch, at: Progress, preset: Recipe) -> StepResult:
    """Forward and backward over the slices of a batch; gradients are averaged over slices and ranks."""
    parts = preset.run.accumulate
    results: list[StepResult] = []
    for number, part in enumerate(slices(batch, parts)):
        seed_here(preset.seed, "step", at.step, number, dist.rank())
        last = number == parts - 1
        with dist.sync_if(training.wrapped, last):
            with autocast(preset, batch.index.device):
                result: StepResult = training.wrapped(part, at.at_part(number))
            with counted_once(training.method) if preset.run.checkpoint_activations else nullcontext():
                training.scaler.scale(result.loss / parts).backward()
        results.append(replace(result, loss=result.loss.detach()))
    if parts == 1:
        return results[0]
    loss = torch.stack([result.loss for result in results]).mean()
    names = results[0].scalars
    return StepResult(loss, {name: torch.stack([r.scalars[name] for r in results]).mean() for name in names})


def slices(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch cut into equal slices of its rows."""
    if parts == 1:
        yield batch
        return
    rows = batch.index.shape[0] // parts
    for number in range(parts):
        cut = slice(number * rows, (number + 1) * rows)
        yield Batch(
            views=[view[cut] for view in batch.views],
            index=batch.index[cut],
            labels=None if batch.labels is None else batch.labels[cut],
            masks=None if batch.masks is None else batch.masks[cut],
            masked=batch.masked,
            blocks=None if batch.blocks is None else batch.blocks[cut],
            targets=[target[cut] for target in batch.targets],
        )


def autocast(preset: Recipe, device: torch.device) -> torch.autocast:
    """Mixed precision of the forward pass."""
    dtype = DTYPES.get(preset.run.precision or "fp32")
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def clip(training: Training, limit: float | None, *, each: bool) -> Tensor:
    """Norm of the whole gradient, after unscaling. What is longer than `limit` is scaled down to it.

    That is the whole gradient, or (`each`) the gradient of every parameter by itself, as in DINO.
    """
    training.scaler.unscale_(training.optimizer)
    grads = [p.grad for group in training.optimizer.param_groups for p in group["params"] if p.grad is not None]
    mine = [dist.own(grad) for grad in grads]
    norms = dist.norms(mine, shared=dist.is_share(grads[0]))  # (P,)
    norm: Tensor = torch.linalg.vector_norm(norms)
    if limit is not None:
        if each:
            torch._foreach_mul_(mine, list((limit / (norms + CLIP_EPS)).clamp(max=1).unbind()))
        else:
            torch._foreach_mul_(mine, (limit / (norm + CLIP_EPS)).clamp(max=1))
    return norm


def leave_out(optimizer: torch.optim.Optimizer, when: Tensor) -> None:
    """Make the next optimiser step do nothing if `when`, a scalar on the device.

    The fused optimisers look at `found_inf`, the door that gradient scaling uses, without waiting for the answer. The
    others are left without gradients, for which the answer is waited for.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale, optimizer.found_inf = None, when.float()  # type: ignore[attr-defined]
    elif when:
        optimizer.zero_grad(set_to_none=True)


class Meter:
    """Sums of metrics that stay on the device until they are asked for."""

    def __init__(self, batch_size: int, record: Record, *, tolerated: int = 0) -> None:
        self._batch_size = batch_size
        self._record = record
        self._tolerated = tolerated
        self._began = time.perf_counter()
        self._clear()
        self._in_a_row: Tensor | float = 0.0

    def _clear(self) -> None:
        self._steps = 0
        self._good: Tensor | float = 0.0
        self._sums: dict[str, Tensor] = {}
        self._bad: Tensor | None = None

    def add(self, step: int, result: StepResult, grad_norm: Tensor) -> None:
        """Take in one step, without waiting for it."""
        values = {"loss": result.loss.detach(), "grad_norm": grad_norm.detach(), **result.scalars}
        wrong = ~(torch.isfinite(values["loss"]) & torch.isfinite(values["grad_norm"]))
        for name, value in values.items():
            value = torch.where(wrong, 0.0, value.detach().float())
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._good = self._good + (~wrong).float()
        self._in_a_row = torch.where(wrong, self._in_a_row + 1.0, 0.0)
        first = torch.where(self._in_a_row > self._tolerated, float(step), torch.inf)
        self._bad = first if self._bad is None else torch.minimum(self._bad, first)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        yield
        self._began += time.perf_counter() - begun

    def note(self, at: Progress, lr: float, feed: Feed) -> Note:
        """Averages since the last note, over ranks; waits for the device once.

        Raises:
            DivergedError: see `check`.
        """
        self.check(at)
        names = list(self._sums)
        sums = torch.stack([*(self._sums[name] for name in names), torch.as_tensor(self._good)])
        *totals, good = dist.mean(sums).tolist()
        values = {name: total / max(good, 1.0) for name, total in zip(names, totals, strict=True)}
        scalars = {name: value for name, value in values.items() if name not in ("loss", "grad_norm")}
        if good < self._steps:
            scalars["left_out"] = self._steps - good
        seconds = time.perf_counter() - self._began
        note = Note(
            step=at.step,
            epoch=round(at.step / at.steps_per_epoch, 4),
            loss=values["loss"],
            lr=lr,
            grad_norm=values["grad_norm"],
            images_per_second=self._steps * self._batch_size / seconds,
            data_wait=min(1.0, feed.waited / seconds),
            memory_gb=memory_gb(),
            scalars=scalars,
        )
        self._clear()
        self._began, feed.waited = time.perf_counter(), 0.0
        return note

    def check(self, at: Progress) -> None:
        """Stop before a broken state is written or reported as progress.

        Raises:
            DivergedError: on some rank, more steps in a row than tolerated had a loss or gradient that is not finite.
        """
        first = torch.inf if self._bad is None else float(self._bad)
        found = [(step, rank) for rank, step in enumerate(dist.gather_objects(first)) if step != torch.inf]
        if found:
            step, rank = min(found)
            message = f"the loss or its gradient is not finite at step {int(step)} (rank {rank})"
            self._record.status("failed", at, message)
            raise DivergedError(
                message,
                hint=f"the last good checkpoint is in `{self._record.folder / 'checkpoints'}`; "
                "try a lower `optim.lr`, a longer `schedule.warmup`, or `run.precision=fp32`",
            )


def memory_gb() -> float:
    """Most device memory used so far, or this process's memory on a CPU, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
