"""What a method cannot do without, said before the first step."""

from sslcli.contracts import Backbone, RunFacts
from sslcli.errors import UserError


def need_two_images(facts: RunFacts, method: str) -> None:
    """Make sure that a forward pass holds images to compare, and batch norm has something to average.

    Raises:
        UserError: it holds only one.
    """
    if facts.part_size < 2:
        raise UserError(
            f"`{method}` compares the images of a forward pass, which here holds only 1",
            hint="raise `data.batch_size`, or lower `run.accumulate`",
        )


def need_patches(backbone: Backbone, method: str) -> None:
    """Make sure that a network begins with patches that can be hidden.

    Raises:
        UserError: it does not.
    """
    if not backbone.patch:
        raise UserError(
            f"`{method}` hides patches, which a `{type(backbone).__name__}` does not have",
            hint="use a vision transformer, e.g. `backbone: {name: vit}`",
        )


def need_clusters(facts: RunFacts, clusters: int, each: int = 1) -> None:
    """Make sure that there are images enough for at least two clusters of so many images each.

    Raises:
        UserError: there are not.
    """
    if clusters < 2 or clusters * each > facts.images:
        most = facts.images // each
        raise UserError(
            f"`method.clusters` {clusters} with at least {each} images each do not go with {facts.images} images",
            hint=f"set `method.clusters` to 2 or more, and at most {most}; a hundredth of the images is usual",
        )
