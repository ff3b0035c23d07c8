"""DeepCluster: labels by image, even sampling, and no way for a loader process to train on yesterday's clusters."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sslcli import dist
from sslcli.backbones import resnet
from sslcli.config.load import load
from sslcli.contracts import Batch, Progress, RunFacts
from sslcli.data.arrays import Arrays
from sslcli.data.loader import Loader
from sslcli.engine import checkpoint
from sslcli.engine.pretrain import pretrain
from sslcli.errors import UserError
from sslcli.methods import deepcluster

IMAGES = 60


def facts(images: int = IMAGES) -> RunFacts:
    return RunFacts(images=images, batch_size=6, part_size=6, steps_per_epoch=10, total_steps=30)


def build(**settings: object) -> deepcluster.DeepCluster:
    torch.manual_seed(0)
    cfg = deepcluster.Config(**({"clusters": 5, "components": 4} | settings))
    return deepcluster.build(cfg, resnet.build(resnet.Config(depth=10, width=8, stem="small")), facts())


def at(step: int) -> Progress:
    return Progress(step=step, total=30, steps_per_epoch=10, seed=1)


def pictures() -> Tensor:
    return torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def clustered(method: deepcluster.DeepCluster, step: int = 0) -> deepcluster.DeepCluster:
    share = dist.share(IMAGES)

    def look(features):
        method.eval()
        with torch.no_grad():
            rows = features(pictures()[share.start : share.stop])
        method.train()
        return rows

    method.before_epoch(at(step), look)
    return method


def test_the_loss_begins_at_the_logarithm_of_the_number_of_clusters():
    method = clustered(build())
    result = method(Batch(views=[pictures()[:6]], index=torch.arange(6)), at(0))
    assert result.loss.item() == pytest.approx(np.log(5), abs=0.1)
    assert float(result.scalars["largest_cluster"]) == method.counts.max()


def test_a_new_clustering_brings_a_new_classifier():
    method = clustered(build())
    first = method.head.weight.detach().clone(), method.labels.clone()
    clustered(method, step=10)
    assert not torch.equal(method.head.weight, first[0])
    assert method.head.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not method.head.bias.any()
    kept = clustered(build(every=2))
    before = kept.head.weight.detach().clone()
    assert torch.equal(clustered(kept, step=10).head.weight, before)
    assert not torch.equal(clustered(kept, step=20).head.weight, before)


def test_labels_are_looked_up_by_the_number_of_the_image():
    method = clustered(build())
    index = torch.tensor([41, 3, 3, 59, 0, 17])
    images = pictures()[index]
    expected = torch.nn.functional.cross_entropy(method.head(method.backbone(images)), method.labels[index])
    torch.testing.assert_close(method(Batch(views=[images], index=index), at(0)).loss, expected)


@pytest.mark.golden
def test_empty_clusters_are_nobodys_label(golden):
    # The authors renumber what is left, we do not: the same images are together, and no image is sent to an empty one.
    case = np.load(golden / "clusters" / "reassign_with_empty.npz")
    dense = np.empty_like(case["out_arranged_labels"])
    dense[case["out_dataset_img_index"]] = case["out_dataset_label"]
    _, ours = np.unique(case["out_arranged_labels"], return_inverse=True)
    assert ours.tolist() == dense.tolist()


def with_labels(labels: np.ndarray) -> deepcluster.DeepCluster:
    method = build()
    method = deepcluster.build(method.cfg, method.backbone, facts(len(labels)))
    method.labels.copy_(torch.from_numpy(labels))
    method.counts.copy_(torch.bincount(method.labels, minlength=5))
    return method


@pytest.mark.golden
def test_an_epoch_shows_clusters_as_often_as_the_authors_sampler(golden):
    case = np.load(golden / "clusters" / "uniform_sampler.npz")
    labels, sizes = case["in_labels"], case["param_sizes"]
    method = with_labels(labels)
    source = Arrays(np.zeros((len(labels), 2, 2, 3), dtype=np.uint8))
    made = Loader(source, batch_size=10, seed=0, look=None, workers=0)
    for epoch in range(5):
        batches = made.epoch(epoch, 0, method.sample_weights(), method.sample_groups())
        drawn = np.concatenate([batch.index.numpy() for batch in batches])
        shown = np.bincount(labels[drawn], minlength=5)
        assert shown.sum() == case["out_label_hist"].sum()
        assert np.abs(shown - case["out_label_hist"]).max() <= 1
        times = np.bincount(drawn, minlength=len(labels))
        for cluster, size in enumerate(sizes):  # no image of a large cluster twice, every image of a small one
            share = len(labels) / (np.count_nonzero(sizes) * max(size, 1))
            found = times[labels == cluster]
            assert ((found >= np.floor(share)) & (found <= np.ceil(share))).all()


def test_too_many_clusters_are_refused():
    with pytest.raises(UserError, match=r"`method\.clusters` 100 with at least 1 images"):
        build(clusters=100)


SMALL = (
    "data.source.count=96", "data.batch_size=16", "run.epochs=3", "run.views=fast", "run.tensorboard=false",
    "run.log_every=1", "run.monitor=null", "backbone.width=8", "run.checkpoints.keep.last=9",
    "views.groups=[{size: 32}]", "method={name: deepcluster, clusters: 6, components: 4}",
)  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [0, 2])
def test_no_batch_is_trained_on_labels_of_an_earlier_epoch(tmp_path: Path, monkeypatch, workers: int):
    """Loader processes live through all epochs; what each step learns is nevertheless the clustering of its epoch."""
    learned: list[tuple[int, Tensor, Tensor]] = []
    original = deepcluster.weighted_cross_entropy
    forward = deepcluster.DeepCluster.forward

    def noting_forward(self, batch, now):
        learned.append((now.epoch, batch.index.clone(), torch.empty(0)))
        return forward(self, batch, now)

    def noting_loss(scores, labels, weights):
        epoch, index, _ = learned[-1]
        learned[-1] = (epoch, index, labels.clone())
        return original(scores, labels, weights)

    monkeypatch.setattr(deepcluster.DeepCluster, "forward", noting_forward)
    monkeypatch.setattr(deepcluster, "weighted_cross_entropy", noting_loss)
    settings = (*SMALL, f"data.workers={workers}", "run.views=reference")
    pretrain(load("pretrain", "demo-digits", settings).preset, tmp_path)
    by_epoch = [checkpoint.read(path)["method"]["labels"] for path in checkpoint.all_in(tmp_path)]
    assert len(by_epoch) == 3
    assert len(learned) == 18
    assert not torch.equal(by_epoch[0], by_epoch[1])
    assert not torch.equal(by_epoch[1], by_epoch[2])
    for epoch, index, labels in learned:
        assert torch.equal(labels, by_epoch[epoch][index])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["nmi"] == pytest.approx(0, abs=1e-6)
    assert 0 < rows[-1]["nmi"] < 1


def test_an_image_shown_twice_is_shown_in_two_ways():
    source = Arrays(np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8))
    weights, groups = np.array([1.0, 0, 0, 0]), np.arange(4)

    def look(image, number, epoch):
        return [np.full((3, 1, 1), number, dtype=np.float32)]

    with closing(Loader(source, batch_size=4, seed=0, look=look, workers=0)) as made:
        (batch,) = made.epoch(0, 0, weights, groups)
        assert batch.index.tolist() == [0, 0, 0, 0]
        assert len(batch.views[0].unique()) == 4


def labels_and_head() -> tuple[Tensor, Tensor]:
    method = clustered(build())
    return method.labels, method.head.weight.detach()


@pytest.mark.dist
def test_two_ranks_cluster_as_one_does(two_ranks):
    for found in two_ranks(labels_and_head):
        torch.testing.assert_close(found, labels_and_head(), rtol=0, atol=0)
