"""What was meant by a name that is not there?"""

import difflib
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The closest of `words`, if any is close or begins like it."""
    known = list(words)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return close[0] if close else next((other for other in known if word and other.startswith(word)), None)


def none_such(name: str, names: Iterable[str]) -> str:
    """What to say of a name that is not among `names`: the nearest, or all there are."""
    known = list(names)
    close = nearest(name, known)
    if close:
        return f"no `{name}`; did you mean `{close}`?"
    return f"no `{name}`; there is {', '.join(f'`{word}`' for word in known) or 'nothing to choose from'}"
