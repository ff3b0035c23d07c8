"""Batches in their order: a function of the seed, the epoch and the step, whatever the number of ranks and workers."""

import atexit
import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sslcli import seeds
from sslcli.data.source import I64, U8, Source, UnreadableImage
from sslcli.errors import DataError, SslError, UserError

LookAt = Callable[[U8, int, int], Sequence[npt.NDArray[np.generic]]]
"""From (image, number of the draw, epoch) to the arrays that the views need of it, alike for all images; the number is
that of the image where it comes once."""

SUBSTITUTES = 20
"""How many images are tried in place of one that cannot be read; if half of them are bad, one in a million fails."""


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One rank's share of a batch, in ordinary memory."""

    index: Tensor
    """(B,) int64: which image of the source each row shows."""
    views: list[Tensor]
    """What looked at the images, stacked: each (B, ...); empty when whole images are handed over."""
    images: Tensor | None
    """(B, H, W, 3) uint8: whole images, when nothing looks at them here."""
    labels: Tensor | None
    """(B,) int64, where the source has labels."""
    draws: Tensor | None = None
    """(B,) int64: by which number, in place of that of the image, views are drawn where images may come repeatedly."""
    skipped: tuple[tuple[int, str], ...] = ()
    """Images that should have been in this batch and could not be read: index and reason."""

    def pin_memory(self) -> "HostBatch":
        """The same in page-locked memory, from where a GPU copies without waiting."""
        return replace(
            self,
            index=self.index.pin_memory(),
            views=[view.pin_memory() for view in self.views],
            images=None if self.images is None else self.images.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
        )

    @property
    def numbers(self) -> I64:
        """(B,) the numbers by which views are drawn."""
        found: I64 = (self.index if self.draws is None else self.draws).numpy()
        return found


@dataclass(frozen=True, slots=True)
class _Request:
    """A batch to make."""

    epoch: int
    rows: I64
    draws: I64 | None
    """What tells repeated draws of one image apart; None where no image is drawn repeatedly."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a batch could not be made: an exception of ours would not come out of a process as it went in."""

    message: str
    hint: str | None


