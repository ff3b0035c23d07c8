"""Which places of a network can be asked for."""

from collections.abc import Sequence

from sslcli.errors import UserError


def check_taps(names: Sequence[str], there: Sequence[str]) -> None:
    """Refuse names of places that a network does not have.

    Raises:
        UserError: with the names there are.
    """
    for name in names:
        if name not in there:
            raise UserError(f"the network has no tap `{name}`", hint=f"there is {', '.join(there)}")
