"""Memories of features and clusters, step by step those of OpenMMLab, alone and over two ranks."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sslcli import dist
from sslcli.nn.memory import Memory, halves

CASES = [
    "odc/memory_basic",
    "odc/memory_momentum1",
    "odc/memory_small_clusters",
    "odc/memory_three_small",
    "odc/memory_update_only",
    "interclr/memory_m1",
]


@pytest.mark.golden
@pytest.mark.parametrize("name", CASES)
def test_every_step_is_openmmlabs(golden, name):
    case = {key: torch.from_numpy(value) for key, value in np.load(golden / f"{name}.npz").items() if key != "meta"}
    clusters, momentum = int(case["param_num_classes"]), float(case["param_momentum"])
    memory = Memory(*case["in_features"].shape, clusters)
    memory.fill(F.normalize(case["in_features"], dim=1), case["in_labels"])

    def near(found: Tensor, expected: str) -> None:
        torch.testing.assert_close(found, case[expected], rtol=1e-5, atol=1e-5)

    near(memory.bank.rows, "out_feature_bank_init")
    near(memory.centroids, "out_centroids_init")
    for step, (index, features) in enumerate(zip(case["in_update_ind"], case["in_update_feat"], strict=True)):
        changed = memory.update(index, features, 1 - momentum)
        assert float(changed) == pytest.approx(float(case["out_change_ratio"][step]), abs=1e-6)
        assert memory.labels.tolist() == case["out_labels_after_updates"][step].tolist()
    near(memory.bank.rows, "out_feature_bank_after_updates")
    memory.move_centroids()
    near(memory.centroids, "out_centroids_after_update")
    if "in_labels_before_small" in case:
        memory.labels.copy_(case["in_labels_before_small"])
        memory.absorb_small(int(case["param_min_cluster"]))
        assert memory.labels.tolist() == case["out_labels_after_small"].tolist()
        near(memory.centroids, "out_centroids_after_small")
        assert memory.counts.tolist() == torch.bincount(memory.labels, minlength=clusters).tolist()


def test_no_half_is_empty():
    assert sorted(halves(torch.ones(5, 3)).tolist()) == [False, False, True, True, True]
    rows = torch.cat([torch.zeros(3, 2), torch.ones(2, 2)])
    assert halves(rows).tolist() in ([False] * 3 + [True] * 2, [True] * 3 + [False] * 2)


def after_a_while(shard: bool, images: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, labels, centroids and changes after three steps of eight images, over however many ranks there are."""
    generator = torch.Generator().manual_seed(0)
    memory = Memory(images, 5, 4, shard=shard).double()
    share = dist.share(images)
    rows = torch.randn(images, 5, generator=generator, dtype=torch.float64)
    memory.start(rows[share.start : share.stop], iterations=9, key=1)
    changes = []
    for step in range(3):
        features = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        index = torch.randint(images, (8,), generator=generator)
        mine = (x.chunk(dist.world())[dist.rank()] for x in (index, features))
        changes.append(memory.update(*mine, momentum=0.5))
        if step == 1:
            memory.move_centroids()
        memory.absorb_small(3)
    return memory.bank.fetch(torch.arange(images)), memory.labels, memory.centroids, torch.stack(changes)


@pytest.mark.dist
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("images", [40, 33])
def test_two_ranks_remember_what_one_does(two_ranks, shard, images):
    alone = after_a_while(False, images)
    for found in two_ranks(after_a_while, shard, images):
        torch.testing.assert_close(found, alone)
