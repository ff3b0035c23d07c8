"""What do the most similar rows say?"""

import torch
from torch import Tensor


def votes(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Votes (Q, C) of neighbours with these similarities and labels (both (Q, K), best first).

    A neighbour's weight is exp((s - s_1) / temperature), where s_1 is the similarity of the nearest: the common factor
    changes no ranking and keeps low temperatures finite (Wu et al. 2018, section 3.4).
    """
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return torch.zeros(len(labels), classes).scatter_add_(1, labels, weights)
