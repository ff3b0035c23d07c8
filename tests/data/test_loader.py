"""The order of images: one for any number of ranks and workers, from any step, with and without bad files."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sslcli import seeds
from sslcli.config.data import Folder
from sslcli.data.arrays import Arrays
from sslcli.data.loader import HostBatch, Loader
from sslcli.data.open import open_source
from sslcli.data.source import Source
from sslcli.errors import DataError, SslError, UserError

BAD = (3, 17, 18)


def look(image: np.ndarray, index: int, epoch: int) -> list[np.ndarray]:
    """Two views that say which image they are of, in which epoch."""
    first = np.ascontiguousarray(image[:4, :5].transpose(2, 0, 1))
    return [first, np.full((3, 2, 2), index + epoch / 100, dtype=np.float32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of two classes and many sizes, three of them unreadable."""
    path = tmp_path_factory.mktemp("images")
    for number in range(30):
        file = path / ("even" if number < 15 else "odd") / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8 + number, 6), (number, 0, 0)).save(file)
        if number in BAD:
            file.write_bytes(b"no image")
    return path


@pytest.fixture
def images(folder: Path) -> Source:
    return open_source(Folder(path=folder))


def numbers(count: int) -> Arrays:
    """Images whose pixels are their number."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    return Arrays(images, np.arange(count, dtype=np.int64) % 3, ("a", "b", "c"))


def loader(source: Source, **changes: Any) -> Loader:
    return Loader(source, **{"batch_size": 8, "seed": 5, "look": look, "workers": 0, **changes})


def same(left: HostBatch, right: HostBatch) -> bool:
    assert left.labels is not None
    assert right.labels is not None
    return (
        torch.equal(left.index, right.index)
        and torch.equal(left.labels, right.labels)
        and left.skipped == right.skipped
        and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left.views, right.views, strict=True))
    )


def endless(loader: Loader) -> Iterator[HostBatch]:
    for epoch in range(1000):
        yield from loader.epoch(epoch)


def test_order_is_the_keyed_permutation() -> None:
    made = loader(numbers(30))
    assert made.images == 30
    assert made.steps_per_epoch == 3
    for epoch in (0, 7):
        whole = seeds.permutation(30, seeds.seed_of(5, "order", epoch))
        got = [batch.index.numpy() for batch in made.epoch(epoch)]
        assert np.array_equal(np.concatenate(got), whole[:24])
        assert np.array_equal(got[2], made.indices(epoch, 2))
    assert not np.array_equal(made.indices(0, 0), made.indices(1, 0))
    assert not np.array_equal(made.indices(0, 0), loader(numbers(30), seed=6).indices(0, 0))


def test_batches_hold_what_they_say(images: Source) -> None:
    for batch in loader(images).epoch(2):
        assert batch.index.dtype == torch.int64
        assert batch.images is None
        uint8, real = batch.views
        assert uint8.shape == (8, 3, 4, 5)
        assert uint8.dtype == torch.uint8
        assert torch.equal(uint8[:, 0, 0, 0].long(), batch.index)
        assert real.dtype == torch.float32
        assert torch.equal(real[:, 0, 0, 0], (batch.index + 0.02).float())
        assert batch.labels is not None
        assert torch.equal(batch.labels, (batch.index >= 15).long())
        assert not set(batch.index.tolist()) & set(BAD)


def test_workers_do_not_matter(images: Source) -> None:
    here = loader(images)
    met = set()
    with closing(loader(images, workers=2)) as there:
        for epoch in range(4):
            pairs = list(zip(here.epoch(epoch), there.epoch(epoch), strict=True))
            assert len(pairs) == 3
            assert all(same(a, b) for a, b in pairs)
            met |= {index for batch, _ in pairs for index, _ in batch.skipped}
    assert met == set(BAD)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_do_not_matter(images: Source, workers: int) -> None:
    alone = list(loader(images).epoch(3))
    shares = []
    for rank in range(2):
        with closing(loader(images, rank=rank, world=2, workers=workers)) as made:
            shares.append(list(made.epoch(3)))
    for whole, first, second in zip(alone, *shares, strict=True):
        assert torch.equal(whole.index, torch.cat([first.index, second.index]))
        assert whole.skipped == first.skipped + second.skipped
        for view, a, b in zip(whole.views, first.views, second.views, strict=True):
            assert torch.equal(view, torch.cat([a, b]))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_anywhere_and_be_left(images: Source, workers: int) -> None:
    whole = list(loader(images).epoch(4))
    with closing(loader(images, workers=workers)) as made:
        left = made.epoch(4)
        next(left)
        assert same(next(made.epoch(4, start=2)), whole[2])
        assert [same(a, b) for a, b in zip(made.epoch(4, start=1), whole[1:], strict=True)] == [True, True]
        assert next(left, None) is None, "an epoch ends when another begins"
        assert list(made.epoch(4, start=3)) == []


def test_processes_last_as_long_as_the_loader(images: Source) -> None:
    made = loader(images, workers=2)
    assert multiprocessing.active_children() == []
    seen = []
    for epoch in range(3):
        list(made.epoch(epoch, start=epoch % 2))
        seen.append({child.pid for child in multiprocessing.active_children()})
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]
    running = made.epoch(3)
    next(running)
    made.close()
    assert multiprocessing.active_children() == []
    assert next(running, None) is None


def test_the_shared_generator_is_left_alone(images: Source) -> None:
    before = torch.random.get_rng_state()
    with closing(loader(images, workers=1)) as made:
        list(made.epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_images_change_their_own_rows_only(images: Source) -> None:
    made = loader(images)
    asked = {(epoch, step): made.indices(epoch, step) for epoch in range(20) for step in range(3)}
    substitutes = set()
    for epoch in range(20):
        for step, batch in enumerate(made.epoch(epoch)):
            wanted = asked[epoch, step]
            bad = np.isin(wanted, BAD)
            assert np.array_equal(batch.index.numpy()[~bad], wanted[~bad])
            assert {index for index, _ in batch.skipped} >= set(wanted[bad].tolist())
            assert all(reason.startswith("not an image") for _, reason in batch.skipped)
            substitutes |= set(batch.index.numpy()[bad].tolist())
    assert len(substitutes) > 10, "substitutes are drawn anew in each epoch"


def test_a_substitute_does_not_depend_on_what_is_remembered(images: Source) -> None:
    used = loader(images)
    for epoch in range(5):
        list(used.epoch(epoch))
    for old, new in zip(used.epoch(5), loader(images).epoch(5), strict=True):
        assert same(old, new)


@pytest.mark.parametrize("workers", [0, 1])
def test_stop_names_the_file(folder: Path, workers: int) -> None:
    source = open_source(Folder(path=folder, on_error="stop"))
    with closing(loader(source, workers=workers)) as made:
        with pytest.raises(DataError, match=r"cannot read image `(even/03|odd/17|odd/18)\.png`: ") as caught:
            list(islice(endless(made), 100))
        assert "\n" not in caught.value.message
        assert "skip" in (caught.value.hint or "")


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_ends_the_epoch(tmp_path: Path, workers: int) -> None:
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(b"no image")
    source = open_source(Folder(path=tmp_path))
    with (
        closing(loader(source, workers=workers)) as made,
        pytest.raises(DataError, match="21 images in a row cannot be read, the last `"),
    ):
        list(made.epoch(0))


def test_images_in_memory_are_gathered_here() -> None:
    source = numbers(40)
    made = loader(source, look=None, workers=4)
    for batch in made.epoch(0):
        assert batch.views == []
        assert batch.images is not None
        assert torch.equal(batch.images[:, 0, 0, 1].long(), batch.index)
        assert batch.labels is not None
        assert torch.equal(batch.labels, batch.index % 3)
    assert multiprocessing.active_children() == []


def test_files_need_a_look(images: Source) -> None:
    with pytest.raises(ValueError, match="look"):
        loader(images, look=None)


def test_sources_without_labels_give_none(folder: Path) -> None:
    source = open_source(Folder(path=folder, labels=False))
    assert next(loader(source).epoch(0)).labels is None


@pytest.mark.parametrize(("world", "lengths"), [(1, [8, 8, 5]), (2, [4, 4, 3]), (8, [1, 1, 1])])
def test_the_incomplete_batch_is_kept_and_shared(world: int, lengths: list[int]) -> None:
    shares = [
        [batch.index for batch in loader(numbers(21), drop_last=False, rank=rank, world=world).epoch(1)]
        for rank in range(world)
    ]
    assert all([len(batch) for batch in share] == lengths for share in shares)
    order = seeds.permutation(21, seeds.seed_of(5, "order", 1))
    last = torch.cat([share[2] for share in shares]).numpy()
    assert np.array_equal(last, np.concatenate([order, order])[16 : 16 + len(last)]), "filled up from the start"


def test_a_small_set_without_drop_last() -> None:
    made = loader(numbers(3), drop_last=False, world=4, rank=3)
    assert made.steps_per_epoch == 1
    assert [batch.index.tolist() for batch in made.epoch(0)] == [[seeds.permuted(0, 3, seeds.seed_of(5, "order", 0))]]


def test_a_fraction_is_a_fixed_choice() -> None:
    made = loader(numbers(100), fraction=0.295, batch_size=6)
    assert made.images == 30
    epochs = [torch.cat([batch.index for batch in made.epoch(epoch)]).tolist() for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) == set(epochs[1])
    assert len(set(epochs[0])) == 30
    other = loader(numbers(100), fraction=0.295, batch_size=6, seed=6)
    assert {int(index) for batch in other.epoch(0) for index in batch.index} != set(epochs[0])
    assert loader(numbers(100), fraction=0.07, batch_size=1).images == 7
    with pytest.raises(DataError, match="leaves none"):
        loader(numbers(100), fraction=0)


def test_weights_are_drawn_with_replacement() -> None:
    weights = np.array([0, 1, 0, 2, 5, 0], dtype=np.float32)
    made = loader(numbers(6), batch_size=1)
    drawn = np.array([int(batch.index[0]) for epoch in range(400) for batch in made.epoch(epoch, 0, weights)])
    counts = np.bincount(drawn, minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    assert np.abs(counts / len(drawn) - weights / 8).max() < 0.03
    assert [int(b.index[0]) for b in made.epoch(9, 2, weights)] == drawn[9 * 6 + 2 : 10 * 6].tolist()


def test_weights_with_a_fraction_ranks_and_workers(images: Source) -> None:
    weights = np.linspace(0, 1, 30)
    alone = list(loader(images, fraction=0.8).epoch(0, 0, weights))
    kept = {int(index) for batch in loader(numbers(30), fraction=0.8, seed=5).epoch(0) for index in batch.index}
    assert {int(index) for batch in alone for index in batch.index} <= kept
    for rank in range(2):
        with closing(loader(images, fraction=0.8, rank=rank, world=2, workers=1)) as made:
            for whole, share in zip(alone, made.epoch(0, 0, weights), strict=True):
                assert torch.equal(share.index, whole.index.chunk(2)[rank])


def test_groups_and_images_come_as_often_as_they_weigh() -> None:
    groups = np.array([0] * 18 + [1] * 2 + [2] * 10)
    weights = 1 / np.bincount(groups)[groups]
    made = loader(numbers(30), batch_size=5)
    orders = []
    for epoch in range(20):
        drawn = np.concatenate([batch.index.numpy() for batch in made.epoch(epoch, 0, weights, groups)])
        assert np.bincount(groups[drawn]).tolist() == [10, 10, 10]
        times = np.bincount(drawn, minlength=30)
        assert set(times[:18]) <= {0, 1}
        assert times[18:20].tolist() == [5, 5]
        assert set(times[20:]) == {1}
        orders.append(drawn.tolist())
    assert orders[0] != orders[1]
    assert len(set(np.concatenate(orders))) == 30  # those of a large group take turns
    rest = [int(i) for batch in made.epoch(3, 4, weights, groups) for i in batch.index]
    assert rest == orders[3][20:]
    for rank in range(5):
        mine = [int(i) for b in loader(numbers(30), batch_size=5, rank=rank, world=5).epoch(3, 0, weights, groups)
                for i in b.index]  # fmt: skip
        assert mine == orders[3][rank::5]


@pytest.mark.parametrize("weights", [np.zeros(30), np.full(30, -1.0), np.full(30, np.nan), np.ones(29)])
def test_useless_weights_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(ValueError, match="weights"):
        list(loader(numbers(30)).epoch(0, 0, weights))


def test_batches_that_do_not_fit_say_what_does() -> None:
    with pytest.raises(UserError, match="100 cannot be shared equally by 8 ranks") as caught:
        loader(numbers(200), batch_size=100, world=8)
    assert "96 or 104" in (caught.value.hint or "")
    with pytest.raises(UserError) as caught:
        loader(numbers(200), batch_size=3, world=8)
    assert "`data.batch_size` to 8," in (caught.value.hint or "")
    with pytest.raises(DataError, match="a batch of 64 is more than the 30 images") as short:
        loader(numbers(30), batch_size=64, world=4)
    assert "28 or less" in (short.value.hint or "")
    assert "drop_last=false" in (short.value.hint or "")
    with pytest.raises(DataError, match="more than the 10 images"):
        loader(numbers(100), batch_size=64, fraction=0.1)


def test_a_signal_to_the_whole_group_does_not_end_the_processes(images: Source) -> None:
    with closing(loader(images, workers=2)) as made:
        batches = endless(made)
        next(batches)
        for child in multiprocessing.active_children():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                assert child.pid is not None
                os.kill(child.pid, number)
        for _ in range(12):
            next(batches)
        assert len(multiprocessing.active_children()) == 2


def broken_look(image: np.ndarray, index: int, epoch: int) -> list[np.ndarray]:
    raise RuntimeError("a mistake of ours")


def test_a_mistake_in_a_process_keeps_its_traceback(images: Source) -> None:
    with (
        closing(loader(images, workers=1, look=broken_look)) as made,
        pytest.raises(RuntimeError, match=r"(?s)in broken_look.*a mistake of ours"),
    ):
        list(made.epoch(0))


def test_a_process_that_dies_is_explained(images: Source) -> None:
    with closing(loader(images, workers=1)) as made:
        batches = endless(made)
        next(batches)
        (child,) = multiprocessing.active_children()
        child.kill()
        with pytest.raises(SslError, match="a loader process died") as caught:
            list(islice(batches, 100))
        assert "data.workers=0" in (caught.value.hint or "")


@pytest.mark.data
def test_epochs_over_awkward_files(small_data: Path, tmp_path: Path) -> None:
    with tarfile.open(small_data / "awkward.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    manifest = json.loads((tmp_path / "awkward" / "MANIFEST.json").read_text())
    source = open_source(Folder(path=tmp_path / "awkward" / "files"))
    corner = partial(corner_of, side=8)
    skipped: dict[str, str] = {}
    with closing(loader(source, look=corner, workers=2, drop_last=False)) as made:
        here = loader(source, look=corner, drop_last=False)
        for left, right in zip(here.epoch(0), made.epoch(0), strict=True):
            assert torch.equal(left.index, right.index)
            assert torch.equal(left.views[0], right.views[0])
            skipped |= {source.name(index): reason for index, reason in right.skipped}
    listed = {source.name(index) for index in range(len(source))}
    assert set(skipped) == {name for name in listed if manifest[name]["pil"] != "decodes"}
    assert all(reason and "\n" not in reason for reason in skipped.values())


def corner_of(image: np.ndarray, index: int, epoch: int, side: int) -> list[np.ndarray]:
    seen = np.zeros((3, side, side), dtype=np.uint8)
    part = image[:side, :side].transpose(2, 0, 1)
    seen[:, : part.shape[1], : part.shape[2]] = part
    return [seen]


UNCLOSED = """
import sys
import numpy as np
from pathlib import Path
from sslcli.config.data import Folder
from sslcli.data import open_source
from sslcli.data.loader import Loader

loader = Loader(
    open_source(Folder(path=Path(sys.argv[1]))),
    batch_size=8, seed=0, look=lambda image, index, epoch: [image[:1, :1]], workers=2,
)
print(len(next(loader.epoch(0)).index), flush=True)
raise SystemExit(7)
"""


def test_a_program_that_forgets_to_close_still_ends(folder: Path) -> None:
    run = subprocess.run([sys.executable, "-c", UNCLOSED, str(folder)], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (7, "8\n", "")
