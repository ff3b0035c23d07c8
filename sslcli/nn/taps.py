"""Which places of a network can be asked for, and how what is found there becomes a vector."""

from collections.abc import Sequence
from typing import NamedTuple

from sslcli.errors import UserError

NINE, FLIP = "@9k", "+flip"


class Tap(NamedTuple):
    """A place in a network and what is made of its features, written `NAME`, `NAME@9k`, `NAME+flip`, `NAME@9k+flip`."""

    place: str
    """Its name."""
    many: bool
    """`@9k`: maps are pooled to about 9,000 values instead of being averaged over space."""
    flip: bool
    """`+flip`: the features of an image and of its mirror image are added."""


def parse_tap(text: str) -> Tap:
    """What a tap's full name says."""
    rest = text.removesuffix(FLIP)
    return Tap(rest.removesuffix(NINE), rest.endswith(NINE), text.endswith(FLIP))


def check_taps(names: Sequence[str], there: Sequence[str]) -> None:
    """Refuse names of places that a network does not have.

    Raises:
        UserError: with the names there are.
    """
    for name in names:
        if name not in there:
            raise UserError(f"the network has no tap `{name}`", hint=f"there is {', '.join(there)}")
