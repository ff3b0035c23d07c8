"""Whitening and k-means equal to the authors' and to faiss, alone and over two ranks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli import dist
from sslcli.errors import DivergedError, UserError
from sslcli.nn import kmeans as kmeans_file
from sslcli.nn.kmeans import kmeans, nearest, refill_, whiten


def drawn_by_faiss(count: int, clusters: int, seed: int) -> list[int]:
    """The rows that faiss takes for its first centroids."""
    import faiss

    order = np.empty(count, dtype=np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), count, seed + 1)
    return order[:clusters].tolist()


FAISS = ["kmeans_faiss_n90_d16_k3", "kmeans_faiss_n600_d8_k6", "kmeans_faiss_n1000_d4_k20"]


@pytest.mark.golden
@pytest.mark.parametrize("name", FAISS[:2])
def test_from_the_same_start_all_steps_are_those_of_faiss(golden, name):
    case = np.load(golden / "clusters" / f"{name}.npz")
    x, k = torch.from_numpy(case["x"]), int(case["k"])
    start = x[drawn_by_faiss(len(x), k, int(case["faiss_seed"]))]
    found = kmeans(x, len(x), k, key=0, start=start)
    assert found.labels.tolist() == case["assignments"].tolist()
    both = min(len(found.objective), len(case["objective_per_iteration"]))
    np.testing.assert_allclose(found.objective[:both], case["objective_per_iteration"][:both], rtol=1e-4)
    np.testing.assert_allclose(float(found.objective[-1]), case["returned_loss"], rtol=1e-4)
    np.testing.assert_allclose(found.centroids.numpy(), case["centroids"], rtol=1e-4, atol=1e-4)
    assert float(nearest(x, found.centroids)[1].sum()) <= 1.0001 * float(case["final_inertia"])


@pytest.mark.golden
def test_until_a_cluster_is_split_they_are_those_of_faiss(golden):
    case = np.load(golden / "clusters" / f"{FAISS[2]}.npz")
    x, k = torch.from_numpy(case["x"]), int(case["k"])
    found = kmeans(x, len(x), k, key=0, start=x[drawn_by_faiss(len(x), k, int(case["faiss_seed"]))])
    # the second update leaves a cluster empty; which one gives it half of its rows is a draw
    np.testing.assert_allclose(found.objective[:2], case["objective_per_iteration"][:2], rtol=1e-4)
    assert float(nearest(x, found.centroids)[1].sum()) <= 1.05 * float(case["final_inertia"])


@pytest.mark.golden
def test_the_authors_clusters(golden):
    case = np.load(golden / "clusters" / "kmeans_5.npz")
    x = torch.from_numpy(case["in_x"])
    found = kmeans(x, len(x), 5, key=0, start=x[drawn_by_faiss(len(x), 5, int(case["info_faiss_seed"]))])
    assert found.labels.tolist() == case["out_assign"].tolist()
    np.testing.assert_allclose(float(found.objective[-1]), case["out_loss"], rtol=1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("name", FAISS)
@pytest.mark.parametrize("key", range(4))
def test_own_starts_are_no_worse_than_those_of_faiss(golden, name, key):
    case = np.load(golden / "clusters" / f"{name}.npz")
    x = torch.from_numpy(case["x"])
    found = kmeans(x, len(x), int(case["k"]), key=key)
    assert float(nearest(x, found.centroids)[1].sum()) <= 1.05 * float(case["inertia_10_seeds_40_iters"].max())


@pytest.mark.golden
@pytest.mark.parametrize("name", ["pca_whiten_l2_n60_d6_p3", "pca_whiten_l2_n80_d10_p4"])
def test_whitened_rows_are_the_authors(golden, name):
    case = np.load(golden / "clusters" / f"{name}.npz")
    x = torch.from_numpy(case["x"])
    found = whiten(x, len(x), int(case["pca"]))
    np.testing.assert_allclose(found.abs().numpy(), np.abs(case["out"]), atol=1e-3)
    count = len(case["gram"])
    np.testing.assert_allclose((found @ found.T)[:count, :count].numpy(), case["gram"], atol=1e-3)


@pytest.mark.golden
def test_as_many_components_as_numbers(golden):
    case = np.load(golden / "clusters" / "pca_whiten_full.npz")
    x = torch.from_numpy(case["in_x"])
    found = whiten(x, len(x), 6)
    np.testing.assert_allclose((found @ found.T).numpy(), case["out_gram"], atol=1e-3)
    # faiss sums squares before it takes the mean off, in 24 bits; ours is nearer to the exact result
    exact = np.linalg.svd(case["in_x"].astype(np.float64) - case["in_x"].astype(np.float64).mean(0))[0][:, :6]
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose((found @ found.T).numpy(), exact @ exact.T, atol=5e-5)


def blobs(seed: int = 0) -> Tensor:
    """30 rows around each of seven far places."""
    generator = torch.Generator().manual_seed(seed)
    places = 10 * torch.randn(7, 5, generator=generator)
    return places.repeat(30, 1) + 0.1 * torch.randn(210, 5, generator=generator)


def test_a_cluster_without_rows_takes_half_of_another():
    centroids = torch.tensor([[4.0, 4.0], [9.0, 9.0], [0.0, 0.0]])
    refill_(centroids, np.array([10, 0, 0]), key=0)
    torch.testing.assert_close(centroids, torch.full((3, 2), 4.0), rtol=3e-3, atol=0)
    assert len({tuple(c.tolist()) for c in centroids}) == 3


def test_equal_starts_end_in_different_clusters():
    x = blobs()
    found = kmeans(x, len(x), 7, key=1, start=x[:1].repeat(7, 1))
    assert len(found.labels.unique()) == 7


def test_a_function_of_the_key():
    x = blobs()
    labels = [kmeans(x, len(x), 12, key=key).labels for key in (0, 0, 1)]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_few_rows_at_a_time_change_nothing(monkeypatch):
    x = blobs().double()
    whole = kmeans(x, len(x), 7, key=3), whiten(x, len(x), 3)
    monkeypatch.setattr(kmeans_file, "AT_ONCE", 60)
    torch.testing.assert_close((kmeans(x, len(x), 7, key=3), whiten(x, len(x), 3)), whole)


def test_what_cannot_be_clustered_is_said():
    with pytest.raises(UserError, match="6 clusters are more than the 5 images"):
        kmeans(torch.randn(5, 2), 5, 6, key=0)
    with pytest.raises(UserError, match="no 4 principal components"):
        whiten(torch.randn(9, 3), 9, 4)
    broken = blobs()
    broken[17, 2] = torch.nan
    with pytest.raises(DivergedError, match="1 images are not finite"):
        kmeans(broken, len(broken), 2, key=0)
    with pytest.raises(DivergedError):
        whiten(broken, len(broken), 2)


def test_constant_features_stay_finite():
    assert torch.isfinite(whiten(torch.ones(20, 4), 20, 2)).all()


def on_a_rank(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = blobs().double()[:count]
    share = dist.share(count)
    few = whiten(x[share.start : share.stop], count, 3)
    found = kmeans(few, count, 9, key=5)
    return dist.gather_shares(found.labels, count), found.centroids, found.objective, dist.gather_shares(few, count)


@pytest.mark.dist
@pytest.mark.parametrize("count", [210, 101, 9])
def test_two_ranks_find_what_one_finds(two_ranks, count):
    labels, centroids, objective, few = on_a_rank(count)
    for found in two_ranks(on_a_rank, count):
        assert torch.equal(found[0], labels)
        torch.testing.assert_close(found[3] @ found[3].T, few @ few.T)
        torch.testing.assert_close(found[2], objective, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(found[1].norm(dim=1), centroids.norm(dim=1))
