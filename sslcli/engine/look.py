"""One un-augmented pass over all images: what a network says of each, in index order, whatever the number of ranks."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sslcli import dist
from sslcli.data.source import Source, UnreadableImage
from sslcli.errors import DataError
from sslcli.views import EvalLook

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

BLOCK_BYTES = 64 * 2**20
"""Most that one exchange between ranks carries per rank: bounds the memory of gathering a table of any length."""

Room = Callable[[str, int, int], F32]
"""From a name, a number of rows and their length: where to put them, (M, D) of zeros."""


def in_memory(name: str, rows: int, width: int) -> F32:
    """Room for rows in memory."""
    return np.zeros((rows, width), dtype=np.float32)


class Pass(NamedTuple):
    """What a pass brought back."""

    rows: dict[str, F32]
    """Per name (M, D): one row for each image that could be read, in index order."""
    kept: I64
    """(M,) index of the image behind each row."""
    skipped: dict[int, str]
    """Images that could not be read: index, and name with reason."""


def features_of(
    apply: Callable[[Tensor], dict[str, Tensor]],
    source: Source,
    look: EvalLook,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    network: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
    everywhere: bool = True,
    room: Room = in_memory,
) -> Pass:
    """Apply a function to every image of a source, each rank to a contiguous share of them.

    Beside the network, memory holds this rank's share of the rows, and the whole table where it is gathered: on every
    rank, or on the main one only (`everywhere=False`; the others get no rows).

    Args:
        apply: from images (B, 3, s, s) to named features, each (B, D).
        source: the images.
        look: how they are looked at.
        batch_size: images per call of `apply`.
        workers: loader processes of this rank; images held in memory need none.
        device: where `apply` computes.
        network: the module that `apply` runs, which must be in evaluation mode.
        progress: called with (images done, images to do) of this rank.
        everywhere: whether all ranks get the rows.
        room: where the main rank keeps the whole table of a name.

    Raises:
        DataError: not one image could be read; or one could not, and the source's policy is to stop.
    """
    here = room if dist.world() == 1 else in_memory
    found = _own(apply, source, look, batch_size, workers, device, network, progress, here)
    gathered = _gathered(found.rows, found.read, device, len(source), everywhere, room)
    everyone = {index: line for part in dist.gather_objects(found.skipped) for index, line in part.items()}
    return Pass(*gathered, dict(sorted(everyone.items())))


def share_of(
    apply: Callable[[Tensor], Tensor],
    source: Source,
    look: EvalLook,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    network: nn.Module | None = None,
) -> F32:
    """Rows (n, D) of this rank's share of the images (`dist.share`), zeros for what cannot be read; see `features_of`.

    Raises:
        DataError: not one image of any rank could be read; or one could not, and the source's policy is to stop.
    """
    found = _own(
        lambda images: {"rows": apply(images)}, source, look, batch_size, workers, device, network, None, in_memory
    )
    width = _agreed(dist.gather_objects(_widths_of(found.rows)), len(source))["rows"]
    return found.rows.get("rows", np.zeros((len(found.read), width), dtype=np.float32))


class _Own(NamedTuple):
    """What one rank has seen: rows (n, D) of its share, which of them could be read, and what could not."""

    rows: dict[str, F32]
    read: npt.NDArray[np.bool_]
    skipped: dict[int, str]


def _own(
    apply: Callable[[Tensor], dict[str, Tensor]],
    source: Source,
    look: EvalLook,
    batch_size: int,
    workers: int,
    device: torch.device,
    network: nn.Module | None,
    progress: Callable[[int, int], None] | None,
    room: Room,
) -> _Own:
    assert network is None or not network.training, "a network in training mode would learn from the images it looks at"
    mine = dist.share(len(source))
    rows: dict[str, F32] = {}
    read = np.zeros(len(mine), dtype=np.bool_)
    skipped: dict[int, str] = {}
    done = 0
    with torch.no_grad():
        for part in _crops(source, look, mine, batch_size, workers, device):
            for index, reason in part.skipped.items():
                if source.on_error == "stop":
                    raise UnreadableImage(source.name(index), reason)
                skipped[index] = f"{source.name(index)}: {reason}"
            at = part.at.numpy() - mine.start
            if len(at):
                images = look.finish(part.images).contiguous(memory_format=torch.channels_last)
                for name, values in apply(images).items():
                    block = values.float().cpu().numpy()  # (b, D)
                    if name not in rows:
                        rows[name] = room(name, len(mine), block.shape[1])
                    rows[name][at] = block
                read[at] = True
            done += len(at) + len(part.skipped)
            if progress is not None:
                progress(done, len(mine))
    return _Own(rows, read, skipped)


class _Part(NamedTuple):
    images: Tensor
    at: Tensor
    skipped: dict[int, str]


@final
class _Read(Dataset[_Part]):
    """Batches of crops, read and cropped one image at a time; an item is a whole batch."""

    def __init__(self, source: Source, look: EvalLook, batches: Sequence[range]) -> None:
        self._source = source
        self._look = look
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> _Part:
        crops: list[npt.NDArray[np.uint8]] = []
        index: list[int] = []
        skipped: dict[int, str] = {}
        for i in self._batches[number]:
            try:
                crops.append(self._look.crop(self._source.read(i)))
                index.append(i)
            except UnreadableImage as error:  # told, not raised: it would not survive the way out of a worker process
                skipped[i] = error.reason
        images = np.stack(crops) if crops else np.empty((0, 3, 1, 1), dtype=np.uint8)
        return _Part(torch.from_numpy(images), torch.tensor(index, dtype=torch.int64), skipped)


def _crops(
    source: Source, look: EvalLook, mine: range, batch_size: int, workers: int, device: torch.device
) -> Iterator[_Part]:
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    held = source.resident()
    if held is not None:
        for batch in batches:
            images = torch.from_numpy(held[batch.start : batch.stop]).to(device)  # (b, H, W, 3)
            yield _Part(look.crop_batch(images), torch.arange(batch.start, batch.stop), {})
        return
    loader = DataLoader(
        _Read(source, look, batches),
        batch_size=None,
        num_workers=min(workers, len(batches)),
        pin_memory=device.type == "cuda",
    )
    for part in loader:
        yield _Part(part.images.to(device, non_blocking=True), part.at, part.skipped)


def _gathered(
    rows: dict[str, F32],
    read: npt.NDArray[np.bool_],
    device: torch.device,
    total: int,
    everywhere: bool,
    room: Room,
) -> tuple[dict[str, F32], I64]:
    """All ranks' rows without the unread ones, and the index of each."""
    found = dist.gather_objects((_widths_of(rows), read))
    kept = np.flatnonzero(np.concatenate([share for _, share in found])).astype(np.int64)
    widths = _agreed([widths for widths, _ in found], total)
    if dist.world() == 1:
        return {name: _moved_up(block, kept) for name, block in rows.items()}, kept
    if not everywhere and not dist.is_main():
        kept = kept[:0]
    whole: dict[str, F32] = {}
    for name, width in widths.items():
        block = rows[name] if name in rows else np.zeros((len(read), width), dtype=np.float32)
        shares = [share for _, share in found]
        here = room if dist.is_main() else in_memory
        target = here(name, len(kept) if everywhere or dist.is_main() else 0, width)
        whole[name] = _exchange(block, shares, device, target)
    return whole, kept


