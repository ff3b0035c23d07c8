"""How good is a ranking? Average precision in the ways the literature means it."""

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def recall_and_precision(targets: I64, scores: F64) -> tuple[F64, F64]:
    """Recall (N,) and precision (N,) at every place of a ranking, best score first.

    Rows of equal score stand as the reversed order of NumPy's sort leaves them, which is what the protocols' own code
    does; with equal scores the result may depend on the machine.

    Args:
        targets: (N,) 1 for what should stand in front, anything else for what should not.
        scores: (N,).
    """
    hit = targets[np.argsort(scores)[::-1]] == 1
    found = hit.cumsum(dtype=np.float64)
    return found / max(1, int(hit.sum())), found / np.arange(1, len(hit) + 1)


def area(recall: F64, precision: F64) -> float:
    """Area under the precision at every recall, where precision counts as the best at that recall or beyond.

    The average precision of Pascal VOC from 2010 on, and of the VOC07 SVM protocol.
    """
    edges = np.concatenate([[0.0], recall, [1.0]])
    best = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    steps = np.flatnonzero(edges[1:] != edges[:-1])
    return float(((edges[steps + 1] - edges[steps]) * best[steps + 1]).sum())


def at_eleven_points(recall: F64, precision: F64) -> float:
    """Mean over recall 0, 0.1, ..., 1 of the best precision there or beyond: Pascal VOC until 2009.

    The thresholds are multiples of the floating-point number 0.1, as in the development kit's translations, so that a
    recall of exactly 0.3 misses its own.
    """
    best = [float(np.max(precision[recall >= point], initial=0.0)) for point in np.arange(0.0, 1.1, 0.1)]
    return sum(best) / 11


def at_hits(places: I64) -> float:
    """Mean of the precision at every hit, without smoothing: average precision in retrieval, and scikit-learn's.

    Args:
        places: (H,) where the hits stand in the ranking, from 0, ascending.
    """
    return float((np.arange(1, len(places) + 1) / (places + 1)).mean())


def by_trapezia(places: I64) -> float:
    """Area under straight lines between the precision before and at every hit, as Market-1501's own code has it.

    Args:
        places: (H,) where the hits stand in the ranking, from 0, ascending.
    """
    before = np.where(places > 0, np.arange(len(places)) / np.maximum(places, 1), 1.0)
    return float(((before + np.arange(1, len(places) + 1) / (places + 1)) / 2).mean())
