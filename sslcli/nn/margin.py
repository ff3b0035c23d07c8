"""Linear support vector machines, one class against the rest, as the VOC07 protocol trains them."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from sslcli.nn.ranking import F64, I64

R = TypeVar("R")

TINY = 1e-5
"""Added to a row's length before it is divided by it."""
POSITIVE_WEIGHT = 2.0
"""How much more an image that shows the class weighs than one that does not."""
ITERATIONS = 2000
"""Most rounds of the solver."""


def normalised(rows: np.ndarray) -> F64:
    """Rows (N, D) as float64, each divided by its length plus 1e-5."""
    wide = np.array(rows, dtype=np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True) + TINY
    return wide


def turned(rows: F64, unseen: F64) -> tuple[F64, F64]:
    """The same rows (N, D) and unseen rows (M, D) in N numbers each, where N is less than D.

    In an orthonormal basis of the space that the rows span, every product of two of them is what it was, and so is
    that of an unseen row with a machine, whose weights lie in that space. A penalty on the squares of weights does not
    see the turn: the machines are the same, and cost N / D of the time.
    """
    if len(rows) >= rows.shape[1]:
        return rows, unseen
    basis, numbers = np.linalg.qr(rows.T)  # (D, N), (N, N)
    return np.ascontiguousarray(numbers.T), unseen @ basis


def fitted(rows: F64, shown: I64, cost: float, seed: int) -> tuple[LinearSVC, bool]:
    """A machine for one class, and whether its solver came to an end.

    Squared hinge loss with an L2 penalty in the dual, positives counted twice (Goyal et al. 2019,
    https://arxiv.org/abs/1905.01235, section 5; their code's settings).

    Args:
        rows: (N, D).
        shown: (N,) 1 where an image shows the class; anything else counts as not shown.
        cost: inverse strength of the penalty.
        seed: of the order in which the solver takes the rows, below 2^32.
    """
    machine = LinearSVC(
        C=cost, class_weight={1: POSITIVE_WEIGHT, -1: 1.0}, loss="squared_hinge", penalty="l2", dual=True, tol=1e-4,
        max_iter=ITERATIONS, intercept_scaling=1.0, random_state=seed,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        machine.fit(rows, np.where(shown == 1, 1, -1))
    return machine, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def costs_of(given: tuple[float, ...]) -> tuple[float, ...]:
    """The costs the protocol always tries beside those that are given: 0.5^4, ..., 0.5^19, after them."""
    return (*given, *(0.5**power for power in range(4, 20)))


def counted(
    results: Iterable[R], told: Callable[[int, int], None] | None, machines: int, done: int, of_all: int
) -> Iterator[R]:
    """The same results; each stands for so many machines, and `told` hears how many of all are done."""
    for result in results:
        done += machines
        if told is not None:
            told(done, of_all)
        yield result


def processes(work: float) -> int:
    """How many processes a job of about so many multiplications is worth: the machine's, or one where it is small."""
    from joblib import cpu_count

    return 1 if work < 2e9 else int(cpu_count())
