"""Which images, in which order?"""

from sslcli.data.open import guess_source, open_source, other_split

__all__ = ["guess_source", "open_source", "other_split"]