@final
class Loader:
    """One rank's batches of every epoch, made here or in processes that last as long as the loader.

    Position p of epoch e shows image `permuted(p)` of a permutation keyed by (seed, e). Global batch k is the positions
    from k*B to (k+1)*B; each rank takes its contiguous share. An image that cannot be read is replaced by another,
    drawn by (seed, epoch, image), so that a bad file changes its own row and nothing else.

    Args:
        source: the images.
        batch_size: images per batch over all ranks.
        seed: the run's seed.
        look: what is made of each image; None hands over whole images, which must be in memory. On systems that do not
            fork it must be picklable.
        workers: processes; 0 makes batches in this one, as does `look=None`.
        drop_last: leave out the last, incomplete batch; otherwise it is short, and filled up from the start of the
            epoch only as far as all ranks need to get equally many.
        fraction: use only this share of the images, at least one; which ones is a function of the seed.
        rank: which share is ours.
        world: how many there are.
        pin: hand over page-locked memory.

    Raises:
        UserError: the batch cannot be shared equally.
        DataError: a batch is larger than the data set, or `fraction` leaves nothing of it.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        look: LookAt | None,
        workers: int,
        drop_last: bool = True,
        fraction: float = 1.0,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        _check_shares(batch_size, world)
        total = len(source)
        self.images = math.ceil(fraction * total - 1e-9)  # 0.07 * 100 is a little more than 7
        if self.images < 1:
            raise DataError(f"a share of {fraction:g} of {total} images leaves none", hint="raise `data.fraction`")
        if drop_last and batch_size > self.images:
            raise DataError(
                f"a batch of {batch_size} is more than the {self.images} images there are",
                hint=_smaller_batch(self.images, world),
            )
        full, rest = divmod(self.images, batch_size)
        self.steps_per_epoch = full + (rest > 0 and not drop_last)
        self._total = total
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world = world
        self._pin = pin
        choose = _Choice(self.images, total, seeds.seed_of(seed, "fraction"))
        self._choose = choose
        self._maker = _Maker(source, look, choose, seed)
        self._processes = None if look is None or workers == 0 else _Processes(self._maker, workers, pin)
        self._running: Generator[HostBatch, None, None] | None = None

    def epoch(
        self,
        epoch: int,
        start: int = 0,
        weights: npt.NDArray[np.floating] | None = None,
        groups: npt.NDArray[np.integer] | None = None,
    ) -> Iterator[HostBatch]:
        """The batches of an epoch from step `start`; it ends the epoch before, if that is still under way.

        With `weights` (N,), one for each image of the source, images are drawn in proportion to them: each draw by
        itself, with replacement; or, with `groups` (N,), so that every group and every image comes as often as its
        share of the weights says, rounded up or down.
        Raises DataError at an image that cannot be read and may not, or cannot, be replaced.
        """
        if self._running is not None:
            self._running.close()
        self._running = self._batches(self._requests(epoch, start, weights, groups))
        return self._running

    def indices(self, epoch: int, step: int) -> I64:
        """This rank's images of one batch, drawn without weights, before bad ones are replaced."""
        return self._permuted(epoch, self._positions(step))

    def close(self) -> None:
        """End the epoch and the processes."""
        if self._running is not None:
            self._running.close()
        if self._processes is not None:
            self._processes.close()

    def _requests(
        self,
        epoch: int,
        start: int,
        weights: npt.NDArray[np.floating] | None,
        groups: npt.NDArray[np.integer] | None,
    ) -> Iterator[_Request]:
        order = partial(self._permuted, epoch) if weights is None else self._sampled(epoch, weights, groups)
        for step in range(start, self.steps_per_epoch):
            positions = self._positions(step)
            yield _Request(epoch, order(positions), None if weights is None else self._total + positions)

    def _positions(self, step: int) -> I64:
        """This rank's positions in the epoch."""
        first = step * self._batch_size
        length = min(self._batch_size, self.images - first)
        share = -(-length // self._world)
        return (first + self._rank * share + np.arange(share)) % self.images

    def _permuted(self, epoch: int, positions: I64) -> I64:
        return self._choose(seeds.permuted(positions, self.images, seeds.seed_of(self._seed, "order", epoch)))

    def _sampled(
        self, epoch: int, weights: npt.NDArray[np.floating], groups: npt.NDArray[np.integer] | None
    ) -> Callable[[I64], I64]:
        """From positions to images, by the inverse of the cumulative weights.

        With groups, the images of each lie side by side, in an order of this epoch, and the draws are one step apart
        all along the line ("systematic sampling"); positions take them in a shuffled order.
        """
        if weights.shape != (self._total,):
            raise ValueError(f"{self._total} images need as many weights, not {weights.shape}")
        rows = self._choose(np.arange(self.images))
        if groups is not None:
            shuffled = seeds.bits(seeds.seed_of(self._seed, "within", epoch), rows)
            rows = rows[np.lexsort((shuffled, groups[rows]))]
        cumulative = np.cumsum(weights[rows], dtype=np.float64)
        whole = cumulative[-1]
        if not (weights.min() >= 0 and 0 < whole < np.inf):
            raise ValueError("weights must be finite, not negative and not all zero")
        last = np.searchsorted(cumulative, whole)  # the last image with any weight
        key = seeds.seed_of(self._seed, "sample", epoch)

        def order(positions: I64) -> I64:
            if groups is None:  # 53 bits: with the 24 of a float32, most of 100 million images would never be drawn
                draw = (seeds.bits(key, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53
            else:
                draw = (seeds.permuted(positions, self.images, key) + seeds.uniform(key, 0)) / self.images
            drawn: I64 = rows[np.minimum(np.searchsorted(cumulative, draw * whole, side="right"), last)]
            return drawn

        return order

    def _batches(self, requests: Iterator[_Request]) -> Generator[HostBatch, None, None]:
        if self._processes is not None:
            made = self._processes.made(requests)
        elif self._pin:
            made = (_pinned(self._maker[request]) for request in requests)
        else:
            made = (self._maker[request] for request in requests)
        for batch in made:
            if isinstance(batch, _Failure):
                raise DataError(batch.message, hint=batch.hint)
            yield batch


def _check_shares(batch_size: int, world: int) -> None:
    if batch_size % world:
        below = batch_size // world * world
        sizes = f"{below} or {below + world}" if below else f"{world}"
        raise UserError(
            f"a batch of {batch_size} cannot be shared equally by {world} ranks",
            hint=f"set `data.batch_size` to {sizes}, or use a number of GPUs that divides {batch_size}",
        )


def _smaller_batch(images: int, world: int) -> str:
    fits = images // world * world
    smaller = f"set `data.batch_size` to {fits} or less, or " if fits else "add images, or "
    return f"{smaller}`data.drop_last=false` to train on the incomplete batch"


@final
class _Choice:
    """Which images of a source are used: all, or a share that needs no list."""

    def __init__(self, images: int, total: int, key: int) -> None:
        self.images = images
        self._total = total
        self._key = key

    def __call__(self, numbers: I64) -> I64:
        """From numbers below `images` to images of the source."""
        return numbers if self.images == self._total else seeds.permuted(numbers, self._total, self._key)


@final
class _Maker(Dataset[HostBatch | _Failure]):
    """Makes whole batches; what it remembers only saves time."""

    def __init__(self, source: Source, look: LookAt | None, choose: _Choice, seed: int) -> None:
        self._source = source
        self._look = look
        self._choose = choose
        self._seed = seed
        self._bad: dict[int, str] = {}
        if look is None and source.resident() is None:
            raise ValueError("images that are not in memory need a `look`")

    def __getitem__(self, request: _Request) -> HostBatch | _Failure:
        if self._look is None:
            return self._gathered(request)
        try:
            return self._looked(self._look, request)
        except DataError as error:
            return _Failure(error.message, error.hint)

    def _gathered(self, request: _Request) -> HostBatch:
        images, rows = self._source.resident(), request.rows
        assert images is not None, "checked when the loader was made"
        whole = torch.from_numpy(images[rows])
        return HostBatch(torch.from_numpy(rows), [], whole, self._labels(rows), _tensor(request.draws))

    def _looked(self, look: LookAt, request: _Request) -> HostBatch:
        shown = request.rows.copy()
        skipped: list[tuple[int, str]] = []
        views: list[npt.NDArray[np.generic]] = []
        for row, wanted in enumerate(request.rows.tolist()):
            index, image = self._read(wanted, request.epoch, skipped)
            shown[row] = index
            seen = look(image, index if request.draws is None else int(request.draws[row]), request.epoch)
            if row == 0:
                views = [np.empty((len(shown), *view.shape), dtype=view.dtype) for view in seen]
            for batch, view in zip(views, seen, strict=True):
                batch[row] = view
        return HostBatch(
            torch.from_numpy(shown),
            [torch.from_numpy(view) for view in views],
            None,
            self._labels(shown),
            _tensor(request.draws),
            tuple(skipped),
        )

    def _read(self, wanted: int, epoch: int, skipped: list[tuple[int, str]]) -> tuple[int, U8]:
        """The wanted image, or the first of its substitutes that can be read, and which one it is."""
        key = seeds.seed_of(self._seed, "substitute", epoch)
        index = wanted
        for attempt in range(SUBSTITUTES + 1):
            try:
                return index, self._read_once(index)
            except UnreadableImage as error:
                if self._source.on_error == "stop":
                    raise
                skipped.append((index, error.reason))
            draw = int(seeds.bits(key, wanted, attempt)) % self._choose.images
            index = int(self._choose(np.array([draw]))[0])
        index, reason = skipped[-1]
        raise DataError(
            f"{SUBSTITUTES + 1} images in a row cannot be read, the last `{self._source.name(index)}`: {reason}",
            hint="point `data.source` to other images, or repair these",
        )

    def _read_once(self, index: int) -> U8:
        if index in self._bad:
            raise UnreadableImage(self._source.name(index), self._bad[index])
        try:
            return self._source.read(index)
        except UnreadableImage as error:
            self._bad[index] = error.reason
            raise

    def _labels(self, rows: I64) -> Tensor | None:
        labels = self._source.labels
        return None if labels is None else torch.from_numpy(labels[rows])


def _tensor(numbers: I64 | None) -> Tensor | None:
    return None if numbers is None else torch.from_numpy(numbers)


def _pinned(made: HostBatch | _Failure) -> HostBatch | _Failure:
    return made if isinstance(made, _Failure) else made.pin_memory()


@final
class _Plan:
    """The batches that are wanted next; torch's loader asks for them anew at each epoch."""

    def __init__(self) -> None:
        self.requests: Iterable[_Request] = ()

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.requests)


@final
class _Processes:
    """Torch's loader, with one of our batches as an item and no surprises for the rest of the program.

    The processes start with the first epoch, last until `close`, and end when this process does.
    """

    def __init__(self, maker: _Maker, workers: int, pin: bool) -> None:
        self._plan = _Plan()
        self._running: _MultiProcessingDataLoaderIter | None = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*suggested max number of worker")  # the user chose the number
            self._torch = DataLoader(
                maker,
                batch_size=None,
                sampler=self._plan,
                num_workers=workers,
                persistent_workers=True,
                pin_memory=pin,
                generator=torch.Generator(),  # or the loader would draw from the generator that everyone shares
                multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
            )

    def made(self, requests: Iterable[_Request]) -> Iterator[HostBatch | _Failure]:
        """The batches asked for, in order; raises SslError when a process dies."""
        self._plan.requests = requests
        batches = self._started()
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                if not _is_death(error):
                    raise
                raise SslError(
                    "a loader process died: out of memory, or of shared memory (`df -h /dev/shm`)",
                    hint="try fewer (`data.workers=1`), a smaller batch, or none (`data.workers=0`)",
                ) from error
            if batch is None:
                return
            yield batch

    def close(self) -> None:
        """End the processes, however the epoch ended: an exception may still hold on to torch's loader."""
        if self._running is not None:
            self._running._shutdown_workers()  # what torch does when nothing refers to the loader any more
            self._running = None
            atexit.unregister(self.close)

    def _started(self) -> Iterator[HostBatch | _Failure]:
        before = signal.getsignal(signal.SIGCHLD)
        with warnings.catch_warnings():
            # Python 3.12 and later warn of forking beside threads; the processes use none of those
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            # A signal to the whole group is for the main process to answer; what starts with it blocked never sees it
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
            try:
                batches = iter(self._torch)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is not None and threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever the program happens to be when a process dies, such as amid a checkpoint;
            # its loader also notices by itself within seconds
            signal.signal(signal.SIGCHLD, before)
        if self._running is None:
            assert isinstance(batches, _MultiProcessingDataLoaderIter), "there are workers"
            self._running = batches
            atexit.register(self.close)  # or Python would wait at its end for processes deaf to its SIGTERM
        return batches


def _is_death(error: Exception) -> bool:
    """Whether a process is gone: torch says so, or the pipe to it ends. What was raised in one begins with `Caught`."""
    text = str(error)
    return not text.startswith("Caught") and (not isinstance(error, RuntimeError) or "DataLoader worker (pid" in text)