def _widths_of(rows: dict[str, F32]) -> dict[str, int]:
    return {name: block.shape[1] for name, block in rows.items()}


def _agreed(widths: Sequence[dict[str, int]], total: int) -> dict[str, int]:
    """Names and lengths of rows, from whichever rank could read an image."""
    for some in widths:
        if some:
            return some
    raise DataError(f"not one of the {total} images can be read", hint="point to readable images")


def _moved_up(block: F32, kept: I64) -> F32:
    """The rows `kept` of a block, moved to its beginning a bounded piece at a time."""
    if len(kept) == len(block):
        return block
    for first in range(0, len(kept), 8192):
        piece = kept[first : first + 8192]
        block[first : first + len(piece)] = block[piece]
    return block[: len(kept)]


def _exchange(block: F32, shares: list[npt.NDArray[np.bool_]], device: torch.device, whole: F32) -> F32:
    """The read rows of every rank's block in rank order, exchanged a bounded piece at a time and put into `whole`.

    A rank that wants none gives no rows to put them into.
    """
    width = block.shape[1]
    offsets = np.cumsum([0, *(int(share.sum()) for share in shares)])
    packed = block[shares[dist.rank()]]
    longest = int(np.diff(offsets).max())
    step = min(longest, max(1, BLOCK_BYTES // (4 * width * dist.world())))
    for first in range(0, longest, step):
        piece = torch.zeros(step, width, device=device)
        here = packed[first : first + step]
        piece[: len(here)] = torch.from_numpy(here)
        pieces = dist.gather(piece).cpu().numpy().reshape(len(shares), step, width)
        if len(whole):
            for rank in range(len(shares)):
                start, stop = offsets[rank] + first, min(offsets[rank] + first + step, offsets[rank + 1])
                if start < stop:
                    whole[start:stop] = pieces[rank, : stop - start]
    return whole
