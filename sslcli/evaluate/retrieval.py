"""Search by example: does the same person, animal or thing stand in front when a gallery is ranked by similarity?

Mean average precision and CMC, the share of queries with a right image among the first so many (Zheng et al. 2015,
https://www.cv-foundation.org/openaccess/content_iccv_2015/papers/Zheng_Scalable_Person_Re-Identification_ICCV_2015_paper.pdf,
section 5; for SYSU-30k Wang et al. 2020, https://arxiv.org/abs/1904.03845).
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslcli import dist
from sslcli.config.base import EvaluatorConfig
from sslcli.config.types import Count
from sslcli.errors import DataError
from sslcli.features.table import F32, I64, FeatureTable, Scores, TableEvaluator
from sslcli.nn.ranking import at_hits, by_trapezia

PAIRS = 2**24
"""Pairs of query and gallery image that are compared at once."""
BLOCK = 16384
"""Gallery images that are normalised at once."""
AP = {"hits": at_hits, "trapezia": by_trapezia}
"""Average precision from the places of hits, by name."""


class Config(EvaluatorConfig):
    """Ranking of a gallery for every query by cosine similarity: mAP and CMC."""

    name: Literal["retrieval"] = "retrieval"
    ranks: tuple[Count, ...] = Field(default=(1, 5, 10), min_length=1)
    """Among how many first images a right one counts."""
    ap: Literal["hits", "trapezia"] = "hits"
    """Average precision: mean of the precision at hits, or by trapezia as in Market-1501's own code."""
    other_cameras: bool = True
    """Where cameras are known, pass over gallery images of the query's label that its own camera took."""
    junk: tuple[str, ...] = ()
    """Labels whose gallery images are passed over, e.g. `-1` of Market-1501."""
    leave_one_out: bool = False
    """Search every image among all the others; for images without a gallery of their own."""
    tap: str = "pooled"
    """Which features."""


def build(cfg: Config) -> TableEvaluator:
    """The evaluator for these settings."""
    return TableEvaluator(
        score=lambda train, test, seed, told=None: score(train, test, cfg, seed),
        taps=(cfg.tap,),
        headline="map",
        same_images=cfg.leave_one_out,
        new_classes=True,
    )


def score(train: FeatureTable, test: FeatureTable, cfg: Config, seed: int) -> Scores:
    """Mean average precision and CMC in percent: `train` is the gallery, `test` the queries. Nothing is drawn.

    A gallery image of a label that no query has is a wrong answer to all. Queries without a right answer in the gallery
    are left out and counted.

    Raises:
        DataError: a table lacks labels or the wanted features, one table has cameras and the other has not, or no query
            has a right answer.
    """
    labels, wanted = train.known_labels(), test.known_labels()
    cameras = _cameras(train, test) if cfg.other_cameras else None
    junk = np.isin(labels, [i for i, name in enumerate(train.meta.classes) if name in cfg.junk])
    device = dist.device()
    queries = test.tap(cfg.tap)
    found: list[I64] = []
    lost = 0
    step = max(1, PAIRS // max(1, len(train)))
    for first in range(0, len(test), step):
        part = slice(first, first + step)
        passed_over = np.broadcast_to(junk, (len(wanted[part]), len(labels))).copy()  # (q, N)
        same = wanted[part, None] == labels
        if cameras is not None:
            passed_over |= same & (cameras[1][part, None] == cameras[0])
        if cfg.leave_one_out:
            passed_over |= test.index[part, None] == train.index
        right = torch.from_numpy(same & ~passed_over).to(device)
        similarity = similarities(queries[part], train.tap(cfg.tap), device)
        similarity[torch.from_numpy(passed_over).to(device)] = -torch.inf
        order = similarity.argsort(dim=1, descending=True, stable=True)
        hits = right.gather(1, order).cpu().numpy()
        for row in hits:
            places = np.flatnonzero(row)
            if len(places):
                found.append(places)
            else:
                lost += 1
    if not found:
        raise DataError(
            "no query has a right answer in the gallery", hint="labels must be the same words on both sides"
        )
    first_hits = np.array([places[0] for places in found])
    return Scores(
        metrics={
            "map": 100 * float(np.mean([AP[cfg.ap](places) for places in found])),
            **{f"rank{rank}": 100 * float((first_hits < rank).mean()) for rank in cfg.ranks},
        },
        details={
            "gallery_images": len(train),
            "queries": len(test),
            "queries_without_answer": lost,
            "gallery_labels": len(np.unique(labels)),
            "cameras": cameras is not None,
        },
    )


def similarities(queries: F32, gallery: F32, device: torch.device) -> Tensor:
    """Cosine similarity (Q, N) of every query (Q, D) and gallery row (N, D), the gallery normalised in blocks."""
    unit = _unit(queries, device)
    blocks = range(0, len(gallery), BLOCK)
    return torch.cat([unit @ _unit(gallery[first : first + BLOCK], device).T for first in blocks], dim=1)


def _unit(rows: F32, device: torch.device) -> Tensor:
    return F.normalize(torch.from_numpy(np.array(rows, dtype=np.float32)).to(device), dim=1)


def _cameras(train: FeatureTable, test: FeatureTable) -> tuple[I64, I64] | None:
    if (train.cameras is None) != (test.cameras is None):
        raise DataError(
            "cameras are known of one side only, gallery or queries",
            hint="name them in both lists, or use `-o evaluator.other_cameras=false`",
        )
    return None if train.cameras is None or test.cameras is None else (train.cameras, test.cameras)
