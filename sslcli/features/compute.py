"""From images to a table of features: one un-augmented pass, shared among all ranks."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from sslcli import __version__, dist
from sslcli.config.views import EvalView
from sslcli.contracts import Backbone
from sslcli.data.source import Source
from sslcli.engine.look import features_of
from sslcli.engine.machine import default_workers
from sslcli.features.table import FeatureTable, TableMeta
from sslcli.nn.taps import check_taps
from sslcli.views import build_eval

Told = Callable[[int, int], None]
"""Called with images done and images to do."""


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
) -> FeatureTable | None:
    """What a network says of images; maps (B, C, h, w) are averaged over space. None on all ranks but the main one.

    Args:
        backbone: the network, in evaluation mode; it is moved to this rank's device.
        source: the images.
        view: how they are looked at.
        taps: places in the network.
        what: `weights` or `untrained`.
        digest: digest of the weights.
        batch_size: images per forward pass.
        workers: loader processes per rank; when None, chosen for the machine.
        progress: who wants to know how far it is.
        named: whether the table keeps the images' names.

    Raises:
        UserError: the network has no tap of a given name.
        DataError: the images cannot be read.
    """
    check_taps(taps, backbone.tap_names())
    backbone.to(dist.device())

    def apply(images: Tensor) -> dict[str, Tensor]:
        found = backbone.taps(images, taps)
        return {name: value.mean((2, 3)) if value.ndim == 4 else value for name, value in found.items()}

    return of_function(
        apply, source, view, what=what, digest=digest, batch_size=batch_size, workers=workers, network=backbone,
        progress=progress, named=named,
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
) -> FeatureTable | None:
    """The table of a function from images (B, 3, s, s) to named features (B, D); None on all ranks but the main one."""
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
    )
    if not dist.is_main():
        return None
    return FeatureTable(
        features=found.rows,
        index=found.kept,
        labels=None if source.labels is None else source.labels[found.kept],
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
        names=tuple(source.name(int(i)) for i in found.kept) if named else (),
    )
