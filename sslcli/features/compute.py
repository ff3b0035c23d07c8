"""From images to a table of features: one un-augmented pass, shared among all ranks."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from sslcli import __version__, dist
from sslcli.config.views import EvalView
from sslcli.contracts import Backbone
from sslcli.data.source import Source
from sslcli.engine.look import Room, features_of, in_memory
from sslcli.engine.machine import default_workers
from sslcli.features.table import FeatureTable, TableMeta, Told
from sslcli.nn.pooling import as_vectors
from sslcli.nn.taps import check_taps, parse_tap
from sslcli.views import build_eval


def of_network(
    backbone: Backbone,
    source: Source,
    view: EvalView,
    taps: Sequence[str],
    *,
    what: str,
    digest: str | None,
    batch_size: int,
    workers: int | None,
    progress: Told | None = None,
    named: bool = False,
    room: Room = in_memory,
) -> FeatureTable | None:
    """What a network says of images, one vector each. None on all ranks but the main one.

    Args:
        backbone: the network, in evaluation mode; it is moved to this rank's device.
        source: the images.
        view: how they are looked at.
        taps: places in the network, as `sslcli.nn.taps.Tap` writes them; maps (B, C, h, w) are averaged over space.
        what: `weights` or `untrained`.
        digest: digest of the weights.
        batch_size: images per forward pass.
        workers: loader processes per rank; when None, chosen for the machine.
        progress: who wants to know how far it is.
        named: whether the table keeps the images' names.
        room: where the main rank keeps the features of a tap.

    Raises:
        UserError: the network has no tap of a given name.
        DataError: the images cannot be read.
    """
    wanted = {name: parse_tap(name) for name in taps}
    places = tuple(dict.fromkeys(tap.place for tap in wanted.values()))
    check_taps(places, backbone.tap_names())
    backbone.to(dist.device())
    mirrored = any(tap.flip for tap in wanted.values())

    def apply(images: Tensor) -> dict[str, Tensor]:
        found = backbone.taps(images, places)
        turned = backbone.taps(images.flip(-1), places) if mirrored else {}
        rows = {}
        for name, tap in wanted.items():
            rows[name] = as_vectors(found[tap.place], tap.place, many=tap.many)
            if tap.flip:
                rows[name] = rows[name] + as_vectors(turned[tap.place], tap.place, many=tap.many)
        return rows

    return of_function(
        apply, source, view, what=what, digest=digest, batch_size=batch_size, workers=workers, network=backbone,
        progress=progress, named=named, room=room,
    )  # fmt: skip


def of_function(
    apply: Callable[[Tensor], dict[str, Tensor]],
    source: Source,
    view: EvalView,
    *,
    what: str,
    digest: str | None,
    batch_size: int,
    workers: int | None,
    network: nn.Module | None = None,
    progress: Told | None = None,
    named: bool = False,
    room: Room = in_memory,
) -> FeatureTable | None:
    """The table of a function from images (B, 3, h, w) to named features (B, D); None on all ranks but the main one."""
    found = features_of(
        apply,
        source,
        build_eval(view),
        batch_size=batch_size,
        workers=default_workers(source.resident() is not None) if workers is None else workers,
        device=dist.device(),
        network=network,
        progress=progress,
        everywhere=False,
        room=room,
    )
    if not dist.is_main():
        return None
    kept = found.kept
    return FeatureTable(
        features=found.rows,
        index=kept,
        labels=None if source.labels is None else source.labels[kept],
        targets=None if source.targets is None else source.targets[kept],
        cameras=None if source.cameras is None else source.cameras[kept],
        meta=TableMeta(
            version=__version__,
            what=what,
            weights=digest,
            source=source.fingerprint(),
            images=len(source),
            skipped=len(found.skipped),
            classes=source.classes,
            view=view,
        ),
        names=tuple(source.name(int(i)) for i in kept) if named else (),
    )
