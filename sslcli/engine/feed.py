"""Images on their way to the network: host batches made into device batches, with the waiting measured."""

import json
import os
import time
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from sslcli import dist
from sslcli.contracts import Batch, Progress
from sslcli.data.loader import HostBatch, Loader
from sslcli.views import Views


class Feed:
    """Batches of one rank, in order, on its device.

    Where the loader's workers have cropped, only the device part is left; where the loader hands over whole images
    (held in memory at one size), crops are batched too; in the reference reading nothing is left to do.
    """

    def __init__(
        self,
        loader: Loader,
        views: Views,
        *,
        reading: Literal["fast", "reference"],
        device: torch.device,
        channels_last: bool,
    ) -> None:
        self.loader = loader
        self.steps_per_epoch = loader.steps_per_epoch
        self.waited = 0.0
        """Seconds spent waiting for the loader since it was last set to 0."""
        self.skipped: dict[int, str] = {}
        """Unreadable images met so far: index and reason."""
        self._views = views
        self._reading = reading
        self._device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def epoch(
        self, at: Progress, weights: np.ndarray | None = None, groups: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """The rest of the current epoch, from the step `at` stands at; weights and groups as the loader has them."""
        host = self._timed(self.loader.epoch(at.epoch, at.step_in_epoch, weights, groups))
        made = (self.on_device(batch, at.epoch) for batch in host)
        batches = made if self._copies is None else self._ahead(made)
        return traced(batches, at.step) if "SSL_TRACE" in os.environ else batches

    def _timed(self, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            self.skipped.update(batch.skipped)
            yield batch

    @torch.no_grad()
    def on_device(self, host: HostBatch, epoch: int) -> Batch:
        """What is left to do of the views of a host batch, on the device."""
        index = host.numbers
        if host.images is not None:
            crops = self._views.crop_batch(host.images.to(self._device, non_blocking=True), index, epoch)
        else:
            crops = [view.to(self._device, non_blocking=True) for view in host.views]
        rendered = crops if self._reading == "reference" else self._views.finish(crops, index, epoch)
        seen = self._views.arrange(rendered, index, epoch)
        return Batch(
            views=[view.contiguous(memory_format=self._format) for view in seen.views],
            index=host.index.to(self._device, non_blocking=True),
            labels=None if host.labels is None else host.labels.to(self._device, non_blocking=True),
            masks=seen.masks,
            masked=seen.masked,
            blocks=seen.blocks,
            targets=[target.contiguous(memory_format=self._format) for target in seen.targets],
        )

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Prepare each batch on a stream of its own while the step before it runs."""
        copies, done = self._copies, object()

        def prepared() -> Batch | object:
            with torch.cuda.stream(copies):
                return next(batches, done)

        coming = prepared()
        while isinstance(coming, Batch):
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(copies)  # type: ignore[arg-type]
            for tensor in (*coming.views, *coming.targets, coming.index, coming.labels, coming.masks, coming.blocks):
                if tensor is not None:
                    tensor.record_stream(now)
            ready, coming = coming, prepared()
            yield ready


def traced(batches: Iterator[Batch], step: int) -> Iterator[Batch]:
    """Note which images and views went into every step, in the file that `SSL_TRACE` names with the rank added."""
    with open(f"{os.environ['SSL_TRACE']}.{dist.rank()}", "a", encoding="utf-8") as file:
        for batch in batches:
            hidden = [tensor for tensor in (batch.masks, batch.blocks) if tensor is not None]
            seen = [*batch.views, *batch.targets, *hidden]
            views = [tensor.contiguous().cpu().numpy() for tensor in seen]
            sums = [zlib.crc32(b"".join(view[row].tobytes() for view in views)) for row in range(len(batch.index))]
            note = {"step": step, "pid": os.getpid(), "index": batch.index.tolist(), "views": sums}
            file.write(json.dumps(note) + "\n")
            file.flush()
            step += 1
            yield batch
